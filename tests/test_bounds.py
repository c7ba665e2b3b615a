"""No kernel touches memory that it was not given, and no program depends on another: see `bounds`.

Each case runs forward and backward under each kind of tile that the tuning table knows for its kernels, on the CPU's
interpreter, with poison around its inputs. The results are right, and the same bits whatever the order of programs.
`mutate_masks.py` proves the cases: with any one mask taken out of a kernel, one of them fails.
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
    pytest.skip("the interpreter is watched, where there is no GPU", allow_module_level=True)

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
# Tiles are those of the table, cut down so that small inputs fill several.
LIMITS = {"rows": 32, "columns": 64, "depth": 32, "keys": 32, "key_value_rows": 32, "key_value_keys": 32}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float8_e4m3fn: 0.15}

launches: Counter[str] = Counter()  # by all the cases that ran


class Case(NamedTuple):
    """ours and theirs take the inputs by name; theirs is the definition, given float64."""

    file: str  # or folder in kernels/
    name: str
    ours: Callable
    theirs: Callable
    inputs: dict[str, Tensor]
    gradients: bool = True


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


def attend(query, key, value, mask=None, cu_seqlens=None) -> Tensor:
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        images = [slice(*ends) for ends in itertools.pairwise(bounds)]
        return torch.cat([attend(query[None, at], key[None, at], value[None, at])[0] for at in images])
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)


def attend_packed(qkv, cu_seqlens=None) -> Tensor:
    return attend(*qkv.unbind(-3), cu_seqlens=cu_seqlens)


def attention_cases() -> Iterator[Case]:
    def case(name, batch, queries, keys, heads, dim, **inputs):
        tensors = {"query": random(batch, queries, heads, dim, seed=1), "key": random(batch, keys, heads, dim, seed=2)}
        tensors |= {"value": random(batch, keys, heads, dim, seed=3), **inputs}
        return Case("attention", name, attention.attention, attend, tensors)

    yield case("padded head dim", 2, 37, 45, 2, 24)
    yield case("head dim in two pieces", 1, 35, 41, 2, 40)
    yield case("nothing to mask", 1, 32, 32, 1, 32)
    yield case("nothing to mask but the head dim", 1, 32, 32, 1, 24)
    yield case("class token alone", 2, 1, 19, 2, 16)
    yield case("boolean mask", 2, 37, 45, 2, 16, mask=random(2, 2, 37, 45) > -1)
    yield case("mask for keys", 2, 5, 45, 2, 16, mask=random(2, 1, 1, 45) > -1)
    yield case("added mask", 1, 37, 45, 2, 16, mask=random(1, 2, 37, 45))
    strided = {name: random(2, 3, 21, 24, seed=4).transpose(1, 2)[:, 1:] for name in ("query", "key", "value")}
    yield Case("attention", "heads first", attention.attention, attend, strided)
    packed = random(2, 37, 3, 2, 24)
    yield Case("attention", "packed", attention.attention_packed, attend_packed, {"qkv": packed})
    packed = random(2, 18, 3, 2, 40, dtype=torch.bfloat16)
    yield Case("attention", "packed, bfloat16", attention.attention_packed, attend_packed, {"qkv": packed})

    def of_many_sizes(qkv, cu_seqlens):
        return attention.attention_packed(qkv, cu_seqlens=cu_seqlens, max_seqlen=40)

    bounds = torch.tensor([0, 5, 45, 45, 46], dtype=torch.int32)
    packed = {"qkv": random(46, 3, 2, 24), "cu_seqlens": bounds}
    yield Case("attention", "images of many sizes, packed", of_many_sizes, attend_packed, packed)

    def apart(query, key, value, cu_seqlens):
        return attention.attention(query, key, value, cu_seqlens=cu_seqlens, max_seqlen=40)

    three = {name: random(46, 2, 24, seed=seed) for seed, name in enumerate(("query", "key", "value"))}
    yield Case("attention", "images of many sizes", apart, attend, {**three, "cu_seqlens": bounds})


def norm_inputs(*shape: int, dtype: torch.dtype = torch.float32, residual: bool = False) -> dict[str, Tensor]:
    inputs = {"x": random(*shape, dtype=dtype, seed=1)}
    if residual:
        inputs["residual"] = random(*shape, dtype=dtype, seed=2)
    return inputs | {"weight": random(shape[-1], dtype=dtype, seed=3), "bias": random(shape[-1], dtype=dtype, seed=4)}


def with_eps(function: Callable) -> Callable:
    return lambda **inputs: function(**inputs, eps=EPS)


def layer_norm_cases() -> Iterator[Case]:
    plain = with_eps(layer_norm.layer_norm), with_eps(reference.layer_norm)
    add = with_eps(layer_norm.add_layer_norm), with_eps(reference.add_layer_norm)
    yield Case("layer_norm", "five columns", *plain, norm_inputs(3, 11, 5))
    yield Case("layer_norm", "several chunks", *plain, norm_inputs(37, 100))
    yield Case("layer_norm", "whole chunks", *plain, norm_inputs(19, 64))
    strided = norm_inputs(3, 8, 100) | {"x": random(3, 8, 103)[:, 1:, :100], "residual": random(7, 3, 100).mT.mT[:3]}
    strided["residual"] = random(3, 9, 100)[:, :7]
    yield Case("layer_norm", "strided", *add, strided)
    yield Case("layer_norm", "add", *add, norm_inputs(5, 7, 100, residual=True))
    scales = {"scale": random(100, seed=5), "row_scale": torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0])}
    yield Case("layer_norm", "scales", *add, norm_inputs(5, 7, 100, residual=True) | scales)
    yield Case("layer_norm", "bfloat16", *add, norm_inputs(19, 100, dtype=torch.bfloat16, residual=True))


def activation_cases() -> Iterator[Case]:
    bias_gelu, swiglu = (gelu.bias_gelu, reference.bias_gelu), (gelu.swiglu, reference.swiglu)
    yield Case("gelu", "bias", *bias_gelu, {"x": random(37, 70), "bias": random(70)})
    yield Case("gelu", "no bias", *bias_gelu, {"x": random(3, 13, 70)[:, 1:]})
    yield Case("gelu", "swiglu", *swiglu, {"x": random(37, 140), "bias": random(140)})
    yield Case("gelu", "one value", *swiglu, {"x": random(1, 2)})
    act = with_eps(layer_norm.layer_norm_act), with_eps(reference.layer_norm_act)
    yield Case("layer_norm_act", "several chunks", *act, norm_inputs(37, 100))
    yield Case("layer_norm_act", "five columns", *act, norm_inputs(3, 11, 5))
    yield Case("layer_norm_act", "bfloat16", *act, norm_inputs(21, 300, dtype=torch.bfloat16))


def product_cases() -> Iterator[Case]:
    """Rows of 16 bytes and more, as descriptors ask of a row; others are computed without."""
    norm = {"norm_weight": random(36, seed=3), "norm_bias": random(36, seed=4)}
    layer = {"weight": random(52, 36, seed=5), "bias": random(52, seed=6)}
    rows, add = {"x": random(3, 15, 36, seed=1)}, {"residual": random(3, 15, 36, seed=2)}
    for name in ("layer_norm_linear", "add_layer_norm_linear", "layer_norm_gelu"):
        functions = with_eps(getattr(layer_norm_linear, name)), with_eps(getattr(reference, name))
        inputs = rows | (add if name.startswith("add") else {}) | norm | layer
        yield Case("linear", name, *functions, inputs)
    whole = {"x": random(64, 64), "norm_weight": random(64), "norm_bias": random(64), "weight": random(64, 64)}
    functions = with_eps(layer_norm_linear.layer_norm_gelu), with_eps(reference.layer_norm_gelu)
    yield Case("linear", "nothing to mask", *functions, whole | {"bias": None})
    uneven = {"x": random(35, 37), "norm_weight": random(37), "norm_bias": random(37), "weight": random(71, 37)}
    yield Case("linear", "odd sizes", *functions, uneven | {"bias": random(71)})
    layers = {"weight1": layer["weight"], "bias1": layer["bias"]}
    layers |= {"weight2": random(44, 52, seed=7), "bias2": random(44, seed=8)}

    def ours(**inputs):
        return feed_forward.feed_forward(**inputs, activation="gelu")

    def theirs(**inputs):
        return reference.feed_forward(**inputs, activation="gelu")

    yield Case("linear", "feed_forward", ours, theirs, rows | layers)
    odd = {"x": random(35, 37), "weight1": random(71, 37), "bias1": None, "weight2": random(33, 71), "bias2": None}
    yield Case("linear", "feed_forward, odd sizes", ours, theirs, odd)
    name = "add_layer_norm_feed_forward"
    functions = with_eps(getattr(feed_forward, name)), with_eps(getattr(reference, name))
    yield Case("linear", name, *functions, rows | add | norm | layers)


def patch_embed_cases() -> Iterator[Case]:
    def case(name, shape, weight_shape, *, dtype=torch.float32, prefix=1, mask=False, pos_embed=True):
        hidden, channels, height, width = weight_shape
        first = shape[1] == channels
        batch, patches = shape[0], (shape[2 if first else 1] // height) * (shape[3 if first else 2] // width)
        options = {"patch_size": (height, width)}
        if dtype == torch.uint8:
            pixels = torch.randint(256, shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
            options |= {"mean": [0.4, 0.5, 0.6][:channels], "std": [0.2, 0.3, 0.4][:channels]}
        else:
            pixels = random(*shape, dtype=dtype, seed=1)
        inputs = {
            "pixels": pixels,
            "weight": random(*weight_shape, seed=2) / math.sqrt(channels * height * width),
            "bias": random(hidden, seed=3),
            "cls_token": random(1, prefix, hidden, seed=4) if prefix else None,
            "pos_embed": random(1, prefix + patches, hidden, seed=5) if pos_embed else None,
        }
        if mask:
            inputs["mask_token"] = random(1, 1, hidden, seed=6)
            inputs["mask"] = random(batch, patches, seed=7) > 0.3

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


def quantize_cases() -> Iterator[Case]:
    def case(name, function, inputs, eps=True):
        # What comes out in steps of an eighth is compared multiplied out.
        def multiplied(function):
            def call(**tensors):
                *summed, values, scale = function(**tensors, **({"eps": EPS} if eps else {}))
                return *summed, values.float() * scale, scale

            return call

        theirs = multiplied(getattr(reference, function))
        return Case("quantize", name, multiplied(getattr(quantize, function)), theirs, inputs, gradients=False)

    yield case("rows", "quantize_rows", {"x": random(37, 100)}, eps=False)
    yield case("strided rows", "quantize_rows", {"x": random(3, 9, 103)[:, 1:, :100]}, eps=False)
    yield case("gelu", "bias_gelu_fp8", {"x": random(37, 100), "bias": random(100)}, eps=False)
    yield case("layer norm", "layer_norm_fp8", norm_inputs(3, 11, 5))
    yield case("add", "add_layer_norm_fp8", norm_inputs(5, 7, 100, residual=True))


CASES = (
    *attention_cases(),
    *layer_norm_cases(),
    *activation_cases(),
    *product_cases(),
    *patch_embed_cases(),
    *quantize_cases(),
)


# ---------------------------------------------------------------------------------------------------------------------
# The cases, watched
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def paths(operation: str) -> list[tuning.Choice]:
    """One choice of the table for each way through this operation's launcher, whatever shape it was written for."""
    found: dict[object, tuning.Choice] = {}
    for rule in tuning.TABLE:
        if re.fullmatch(rule.operation, operation):
            for choice in rule.candidates:
                way = frozenset(choice), choice.get("fused"), choice.get("normalize")
                small = {name: min(size, LIMITS.get(name, size)) for name, size in choice.items()}
                found.setdefault(way, small)
    return list(found.values())


