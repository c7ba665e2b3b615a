"""Compile every kernel for several GPUs, without a GPU, and report resources and instructions of the machine code.

    python tests/compile/compile_kernels.py [--targets sm_90 ...] [--quick] [--output FOLDER]

Signatures and options are not repeated here: the launchers are called with tensors on the "meta" device, and each
launch is recorded instead of executed, once with each candidate of the tuning table. A new kernel adds one function to
`CASES`.

Run it as a separate process: one process cannot both interpret and compile kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit.kernels import (
    attention,
    gelu,
    layer_norm,
    linear,
    patch_embed,
    quantize,
    tuning,
)

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDTHS = (192, 384, 768, 1024, 1280)  # ViT-Ti, S, B, L, H
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Target(NamedTuple):
    """A GPU: Triton's target, and the limits for the number of blocks per multiprocessor."""

    gpu: GPUTarget
    shared_memory: int = 0  # bytes per multiprocessor
    threads: int = 0
    blocks: int = 0


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 164 * 1024, 2048, 32),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 100 * 1024, 1536, 24),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 228 * 1024, 2048, 32),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 228 * 1024, 2048, 32),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64)),
}


class Launch(NamedTuple):
    """A recorded launch: the kernel, its arguments by name, and compile options such as num_warps."""

    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]


Case = tuple[str, Callable[[], object]]  # a label, and a function that calls a launcher


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def make_layer_norm_cases(quick: bool) -> Iterator[Case]:
    """Yield LayerNorms: plain, with residual add (recomputing y in backward), with all options; contiguous and strided
    rows; every dtype, and the mixed dtypes of autocast."""
    for dim in (192, 768, 1280) if quick else WIDTHS:
        for dtype in (torch.bfloat16, torch.float32) if quick else DTYPES:
            x, residual = meta(256, 197, dim, dtype=dtype), meta(256, 197, dim, dtype=dtype)
            vector, statistics = meta(dim, dtype=dtype), meta(2, 256 * 197)
            size = f"{dim} {str(dtype)[6:]}"
            yield f"plain {size}", lambda a=(x, None, vector, vector, None, None, 1e-6): layer_norm.launch_forward(*a)
            options = (None, None, statistics, dtype, dtype, True)
            backward = (x, None, x, None, vector, None, *options)
            yield f"plain {size}", lambda a=backward: layer_norm.launch_backward(*a)
            yield (
                f"add {size}",
                lambda a=(x, residual, vector, vector, None, None, 1e-6): layer_norm.launch_forward(*a),
            )
            again = (x, residual, x, None, vector, vector, *options, dtype)  # y, for the weight gradient of a matmul
            yield f"add {size}", lambda a=again: layer_norm.launch_backward(*a)
        x, residual = meta(256, 197, dim, dtype=torch.bfloat16), meta(256, 197, dim)
        vector, factors, statistics = meta(dim), meta(256), meta(2, 256 * 197)
        size = f"{dim} bfloat16+float32"
        yield f"add {size}", lambda a=(x, residual, vector, vector, None, None, 1e-6): layer_norm.launch_forward(*a)
        options = (statistics, x.dtype, residual.dtype, True)
        arguments = (residual, residual, residual, None, vector, vector, None, None, *options, x.dtype)
        yield f"add {size}", lambda a=arguments: layer_norm.launch_backward(*a)
        scales = (vector, factors)
        yield f"scaled {size}", lambda a=(x, residual, vector, vector, *scales, 1e-6): layer_norm.launch_forward(*a)
        arguments = (residual, residual, residual, x, vector, None, *scales, *options)
        yield f"scaled {size}", lambda a=arguments: layer_norm.launch_backward(*a)
    x = meta(256, 197, 768, dtype=torch.bfloat16)[:, 1:]
    vector, statistics = meta(768, dtype=torch.bfloat16), meta(2, 256 * 196)
    size = "768 bfloat16"
    yield f"strided {size}", lambda: layer_norm.launch_forward(x, None, vector, vector, None, None, 1e-6)
    arguments = (x, None, x, None, vector, None, None, None, statistics, torch.bfloat16, torch.bfloat16, True)
    yield f"strided {size}", lambda: layer_norm.launch_backward(*arguments)


