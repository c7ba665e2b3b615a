"""Attention for the short sequences of a Vision Transformer.

    scores = query @ key^T * scale + mask;   out = softmax(scores) @ value          for each image and head

    query [B, Nq, H, D], key and value [B, Nk, H, D], any strides  ->  out [B, Nq, H * D]
    or qkv [B, N, 3, H, D] as one GEMM wrote it                    ->  out [B, N, H * D]

Inputs are read in place, and out is written in the output projection's layout, without transposes or copies. qkv's
gradient is also one tensor, whose three parts are written in place. `kernels.py` has the kernels, this file the
launchers, their fallbacks, the operators (for three tensors and for the packed form) and the public functions.

At N = 197, D = 64 (ViT-B/16, batch 256, bfloat16) forward is memory-bound: it moves 310 MB, 103 microseconds at 3 TB/s,
and computes for 38. So with up to 256 keys (`short`) a program reads the keys and values of one head once into shared
memory and loops over the queries; all scores of a query are in registers at once, and the softmax needs no second pass.
Keys are split into powers of two, 197 into 128 + 64 + 16, so that 208 columns are computed instead of 256, and so are
head dims, 80 into 64 + 16. With more keys, with a mask, or with too few heads to fill a GPU, the softmax is computed
online (`long`; Milakov & Gimelshein 2018).

Saved for backward: qkv, out, and one float32 per row, the base-2 log-sum-exp, from which probabilities are recomputed
(Dao et al. 2022): besides qkv 0.31 MB per image of ViT-B, where the probabilities would take 0.93. Backward of `short`
is one launch, which holds the gradients of all keys and values of a head in registers and writes each query's gradient
once: 620 MB, 207 microseconds. `long` needs two launches, one by queries and one by keys. Sums have a fixed order,
without atomics: two runs are bitwise equal. Scores are float32, multiplied once by scale * log2(e), for exp2.

Dropout of probabilities and the gradient of an additive mask are not supported here: PyTorch computes them.

Vaswani et al. 2017, arXiv:1706.03762; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.attention.kernels import (
    _attention_bwd_key_value,
    _attention_bwd_query,
    _attention_fwd_long,
    _attention_fwd_short,
)
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.operators import is_fake, register
from fastvit.kernels.tuning import cdiv, next_power_of_2

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128
SHORT_KEYS = 256  # the most keys whose scores fit in registers at once
MIN_PROGRAMS = 256  # about two per multiprocessor of an H100
MAX_FALLBACK_SCORES = 2**28  # scores that a fallback computes at once: 1 GiB in float32


def _get_sizes(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, ...]:
    """Images, heads, queries in the batch, and queries and keys of one image (the largest)."""
    if cu_seqlens is not None:
        return cu_seqlens.numel() - 1, query.shape[1], query.shape[0], max_seqlen, max_seqlen
    batch, queries, heads, _ = query.shape
    return batch, heads, batch * queries, queries, key.shape[1]


def _split(size: int, most: int, largest: int = MAX_HEAD_DIM) -> tuple[tuple[int, int], ...]:
    """`size` rounded up to a multiple of 16 and split into at most `most` powers of two, (first, length) each; it is
    rounded up further if they do not suffice."""
    size = cdiv(size, 16) * 16
    while size.bit_count() > most:
        size += 16
    pieces, first = [], 0
    while first < size:
        length = min(largest, 1 << (size - first).bit_length() - 1)
        pieces.append((first, length))
        first += length
    return tuple(pieces)


def _fit_tile(length: int, tokens: int) -> int:
    """A tile's length: at most `length`, less for few tokens such as the class token alone; matrix units need 16."""
    return min(length, max(16, next_power_of_2(tokens)))


def _describe_shape(programs: int, keys: int, dim: int, mask: Tensor | None) -> str:
    """The shape class: by number of keys and padded head dim.

    "short" selects the kernels that hold all keys of a head. Few heads, one program each, do not fill a GPU, and with a
    mask these kernels would spill registers.
    """
    looped = programs < MIN_PROGRAMS or mask is not None
    length = "long" if keys > SHORT_KEYS else "short, looped" if looped else "short"
    return f"{length}, dim {next(padded for padded in (64, 80, 96, 128) if dim <= padded)}"


def _make_readable(tensor: Tensor) -> Tensor:
    """The tensor; a copy only if its last dimension is not contiguous, or a tile's offsets could exceed 2**31."""
    return tensor if tensor.stride(-1) == 1 and tensor.stride(-3) < 2**31 // SHORT_KEYS else tensor.contiguous()


