"""Launch every kernel, forward and backward, through Triton's own launcher into a driver that does nothing.

The interpreter takes any Python for a kernel, and `compile_kernels.py` hands the compiler its arguments by itself. Only
this goes the whole way of a call on a GPU, up to the driver: how the launcher binds what it is given, and which
language this version of Triton compiles. It does so with each candidate of the tuning table, at sizes that select each
of its rules. Prints a line for each call that fails; exit code 1 if one did.
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
MANY_IMAGES = 42  # images of 197 tokens: 8,274 rows, from 8,192 on the tuning table has a rule of its own
failures: list[str] = []
rules: set[int] = set()  # of the tuning table, by number: those that were asked for

launch_nothing()


def make_empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Of any values: nothing is computed with them."""
    return torch.empty(*shape, dtype=dtype).requires_grad_()


def call(name: str, function: Callable[..., object], *args: object, **options: object) -> None:
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
    """197 tokens are short, 577 long; head dims of one piece, of two, and padded. The kernels for short sequences run
    from 256 heads of a whole batch on, so each size comes with few heads and with many."""
    for tokens, dim in ((197, 64), (197, 80), (577, 64), (50, 32), (197, 128), (256, 64)):
        for batch in (2, 256) if tokens <= 256 else (2,):
            query = make_empty(batch, tokens, 1, dim, dtype=dtype)
            name = f"attention {batch} x {tokens} x {dim} {dtype}, candidate {candidate}"
            call(name, attention.attention, query, query, query, candidate=candidate)
    for heads in (2, 128):
        query = make_empty(2, 197, 3, heads, 64, dtype=dtype)
        call(f"attention_packed, {heads} heads, {dtype}", attention.attention_packed, query, candidate=candidate)
    query = make_empty(2, 197, 2, 64, dtype=dtype)
    for name, mask in {
        "boolean mask": torch.ones(2, 1, 1, 197, dtype=torch.bool),
        "additive mask": torch.zeros(1, 2, 197, 197, dtype=dtype),
    }.items():
        options = {"mask": mask, "candidate": candidate}
        call(f"attention, {name}, {dtype}", attention.attention, query, query, query, **options)
    for tokens, heads in ((200, 2), (200, 128), (700, 2)):
        packed, bounds = make_empty(tokens, heads, 64, dtype=dtype), torch.tensor([0, 50, tokens], dtype=torch.int32)
        options = {"cu_seqlens": bounds, "max_seqlen": tokens - 50, "candidate": candidate}
        name = f"attention, {tokens} packed tokens, {heads} heads, {dtype}"
        call(name, attention.attention, packed, packed, packed, **options)


def call_rows(dtype: torch.dtype, dim: int = 768, batch: int = 2) -> None:
    x, vector = make_empty(batch, 197, dim, dtype=dtype), make_empty(dim, dtype=dtype)
    call(f"layer_norm {dtype}", layer_norm.layer_norm, x, vector, vector, EPS)
    call(f"add_layer_norm {dtype}", layer_norm.add_layer_norm, x, x, vector, vector, EPS)
    scales = {"scale": vector, "row_scale": torch.ones(batch)}
    call(f"add_layer_norm, scales, {dtype}", layer_norm.add_layer_norm, x, x, vector, vector, EPS, **scales)
    call(f"layer_norm_act {dtype}", layer_norm.layer_norm_act, x, vector, vector, EPS)
    for activation in ("gelu", "gelu_new", "quick_gelu"):
        call(f"bias_gelu {activation} {dtype}", gelu.bias_gelu, x, vector, activation)
    call(f"swiglu {dtype}", gelu.swiglu, x, vector)


