"""Launch every kernel, forward and backward, through Triton's launcher with a driver that does nothing.

The interpreter accepts any Python in a kernel, and `compile_kernels.py` bypasses the launcher. This script follows the
whole path of a call on a GPU up to the driver: how the launcher binds arguments, and which language features the
installed Triton compiles. It runs each candidate of the tuning table, at sizes that select each of its rules. Prints a
line for each failing call; the exit code is 1 if there are any.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported

import torch
from torch import Tensor

from fastvit.benchmarks.bench_host import launch_nothing
from fastvit.kernels import (
    attention,
    feed_forward,
    gelu,
    layer_norm,
    layer_norm_linear,
    patch_embed,
    quantize,
    tuning,
)

EPS = 1e-6
MANY_IMAGES = 42  # of 197 tokens, 8,274 rows: the tuning table has a separate rule from 8,192 rows on
failures: list[str] = []
rules: set[int] = set()  # indices of the tuning table's rules that were selected

launch_nothing()


def make_empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor: nothing is computed."""
    return torch.empty(*shape, dtype=dtype).requires_grad_()


def run_call(name: str, function: Callable[..., object], *args: object, **options: object) -> None:
    try:
        outputs = function(*args, **options)
        outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        failures.append(name)
        print(f"{name}: {type(cause).__name__}: {cause}", flush=True)


def call_attention(dtype: torch.dtype, candidate: int = 0) -> None:
    """Short (197 tokens) and long (577) sequences, with head dims of one piece, of two pieces, and padded.

    The kernels for short sequences need at least 256 heads in the batch, so each size runs with few and many heads.
    """
    for tokens, dim in ((197, 64), (197, 80), (577, 64), (50, 32), (197, 128), (256, 64)):
        for batch in (2, 256) if tokens <= 256 else (2,):
            query = make_empty(batch, tokens, 1, dim, dtype=dtype)
            name = f"attention {batch} x {tokens} x {dim} {dtype}, candidate {candidate}"
            run_call(name, attention.attention, query, query, query, candidate=candidate)
    for heads in (2, 128):
        query = make_empty(2, 197, 3, heads, 64, dtype=dtype)
        run_call(f"attention_packed, {heads} heads, {dtype}", attention.attention_packed, query, candidate=candidate)
    query = make_empty(2, 197, 2, 64, dtype=dtype)
    for name, mask in {
        "boolean mask": torch.ones(2, 1, 1, 197, dtype=torch.bool),
        "additive mask": torch.zeros(1, 2, 197, 197, dtype=dtype),
    }.items():
        options = {"mask": mask, "candidate": candidate}
        run_call(f"attention, {name}, {dtype}", attention.attention, query, query, query, **options)
    for tokens, heads in ((200, 2), (200, 128), (700, 2)):
        packed, bounds = make_empty(tokens, heads, 64, dtype=dtype), torch.tensor([0, 50, tokens], dtype=torch.int32)
        options = {"cu_seqlens": bounds, "max_seqlen": tokens - 50, "candidate": candidate}
        name = f"attention, {tokens} packed tokens, {heads} heads, {dtype}"
        run_call(name, attention.attention, packed, packed, packed, **options)


def call_rows(dtype: torch.dtype, dim: int = 768, batch: int = 2) -> None:
    x, vector = make_empty(batch, 197, dim, dtype=dtype), make_empty(dim, dtype=dtype)
    run_call(f"layer_norm {dtype}", layer_norm.layer_norm, x, vector, vector, EPS)
    run_call(f"add_layer_norm {dtype}", layer_norm.add_layer_norm, x, x, vector, vector, EPS)
    scales = {"scale": vector, "row_scale": torch.ones(batch)}
    run_call(f"add_layer_norm, scales, {dtype}", layer_norm.add_layer_norm, x, x, vector, vector, EPS, **scales)
    run_call(f"layer_norm_act {dtype}", layer_norm.layer_norm_act, x, vector, vector, EPS)
    for activation in ("gelu", "gelu_new", "quick_gelu"):
        run_call(f"bias_gelu {activation} {dtype}", gelu.bias_gelu, x, vector, activation)
    run_call(f"swiglu {dtype}", gelu.swiglu, x, vector)


def call_odd_sizes(dtype: torch.dtype) -> None:
    """Sizes and addresses that are or are not multiples of 16, and sizes of 1: each compiles to another binary."""
    for shape in ((2, 197, 100), (1, 1, 768), (16, 16, 768), (1, 16, 1)):
        x, vector = make_empty(*shape, dtype=dtype), make_empty(shape[-1], dtype=dtype)
        run_call(f"layer_norm {shape} {dtype}", layer_norm.layer_norm, x, vector, vector, EPS)
        run_call(f"bias_gelu {shape} {dtype}", gelu.bias_gelu, x, vector)
    x, vector = make_empty(2, 197, 769, dtype=dtype).detach()[..., 1:].requires_grad_(), make_empty(768, dtype=dtype)
    aligned = make_empty(2, 197, 769, dtype=dtype).detach()[..., :768].requires_grad_()  # of the same strides
    for name, rows in {"aligned": aligned, "one value further": x}.items():
        run_call(f"layer_norm, {name}, {dtype}", layer_norm.layer_norm, rows, vector, vector, EPS)
        run_call(f"bias_gelu, {name}, {dtype}", gelu.bias_gelu, rows, vector)
        heads = rows.view(2, 197, 12, 64)
        run_call(f"attention, {name}, {dtype}", attention.attention, heads, heads, heads)