def make_patch_embed_cases(quick: bool) -> Iterator[Case]:
    """Yield forward and both backward kernels with every candidate; float and uint8 pixels in both layouts; patch sizes
    16, 14 and 32; a single image, which selects smaller tiles."""
    sizes = ((768, 16, 256),) if quick else ((192, 16, 256), (384, 16, 256), (768, 16, 256), (768, 32, 256))
    sizes += () if quick else ((1024, 14, 256), (1280, 14, 256), (768, 16, 1))
    for hidden, side, batch in sizes:
        for dtype in (torch.bfloat16, torch.float32) if quick else DTYPES:
            weight = meta(hidden, 3, side, side, dtype=dtype)
            tokens = meta(1, 1 + (224 // side) ** 2, hidden, dtype=dtype)
            vectors = (weight[:, 0, 0, 0], tokens[:, :1], tokens)
            grad_out = meta(batch, tokens.shape[1], hidden, dtype=dtype)
            size = f"{hidden}/{side} {str(dtype)[6:]}"
            for layout in ("channels first", "channels last"):
                shape = (batch, 3, 224, 224) if layout == "channels first" else (batch, 224, 224, 3)
                for pixel_dtype in (torch.uint8, torch.float32):
                    pixels = meta(*shape, dtype=pixel_dtype)
                    mean = std = [0.5] * 3
                    for number in range(2):
                        label = f"{size}, {str(pixel_dtype)[6:]} {layout}, batch {batch}, candidate {number}"
                        forward = (pixels, weight, *vectors, None, None, mean, std, number)
                        yield label, lambda a=forward: patch_embed.launch_forward(*a)
                        backward = (grad_out, pixels, weight, None, mean, std, number)
                        yield label, lambda a=backward: patch_embed.launch_weight_backward(*a)
            yield size, lambda a=grad_out: patch_embed.launch_tokens_backward(a, None, 1)
    weight, mask = meta(768, 3, 16, 16, dtype=torch.bfloat16), meta(256, 196, dtype=torch.bool)
    tokens, grad_out = meta(1, 197, 768, dtype=torch.bfloat16), meta(256, 197, 768, dtype=torch.bfloat16)
    vectors = (weight[:, 0, 0, 0], tokens[:, :1], tokens, tokens[:, :1])
    pixels = meta(256, 3, 224, 224)
    if quick:  # a single image, which selects smaller tiles
        lone = (meta(1, 224, 224, 3, dtype=torch.uint8), weight)
        forward = (*lone, *vectors[:3], None, None, [0.5] * 3, [0.5] * 3, 0)
        yield "768/16 bfloat16, one image", lambda: patch_embed.launch_forward(*forward)
        backward = (meta(1, 197, 768, dtype=torch.bfloat16), *lone, None, [0.5] * 3, [0.5] * 3, 0)
        yield "768/16 bfloat16, one image", lambda: patch_embed.launch_weight_backward(*backward)
    label = "768/16 bfloat16, float32 channels first, masked"
    yield label, lambda: patch_embed.launch_forward(pixels, weight, *vectors, mask, None, None, 0)
    yield label, lambda: patch_embed.launch_weight_backward(grad_out, pixels, weight, mask, None, None, 0)
    yield label, lambda: patch_embed.launch_tokens_backward(grad_out, mask, 1)


def make_smallest_cases(quick: bool) -> Iterator[Case]:
    """Yield sizes and strides of 1, which the compiler treats as constants and the interpreter does not."""
    one = meta(1)
    yield "one value", lambda: layer_norm.launch_forward(meta(1, 1), None, one, one, None, None, 1e-6)
    yield "one value", lambda: layer_norm.launch_forward(meta(1, 1), meta(1, 1), one, one, one, one, 1e-6)
    arguments = (meta(1, 1), meta(1, 1), meta(1, 1), meta(1, 1), one, None, one, one, meta(2, 1))
    yield "one value", lambda: layer_norm.launch_backward(*arguments, torch.float32, torch.float32, True)
    weight, token, mask = meta(1, 1, 1, 1), meta(1, 1, 1), meta(1, 1, dtype=torch.bool)
    grad_out = meta(1, 2, 1)
    for pixels in (meta(1, 1, 1, 1), meta(1, 1, 1, 1, dtype=torch.uint8)):
        forward = (pixels, weight, one, token, meta(1, 2, 1), token, mask, [0.5], [0.5], 0)
        yield "one pixel", lambda a=forward: patch_embed.launch_forward(*a)
        backward = (grad_out, pixels, weight, mask, [0.5], [0.5], 0)
        yield "one pixel", lambda a=backward: patch_embed.launch_weight_backward(*a)
    yield "one pixel", lambda: patch_embed.launch_tokens_backward(grad_out, mask, 1)
    row = meta(1, 1)
    yield "one value", lambda: gelu.launch_forward(meta(1, 2), meta(2), "swiglu")
    yield "one value", lambda: gelu.launch_backward(row, row, one, "gelu", bias_grad=True, with_y=True)
    yield "one value", lambda: layer_norm.launch_forward(row, None, one, one, None, None, 1e-6, activation="gelu")
    backward = (row, None, row, None, one, one, None, None, meta(2, 1), torch.float32, torch.float32, True)
    yield "one value", lambda a=backward: layer_norm.launch_backward(*a, activation="gelu")
    row, weight, units = (meta(*size, dtype=torch.bfloat16) for size in ((1, 1), (2, 1), (2,)))
    for candidate in range(CANDIDATES):
        yield "one value", lambda a=(row, weight, units, "gelu", True, candidate): linear.launch_forward(*a)
        backward = (row, weight.t(), weight.t(), "gelu")
        options = {"bias_grad": True, "with_y": True, "candidate": candidate}
        yield "one value", lambda a=backward, k=options: linear.launch_backward(*a, **k)


CANDIDATES = 3  # the largest number that a rule of the tuning table has


def make_feed_forward_cases(quick: bool) -> Iterator[Case]:
    """Yield every candidate of a feed-forward's first matmul, its second matmul's backward, and the qkv matmul."""
    for dim in (768,) if quick else WIDTHS:
        for save_pre in (True,) if quick else (True, False):
            yield from make_matmul_cases(dim, torch.bfloat16, "gelu", save_pre)
    yield from make_matmul_cases(768, torch.float32, "gelu", True)
    if not quick:
        yield from make_matmul_cases(768, torch.float16, "gelu", True)
        for activation in ("gelu_new", "quick_gelu"):
            yield from make_matmul_cases(768, torch.bfloat16, activation, True)


def make_matmul_cases(dim: int, dtype: torch.dtype, activation: str, save_pre: bool) -> Iterator[Case]:
    x, hidden = (meta(256 * 197, size, dtype=dtype) for size in (dim, 4 * dim))
    weight1, weight2 = meta(4 * dim, dim, dtype=dtype), meta(dim, 4 * dim, dtype=dtype)
    units, packed, packed_bias = (meta(*size, dtype=dtype) for size in ((4 * dim,), (3 * dim, dim), (3 * dim,)))
    for candidate in range(CANDIDATES):
        label = (
            f"{dim} to {4 * dim} {activation}{', kept' if save_pre else ''}, {str(dtype)[6:]}, candidate {candidate}"
        )
        yield label, lambda a=(x, weight1, units, activation, save_pre, candidate): linear.launch_forward(*a)
        options = {"bias_grad": True, "with_y": True, "candidate": candidate}
        yield label, lambda k=options: linear.launch_backward(x, weight2, hidden, activation, **k)
        label = f"{dim} to {3 * dim}, {str(dtype)[6:]}, candidate {candidate}"
        yield label, lambda a=(x, packed, packed_bias, None, False, candidate): linear.launch_forward(*a)


def make_gelu_cases(quick: bool) -> Iterator[Case]:
    """Yield activations with and without bias, and LayerNorm followed by an activation."""
    for dim in (768,) if quick else WIDTHS:
        for dtype in (torch.bfloat16, torch.float32) if quick else DTYPES:
            x, bias, size = meta(256 * 197, 4 * dim, dtype=dtype), meta(4 * dim, dtype=dtype), str(dtype)[6:]
            for activation in ("gelu", "swiglu") if quick else ("gelu", "gelu_new", "quick_gelu", "swiglu"):
                label = f"{4 * dim} {activation}, {size}"
                grad = x if activation != "swiglu" else x[:, : 2 * dim].contiguous()
                yield label, lambda a=(x, bias, activation): gelu.launch_forward(*a)
                yield (
                    label,
                    lambda a=(grad, x, None, activation): gelu.launch_backward(*a, bias_grad=True, with_y=True),
                )
            rows, vector = meta(256 * 197, dim, dtype=dtype), meta(dim, dtype=dtype)
            label = f"{dim} layer norm and gelu, {size}"
            forward = (rows, None, vector, vector, None, None, 1e-6)
            yield label, lambda a=forward: layer_norm.launch_forward(*a, activation="gelu")
            backward = (rows, None, rows, None, vector, vector, None, None, meta(2, 256 * 197), dtype, dtype, True)
            yield label, lambda a=backward: layer_norm.launch_backward(*a, activation="gelu")


HEADS = ((3, 64), (6, 64), (12, 64), (16, 64), (16, 80))  # heads and head dim of ViT-Ti, S, B, L, H


def make_attention_cases(quick: bool) -> Iterator[Case]:
    """Yield packed qkv of the models at 224 and 384 pixels with every candidate; at ViT-B's size every dtype and
    option, the class token alone, a single image, and other head dims."""
    for candidate in range(1 if quick else 3):
        for heads, dim in HEADS[2::2] if quick else HEADS:
            for tokens in (197, 577):
                yield from make_attention_calls(256, tokens, heads, dim, candidate=candidate)
        yield from make_attention_calls(1, 197, 12, 64, candidate=candidate)
    for tokens in (197, 577):
        yield from make_attention_calls(256, tokens, 12, 64, torch.float32)
    if quick:
        yield from make_attention_calls(256, 197, 12, 128)
        return
    for tokens in (197, 577):
        yield from make_attention_calls(256, tokens, 12, 64, torch.float16)
        for option in ("boolean mask", "additive mask", "cu_seqlens"):
            yield from make_attention_calls(256, tokens, 12, 64, option=option)
        yield from make_attention_calls(256, tokens, 12, 64, queries=1)
    for candidate in range(3):
        for tokens in (50, 256):
            yield from make_attention_calls(256, tokens, 12, 64, candidate=candidate)
        for dim in (32, 48, 96, 128):
            yield from make_attention_calls(256, 197, 12, dim, candidate=candidate)


def make_attention_calls(
    batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16,
    *, queries: int | None = None, option: str = "", candidate: int = 0,
) -> Iterator[Case]:  # fmt: skip
    """Yield forward and backward of one size."""
    mask = bounds = None
    if option == "boolean mask":
        mask = meta(batch, 1, 1, tokens, dtype=torch.bool)
    if option == "additive mask":
        mask = meta(1, heads, tokens, tokens, dtype=dtype)
    if option == "cu_seqlens":
        bounds = meta(batch + 1, dtype=torch.int32)
    call = (mask, bounds, tokens, dim**-0.5, candidate)
    lead = (batch, tokens) if bounds is None else (batch * tokens,)
    qkv, grad_qkv = meta(*lead, 3, heads, dim, dtype=dtype), meta(*lead, 3, heads, dim, dtype=dtype)
    query, key, value = qkv.unbind(-3)
    grads = grad_qkv.unbind(-3)
    if queries is not None:
        query = query[:, :queries]
        grads = [meta(*tensor.shape, dtype=dtype) for tensor in (query, key, value)]
    label = " ".join(filter(None, (f"{tokens} x {dim}", str(dtype)[6:], f"batch {batch}", option)))
    label += "" if queries is None else f" queries {queries}"
    label += f", candidate {candidate}" if candidate else ""
    yield label, lambda: attention._launch_forward(query, key, value, *call)
    out = meta(*query.shape[:-2], heads * dim, dtype=dtype)
    lse = meta(heads, math.prod(query.shape[:-2]))
    yield label, lambda: attention._launch_backward(torch.empty_like(out), query, key, value, out, lse, grads, *call)


def make_quantize_cases(quick: bool) -> Iterator[Case]:
    """Yield the e4m3 rows between the matmuls of a quantised block, whose LayerNorms read bfloat16 or float32."""
    for dim in (192, 768, 1280) if quick else WIDTHS:
        x, residual = meta(256, 197, dim, dtype=torch.bfloat16), meta(256, 197, dim)
        vector, float_vector = meta(dim, dtype=torch.bfloat16), meta(dim)
        hidden, units = meta(256, 197, 4 * dim, dtype=torch.bfloat16), meta(4 * dim, dtype=torch.bfloat16)
        yield f"{dim} rows, bfloat16", lambda a=(x, None, None): quantize._launch_activation(*a)
        yield f"{dim} first, bfloat16", lambda a=(x, None, vector, vector, 1e-6): quantize._launch_layer_norm(*a)
        yield f"{dim} add, bfloat16", lambda a=(x, x, vector, vector, 1e-6): quantize._launch_layer_norm(*a)
        mixed = (x, residual, float_vector, float_vector, 1e-6)
        yield f"{dim} add, bfloat16+float32", lambda a=mixed: quantize._launch_layer_norm(*a)
        for activation in ("gelu",) if quick else ("gelu", "gelu_new", "quick_gelu"):
            label = f"{4 * dim} {activation}, bfloat16"
            yield label, lambda a=(hidden, units, activation): quantize._launch_activation(*a)
    if not quick:
        for width in (8192, quantize.MAX_WIDTH):
            x, bias = meta(256, width, dtype=torch.bfloat16), meta(width, dtype=torch.bfloat16)
            yield f"{width} gelu, bfloat16", lambda a=(x, bias, "gelu"): quantize._launch_activation(*a)
        x, vector, one = meta(256, 197, 768), meta(768), meta(1)
        yield "768 first, float32", lambda: quantize._launch_layer_norm(x, None, vector, vector, 1e-6)
        yield "one value", lambda: quantize._launch_layer_norm(meta(1, 1), meta(1, 1), one, one, 1e-6)
        yield "one value", lambda: quantize._launch_activation(meta(1, 1), one, "gelu")


# Each function yields the launches to compile: all that the models use, or with `quick` the few that fit in a CI run.
CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "layer_norm": make_layer_norm_cases,
    "attention": make_attention_cases,
    "patch_embed": make_patch_embed_cases,
    "feed_forward": make_feed_forward_cases,
    "gelu": make_gelu_cases,
    "quantize": make_quantize_cases,
    "smallest": make_smallest_cases,  # last: `quick` compiles further candidates of a rule for its first case only
}
# Cases that a target does not support: sm_80 has no conversion to e4m3, and the fp8 kernels are for NVIDIA GPUs only.
EXCLUDED_CASES = {"sm_80": ("quantize",), "gfx942": ("quantize",)}


def record_launches(call: Callable[[], object], target: str, candidate: int) -> tuple[list[Launch], set[int]]:
    """Record the launches that `call` makes on a target, and the indices of the tuning table's rules that it selects.

    Args:
        call: Calls a launcher.
        target: A key of `TARGETS`.
        candidate: Index of the candidate of each rule; the last one if a rule has fewer.
    """
    launches, rules = [], set()
    table = tuning.find_candidates

    def candidates(*case: object) -> tuple[tuning.Choice, ...]:
        found = table(*case)
        rules.add(next(index for index, rule in enumerate(tuning.TABLE) if rule.candidates is found))
        return found[: candidate + 1][-1:]

    def run(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in list(kwargs) if name in kernel.arg_names}
        launches.append(Launch(kernel, arguments, kwargs))

    device = tuning.Device("compiled for", target, 132)
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tuning, "describe_device", lambda _: device),
        mock.patch.object(tuning, "find_candidates", candidates),
    ):
        call()
    return launches, rules


