"""Attention's launchers and operators: one for three tensors, one for the packed form, whose gradient is one tensor."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.attention import fallback
from fastvit.kernels.attention.backward import _attention_bwd_key_value, _attention_bwd_query, _attention_bwd_short
from fastvit.kernels.attention.forward import _attention_fwd_long, _attention_fwd_short
from fastvit.kernels.operators import operator
from fastvit.kernels.tuning import cdiv, next_power_of_2

MAX_HEAD_DIM = 128
SHORT = 256  # keys whose scores fit into registers at once
ENOUGH_PROGRAMS = 256  # about two on each multiprocessor of an H100


class Call(NamedTuple):
    """One call's arguments beside query, key and value. With cu_seqlens the tokens of all images follow one another,
    those of image i from cu_seqlens[i] to cu_seqlens[i + 1]."""

    mask: Tensor | None  # bool or floating [B or 1, H or 1, Nq or 1, Nk or 1]
    cu_seqlens: Tensor | None  # int32 [B + 1]
    max_seqlen: int | None
    scale: float
    candidate: int  # of the tuning table


class Sizes(NamedTuple):
    batch: int
    heads: int
    rows: int  # queries of the whole batch
    queries: int  # of one image, the largest
    keys: int
    dim: int


def _sizes(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Sizes:
    if cu_seqlens is not None:
        rows, heads, dim = query.shape
        return Sizes(cu_seqlens.numel() - 1, heads, rows, max_seqlen, max_seqlen, dim)
    batch, queries, heads, dim = query.shape
    return Sizes(batch, heads, batch * queries, queries, key.shape[1], dim)


def _pieces(size: int, largest: int, most: int) -> tuple[tuple[int, int], ...]:
    """`size` rounded up to a multiple of 16 and cut into powers of two, (first, length) each: at most `most` of them,
    for which it may be rounded up further."""
    size = cdiv(size, 16) * 16
    while size.bit_count() > most:
        size += 16
    pieces, first = [], 0
    while first < size:
        length = min(largest, 1 << (size - first).bit_length() - 1)
        pieces.append((first, length))
        first += length
    return tuple(pieces)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Steps from image to image (none where they follow each other unevenly), token to token and head to head."""
    return (0, *tensor.stride()[:2]) if tensor.ndim == 3 else tensor.stride()[:3]


def _readable(tensor: Tensor) -> Tensor:
    """The tensor where it lies; a copy only where its last dimension is not contiguous, or where its tokens lie so far
    apart that a tile's offsets would pass 2**31."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-3) < 2**31 // SHORT else tensor.contiguous()


def _mask_arguments(mask: Tensor | None) -> tuple[Tensor | None, list[int]]:
    if mask is None:
        return None, [0, 0, 0, 0]
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, strides


def _checked_bounds(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """cu_seqlens as the kernels read it. On a GPU its values are not looked at, which would wait for it: kernels take
    no token beyond the last, whatever it says."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > tokens or any(first > end for first, end in pairwise(bounds)):
            raise ValueError(f"cu_seqlens: expected 0, then no less than the one before, up to {tokens}, got {bounds}")
    return cu_seqlens.contiguous()


def _shape(sizes: Sizes, call: Call) -> str:
    """By number of keys, and by head dim as it is padded.

    "short" are those for which the kernels that hold all keys of a head are made. With few heads, one program each does
    not fill a GPU; with a mask they would spill registers.
    """
    if sizes.keys > SHORT:
        length = "long"
    elif sizes.batch * sizes.heads < ENOUGH_PROGRAMS or call.mask is not None:
        length = "short, looped"
    else:
        length = "short"
    return f"{length}, dim {next(dim for dim in (64, 80, 96, 128) if sizes.dim <= dim)}"


def _fitting(wanted: int, tokens: int) -> int:
    """A tile's length: a few tokens, or the class token alone, do not pay for `wanted`; a matrix unit takes 16."""
    return min(wanted, max(16, next_power_of_2(tokens)))


