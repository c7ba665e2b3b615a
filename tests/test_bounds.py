"""No kernel accesses memory outside its tensors, and no program depends on another: see `bounds`.

Each case runs forward and backward with each kind of tile in the tuning table, in the CPU interpreter, with poison
around its inputs. The results must be correct, and bitwise equal in any order of programs. `mutate_masks.py` tests the
cases themselves: without any one mask of a kernel, one of them must fail.
"""

import ast
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from accuracy import poison_memory
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("checks the interpreter, which is not used on GPUs", allow_module_level=True)

import itertools

import triton
import triton.language as tl
from bounds import ORDERS, surround_with_poison, watch_accesses
from triton.runtime.interpreter import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

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
from fastvit.ops import reference

KERNELS = Path(tuning.__file__).parent
EPS = 1e-6
# Upper limits for the tiles of the tuning table, so that small inputs fill several.
LIMITS = {"rows": 32, "columns": 64, "depth": 32, "keys": 32, "key_value_rows": 32, "key_value_keys": 32}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float8_e4m3fn: 0.15}

launches: Counter[str] = Counter()  # of all cases that ran, by kernel


class Case(NamedTuple):
    """`ours` and `theirs` accept the inputs by name; `theirs` is the plain PyTorch definition, called in float64."""

    file: str  # or folder in kernels/
    name: str
    ours: Callable
    theirs: Callable
    inputs: dict[str, Tensor]
    gradients: bool = True


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


def compute_attention(query, key, value, mask=None, cu_seqlens=None) -> Tensor:
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        images = [slice(*ends) for ends in itertools.pairwise(bounds)]
        return torch.cat([compute_attention(query[None, at], key[None, at], value[None, at])[0] for at in images])
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def compute_packed_attention(qkv, cu_seqlens=None) -> Tensor:
    return compute_attention(*qkv.unbind(-3), cu_seqlens=cu_seqlens)


def make_attention_cases() -> Iterator[Case]:
    def case(name, batch, queries, keys, heads, dim, **inputs):
        tensors = {"query": randn(batch, queries, heads, dim, seed=1), "key": randn(batch, keys, heads, dim, seed=2)}
        tensors |= {"value": randn(batch, keys, heads, dim, seed=3), **inputs}
        return Case("attention", name, attention.attention, compute_attention, tensors)

    yield case("padded head dim", 2, 37, 45, 2, 24)
    yield case("head dim in two pieces", 1, 35, 41, 2, 40)
    yield case("nothing to mask", 1, 32, 32, 1, 32)
    yield case("nothing to mask but the head dim", 1, 32, 32, 1, 24)
    yield case("class token alone", 2, 1, 19, 2, 16)
    yield case("boolean mask", 2, 37, 45, 2, 16, mask=randn(2, 2, 37, 45) > -1)
    yield case("mask for keys", 2, 5, 45, 2, 16, mask=randn(2, 1, 1, 45) > -1)
    yield case("added mask", 1, 37, 45, 2, 16, mask=randn(1, 2, 37, 45))
    strided = {name: randn(2, 3, 21, 24, seed=4).transpose(1, 2)[:, 1:] for name in ("query", "key", "value")}
    yield Case("attention", "heads first", attention.attention, compute_attention, strided)
    packed = randn(2, 37, 3, 2, 24)
    yield Case("attention", "packed", attention.attention_packed, compute_packed_attention, {"qkv": packed})
    packed = randn(2, 18, 3, 2, 40, dtype=torch.bfloat16)
    yield Case("attention", "packed, bfloat16", attention.attention_packed, compute_packed_attention, {"qkv": packed})

    def attend_packed_images(qkv, cu_seqlens):
        return attention.attention_packed(qkv, cu_seqlens=cu_seqlens, max_seqlen=40)

    bounds = torch.tensor([0, 5, 45, 45, 46], dtype=torch.int32)
    packed = {"qkv": randn(46, 3, 2, 24), "cu_seqlens": bounds}
    yield Case("attention", "images of many sizes, packed", attend_packed_images, compute_packed_attention, packed)

    def attend_images(query, key, value, cu_seqlens):
        return attention.attention(query, key, value, cu_seqlens=cu_seqlens, max_seqlen=40)

    three = {name: randn(46, 2, 24, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    yield Case("attention", "images of many sizes", attend_images, compute_attention, {**three, "cu_seqlens": bounds})


def make_norm_inputs(*shape: int, dtype: torch.dtype = torch.float32, residual: bool = False) -> dict[str, Tensor]:
    inputs = {"x": randn(*shape, dtype=dtype, seed=1)}
    if residual:
        inputs["residual"] = randn(*shape, dtype=dtype, seed=2)
    return inputs | {"weight": randn(shape[-1], dtype=dtype, seed=3), "bias": randn(shape[-1], dtype=dtype, seed=4)}


def bind_eps(function: Callable) -> Callable:
    return lambda **inputs: function(**inputs, eps=EPS)


def make_layer_norm_cases() -> Iterator[Case]:
    plain = bind_eps(layer_norm.layer_norm), bind_eps(reference.layer_norm)
    add = bind_eps(layer_norm.add_layer_norm), bind_eps(reference.add_layer_norm)
    yield Case("layer_norm", "five columns", *plain, make_norm_inputs(3, 11, 5))
    yield Case("layer_norm", "several chunks", *plain, make_norm_inputs(37, 100))
    yield Case("layer_norm", "whole chunks", *plain, make_norm_inputs(19, 64))
    strided = make_norm_inputs(3, 8, 100) | {"x": randn(3, 8, 103)[:, 1:, :100], "residual": randn(7, 3, 100).mT.mT[:3]}
    strided["residual"] = randn(3, 9, 100)[:, :7]
    yield Case("layer_norm", "strided", *add, strided)
    yield Case("layer_norm", "add", *add, make_norm_inputs(5, 7, 100, residual=True))
    scales = {"scale": randn(100, seed=5), "row_scale": torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0])}
    yield Case("layer_norm", "scales", *add, make_norm_inputs(5, 7, 100, residual=True) | scales)
    yield Case("layer_norm", "bfloat16", *add, make_norm_inputs(19, 100, dtype=torch.bfloat16, residual=True))