def call_odd_sizes(dtype: torch.dtype) -> None:
    """Sizes and addresses that are multiples of 16, or not, or 1: another binary each."""
    for shape in ((2, 197, 100), (1, 1, 768), (16, 16, 768), (1, 16, 1)):
        x, vector = make_empty(*shape, dtype=dtype), make_empty(shape[-1], dtype=dtype)
        call(f"layer_norm {shape} {dtype}", layer_norm.layer_norm, x, vector, vector, EPS)
        call(f"bias_gelu {shape} {dtype}", gelu.bias_gelu, x, vector)
    x, vector = make_empty(2, 197, 769, dtype=dtype).detach()[..., 1:].requires_grad_(), make_empty(768, dtype=dtype)
    aligned = make_empty(2, 197, 769, dtype=dtype).detach()[..., :768].requires_grad_()  # of the same strides
    for name, rows in {"aligned": aligned, "one value further": x}.items():
        call(f"layer_norm, {name}, {dtype}", layer_norm.layer_norm, rows, vector, vector, EPS)
        call(f"bias_gelu, {name}, {dtype}", gelu.bias_gelu, rows, vector)
        heads = rows.view(2, 197, 12, 64)
        call(f"attention, {name}, {dtype}", attention.attention, heads, heads, heads)


def call_matmuls(dtype: torch.dtype, what: str, candidate: int, dim: int = 768) -> None:
    x, vector = make_empty(2, 197, dim, dtype=dtype), make_empty(dim, dtype=dtype)
    sizes = ((4 * dim, dim), (4 * dim,), (dim, 4 * dim))
    first, bias, second = (make_empty(*shape, dtype=dtype) for shape in sizes)
    norm, products = (vector, vector, EPS), layer_norm_linear
    for name, function, arguments in (
        ("layer_norm_linear", products.layer_norm_linear, (x, *norm, first, bias)),
        ("add_layer_norm_linear", products.add_layer_norm_linear, (x, x, *norm, first, bias)),
        ("layer_norm_gelu", products.layer_norm_gelu, (x, *norm, first, bias)),
        ("feed_forward", feed_forward.feed_forward, (x, first, bias, second, vector, "gelu")),
        (
            "add_layer_norm_feed_forward",
            feed_forward.add_layer_norm_feed_forward,
            (x, x, *norm, first, bias, second, vector),
        ),
    ):
        call(f"{name}, {what}", function, *arguments, candidate=candidate)


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
            call(label, patch_embed.patch_embed, *arguments, **options)


@torch.no_grad()
def call_fp8(dtype: torch.dtype) -> None:
    x, vector = torch.randn(2, 197, 768, dtype=dtype), torch.randn(768, dtype=dtype)
    for name, function, arguments in (
        ("quantize_rows", quantize.quantize_rows, (x,)),
        ("bias_gelu_fp8", quantize.bias_gelu_fp8, (x, vector)),
        ("layer_norm_fp8", quantize.layer_norm_fp8, (x, vector, vector, EPS)),
        ("add_layer_norm_fp8", quantize.add_layer_norm_fp8, (x, x, vector, vector, EPS)),
    ):
        call(f"{name} {dtype}", function, *arguments)


@contextlib.contextmanager
def use_candidate(number: int) -> Iterator[None]:
    """Inside, each rule of the tuning table has one candidate: this one, or its last where it has fewer."""
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
    """Prints as its last line the numbers of the tuning table's rules that were launched."""
    for number in range(max(len(rule.candidates) for rule in tuning.TABLE)):
        for dtype in (torch.bfloat16, torch.float32):
            what = f"{dtype}, candidate {number}"
            print(what, flush=True)
            with use_candidate(number):
                call_attention(dtype, number)
                call_rows(dtype)
                call_rows(dtype, dim=192, batch=MANY_IMAGES)
                call_odd_sizes(dtype)
                call_matmuls(dtype, what, number)
                call_patch_embed(dtype, number)
                call_patch_embed(dtype, number, batch=48)  # large tiles fill a GPU
                call_fp8(dtype)
    print(f"{len(failures)} calls failed")
    print(json.dumps(sorted(rules)))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