def _list_strides(*tensors: Tensor) -> list[int]:
    """The strides of each tensor over images (0 with cu_seqlens), tokens and heads."""
    return [step for t in tensors for step in ((0, *t.stride()[:2]) if t.ndim == 3 else t.stride()[:3])]


def _prepare_mask(mask: Tensor | None) -> tuple[Tensor | None, list[int]]:
    """The mask, as bytes if boolean, and its strides: 0 along broadcast dimensions."""
    if mask is None:
        return None, [0, 0, 0, 0]
    strides = [0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)]
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask, strides


def _check_bounds(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """cu_seqlens, contiguous. On a GPU its values are not checked, which would synchronise; the kernels clamp them."""
    if cu_seqlens is None:
        return None
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] > tokens or any(first > end for first, end in pairwise(bounds)):
            raise ValueError(f"cu_seqlens: expected 0, then no less than the one before, up to {tokens}, got {bounds}")
    return cu_seqlens.contiguous()


def _alloc(like: Tensor, shape: tuple[int, ...], cu_seqlens: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a result; with cu_seqlens zeros, for tokens that belong to no image."""
    return like.new_empty(shape, dtype=dtype) if cu_seqlens is None else like.new_zeros(shape, dtype=dtype)


def _launch_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None,
    scale: float, candidate: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns out [B, Nq, H * D] or [tokens, H * D], and the base-2 log-sum-exp of the scores [H, rows].

    mask: bool or floating [B or 1, H or 1, Nq or 1, Nk or 1].
    """
    batch, heads, rows, queries, keys = _get_sizes(query, key, cu_seqlens, max_seqlen)
    dim = query.shape[-1]
    out = _alloc(query, (*query.shape[:-2], heads * dim), cu_seqlens)
    lse = _alloc(query, (heads, rows), cu_seqlens, torch.float32)
    if is_fake(out):
        return out, lse
    bounds = _check_bounds(cu_seqlens, query.shape[0])
    if out.numel() == 0 or batch == 0:
        return out, lse
    tensors = [_make_readable(tensor) for tensor in (query, key, value)]
    mask_values, mask_strides = _prepare_mask(mask)
    numbers = (*_list_strides(*tensors), *mask_strides, heads, rows, queries, keys, scale)
    arguments = (*tensors, mask_values, bounds, out, lse, *numbers)
    shape = _describe_shape(batch * heads, keys, dim, mask)
    tile = dict(tuning.select("attention_forward", shape, query.dtype, query.device, candidate))
    tile |= {"DIM": dim, "DIMS": _split(dim, 2), "ROWS": _fit_tile(tile.pop("rows"), queries)}
    if "piece" in tile:
        if bounds is not None:  # every piece is masked, and prefetching queries as well would spill
            tile["num_stages"] = 1
        tile |= {"KEYS": _split(keys, 3, tile.pop("piece")), "FULL": 0 if bounds is not None else keys // 16 * 16}
        tile["BLOCKS"] = min(tile.pop("blocks"), cdiv(queries, tile["ROWS"]))
        grid = (batch * heads * cdiv(queries, tile["ROWS"] * tile["BLOCKS"]),)
        _attention_fwd_short[grid](*arguments, **tile)
    else:
        tile["KEYS"] = _fit_tile(tile.pop("keys"), keys)
        masked = bounds is not None or keys % tile["KEYS"] != 0
        _attention_fwd_long[(batch * heads * cdiv(queries, tile["ROWS"]),)](*arguments, **tile, MASKED=masked)
    return out, lse


def _launch_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, ...], mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float,
    candidate: int,
) -> None:  # fmt: skip
    """Write the gradients of query, key and value, which are three tensors or parts of one."""
    if is_fake(out):
        return
    bounds = _check_bounds(cu_seqlens, query.shape[0])
    batch, heads, rows, queries, keys = _get_sizes(query, key, bounds, max_seqlen)
    programs, dim = batch * heads, query.shape[-1]
    if out.numel() == 0 or programs == 0:
        for grad in grads:
            grad.zero_()
        return
    tensors = [_make_readable(t) for t in (query, key, value, grad_out.unflatten(-1, (heads, dim)))]
    mask_values, mask_strides = _prepare_mask(mask)
    inputs = (*tensors, mask_values, bounds)
    grad_query, grad_key, grad_value = grads
    numbers = (*_list_strides(*tensors), *mask_strides, grad_query.stride(-3), heads, rows, queries, keys, scale)
    shape = _describe_shape(programs, keys, dim, mask)
    choice = tuning.select("attention_backward", shape, query.dtype, query.device, candidate)

    def tile(pieces: int, most_rows: int, most_keys: int, num_warps: int) -> dict[str, object]:
        keys_of_tile = _fit_tile(most_keys, keys)
        masked = bounds is not None or keys % keys_of_tile != 0
        return {
            "DIM": dim, "DIMS": _split(dim, pieces), "MASKED": masked, "KEYS": keys_of_tile,
            "ROWS": _fit_tile(most_rows, queries), "num_warps": num_warps, "num_stages": choice["num_stages"],
        }  # fmt: skip

    if "keys_per_warp" in choice:
        num_warps = max(4, _fit_tile(SHORT_KEYS, keys) // choice["keys_per_warp"])  # registers hold the key gradients
        # A head dim of 48 spills as 32 + 16, but not padded to 64.
        arguments = tile(1, choice["rows"], SHORT_KEYS, num_warps) | {"TRANSPOSED": choice["transposed"]}
        _attention_bwd_key_value[(programs,)](
            *inputs, out, lse, grad_query, None, grad_key, grad_value, *numbers, **arguments
        )
        return
    delta = torch.empty_like(lse)
    arguments = tile(2, choice["rows"], choice["keys"], choice["num_warps"])
    grid = (programs * cdiv(queries, arguments["ROWS"]),)
    _attention_bwd_query[grid](*inputs, out, lse, grad_query, delta, *numbers, **arguments)
    arguments = tile(2, *(choice[f"key_value_{name}"] for name in ("rows", "keys", "warps"))) | {"TRANSPOSED": 0}
    grid = (programs * cdiv(keys, arguments["KEYS"]),)
    _attention_bwd_key_value[grid](*inputs, None, lse, None, delta, grad_key, grad_value, *numbers, **arguments)


def _split_images(
    tensors: tuple[Tensor, ...], mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Chunks of images whose scores fit in MAX_FALLBACK_SCORES: tensors as views [b, N, ...], and their mask.

    tensors: [B, N, ...] or [tokens, ...] each; query and key come first.
    """
    if cu_seqlens is None:
        (batch, queries, heads), keys = tensors[0].shape[:3], tensors[1].shape[1]
        step = max(1, MAX_FALLBACK_SCORES // max(1, heads * queries * keys))
        for own in (slice(first, first + step) for first in range(0, batch, step)):
            yield [tensor[own] for tensor in tensors], mask if mask is None or len(mask) == 1 else mask[own]
        return
    for image, (first, end) in enumerate(pairwise(cu_seqlens.clamp(0, len(tensors[0])).tolist())):
        count = min(max(end - first, 0), max_seqlen)
        own = None if mask is None else mask[image % len(mask)][None, :, :count, :count]
        yield [tensor[None, first : first + count] for tensor in tensors], own


def _compute_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """float32 [b, H, Nq, Nk], in natural units."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * scale
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()


def _forward_fallback(query, key, value, mask, cu_seqlens, max_seqlen, scale, candidate):
    """`_launch_forward` in plain PyTorch, a few times slower."""
    out = query.new_zeros(query.shape)
    lse = query.new_zeros(query.shape[:-1], dtype=torch.float32)
    for (q, k, v, o, level), own_mask in _split_images((query, key, value, out, lse), mask, cu_seqlens, max_seqlen):
        scores = _compute_scores(q, k, own_mask, scale)
        highest = scores.logsumexp(-1, keepdim=True)
        highest = highest.masked_fill(highest == float("-inf"), 0.0)  # every key is masked: the row is zeros
        o.copy_(torch.einsum("bhqk,bkhd->bqhd", (scores - highest).exp(), v.float()))
        level.copy_(highest.squeeze(-1).transpose(1, 2) / math.log(2))
    return out.flatten(-2), lse.flatten(0, -2).t().contiguous()


def _backward_fallback(grad_out, query, key, value, out, lse, mask, cu_seqlens, max_seqlen, scale, candidate):
    grads = tuple(tensor.new_zeros(tensor.shape) for tensor in (query, key, value))
    grad_out, out = (tensor.unflatten(-1, query.shape[-2:]) for tensor in (grad_out, out))
    level = lse.t().unflatten(0, query.shape[:-2]) * math.log(2)
    tensors = (query, key, value, grad_out, out, level, *grads)
    for (q, k, v, do, o, at, dq, dk, dv), own_mask in _split_images(tensors, mask, cu_seqlens, max_seqlen):
        probabilities = (_compute_scores(q, k, own_mask, scale) - at.transpose(1, 2)[..., None]).exp()
        delta = (do.float() * o.float()).sum(-1).transpose(1, 2)[..., None]
        grad_scores = probabilities * (torch.einsum("bqhd,bkhd->bhqk", do.float(), v.float()) - delta) * scale
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", grad_scores, k.float()))
        dk.copy_(torch.einsum("bhqk,bqhd->bkhd", grad_scores, q.float()))
        dv.copy_(torch.einsum("bhqk,bqhd->bkhd", probabilities, do.float()))
    return grads


def _packed_forward_fallback(qkv, *options):
    return _forward_fallback(*qkv.unbind(-3), *options)


def _packed_backward_fallback(grad_out, qkv, *rest):
    return torch.stack(_backward_fallback(grad_out, *qkv.unbind(-3), *rest), -3)


_attention = register("attention", fallback=_forward_fallback)(_launch_forward)


@register("attention_backward", fallback=_backward_fallback)
def _attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float, candidate: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    parts = (query, key, value)
    grads = tuple(_alloc(part, part.shape, cu_seqlens) for part in parts)
    _launch_backward(grad_out, *parts, out, lse, grads, mask, cu_seqlens, max_seqlen, scale, candidate)
    return grads


@register("attention_packed", fallback=_packed_forward_fallback)
def _attention_packed(
    qkv: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float, candidate: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_forward(*qkv.unbind(-3), mask, cu_seqlens, max_seqlen, scale, candidate)


@register("attention_packed_backward", fallback=_packed_backward_fallback)
def _attention_packed_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    max_seqlen: int | None, scale: float, candidate: int,
) -> Tensor:  # fmt: skip
    parts, grad = qkv.unbind(-3), _alloc(qkv, qkv.shape, cu_seqlens)
    _launch_backward(grad_out, *parts, out, lse, grad.unbind(-3), mask, cu_seqlens, max_seqlen, scale, candidate)
    return grad


def _setup_context(ctx, inputs, output) -> None:
    *tensors, mask, cu_seqlens, max_seqlen, scale, candidate = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output, mask, cu_seqlens)
    ctx.numbers = max_seqlen, scale, candidate


def _backward(ctx, grad_out, _):
    """For both operators, whose inputs are query, key, value or qkv, then five without gradients."""
    saved = ctx.saved_tensors
    if grad_out is None:
        return (None,) * (len(saved) + 1)
    if len(saved) == 5:
        return (_attention_packed_backward(grad_out, *saved, *ctx.numbers), *(None,) * 5)
    return (*_attention_backward(grad_out, *saved, *ctx.numbers), *(None,) * 5)


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_packed.register_autograd(_backward, setup_context=_setup_context)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, candidate: int = 0,
) -> Tensor:  # fmt: skip
    """softmax(query key^T * scale + mask) value for each head; the heads' outputs are concatenated.

    Float32 inputs are cast under autocast as for PyTorch's scaled_dot_product_attention. Not twice differentiable.

    Args:
        query: [B, Nq, H, D], float32, bfloat16 or float16, any strides; D a multiple of 8 from 16 to 128. A tensor is
            copied only if its last dimension is not contiguous, or its tokens are 2**23 elements apart.
        key, value: [B, Nk, H, D], query's dtype.
        scale: 1 / sqrt(D) if None.
        mask: broadcastable to [B, H, Nq, Nk]; boolean (True: may be attended to), or floating and added to the scores,
            not differentiable. A row in which every key is masked returns zeros. An added number that in base 2 is
            below float32's range, such as the lowest float32, also masks a key.
        cu_seqlens: int32 [B + 1], for images of different sizes in one batch: query, key and value are [tokens, H, D],
            and image i attends to its own tokens, from cu_seqlens[i] to cu_seqlens[i + 1]. Tokens of no image return
            zeros. On a GPU the values are not checked, which would synchronise, but never lead out of bounds.
        max_seqlen: with cu_seqlens, at least the largest image's number of tokens; tokens beyond it return zeros. mask
            is then broadcastable to [B, H, max_seqlen, max_seqlen].
        candidate: number of the candidate in the tuning table.

    Returns:
        [B, Nq, H * D] or [tokens, H * D], contiguous.

    Raises:
        ValueError: if an argument does not fit; the message names it.
    """
    query, key, value = (_cast(tensor) for tensor in (query, key, value))
    options = _check_arguments(query, key, value, scale, mask, cu_seqlens, max_seqlen, candidate)
    return _attention(query, key, value, *options)[0]