@contextmanager
def way(number: int) -> Iterator[list[int]]:
    """Inside, each operation goes way `number`, counted on from the first again where it has fewer.

    Yields how many ways the operations have that were asked for."""
    counts: list[int] = []

    def candidates(operation: str, *_: object) -> tuple[tuning.Choice, ...]:
        ways = paths(operation)
        counts.append(len(ways))
        return (ways[number % len(ways)],)

    with mock.patch.object(tuning, "find_candidates", candidates):
        yield counts


def results(case: Case, function: Callable, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of all floating inputs, by name."""
    inputs = {name: None if tensor is None else place(tensor.detach()) for name, tensor in case.inputs.items()}
    wanted = {}
    if case.gradients:
        for name, tensor in inputs.items():
            if tensor is not None and tensor.is_floating_point() and name not in ("mask", "row_scale", "pixels"):
                wanted[name] = tensor.requires_grad_()
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    if wanted:
        grads = [place(random(*output.shape, seed=7)).to(output.dtype) for output in outputs]
        found = torch.autograd.grad(outputs, list(wanted.values()), grads)
        named |= {f"grad {name}": grad for name, grad in zip(wanted, found, strict=True)}
    return named


def double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def assert_close(found: Tensor, exact: Tensor, name: str) -> None:
    tolerance = TOLERANCES[found.dtype] if "values" not in name else 0.15
    size = exact.abs().max().item()
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=tolerance, atol=tolerance * size, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}, {case.name}")
def test_programs_stay_within_their_tensors_and_do_not_race(case):
    exact = results(case, case.theirs, double)
    number, ways = 0, 1
    while number < ways:
        found = {}
        for order in ORDERS:
            with way(number) as counts, poison_memory(), watch_accesses(order) as watch:
                found[order] = results(case, case.ours, surround_with_poison)
            launches.update(watch.launches)
        for name, tensor in found["usual"].items():
            assert_close(tensor, exact[name], name)
            for order in ORDERS[1:]:
                assert torch.equal(tensor.view(torch.uint8), found[order][name].view(torch.uint8)), (order, name)
        number, ways = number + 1, max(counts)


def test_every_kernel_was_among_them():
    """Those that another does not call: what launchers launch."""
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
        pytest.skip("the cases were not run before, in this process")
    assert kernels <= set(launches)


# ---------------------------------------------------------------------------------------------------------------------
# What is seen
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _copy(x_ptr, out_ptr, size, LOAD_BEYOND: tl.constexpr, STORE_BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = at < size
    x = tl.load(x_ptr + at) if LOAD_BEYOND else tl.load(x_ptr + at, exists)
    x = tl.where(exists, x, 0.0)  # what lies beyond is not used
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
    """Each program stores an element, and reads from read_ptr the one that the next program stores."""
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
def test_a_kernel_within_its_tensors_runs_in_any_order(order):
    x, out = surround_with_poison(random(37)), surround_with_poison(torch.zeros(37))
    with watch_accesses(order) as watch:
        _copy[(3,)](x, out, 37, False, False, BLOCK=16)
    assert torch.equal(x, out)
    assert watch.launches == {"_copy": 1}


def test_loads_beyond_a_tensor_are_seen_even_if_their_values_are_not_used():
    x, out = surround_with_poison(random(37)), torch.zeros(37)
    with (
        watch_accesses(),
        pytest.raises(InterpreterError, match=r"_copy, program 2, test_bounds.py:\d+: loads outside"),
    ):
        _copy[(3,)](x, out, 37, True, False, BLOCK=16)
    whole = torch.zeros(16, 4)  # a column: the elements between belong to others
    with watch_accesses(), pytest.raises(InterpreterError, match=r"_copy, program 0, .*: loads outside"):
        _copy[(1,)](whole[:, 0], out, 16, False, False, BLOCK=16)


def test_a_store_beyond_a_tensor_is_refused_before_it_is_made():
    memory = torch.zeros(64)
    with watch_accesses(), pytest.raises(InterpreterError, match=r"_copy, program 2, .*: stores outside"):
        _copy[(3,)](random(37), memory[:37], 37, False, True, BLOCK=16)
    assert memory[:32].count_nonzero() == 32  # by the programs before
    assert memory[32:].count_nonzero() == 0


def test_a_descriptor_gives_its_base():
    x, out = surround_with_poison(random(20, 20)), torch.zeros(16, 16)
    with watch_accesses():
        _copy_by_descriptor[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), out, BLOCK=16)
    assert torch.equal(out, x[:16, :16])
    described = TensorDescriptor.from_tensor(x[:8], [16, 16])
    described.shape = [20, 20]  # it promises more than there is
    with watch_accesses(), pytest.raises(InterpreterError, match="loads outside"):
        _copy_by_descriptor[(1,)](described, out, BLOCK=16)


@pytest.mark.parametrize("order", ["usual", "reversed"])
def test_programs_that_race_are_seen(order):
    memory = torch.zeros(4)
    found = "stores what another program loaded" if order == "usual" else "loads what program"
    with watch_accesses(order), pytest.raises(InterpreterError, match=found):
        _shift[(3,)](random(3), memory, memory)
    with watch_accesses(order):
        _shift[(3,)](random(3), torch.zeros(3), memory)
    with watch_accesses(order), pytest.raises(InterpreterError, match="stores again what program"):
        _store_to[(3,)](memory, 12, BLOCK=1)
    with watch_accesses(order), pytest.raises(InterpreterError, match="twice in one store"):
        _store_to[(1,)](memory, 2, BLOCK=4)
    with watch_accesses(order), pytest.raises(InterpreterError, match="atomics"):
        _add_atomically[(3,)](memory)


def test_lanes_that_are_switched_off_are_undefined_where_a_load_names_no_other():
    out = torch.zeros(1)
    with watch_accesses():
        _sum_without_other[(1,)](random(5), out, 5, BLOCK=8)
    assert out.isnan().all()