def call_matmuls(dtype: torch.dtype, label: str, candidate: int, dim: int = 768) -> None:
    x, vector = make_empty(2, 197, dim, dtype=dtype), make_empty(dim, dtype=dtype)
    sizes = ((4 * dim, dim), (4 * dim,), (dim, 4 * dim))
    first, bias, second = (make_empty(*shape, dtype=dtype) for shape in sizes)
    norm = (vector, vector, EPS)
    for name, function, arguments in (
        ("layer_norm_linear", layer_norm_linear.layer_norm_linear, (x, *norm, first, bias)),
        ("add_layer_norm_linear", layer_norm_linear.add_layer_norm_linear, (x, x, *norm, first, bias)),
        ("layer_norm_gelu", layer_norm_linear.layer_norm_gelu, (x, *norm, first, bias)),
        ("feed_forward", feed_forward.feed_forward, (x, first, bias, second, vector, "gelu")),
        (
            "add_layer_norm_feed_forward",
            feed_forward.add_layer_norm_feed_forward,
            (x, x, *norm, first, bias, second, vector),
        ),
    ):
        run_call(f"{name}, {label}", function, *arguments, candidate=candidate)


def call_patch_embed(dtype: torch.dtype, candidate: int, batch: int = 2) -> None:
    weight, bias, token = (make_empty(*shape, dtype=dtype) for shape in ((768, 3, 16, 16), (768,), (1, 1, 768)))
    masked = {"mask_token": token, "mask": torch.zeros(batch, 196, dtype=torch.bool)}
    for name, pixels in {
        "uint8, channels last": torch.zeros(batch, 224, 224, 3, dtype=torch.uint8),
        "float with a gradient": make_empty(batch, 3, 224, 224, dtype=torch.float32),
    }.items():
        for options in ({}, masked):
            options = {"patch_size": (16, 16), "mean": [0.5] * 3, "std": [0.5] * 3, "candidate": candidate, **options}
            arguments = (pixels, weight, bias, token, make_empty(1, 197, 768, dtype=dtype))
            label = f"patch_embed, {name}, {dtype}, candidate {candidate}, batch {batch}"
            run_call(label, patch_embed.patch_embed, *arguments, **options)


@torch.no_grad()
def call_fp8(dtype: torch.dtype) -> None:
    x, vector = torch.randn(2, 197, 768, dtype=dtype), torch.randn(768, dtype=dtype)
    for name, function, arguments in (
        ("quantize_rows", quantize.quantize_rows, (x,)),
        ("bias_gelu_fp8", quantize.bias_gelu_fp8, (x, vector)),
        ("layer_norm_fp8", quantize.layer_norm_fp8, (x, vector, vector, EPS)),
        ("add_layer_norm_fp8", quantize.add_layer_norm_fp8, (x, x, vector, vector, EPS)),
    ):
        run_call(f"{name} {dtype}", function, *arguments)


@contextlib.contextmanager
def use_candidate(number: int) -> Iterator[None]:
    """Within this context, each rule of the tuning table has one candidate: this one, or the last if it has fewer."""
    table = tuning.TABLE
    numbered = tuple(rule._replace(candidates=rule.candidates[: number + 1][-1:]) for rule in table)
    candidates = tuning.find_candidates

    def remember(*case: object) -> tuple[tuning.Choice, ...]:
        found = candidates(*case)
        rules.add(next(index for index, rule in enumerate(numbered) if rule.candidates is found))
        return found

    with mock.patch.object(tuning, "TABLE", numbered), mock.patch.object(tuning, "find_candidates", remember):
        yield


def main() -> int:
    """Run all calls. The last line printed lists the indices of the tuning table's rules that were launched."""
    for number in range(max(len(rule.candidates) for rule in tuning.TABLE)):
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{dtype}, candidate {number}"
            print(label, flush=True)
            with use_candidate(number):
                call_attention(dtype, number)
                call_rows(dtype)
                call_rows(dtype, dim=192, batch=MANY_IMAGES)
                call_odd_sizes(dtype)
                call_matmuls(dtype, label, number)
                call_patch_embed(dtype, number)
                call_patch_embed(dtype, number, batch=48)  # large tiles fill a GPU
                call_fp8(dtype)
    print(f"{len(failures)} calls failed")
    print(json.dumps(sorted(rules)))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