def build_source(launch: Launch) -> ASTSource:
    """Build the source as Triton's just-in-time compiler does for these arguments: 1 and None become constants,
    pointers are 16-byte aligned like PyTorch's, and integers divisible by 16 are marked as such."""
    constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if name in constants or value is None or (is_integer and value == 1):
            signature[name], constexprs[name] = "constexpr", value
            continue
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{mangle_type(value.base)[1:]}{value.block_shape}>"
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (is_integer and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def inspect_code(launch: Launch, target: Target) -> dict[str, int]:
    """Compile a launch, and read resources and instruction counts from the machine code."""
    compiled = triton.compile(build_source(launch), target=target.gpu, options=launch.options)
    warps = compiled.metadata.num_warps
    result = {"warps": warps, "shared_memory": compiled.metadata.shared}
    if target.gpu.backend == "hip":
        return result | inspect_amd(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = run_tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return result | {
        "registers": registers,
        "spill_bytes": stack,
        "spill_instructions": count_matches(r"\b(STL|LDL)\b", code),
        "loads": count_matches(r"\bLDG\.", code),
        "loads_128": count_matches(r"\bLDG\.\S*\.(128|256)", code),
        "async_copies": count_matches(r"\bLDGSTS", code),
        "async_copies_128": count_matches(r"\bLDGSTS\.\S*\.128", code),
        "descriptor_copies": count_matches(r"\bUTMALDG", code),
        "stores": count_matches(r"\bSTG\.", code),
        "stores_128": count_matches(r"\bSTG\.\S*\.(128|256)", code),
        "wgmma": count_matches(r"\bHGMMA", code),
        "mma": count_matches(r"\b(HMMA|UTC\w*MMA)", code),
        "instructions": count_matches(r"^\s+/\*[0-9a-f]{4,}\*/", code),
        "blocks_per_sm": count_blocks_per_multiprocessor(target, warps, registers, compiled.metadata.shared),
    }


def inspect_amd(code: str) -> dict[str, int]:
    def read_field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))

    return {
        "registers": read_field("vgpr_count"),
        "spill_bytes": read_field("private_segment_fixed_size"),
        "spill_instructions": read_field("vgpr_spill_count"),
        "loads": count_matches(r"\b(global|buffer)_load", code),
        "loads_128": count_matches(r"\b(global|buffer)_load_dwordx4", code),
        "stores": count_matches(r"\b(global|buffer)_store", code),
        "stores_128": count_matches(r"\b(global|buffer)_store_dwordx4", code),
        "mma": count_matches(r"\bv_mfma", code),
        "instructions": count_matches(r"^\t[vs]_|^\t(global|buffer|ds)_", code),
    }