def make_activation_cases() -> Iterator[Case]:
    bias_gelu, swiglu = (gelu.bias_gelu, reference.bias_gelu), (gelu.swiglu, reference.swiglu)
    yield Case("gelu", "bias", *bias_gelu, {"x": randn(37, 70), "bias": randn(70)})
    yield Case("gelu", "no bias", *bias_gelu, {"x": randn(3, 13, 70)[:, 1:]})
    yield Case("gelu", "swiglu", *swiglu, {"x": randn(37, 140), "bias": randn(140)})
    yield Case("gelu", "one value", *swiglu, {"x": randn(1, 2)})
    act = bind_eps(layer_norm.layer_norm_act), bind_eps(reference.layer_norm_act)
    yield Case("layer_norm_act", "several chunks", *act, make_norm_inputs(37, 100))
    yield Case("layer_norm_act", "five columns", *act, make_norm_inputs(3, 11, 5))
    yield Case("layer_norm_act", "bfloat16", *act, make_norm_inputs(21, 300, dtype=torch.bfloat16))


def make_matmul_cases() -> Iterator[Case]:
    """Yield cases with rows that are multiples of 16 bytes, as descriptors require, and with others."""
    norm = {"norm_weight": randn(36, seed=3), "norm_bias": randn(36, seed=4)}
    layer = {"weight": randn(52, 36, seed=5), "bias": randn(52, seed=6)}
    rows, add = {"x": randn(3, 15, 36, seed=1)}, {"residual": randn(3, 15, 36, seed=2)}
    for name in ("layer_norm_linear", "add_layer_norm_linear", "layer_norm_gelu"):
        functions = bind_eps(getattr(layer_norm_linear, name)), bind_eps(getattr(reference, name))
        inputs = rows | (add if name.startswith("add") else {}) | norm | layer
        yield Case("linear", name, *functions, inputs)
    whole = {"x": randn(64, 64), "norm_weight": randn(64), "norm_bias": randn(64), "weight": randn(64, 64)}
    functions = bind_eps(layer_norm_linear.layer_norm_gelu), bind_eps(reference.layer_norm_gelu)
    yield Case("linear", "nothing to mask", *functions, whole | {"bias": None})
    uneven = {"x": randn(35, 37), "norm_weight": randn(37), "norm_bias": randn(37), "weight": randn(71, 37)}
    yield Case("linear", "odd sizes", *functions, uneven | {"bias": randn(71)})
    layers = {"weight1": layer["weight"], "bias1": layer["bias"]}
    layers |= {"weight2": randn(44, 52, seed=7), "bias2": randn(44, seed=8)}

    def ours(**inputs):
        return feed_forward.feed_forward(**inputs, activation="gelu")

    def theirs(**inputs):
        return reference.feed_forward(**inputs, activation="gelu")

    yield Case("linear", "feed_forward", ours, theirs, rows | layers)
    odd = {"x": randn(35, 37), "weight1": randn(71, 37), "bias1": None, "weight2": randn(33, 71), "bias2": None}
    yield Case("linear", "feed_forward, odd sizes", ours, theirs, odd)
    name = "add_layer_norm_feed_forward"
    functions = bind_eps(getattr(feed_forward, name)), bind_eps(getattr(reference, name))
    yield Case("linear", name, *functions, rows | add | norm | layers)