def _loop_tile(sizes: Sizes, rows: int, keys: int, num_warps: int, num_stages: int) -> dict[str, object]:
    """Compile-time arguments of the kernels that loop over keys or queries."""
    return {
        "DIM": sizes.dim,
        "DIMS": _pieces(sizes.dim, MAX_HEAD_DIM, 2),
        "KEYS": _fitting(keys, sizes.keys),
        "ROWS": _fitting(rows, sizes.queries),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _short_tile(sizes: Sizes, call: Call, choice: tuning.Choice) -> dict[str, object]:
    """Compile-time arguments of the kernels that hold all keys of a head."""
    uneven = call.cu_seqlens is not None  # then every piece is masked, and to prefetch queries as well would spill
    return {
        "DIM": sizes.dim,
        "DIMS": _pieces(sizes.dim, MAX_HEAD_DIM, 2),
        "KEYS": _pieces(sizes.keys, choice["piece"], 3),
        "FULL": 0 if uneven else sizes.keys // 16 * 16,
        "ROWS": _fitting(choice["rows"], sizes.queries),
        "num_warps": choice["num_warps"],
        "num_stages": 1 if uneven else choice["num_stages"],
    }


def _forward_outputs(query: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Memory for out and lse; zeros with cu_seqlens, for tokens that belong to no image."""
    heads, dim = query.shape[-2:]
    new = query.new_empty if cu_seqlens is None else query.new_zeros
    rows = math.prod(query.shape[:-2])
    return new((*query.shape[:-2], heads * dim)), new((heads, rows), dtype=torch.float32)


def _launch_forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The output [B, Nq, H * D] or [tokens, H * D], and the base-2 log-sum-exp of the scores [H, rows]."""
    bounds = _checked_bounds(call.cu_seqlens, query.shape[0])
    out, lse = _forward_outputs(query, bounds)
    sizes = _sizes(query, key, bounds, call.max_seqlen)
    programs = sizes.batch * sizes.heads
    if out.numel() == 0 or programs == 0:
        return out, lse
    query, key, value = map(_readable, (query, key, value))
    mask, mask_strides = _mask_arguments(call.mask)
    arguments = (
        query, key, value, mask, bounds, out, lse,
        *_strides(query), *_strides(key), *_strides(value), *mask_strides,
        sizes.heads, sizes.rows, sizes.queries, sizes.keys, call.scale,
    )  # fmt: skip
    choice = tuning.candidate("attention_forward", _shape(sizes, call), query.dtype, query.device, call.candidate)
    if "piece" in choice:
        tile = _short_tile(sizes, call, choice)
        blocks = min(choice["blocks"], cdiv(sizes.queries, tile["ROWS"]))
        grid = (programs * cdiv(sizes.queries, tile["ROWS"] * blocks),)
        _attention_fwd_short[grid](*arguments, **tile, BLOCKS=blocks)
    else:
        tile = _loop_tile(sizes, **choice)
        masked = bounds is not None or sizes.keys % tile["KEYS"] != 0
        _attention_fwd_long[(programs * cdiv(sizes.queries, tile["ROWS"]),)](*arguments, **tile, MASKED=masked)
    return out, lse


def _launch_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], call: Call,
) -> None:  # fmt: skip
    """Writes the gradients of query, key and value: three tensors, or parts of one."""
    bounds = _checked_bounds(call.cu_seqlens, query.shape[0])
    sizes = _sizes(query, key, bounds, call.max_seqlen)
    programs = sizes.batch * sizes.heads
    if out.numel() == 0 or programs == 0:
        for grad in grads:
            grad.zero_()
        return
    grad_out = _readable(grad_out.unflatten(-1, (sizes.heads, sizes.dim)))
    query, key, value = map(_readable, (query, key, value))
    mask, mask_strides = _mask_arguments(call.mask)
    inputs = (query, key, value, grad_out, mask, bounds)
    grad_query, grad_key, grad_value = grads
    numbers = (
        *_strides(query), *_strides(key), *_strides(value), *_strides(grad_out), *mask_strides,
        grad_query.stride(-3), sizes.heads, sizes.rows, sizes.queries, sizes.keys, call.scale,
    )  # fmt: skip
    choice = tuning.candidate("attention_backward", _shape(sizes, call), query.dtype, query.device, call.candidate)
    if "keys_per_warp" in choice:
        keys = _fitting(SHORT, sizes.keys)
        num_warps = max(4, keys // choice["keys_per_warp"])  # whose registers hold the sums of so many keys' gradients
        tile = _loop_tile(sizes, choice["rows"], keys, num_warps, choice["num_stages"])
        tile["DIMS"] = _pieces(sizes.dim, MAX_HEAD_DIM, 1)  # 48 cut into 32 + 16 spills, padded to 64 it does not
        tile |= {"MASKED": bounds is not None or sizes.keys != keys, "TRANSPOSED": choice["transposed"]}
        _attention_bwd_short[(programs,)](*inputs, out, lse, *grads, *numbers, **tile)
        return
    # First by queries, which also computes the delta that the second reads.
    delta = torch.empty_like(lse)
    tile = _loop_tile(sizes, choice["rows"], choice["keys"], choice["num_warps"], choice["num_stages"])
    masked = bounds is not None or sizes.keys % tile["KEYS"] != 0
    grid = (programs * cdiv(sizes.queries, tile["ROWS"]),)
    _attention_bwd_query[grid](*inputs, out, lse, grad_query, delta, *numbers, **tile, MASKED=masked)
    rows, keys, num_warps = (choice[f"key_value_{name}"] for name in ("rows", "keys", "warps"))
    tile = _loop_tile(sizes, rows, keys, num_warps, choice["num_stages"])
    grid = (programs * cdiv(sizes.keys, tile["KEYS"]),)
    _attention_bwd_key_value[grid](*inputs, lse, delta, grad_key, grad_value, *numbers, **tile)


@operator("attention", fallback=fallback.forward)
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None,
    scale: float, candidate: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_forward(query, key, value, Call(mask, cu_seqlens, max_seqlen, scale, candidate))


@_attention.register_fake
def _(query, key, value, mask, cu_seqlens, max_seqlen, scale, candidate):
    return _forward_outputs(query, cu_seqlens)


@operator("attention_backward", fallback=fallback.backward)
def _attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float, candidate: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = tuple(_empty_gradient(tensor, cu_seqlens) for tensor in (query, key, value))
    call = Call(mask, cu_seqlens, max_seqlen, scale, candidate)
    _launch_backward(grad_out, query, key, value, out, lse, grads, call)
    return grads


@_attention_backward.register_fake
def _(grad_out, query, key, value, *rest):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


@operator("attention_packed", fallback=fallback.forward_packed)
def _attention_packed(
    qkv: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float, candidate: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_forward(*qkv.unbind(-3), Call(mask, cu_seqlens, max_seqlen, scale, candidate))


@_attention_packed.register_fake
def _(qkv, mask, cu_seqlens, max_seqlen, scale, candidate):
    return _forward_outputs(qkv.select(-3, 0), cu_seqlens)


@operator("attention_packed_backward", fallback=fallback.backward_packed)
def _attention_packed_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    max_seqlen: int | None, scale: float, candidate: int,
) -> Tensor:  # fmt: skip
    grad_qkv = _empty_gradient(qkv, cu_seqlens)
    call = Call(mask, cu_seqlens, max_seqlen, scale, candidate)
    _launch_backward(grad_out, *qkv.unbind(-3), out, lse, grad_qkv.unbind(-3), call)
    return grad_qkv


@_attention_packed_backward.register_fake
def _(grad_out, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _empty_gradient(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Contiguous; zeros with cu_seqlens, for tokens that belong to no image."""
    return like.new_empty(like.shape) if cu_seqlens is None else like.new_zeros(like.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, mask, cu_seqlens, max_seqlen, scale, candidate = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse, mask, cu_seqlens)
    ctx.numbers = max_seqlen, scale, candidate


def _backward(ctx, grad_out, _):
    """For both operators: query, key, value or qkv come first among their inputs."""
    *tensors, out, lse, mask, cu_seqlens = ctx.saved_tensors
    no_grads = (None,) * 5  # mask, cu_seqlens, max_seqlen, scale, candidate
    if grad_out is None:
        return (*(None for _ in tensors), *no_grads)
    arguments = (grad_out, *tensors, out, lse, mask, cu_seqlens, *ctx.numbers)
    if len(tensors) == 1:
        return (_attention_packed_backward(*arguments), *no_grads)
    return (*_attention_backward(*arguments), *no_grads)


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_packed.register_autograd(_backward, setup_context=_setup_context)
