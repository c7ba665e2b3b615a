"""Attention's forward kernels: `short` holds all keys of a head, `long` passes over them."""

import triton
import triton.language as tl

from fastvit.kernels.attention.tiles import (
    _add_product,
    _finish_scores,
    _load,
    _locate,
    _product,
    _scale_rows,
    _store,
    _transposed,
    _zeros,
)


@triton.jit
def _attention_fwd_short(
    query_ptr, key_ptr, value_ptr,                  # in:  [B, N, H, D] by strides, or [tokens, H, D] with cu_seqlens
    mask_ptr, cu_seqlens_ptr,                       # in:  [B, H, Nq, Nk] by strides, [B + 1] int32; or None
    out_ptr, lse_ptr,                               # out: [rows, H, D], [H, rows] float32
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    heads, rows, num_queries, num_keys, scale,      # rows: queries of the whole batch
    DIM: tl.constexpr, DIMS: tl.constexpr,
    KEYS: tl.constexpr, FULL: tl.constexpr,         # keys below FULL exist in every image
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,       # a program takes BLOCKS times ROWS queries
):  # fmt: skip
    blocks = tl.cdiv(num_queries, ROWS * BLOCKS)
    pair = tl.program_id(0) // blocks
    image, first, head, queries, keys = _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys)
    query_ptr += image * stride_query_batch + first * stride_query_token + head * stride_query_head
    key_ptr += image * stride_key_batch + first * stride_key_token + head * stride_key_head
    value_ptr += image * stride_value_batch + first * stride_value_token + head * stride_value_head
    mask_start = (pair // heads).to(tl.int64) * stride_mask_batch + head * stride_mask_head
    row = image * num_queries + first
    out_ptr += (row * heads + head) * DIM
    lse_ptr += head * rows + row

    key_tiles, value_tiles = (), ()
    for c in tl.static_range(len(KEYS)):
        key = _load(key_ptr, KEYS[c][0], keys, stride_key_token, KEYS[c][0] + KEYS[c][1] > FULL, KEYS[c][1], DIM, DIMS)
        value = _load(
            value_ptr, KEYS[c][0], keys, stride_value_token, KEYS[c][0] + KEYS[c][1] > FULL, KEYS[c][1], DIM, DIMS
        )
        key_tiles = key_tiles + (_transposed(key),)
        value_tiles = value_tiles + (value,)

    begin = tl.program_id(0) % blocks * (ROWS * BLOCKS)
    for start in range(begin, tl.minimum(begin + ROWS * BLOCKS, queries), ROWS):
        at_query = start + tl.arange(0, ROWS)
        query = _load(query_ptr, start, queries, stride_query_token, True, ROWS, DIM, DIMS)
        scores = ()
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        for c in tl.static_range(len(KEYS)):
            at = KEYS[c][0] + tl.arange(0, KEYS[c][1])
            chunk = _finish_scores(
                _product(query, key_tiles[c]), at_query[:, None], at[None, :], queries, keys, scale,
                mask_ptr, mask_start, stride_mask_query, stride_mask_key, KEYS[c][0] + KEYS[c][1] > FULL,
            )  # fmt: skip
            highest = tl.maximum(highest, tl.max(chunk, 1))
            scores = scores + (chunk,)
        if mask_ptr is not None:  # a row whose every key is hidden has probabilities of zero, not NaN
            highest = tl.where(highest == float("-inf"), 0.0, highest)

        total = tl.zeros([ROWS], tl.float32)
        out = _zeros(ROWS, DIMS)
        for c in tl.static_range(len(KEYS)):
            probabilities = tl.exp2(scores[c] - highest[:, None])
            total += tl.sum(probabilities, 1)
            out = _add_product(out, probabilities, value_tiles[c])
        if mask_ptr is not None:
            total = tl.where(total == 0.0, 1.0, total)
        _store(out_ptr, out, (1.0 / total)[:, None], start, queries, heads * DIM, ROWS, DIM, DIMS)
        tl.store(lse_ptr + at_query, highest + tl.log2(total), at_query < queries)


@triton.jit
def _attention_fwd_long(
    query_ptr, key_ptr, value_ptr,                  # in:  [B, N, H, D] by strides, or [tokens, H, D] with cu_seqlens
    mask_ptr, cu_seqlens_ptr,                       # in:  [B, H, Nq, Nk] by strides, [B + 1] int32; or None
    out_ptr, lse_ptr,                               # out: [rows, H, D], [H, rows] float32
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    heads, rows, num_queries, num_keys, scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    MASKED: tl.constexpr,                           # the number of keys may not be a multiple of KEYS
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_queries, ROWS)
    pair = tl.program_id(0) // blocks
    image, first, head, queries, keys = _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys)
    query_ptr += image * stride_query_batch + first * stride_query_token + head * stride_query_head
    key_ptr += image * stride_key_batch + first * stride_key_token + head * stride_key_head
    value_ptr += image * stride_value_batch + first * stride_value_token + head * stride_value_head
    mask_start = (pair // heads).to(tl.int64) * stride_mask_batch + head * stride_mask_head
    row = image * num_queries + first
    out_ptr += (row * heads + head) * DIM
    lse_ptr += head * rows + row

    begin = tl.program_id(0) % blocks * ROWS
    if cu_seqlens_ptr is not None:  # noqa: SIM102 (one is known at compile time, the other not)
        if begin >= queries:
            return
    at_query = begin + tl.arange(0, ROWS)
    query = _load(query_ptr, begin, queries, stride_query_token, True, ROWS, DIM, DIMS)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = _zeros(ROWS, DIMS)
    for start in range(0, keys, KEYS):
        at = start + tl.arange(0, KEYS)
        key = _transposed(_load(key_ptr, start, keys, stride_key_token, MASKED, KEYS, DIM, DIMS))
        scores = _finish_scores(
            _product(query, key), at_query[:, None], at[None, :], queries, keys, scale,
            mask_ptr, mask_start, stride_mask_query, stride_mask_key, MASKED,
        )  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        level = new_highest
        if mask_ptr is not None:  # no key so far
            level = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        probabilities = tl.exp2(scores - level[:, None])
        correction = tl.exp2(highest - level)
        total = total * correction + tl.sum(probabilities, 1)
        highest = new_highest
        value = _load(value_ptr, start, keys, stride_value_token, MASKED, KEYS, DIM, DIMS)
        out = _add_product(_scale_rows(out, correction), probabilities, value)
    if mask_ptr is not None:
        highest = tl.where(total == 0.0, 0.0, highest)
        total = tl.where(total == 0.0, 1.0, total)
    _store(out_ptr, out, (1.0 / total)[:, None], begin, queries, heads * DIM, ROWS, DIM, DIMS)
    tl.store(lse_ptr + at_query, highest + tl.log2(total), at_query < queries)