def attention_packed(
    qkv: Tensor, *, num_heads: int | None = None, scale: float | None = None, mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, candidate: int = 0,
) -> Tensor:  # fmt: skip
    """`attention` of the three parts of one tensor, as the GEMM with concatenated weights writes it.

    Args:
        qkv: [B, N, 3, H, D], or [B, N, 3 * H * D] with num_heads; with cu_seqlens [tokens, ...] instead of [B, N, ...].
            Its gradient is one tensor as well.
        num_heads: H, required if qkv's last dimension is flat.
        scale, mask, cu_seqlens, max_seqlen, candidate: as in `attention`.

    Returns:
        [B, N, H * D] or [tokens, H * D], contiguous.

    Raises:
        ValueError: as in `attention`.
    """
    qkv = _cast(qkv)
    packed_rank = 4 if cu_seqlens is None else 3
    if qkv.ndim == packed_rank - 1:
        if num_heads is None or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
            expected = f"the heads in qkv's last dimension, a third of {qkv.shape[-1]}"
            raise ValueError(f"num_heads: expected {expected}, got {num_heads}")
        qkv = qkv.unflatten(-1, (3, num_heads, -1))
    elif num_heads not in (None, qkv.shape[-2]):
        raise ValueError(f"num_heads: expected {qkv.shape[-2]}, the heads of qkv {list(qkv.shape)}, got {num_heads}")
    if qkv.ndim != packed_rank + 1 or qkv.shape[-3] != 3:
        expected = "[B, N, 3, H, D]" if cu_seqlens is None else "[tokens, 3, H, D] with cu_seqlens"
        raise ValueError(f"qkv: expected {expected}, got {list(qkv.shape)}")
    options = _check_arguments(*qkv.unbind(-3), scale, mask, cu_seqlens, max_seqlen, candidate)
    return _attention_packed(qkv, *options)[0]