def make_patch_embed_cases() -> Iterator[Case]:
    def case(name, shape, weight_shape, *, dtype=torch.float32, prefix=1, mask=False, pos_embed=True):
        hidden, channels, height, width = weight_shape
        first = shape[1] == channels
        batch, patches = shape[0], (shape[2 if first else 1] // height) * (shape[3 if first else 2] // width)
        options = {"patch_size": (height, width)}
        if dtype == torch.uint8:
            pixels = torch.randint(256, shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
            options |= {"mean": [0.4, 0.5, 0.6][:channels], "std": [0.2, 0.3, 0.4][:channels]}
        else:
            pixels = randn(*shape, dtype=dtype, seed=1)
        inputs = {
            "pixels": pixels,
            "weight": randn(*weight_shape, seed=2) / math.sqrt(channels * height * width),
            "bias": randn(hidden, seed=3),
            "cls_token": randn(1, prefix, hidden, seed=4) if prefix else None,
            "pos_embed": randn(1, prefix + patches, hidden, seed=5) if pos_embed else None,
        }
        if mask:
            inputs["mask_token"] = randn(1, 1, hidden, seed=6)
            inputs["mask"] = randn(batch, patches, seed=7) > 0.3

        def ours(**tensors):
            return patch_embed.patch_embed(**tensors, **options)

        def theirs(pixels, **tensors):
            pixels = pixels.double() if dtype != torch.uint8 else pixels
            return reference.patch_embed(pixels, **tensors, **options)

        return Case("patch_embed", name, ours, theirs, inputs)

    yield case("channels first, edges left over", (3, 3, 13, 18), (20, 3, 4, 4))
    yield case("channels last, edges left over", (3, 13, 18, 3), (20, 3, 4, 4))
    yield case("uint8, channels first, masked", (3, 3, 12, 16), (20, 3, 4, 4), dtype=torch.uint8, mask=True)
    yield case("uint8, channels last, masked", (3, 13, 17, 3), (70, 3, 4, 4), dtype=torch.uint8, mask=True, prefix=5)
    yield case("whole tiles", (2, 1, 32, 32), (64, 1, 8, 8), prefix=0)
    yield case("no position embedding", (5, 3, 9, 9), (33, 3, 3, 3), prefix=2, pos_embed=False)


def make_quantize_cases() -> Iterator[Case]:
    def case(name, function, inputs, eps=True):
        # e4m3 values have coarse steps, so the dequantised results are compared.
        def dequantize(function):
            def call(**tensors):
                *summed, values, scale = function(**tensors, **({"eps": EPS} if eps else {}))
                return *summed, values.float() * scale, scale

            return call

        theirs = dequantize(getattr(reference, function))
        return Case("quantize", name, dequantize(getattr(quantize, function)), theirs, inputs, gradients=False)

    yield case("rows", "quantize_rows", {"x": randn(37, 100)}, eps=False)
    yield case("strided rows", "quantize_rows", {"x": randn(3, 9, 103)[:, 1:, :100]}, eps=False)
    yield case("gelu", "bias_gelu_fp8", {"x": randn(37, 100), "bias": randn(100)}, eps=False)
    yield case("layer norm", "layer_norm_fp8", make_norm_inputs(3, 11, 5))
    yield case("add", "add_layer_norm_fp8", make_norm_inputs(5, 7, 100, residual=True))


CASES = (
    *make_attention_cases(),
    *make_layer_norm_cases(),
    *make_activation_cases(),
    *make_matmul_cases(),
    *make_patch_embed_cases(),
    *make_quantize_cases(),
)


# ---------------------------------------------------------------------------------------------------------------------
# The cases under the memory checker
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def list_variants(operation: str) -> list[tuning.Choice]:
    """Return one choice of the tuning table for each variant of this operation, whatever shape the choice is for."""
    found: dict[object, tuning.Choice] = {}
    for rule in tuning.TABLE:
        if re.fullmatch(rule.operation, operation):
            for choice in rule.candidates:
                variant = frozenset(choice), choice.get("fused"), choice.get("normalize")
                small = {name: min(size, LIMITS.get(name, size)) for name, size in choice.items()}
                found.setdefault(variant, small)
    return list(found.values())


@contextmanager
def use_variant(number: int) -> Iterator[list[int]]:
    """Within this context, each operation runs its variant `number`, modulo the number of its variants.

    Yields a list of the numbers of variants of the operations that ran.
    """
    counts: list[int] = []

    def candidates(operation: str, *_: object) -> tuple[tuning.Choice, ...]:
        variants = list_variants(operation)
        counts.append(len(variants))
        return (variants[number % len(variants)],)

    with mock.patch.object(tuning, "find_candidates", candidates):
        yield counts


def compute_results(case: Case, function: Callable, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the outputs and the gradients of all floating-point inputs, by name."""
    inputs = {name: None if tensor is None else place(tensor.detach()) for name, tensor in case.inputs.items()}
    leaves = {}
    if case.gradients:
        for name, tensor in inputs.items():
            if tensor is not None and tensor.is_floating_point() and name not in ("mask", "row_scale", "pixels"):
                leaves[name] = tensor.requires_grad_()
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if leaves:
        grads = [place(randn(*output.shape, seed=7)).to(output.dtype) for output in outputs]
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        named |= {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}
    return named


def to_float64(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def assert_close(found: Tensor, exact: Tensor, name: str) -> None:
    tolerance = TOLERANCES[found.dtype] if "values" not in name else 0.15
    size = exact.abs().max().item()
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=tolerance, atol=tolerance * size, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}, {case.name}")
def test_programs_stay_within_their_tensors_without_races(case):
    exact = compute_results(case, case.theirs, to_float64)
    number, variants = 0, 1
    while number < variants:
        found = {}
        for order in ORDERS:
            with use_variant(number) as counts, poison_memory(), watch_accesses(order) as watch:
                found[order] = compute_results(case, case.ours, surround_with_poison)
            launches.update(watch.launches)
        for name, tensor in found["usual"].items():
            assert_close(tensor, exact[name], name)
            for order in ORDERS[1:]:
                assert torch.equal(tensor.view(torch.uint8), found[order][name].view(torch.uint8)), (order, name)
        number, variants = number + 1, max(counts)


def test_every_launched_kernel_has_a_case():
    """Kernels that are only called by other kernels are not launched, and need no case."""
    functions = [
        node
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
    ]
    called = {
        ast.unparse(node.func) for function in functions for node in ast.walk(function) if isinstance(node, ast.Call)
    }
    kernels = {function.name for function in functions} - called
    if not launches:
        pytest.skip("the cases did not run in this process")
    assert kernels <= set(launches)


# ---------------------------------------------------------------------------------------------------------------------
# The memory checker itself
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _copy(x_ptr, out_ptr, size, LOAD_BEYOND: tl.constexpr, STORE_BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size
    x = tl.load(x_ptr + at) if LOAD_BEYOND else tl.load(x_ptr + at, exists)
    x = tl.where(exists, x, 0.0)  # values out of bounds are not used
    if STORE_BEYOND:
        tl.store(out_ptr + at, x)
    else:
        tl.store(out_ptr + at, x, exists)


@triton.jit
def _copy_by_descriptor(x, out_ptr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    tl.store(out_ptr + rows[:, None] * BLOCK + cols[None, :], x.load([0, 0]))


@triton.jit
def _shift(x_ptr, out_ptr, read_ptr):
    """Each program stores an element, and loads from read_ptr the one that the next program stores."""
    at = tl.program_id(0)
    tl.store(out_ptr + at, tl.load(read_ptr + at + 1) + tl.load(x_ptr + at))


@triton.jit
def _store_to(out_ptr, divisor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at // divisor, at)


@triton.jit
def _sum_without_other(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + at, at < size), 0))


@triton.jit
def _add_atomically(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


@pytest.mark.parametrize("order", ORDERS)
def test_valid_kernel_runs_in_any_order(order):
    x, out = surround_with_poison(randn(37)), surround_with_poison(torch.zeros(37))
    with watch_accesses(order) as watch:
        _copy[(3,)](x, out, 37, False, False, BLOCK=16)
    assert torch.equal(x, out)
    assert watch.launches == {"_copy": 1}


def test_out_of_bounds_load_raises_even_if_its_values_are_unused():
    x, out = surround_with_poison(randn(37)), torch.zeros(37)
    with (
        watch_accesses(),
        pytest.raises(InterpreterError, match=r"_copy, program 2, test_bounds.py:\d+: loads outside"),
    ):
        _copy[(3,)](x, out, 37, True, False, BLOCK=16)
    whole = torch.zeros(16, 4)  # a column: the elements in between are outside the view
    with watch_accesses(), pytest.raises(InterpreterError, match=r"_copy, program 0, .*: loads outside"):
        _copy[(1,)](whole[:, 0], out, 16, False, False, BLOCK=16)


def test_out_of_bounds_store_raises_before_it_happens():
    memory = torch.zeros(64)
    with watch_accesses(), pytest.raises(InterpreterError, match=r"_copy, program 2, .*: stores outside"):
        _copy[(3,)](randn(37), memory[:37], 37, False, True, BLOCK=16)
    assert memory[:32].count_nonzero() == 32  # stored by the previous programs
    assert memory[32:].count_nonzero() == 0


def test_descriptor_allows_its_base_tensor_only():
    x, out = surround_with_poison(randn(20, 20)), torch.zeros(16, 16)
    with watch_accesses():
        _copy_by_descriptor[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), out, BLOCK=16)
    assert torch.equal(out, x[:16, :16])
    described = TensorDescriptor.from_tensor(x[:8], [16, 16])
    described.shape = [20, 20]  # larger than the base tensor
    with watch_accesses(), pytest.raises(InterpreterError, match="loads outside"):
        _copy_by_descriptor[(1,)](described, out, BLOCK=16)


@pytest.mark.parametrize("order", ["usual", "reversed"])
def test_races_and_atomics_raise(order):
    memory = torch.zeros(4)
    found = "stores what another program loaded" if order == "usual" else "loads what program"
    with watch_accesses(order), pytest.raises(InterpreterError, match=found):
        _shift[(3,)](randn(3), memory, memory)
    with watch_accesses(order):
        _shift[(3,)](randn(3), torch.zeros(3), memory)
    with watch_accesses(order), pytest.raises(InterpreterError, match="stores again what program"):
        _store_to[(3,)](memory, 12, BLOCK=1)
    with watch_accesses(order), pytest.raises(InterpreterError, match="twice in one store"):
        _store_to[(1,)](memory, 2, BLOCK=4)
    with watch_accesses(order), pytest.raises(InterpreterError, match="atomics"):
        _add_atomically[(3,)](memory)


def test_masked_lanes_are_nan_if_the_load_has_no_other():
    out = torch.zeros(1)
    with watch_accesses():
        _sum_without_other[(1,)](randn(5), out, 5, BLOCK=8)
    assert out.isnan().all()