def count_blocks_per_multiprocessor(target: Target, warps: int, registers: int, shared_memory: int) -> int:
    """Registers (65,536) are allocated to warps in units of 256; each block needs another 1 KiB of shared memory."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    return min(
        65536 // registers_per_warp // warps,
        target.shared_memory // (shared_memory + 1024),
        target.threads // (32 * warps),
        target.blocks,
    )


def count_matches(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def run_tool(name: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / name, *arguments], capture_output=True, text=True, check=True).stdout


def compile_all(operations: list[str], target: str, quick: bool) -> tuple[list[dict[str, object]], set[int]]:
    """Compile the cases of these operations for one target.

    Args:
        operations: Keys of `CASES`.
        target: A key of `TARGETS`.
        quick: Compile fewer cases, and each further candidate of a rule for one case only.

    Returns:
        One row for each kernel, case and candidate, without launches that compile to the same code, and the indices of
        the tuning table's rules that were selected.
    """
    rows, tried, seen = [], set(), set()
    cases = [case for name in operations if name not in EXCLUDED_CASES.get(target, ()) for case in CASES[name](quick)]
    for candidate in range(max(len(rule.candidates) for rule in tuning.TABLE)):
        for label, call in cases:
            launches, rules = record_launches(call, target, candidate)
            new = {(index, candidate) for index in rules if candidate < len(tuning.TABLE[index].candidates)} - tried
            if candidate > 0 and not (new if quick else rules):
                continue
            tried |= new
            for launch in launches:
                key = (build_source(launch).hash(), str(launch.options))
                if key in seen:
                    continue
                seen.add(key)
                row = {"kernel": launch.kernel.__name__, "case": label, "candidate": candidate, "target": target}
                row |= inspect_code(launch, TARGETS[target])
                if "COLS" in launch.arguments:  # elementwise: bound by instructions or by memory
                    elements = launch.arguments["ROWS"] * launch.arguments["COLS"]
                    threads = row["warps"] * TARGETS[target].gpu.warp_size
                    row["instructions_per_element"] = round(row["instructions"] * threads / elements, 1)
                rows.append(row)
    return rows, {index for index, _ in tried}


def format_table(rows: list[dict[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="only the cases of the CI run")
    version = ".".join(triton.__version__.split(".")[:2])
    folder = Path(f"benchmarks/results/compile/triton-{version}")
    parser.add_argument("--output", type=Path, default=folder, help="folder for the reports")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for target in options.targets:
        rows, rules = compile_all(options.kernels, target, options.quick)
        about = {"triton": triton.__version__, "target": target, "quick": options.quick}
        report = about | {"rules": sorted(rules), "kernels": rows}
        for suffix, text in ((".json", json.dumps(report, indent=1) + "\n"), (".txt", format_table(rows))):
            part = options.output / f"{target}{suffix}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(options.output / f"{target}{suffix}")
        print(format_table(rows))


if __name__ == "__main__":
    main()