def supports_head_dim(dim: int) -> bool:
    return MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM and dim % 8 == 0


def _cast(tensor: Tensor) -> Tensor:
    """Cast as PyTorch's autocast does, which does not know the device "meta"."""
    device = tensor.device.type
    if tensor.dtype == torch.float32 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _check_arguments(query, key, value, scale, mask, cu_seqlens, max_seqlen, candidate) -> tuple:
    """The operators' arguments after their tensors, with defaults and a mask of four dimensions; raises ValueError."""
    if cu_seqlens is None:
        for name, tensor, size, what in (("query", query, "Nq", "query"), ("key", key, "Nk", "key")):
            if tensor.ndim != 4 or tensor.shape[1] == 0:
                expected = f"[B, {size}, H, D] with at least one {what}"
                raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")
        key_shape = (query.shape[0], key.shape[1], *query.shape[2:])
    else:
        if query.ndim != 3:
            raise ValueError(f"query: expected [tokens, H, D] with cu_seqlens, got {list(query.shape)}")
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens: expected [B + 1], got {list(cu_seqlens.shape)}")
        check_tensor("cu_seqlens", cu_seqlens, cu_seqlens.shape, (torch.int32,), query.device)
        if max_seqlen is None or max_seqlen < 1:
            raise ValueError(f"max_seqlen: expected the tokens of the largest image, got {max_seqlen}")
        key_shape = query.shape
    dim = query.shape[-1]
    if not supports_head_dim(dim):
        expected = f"a head dim that is a multiple of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        raise ValueError(f"query: expected {expected}, got {dim}")
    check_tensor("query", query, query.shape, DTYPES, query.device)
    check_tensor("key", key, key_shape, (query.dtype,), query.device)
    check_tensor("value", value, key_shape, (query.dtype,), query.device)
    if mask is not None:
        batch, heads, _, queries, keys = _get_sizes(query, key, cu_seqlens, max_seqlen)
        full = (batch, heads, queries, keys)
        sizes = zip(reversed(mask.shape), reversed(full), strict=False)
        if not 1 <= mask.ndim <= 4 or any(size not in (1, most) for size, most in sizes):
            raise ValueError(f"mask: expected something broadcastable to {list(full)}, got {list(mask.shape)}")
        check_tensor("mask", mask, mask.shape, (torch.bool, *DTYPES), query.device)
        if mask.requires_grad and torch.is_grad_enabled():
            raise ValueError("mask: expected one that requires no gradient, which the kernels do not compute")
        mask = mask[(None,) * (4 - mask.ndim)]
    return mask, cu_seqlens, max_seqlen, float(dim**-0.5 if scale is None else scale), candidate
