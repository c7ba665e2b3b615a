"""Attention for the short sequences of a Vision Transformer.

    scores = query @ key^T * scale + bias;   out = dropout(softmax(scores)) @ value          for each picture and head

    query [B, Nq, H, D], key and value [B, Nk, H, D], any strides  ->  out [B, Nq, H * D]
    or qkv [B, N, 3, H, D] as one matrix product wrote it          ->  out [B, N, H * D]

The three are read where they lie, and out is written as the output projection reads it: no transpose, no copy. The
gradient of qkv is one tensor too, its three parts written in place by strides.

At N = 197, D = 64 (ViT-B/16, batch 256, bfloat16) forward moves 310 MB, 103 microseconds at 3 TB/s, and computes for
38: it is bound by memory. So a program takes one head, reads its keys and values once into shared memory, and passes
over the queries; all scores of a query are in registers at once and the softmax needs no second look (`short`: up to
256 keys). The keys are cut into powers of two, 197 into 3 * 64 + 16, so that 208 columns are computed and not 256; head
dims too, 80 into 64 + 16. With more keys (`long`; or a mask, dropout, or too few heads to fill a GPU) the softmax runs
along (Milakov & Gimelshein 2018).

Kept for backward: qkv, out, and one float32 a row, the log-sum-exp in base 2, from which the probabilities are computed
again (Dao et al. 2022). For ViT-B's 197 tokens those would be 0.93 MB a picture in bfloat16, what is kept beside qkv is
0.31 MB. Backward of `short` is one kernel: it computes the probabilities once, holds the gradients of all keys and
values of its head in registers, and writes each query's gradient once: 620 MB, 207 microseconds. `long` takes two
kernels, one by queries and one by keys. Every sum has its one place and order, without atomics: two runs give the same
bits. Scores are float32, scaled by scale * log2(e) in one multiplication for exp2.

Dropout asks Philox once for each probability, in forward and again in backward; it is not made to be fast, as no
ViT in use drops probabilities.

Vaswani et al. 2017, arXiv:1706.03762; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.launch import launch
from fastvit.kernels.operators import operator
from fastvit.kernels.tuning import cdiv, next_power_of_2

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128
SHORT = 256  # keys whose scores fit into registers at once
ENOUGH_PROGRAMS = 256  # about two on each multiprocessor of an H100
MASK_PROGRAMS = 528  # four there; the same number everywhere: the same sums everywhere
LOG2E = tl.constexpr(1.4426950408889634)

# ---------------------------------------------------------------------------------------------------------------------
# Pieces that the kernels share. A tile is a tuple: its columns, the head dim, are cut into powers of two. `DIMS` and
# `KEYS` are such cuts: (first, length) for each piece.
#
# Steps from head to head are compile-time constants of the kernels: at a head dim like 72, which 16 does not divide,
# their value alone tells the compiler that rows begin at multiples of 16 bytes (34 loads instead of 300).
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _sequence(cu_seqlens_ptr, batch, tokens):
    """First row, counted over the whole batch, and number of tokens of a picture."""
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + batch).to(tl.int64)
        count = tl.minimum((tl.load(cu_seqlens_ptr + batch + 1) - first).to(tl.int32), tokens)
    else:
        first = batch.to(tl.int64) * tokens
        count = tokens
    return first, count


@triton.jit
def _head(ptr, cu_seqlens_ptr, first, batch, head, stride_batch, stride_token, stride_head):
    """Where a picture's head begins. 64 bit: a large batch passes 2**31 elements."""
    if cu_seqlens_ptr is not None:
        picture = first * stride_token
    else:
        picture = batch.to(tl.int64) * stride_batch
    return ptr + picture + head.to(tl.int64) * stride_head


@triton.jit
def _load(
    ptr, start, count, stride_token, MASKED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr
):
    """ROWS tokens of a head from `start` on, as a tile; zeros for tokens that do not exist."""
    token = start + tl.arange(0, ROWS)
    pointers = ptr + tl.cast(start, tl.int64) * stride_token + (tl.arange(0, ROWS) * stride_token)[:, None]
    tile = ()
    for i in tl.static_range(len(DIMS)):
        cols = (DIMS[i][0] + tl.arange(0, DIMS[i][1]))[None, :]
        if DIMS[i][0] + DIMS[i][1] > DIM:
            if MASKED:
                part = tl.load(pointers + cols, (token < count)[:, None] & (cols < DIM), other=0.0)
            else:
                part = tl.load(pointers + cols, cols < DIM, other=0.0)
        elif MASKED:
            part = tl.load(pointers + cols, (token < count)[:, None], other=0.0)
        else:
            part = tl.load(pointers + cols)
        tile = tile + (part,)
    return tile


@triton.jit
def _load_piece(
    ptr, count, stride_token, PIECE: tl.constexpr, FULL: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr
):
    """One piece of `KEYS`. Tokens below FULL exist in every picture, and need no mask."""
    return _load(ptr, PIECE[0], count, stride_token, PIECE[0] + PIECE[1] > FULL, PIECE[1], DIM, DIMS)


@triton.jit
def _store(ptr, tile, factor, start, count, stride_token, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr):
    token = start + tl.arange(0, ROWS)
    pointers = ptr + tl.cast(start, tl.int64) * stride_token + (tl.arange(0, ROWS) * stride_token)[:, None]
    for i in tl.static_range(len(DIMS)):
        cols = (DIMS[i][0] + tl.arange(0, DIMS[i][1]))[None, :]
        mask = (token < count)[:, None]
        if DIMS[i][0] + DIMS[i][1] > DIM:
            mask = mask & (cols < DIM)
        tl.store(pointers + cols, (tile[i] * factor).to(ptr.dtype.element_ty), mask)


@triton.jit
def _zeros(ROWS: tl.constexpr, DIMS: tl.constexpr):
    tile = ()
    for i in tl.static_range(len(DIMS)):
        tile = tile + (tl.full([ROWS, DIMS[i][1]], 0.0, tl.float32),)  # Triton 3.6: tl.zeros takes no plain numbers
    return tile


@triton.jit
def _transposed(tile):
    """What is transposed before a loop stays in shared memory for all of it; inside, it would be written there anew."""
    turned = ()
    for i in tl.static_range(len(tile)):
        turned = turned + (tl.trans(tile[i]),)
    return turned


@triton.jit
def _product(a, b):
    """a @ b for a tile a and a transposed tile b, in float32."""
    product = tl.dot(a[0], b[0], input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], b[i], product, input_precision="ieee")
    return product


@triton.jit
def _add_product(sums, a, b):
    """sums + a @ b for a matrix a and tiles sums and b."""
    added = ()
    for i in tl.static_range(len(b)):
        added = added + (tl.dot(a.to(b[i].dtype), b[i], sums[i], input_precision="ieee"),)
    return added


@triton.jit
def _scale_rows(tile, factor):
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled = scaled + (tile[i] * factor[:, None],)
    return scaled


@triton.jit
def _row_dot(a, b):
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return total


@triton.jit
def _finish_scores(
    product,
    query,
    key,
    num_queries,
    num_keys,
    scale,
    mask_ptr,
    stride_mask_query,
    stride_mask_key,
    MASKED: tl.constexpr,
):
    """Scores in base 2; -inf where a key is hidden or, if MASKED, beyond the last.

    query and key are indices of shapes [R, 1] and [1, K], or [1, R] and [K, 1] for a transposed product.
    """
    scores = product * (scale * LOG2E)
    if mask_ptr is not None:
        # Every element is asked for, also where the mask is one row for all queries: then its stride is zero.
        offset = query.to(tl.int64) * stride_mask_query + key.to(tl.int64) * stride_mask_key
        exists = (query < num_queries) & (key < num_keys)
        if mask_ptr.dtype.element_ty == tl.uint8:
            scores = tl.where(tl.load(mask_ptr + offset, exists, other=1) != 0, scores, float("-inf"))
        else:
            scores += tl.load(mask_ptr + offset, exists, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        scores = tl.where(key < num_keys, scores, float("-inf"))
    return scores


@triton.jit
def _kept(seed_ptr, pair, query, key, num_keys, dropout_p):
    """Which probabilities dropout keeps: a function of the seed, picture and head, query and key alone."""
    position = (query * num_keys + key).to(tl.uint32)
    zero = position * 0
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), position, zero + pair.to(tl.uint32), zero, zero)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def _mask_head(mask_ptr, batch, head, stride_mask_batch, stride_mask_head):
    return mask_ptr + batch.to(tl.int64) * stride_mask_batch + head.to(tl.int64) * stride_mask_head


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _attention_fwd_short(
    query_ptr, key_ptr, value_ptr,                  # in:  [B, N, H, D] by strides, or [tokens, H, D] with cu_seqlens
    mask_ptr, cu_seqlens_ptr, seed_ptr,             # in:  [B, H, Nq, Nk] by strides, [B + 1] int32, [1] int64; or None
    out_ptr, lse_ptr,                               # out: [rows, H, D], [H, rows] float32
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    heads, rows, num_queries, num_keys,             # rows: queries of the whole batch
    scale, dropout_p, keep_scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    KEYS: tl.constexpr, FULL: tl.constexpr,         # keys below FULL exist in every picture
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,       # a program takes BLOCKS times ROWS queries
):  # fmt: skip
    blocks = tl.cdiv(num_queries, ROWS * BLOCKS)
    pair = tl.program_id(0) // blocks
    batch, head = pair // heads, pair % heads
    first, queries = _sequence(cu_seqlens_ptr, batch, num_queries)
    first_key, keys = _sequence(cu_seqlens_ptr, batch, num_keys)
    query_ptr = _head(
        query_ptr, cu_seqlens_ptr, first, batch, head, stride_query_batch, stride_query_token, stride_query_head
    )
    key_ptr = _head(
        key_ptr, cu_seqlens_ptr, first_key, batch, head, stride_key_batch, stride_key_token, stride_key_head
    )
    value_ptr = _head(
        value_ptr, cu_seqlens_ptr, first_key, batch, head, stride_value_batch, stride_value_token, stride_value_head
    )
    if mask_ptr is not None:
        mask_ptr = _mask_head(mask_ptr, batch, head, stride_mask_batch, stride_mask_head)
    out_ptr += (first * heads + head) * DIM
    lse_ptr += head.to(tl.int64) * rows + first

    key_tiles, value_tiles = (), ()
    for c in tl.static_range(len(KEYS)):
        key = _load_piece(key_ptr, keys, stride_key_token, KEYS[c], FULL, DIM, DIMS)
        value = _load_piece(value_ptr, keys, stride_value_token, KEYS[c], FULL, DIM, DIMS)
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
                mask_ptr, stride_mask_query, stride_mask_key, KEYS[c][0] + KEYS[c][1] > FULL,
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
            if seed_ptr is not None:
                at = KEYS[c][0] + tl.arange(0, KEYS[c][1])
                kept = _kept(seed_ptr, pair, at_query[:, None], at[None, :], num_keys, dropout_p)
                probabilities = tl.where(kept, probabilities * keep_scale, 0.0)
            out = _add_product(out, probabilities, value_tiles[c])
        if mask_ptr is not None:
            total = tl.where(total == 0.0, 1.0, total)
        _store(out_ptr, out, (1.0 / total)[:, None], start, queries, heads * DIM, ROWS, DIM, DIMS)
        tl.store(lse_ptr + at_query, highest + tl.log2(total), at_query < queries)


@triton.jit
def _attention_fwd_long(
    query_ptr, key_ptr, value_ptr,                  # in:  [B, N, H, D] by strides, or [tokens, H, D] with cu_seqlens
    mask_ptr, cu_seqlens_ptr, seed_ptr,             # in:  [B, H, Nq, Nk] by strides, [B + 1] int32, [1] int64; or None
    out_ptr, lse_ptr,                               # out: [rows, H, D], [H, rows] float32
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    heads, rows, num_queries, num_keys,
    scale, dropout_p, keep_scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    MASKED: tl.constexpr,                           # the number of keys may not be a multiple of KEYS
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_queries, ROWS)
    pair = tl.program_id(0) // blocks
    batch, head = pair // heads, pair % heads
    first, queries = _sequence(cu_seqlens_ptr, batch, num_queries)
    first_key, keys = _sequence(cu_seqlens_ptr, batch, num_keys)
    query_ptr = _head(
        query_ptr, cu_seqlens_ptr, first, batch, head, stride_query_batch, stride_query_token, stride_query_head
    )
    key_ptr = _head(
        key_ptr, cu_seqlens_ptr, first_key, batch, head, stride_key_batch, stride_key_token, stride_key_head
    )
    value_ptr = _head(
        value_ptr, cu_seqlens_ptr, first_key, batch, head, stride_value_batch, stride_value_token, stride_value_head
    )
    if mask_ptr is not None:
        mask_ptr = _mask_head(mask_ptr, batch, head, stride_mask_batch, stride_mask_head)
    out_ptr += (first * heads + head) * DIM
    lse_ptr += head.to(tl.int64) * rows + first

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
            mask_ptr, stride_mask_query, stride_mask_key, MASKED,
        )  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        level = new_highest
        if mask_ptr is not None:  # no key so far
            level = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        probabilities = tl.exp2(scores - level[:, None])
        correction = tl.exp2(highest - level)
        total = total * correction + tl.sum(probabilities, 1)
        highest = new_highest
        if seed_ptr is not None:
            kept = _kept(seed_ptr, pair, at_query[:, None], at[None, :], num_keys, dropout_p)
            probabilities = tl.where(kept, probabilities * keep_scale, 0.0)
        value = _load(value_ptr, start, keys, stride_value_token, MASKED, KEYS, DIM, DIMS)
        out = _add_product(_scale_rows(out, correction), probabilities, value)
    if mask_ptr is not None:
        highest = tl.where(total == 0.0, 0.0, highest)
        total = tl.where(total == 0.0, 1.0, total)
    _store(out_ptr, out, (1.0 / total)[:, None], begin, queries, heads * DIM, ROWS, DIM, DIMS)
    tl.store(lse_ptr + at_query, highest + tl.log2(total), at_query < queries)


# ---------------------------------------------------------------------------------------------------------------------
# Backward
#     grad_value = dropped^T grad_out,   grad_scores = probabilities * (grad_probabilities - delta)
#     grad_key = grad_scores^T query * scale,   grad_query = grad_scores key * scale
# with grad_probabilities = grad_out value^T where dropout kept, and delta = the row's sum of grad_out * out.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _attention_bwd_short(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_out_ptr,   # in: [B, N, H, D] by strides (out: contiguous)
    mask_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr,            # in: as in forward; [H, rows] float32
    grad_query_ptr, grad_key_ptr, grad_value_ptr,           # out: [rows, H, D], their rows stride_grad_token apart
    delta_ptr,                                              # out: [H, rows] float32, or None
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_grad_token,
    heads, rows, num_queries, num_keys,
    scale, dropout_p, keep_scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    MASKED: tl.constexpr, KEYS: tl.constexpr,       # KEYS: power of two, all keys; MASKED: fewer exist
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program takes one head of one picture.

    Scores are computed transposed, [keys, queries]: so the probabilities go from registers straight into the products
    with grad_out and query, whose sums, one row a key, stay in registers while the loop passes over the queries.
    """
    pair = tl.program_id(0)
    batch, head = pair // heads, pair % heads
    first, queries = _sequence(cu_seqlens_ptr, batch, num_queries)
    first_key, keys = _sequence(cu_seqlens_ptr, batch, num_keys)
    query_ptr = _head(
        query_ptr, cu_seqlens_ptr, first, batch, head, stride_query_batch, stride_query_token, stride_query_head
    )
    key_ptr = _head(
        key_ptr, cu_seqlens_ptr, first_key, batch, head, stride_key_batch, stride_key_token, stride_key_head
    )
    value_ptr = _head(
        value_ptr, cu_seqlens_ptr, first_key, batch, head, stride_value_batch, stride_value_token, stride_value_head
    )
    grad_out_ptr = _head(
        grad_out_ptr, cu_seqlens_ptr, first, batch, head,
        stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head,
    )  # fmt: skip
    if mask_ptr is not None:
        mask_ptr = _mask_head(mask_ptr, batch, head, stride_mask_batch, stride_mask_head)
    out_ptr += (first * heads + head) * DIM
    lse_ptr += head.to(tl.int64) * rows + first
    if delta_ptr is not None:
        delta_ptr += head.to(tl.int64) * rows + first
    grad_query_ptr += first * stride_grad_token + head * DIM
    grad_key_ptr += first_key * stride_grad_token + head * DIM
    grad_value_ptr += first_key * stride_grad_token + head * DIM

    at = tl.arange(0, KEYS)
    key = _load(key_ptr, 0, keys, stride_key_token, MASKED, KEYS, DIM, DIMS)
    value = _load(value_ptr, 0, keys, stride_value_token, MASKED, KEYS, DIM, DIMS)
    grad_key = _zeros(KEYS, DIMS)
    grad_value = _zeros(KEYS, DIMS)
    for start in range(0, queries, ROWS):
        at_query = start + tl.arange(0, ROWS)
        query = _load(query_ptr, start, queries, stride_query_token, True, ROWS, DIM, DIMS)
        grad_out = _load(grad_out_ptr, start, queries, stride_grad_out_token, True, ROWS, DIM, DIMS)
        delta = _row_dot(grad_out, _load(out_ptr, start, queries, heads * DIM, True, ROWS, DIM, DIMS))
        if delta_ptr is not None:
            tl.store(delta_ptr + at_query, delta, at_query < queries)
        lse = tl.load(lse_ptr + at_query, at_query < queries, other=0.0)
        scores = _finish_scores(
            _product(key, _transposed(query)), at_query[None, :], at[:, None], queries, keys, scale,
            mask_ptr, stride_mask_query, stride_mask_key, MASKED,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[None, :])
        dropped = probabilities
        if seed_ptr is not None:
            kept = _kept(seed_ptr, pair, at_query[None, :], at[:, None], num_keys, dropout_p)
            dropped = tl.where(kept, probabilities * keep_scale, 0.0)
        grad_value = _add_product(grad_value, dropped, grad_out)
        grad = _product(value, _transposed(grad_out))
        if seed_ptr is not None:
            grad = tl.where(kept, grad * keep_scale, 0.0)
        grad_scores = (probabilities * (grad - delta[None, :])).to(query[0].dtype)
        grad_key = _add_product(grad_key, grad_scores, query)
        grad_query = _add_product(_zeros(ROWS, DIMS), tl.trans(grad_scores), key)
        _store(grad_query_ptr, grad_query, scale, start, queries, stride_grad_token, ROWS, DIM, DIMS)
    _store(grad_key_ptr, grad_key, scale, 0, keys, stride_grad_token, KEYS, DIM, DIMS)
    _store(grad_value_ptr, grad_value, 1.0, 0, keys, stride_grad_token, KEYS, DIM, DIMS)


@triton.jit
def _attention_bwd_query(
    query_ptr, key_ptr, value_ptr, out_ptr, grad_out_ptr,   # in: [B, N, H, D] by strides (out: contiguous)
    mask_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr,            # in: as in forward; [H, rows] float32
    grad_query_ptr, delta_ptr,                              # out: [rows, H, D] by stride_grad_token, [H, rows] float32
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_grad_token,
    heads, rows, num_queries, num_keys,
    scale, dropout_p, keep_scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    MASKED: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS queries, and their delta, which the gradient of keys needs."""
    blocks = tl.cdiv(num_queries, ROWS)
    pair = tl.program_id(0) // blocks
    batch, head = pair // heads, pair % heads
    first, queries = _sequence(cu_seqlens_ptr, batch, num_queries)
    first_key, keys = _sequence(cu_seqlens_ptr, batch, num_keys)
    query_ptr = _head(
        query_ptr, cu_seqlens_ptr, first, batch, head, stride_query_batch, stride_query_token, stride_query_head
    )
    key_ptr = _head(
        key_ptr, cu_seqlens_ptr, first_key, batch, head, stride_key_batch, stride_key_token, stride_key_head
    )
    value_ptr = _head(
        value_ptr, cu_seqlens_ptr, first_key, batch, head, stride_value_batch, stride_value_token, stride_value_head
    )
    grad_out_ptr = _head(
        grad_out_ptr, cu_seqlens_ptr, first, batch, head,
        stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head,
    )  # fmt: skip
    if mask_ptr is not None:
        mask_ptr = _mask_head(mask_ptr, batch, head, stride_mask_batch, stride_mask_head)
    out_ptr += (first * heads + head) * DIM
    grad_query_ptr += first * stride_grad_token + head * DIM
    at_row = head.to(tl.int64) * rows + first

    begin = tl.program_id(0) % blocks * ROWS
    if cu_seqlens_ptr is not None:  # noqa: SIM102 (one is known at compile time, the other not)
        if begin >= queries:
            return
    at_query = begin + tl.arange(0, ROWS)
    query = _load(query_ptr, begin, queries, stride_query_token, True, ROWS, DIM, DIMS)
    grad_out = _load(grad_out_ptr, begin, queries, stride_grad_out_token, True, ROWS, DIM, DIMS)
    delta = _row_dot(grad_out, _load(out_ptr, begin, queries, heads * DIM, True, ROWS, DIM, DIMS))
    tl.store(delta_ptr + at_row + at_query, delta, at_query < queries)
    lse = tl.load(lse_ptr + at_row + at_query, at_query < queries, other=0.0)
    grad_query = _zeros(ROWS, DIMS)
    for start in range(0, keys, KEYS):
        at = start + tl.arange(0, KEYS)
        key = _load(key_ptr, start, keys, stride_key_token, MASKED, KEYS, DIM, DIMS)
        value = _load(value_ptr, start, keys, stride_value_token, MASKED, KEYS, DIM, DIMS)
        scores = _finish_scores(
            _product(query, _transposed(key)), at_query[:, None], at[None, :], queries, keys, scale,
            mask_ptr, stride_mask_query, stride_mask_key, MASKED,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[:, None])
        grad = _product(grad_out, _transposed(value))
        if seed_ptr is not None:
            kept = _kept(seed_ptr, pair, at_query[:, None], at[None, :], num_keys, dropout_p)
            grad = tl.where(kept, grad * keep_scale, 0.0)
        grad_query = _add_product(grad_query, probabilities * (grad - delta[:, None]), key)
    _store(grad_query_ptr, grad_query, scale, begin, queries, stride_grad_token, ROWS, DIM, DIMS)


@triton.jit
def _attention_bwd_key_value(
    query_ptr, key_ptr, value_ptr, grad_out_ptr,            # in: [B, N, H, D] by strides
    mask_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr, delta_ptr,  # in: as in forward; [H, rows] float32 x2
    grad_key_ptr, grad_value_ptr,                           # out: [rows, H, D], their rows stride_grad_token apart
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_grad_token,
    heads, rows, num_queries, num_keys,
    scale, dropout_p, keep_scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS keys and values. Scores are computed transposed, [keys, queries]: so the probabilities go
    from registers straight into the product with grad_out."""
    blocks = tl.cdiv(num_keys, KEYS)
    pair = tl.program_id(0) // blocks
    batch, head = pair // heads, pair % heads
    first, queries = _sequence(cu_seqlens_ptr, batch, num_queries)
    first_key, keys = _sequence(cu_seqlens_ptr, batch, num_keys)
    query_ptr = _head(
        query_ptr, cu_seqlens_ptr, first, batch, head, stride_query_batch, stride_query_token, stride_query_head
    )
    key_ptr = _head(
        key_ptr, cu_seqlens_ptr, first_key, batch, head, stride_key_batch, stride_key_token, stride_key_head
    )
    value_ptr = _head(
        value_ptr, cu_seqlens_ptr, first_key, batch, head, stride_value_batch, stride_value_token, stride_value_head
    )
    grad_out_ptr = _head(
        grad_out_ptr, cu_seqlens_ptr, first, batch, head,
        stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head,
    )  # fmt: skip
    if mask_ptr is not None:
        mask_ptr = _mask_head(mask_ptr, batch, head, stride_mask_batch, stride_mask_head)
    grad_key_ptr += first_key * stride_grad_token + head * DIM
    grad_value_ptr += first_key * stride_grad_token + head * DIM
    at_row = head.to(tl.int64) * rows + first

    begin = tl.program_id(0) % blocks * KEYS
    if cu_seqlens_ptr is not None:  # noqa: SIM102 (one is known at compile time, the other not)
        if begin >= keys:
            return
    at = begin + tl.arange(0, KEYS)
    key = _load(key_ptr, begin, keys, stride_key_token, True, KEYS, DIM, DIMS)
    value = _load(value_ptr, begin, keys, stride_value_token, True, KEYS, DIM, DIMS)
    grad_key = _zeros(KEYS, DIMS)
    grad_value = _zeros(KEYS, DIMS)
    for start in range(0, queries, ROWS):
        at_query = start + tl.arange(0, ROWS)
        query = _load(query_ptr, start, queries, stride_query_token, True, ROWS, DIM, DIMS)
        grad_out = _load(grad_out_ptr, start, queries, stride_grad_out_token, True, ROWS, DIM, DIMS)
        lse = tl.load(lse_ptr + at_row + at_query, at_query < queries, other=0.0)
        delta = tl.load(delta_ptr + at_row + at_query, at_query < queries, other=0.0)
        scores = _finish_scores(
            _product(key, _transposed(query)), at_query[None, :], at[:, None], queries, keys, scale,
            mask_ptr, stride_mask_query, stride_mask_key, False,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[None, :])
        grad = _product(value, _transposed(grad_out))
        dropped = probabilities
        if seed_ptr is not None:
            kept = _kept(seed_ptr, pair, at_query[None, :], at[:, None], num_keys, dropout_p)
            dropped = tl.where(kept, probabilities * keep_scale, 0.0)
            grad = tl.where(kept, grad * keep_scale, 0.0)
        grad_value = _add_product(grad_value, dropped, grad_out)
        grad_key = _add_product(grad_key, probabilities * (grad - delta[None, :]), query)
    _store(grad_key_ptr, grad_key, scale, begin, keys, stride_grad_token, KEYS, DIM, DIMS)
    _store(grad_value_ptr, grad_value, 1.0, begin, keys, stride_grad_token, KEYS, DIM, DIMS)


@triton.jit
def _attention_bwd_mask(
    query_ptr, key_ptr, value_ptr, grad_out_ptr,            # in: [B, N, H, D] by strides
    mask_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr, delta_ptr,  # in: as in forward; [H, rows] float32 x2
    grad_mask_ptr,                                          # out: [splits, mask_batch, mask_heads, Nq, Nk]
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    batch_size, heads, rows, num_queries, num_keys,
    mask_batch, mask_heads, splits,                         # 1 where the mask is the same for all pictures, heads
    scale, dropout_p, keep_scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of an additive mask: grad_scores, summed over the pictures and heads that share the mask.

    A program has one tile of the mask and takes every `splits`-th of those; the splits are summed afterwards.
    """
    key_blocks, query_blocks = tl.cdiv(num_keys, KEYS), tl.cdiv(num_queries, ROWS)
    program = tl.program_id(0)
    begin_key = program % key_blocks * KEYS
    begin = program // key_blocks % query_blocks * ROWS
    plane = program // (key_blocks * query_blocks)  # of grad_mask: split, mask_batch, mask_head
    mask_head, mask_picture = plane % mask_heads, plane // mask_heads % mask_batch
    split = plane // (mask_heads * mask_batch)
    shared_heads = heads // mask_heads  # 1, or all of them
    shared = shared_heads * (batch_size // mask_batch)

    at_query = begin + tl.arange(0, ROWS)
    at = begin_key + tl.arange(0, KEYS)
    sums = tl.zeros([ROWS, KEYS], tl.float32)
    for index in range(split, shared, splits):
        batch = mask_picture + index // shared_heads
        head = mask_head + index % shared_heads
        pair = batch * heads + head
        first, queries = _sequence(cu_seqlens_ptr, batch, num_queries)
        first_key, keys = _sequence(cu_seqlens_ptr, batch, num_keys)
        query = _load(
            _head(
                query_ptr, cu_seqlens_ptr, first, batch, head,
                stride_query_batch, stride_query_token, stride_query_head,
            ),
            begin, queries, stride_query_token, True, ROWS, DIM, DIMS,
        )  # fmt: skip
        key = _load(
            _head(key_ptr, cu_seqlens_ptr, first_key, batch, head, stride_key_batch, stride_key_token, stride_key_head),
            begin_key, keys, stride_key_token, True, KEYS, DIM, DIMS,
        )  # fmt: skip
        scores = _finish_scores(
            _product(query, _transposed(key)), at_query[:, None], at[None, :], queries, keys, scale,
            _mask_head(mask_ptr, batch, head, stride_mask_batch, stride_mask_head),
            stride_mask_query, stride_mask_key, True,
        )  # fmt: skip
        grad_out = _load(
            _head(
                grad_out_ptr, cu_seqlens_ptr, first, batch, head,
                stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head,
            ),
            begin, queries, stride_grad_out_token, True, ROWS, DIM, DIMS,
        )  # fmt: skip
        value = _load(
            _head(
                value_ptr, cu_seqlens_ptr, first_key, batch, head,
                stride_value_batch, stride_value_token, stride_value_head,
            ),
            begin_key, keys, stride_value_token, True, KEYS, DIM, DIMS,
        )  # fmt: skip
        grad = _product(grad_out, _transposed(value))
        if seed_ptr is not None:
            kept = _kept(seed_ptr, pair, at_query[:, None], at[None, :], num_keys, dropout_p)
            grad = tl.where(kept, grad * keep_scale, 0.0)
        at_row = head.to(tl.int64) * rows + first
        # Rows that this picture does not have: their probabilities are zero.
        lse = tl.load(lse_ptr + at_row + at_query, at_query < queries, other=float("inf"))
        delta = tl.load(delta_ptr + at_row + at_query, at_query < queries, other=0.0)
        sums += tl.exp2(scores - lse[:, None]) * (grad - delta[:, None])
    offset = (plane.to(tl.int64) * num_queries + at_query[:, None]) * num_keys + at[None, :]
    exists = (at_query < num_queries)[:, None] & (at < num_keys)[None, :]
    tl.store(grad_mask_ptr + offset, sums.to(grad_mask_ptr.dtype.element_ty), exists)


@triton.jit
def _dropout_mask(
    seed_ptr, kept_ptr,                             # in: [1] int64; out: [B, H, Nq, Nk] bool
    num_queries, num_keys, dropout_p,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    query_blocks, key_blocks = tl.cdiv(num_queries, ROWS), tl.cdiv(num_keys, KEYS)
    program = tl.program_id(0)
    pair = program // (query_blocks * key_blocks)
    query = (program // key_blocks % query_blocks * ROWS + tl.arange(0, ROWS))[:, None]
    key = (program % key_blocks * KEYS + tl.arange(0, KEYS))[None, :]
    kept = _kept(seed_ptr, pair, query, key, num_keys, dropout_p)
    offset = (pair.to(tl.int64) * num_queries + query) * num_keys + key
    tl.store(kept_ptr + offset, kept, (query < num_queries) & (key < num_keys))


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What one call computes, beside its tensors. `cu_seqlens` and the rest describe a batch of pictures of different
    sizes: their tokens one after the other, those of picture i from cu_seqlens[i] to cu_seqlens[i + 1]."""

    mask: Tensor | None  # bool or floating [B or 1, H or 1, Nq or 1, Nk or 1]
    cu_seqlens: Tensor | None  # int32 [B + 1]
    max_seqlen: int | None
    seed: Tensor | None  # int64 [1]; None: no dropout
    scale: float
    dropout_p: float  # fmt: skip


class Sizes(NamedTuple):
    batch: int
    heads: int
    rows: int  # queries of the whole batch
    queries: int  # of one picture, the largest
    keys: int
    dim: int


def _sizes(query: Tensor, key: Tensor, call: Call) -> Sizes:
    if call.cu_seqlens is not None:
        rows, heads, dim = query.shape
        return Sizes(call.cu_seqlens.numel() - 1, heads, rows, call.max_seqlen, call.max_seqlen, dim)
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
    """Steps from picture to picture (none where they follow each other unevenly), token to token and head to head."""
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


def _shape(sizes: Sizes, call: Call) -> str:
    """By number of keys, and by head dim as it is padded.

    "short" are those for which the kernels that hold all keys of a head are made. With few heads, one program each does
    not fill a GPU; with a mask or dropout they would spill registers.
    """
    if sizes.keys > SHORT:
        length = "long"
    elif sizes.batch * sizes.heads < ENOUGH_PROGRAMS or call.mask is not None or call.seed is not None:
        length = "short, looped"
    else:
        length = "short"
    return f"{length}, dim {next(dim for dim in (64, 80, 96, 128) if sizes.dim <= dim)}"


def _fitting(wanted: int, tokens: int) -> int:
    """A tile's length: a few tokens, or the class token alone, do not pay for `wanted`; a matrix unit takes 16."""
    return min(wanted, max(16, next_power_of_2(tokens)))


def _loop_tile(sizes: Sizes, call: Call, rows: int, keys: int, num_warps: int, num_stages: int) -> dict[str, object]:
    """Compile-time arguments of the kernels that loop over keys or queries."""
    keys = _fitting(keys, sizes.keys)
    return {
        "DIM": sizes.dim,
        "DIMS": _pieces(sizes.dim, MAX_HEAD_DIM, 2),
        "MASKED": call.cu_seqlens is not None or sizes.keys % keys != 0,
        "KEYS": keys,
        "ROWS": _fitting(rows, sizes.queries),
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _short_forward_tile(sizes: Sizes, call: Call, choice: tuning.Choice) -> dict[str, object]:
    rows = _fitting(choice["rows"], sizes.queries)
    uneven = call.cu_seqlens is not None  # then every piece is masked, and to prefetch queries as well would spill
    return {
        "DIM": sizes.dim,
        "DIMS": _pieces(sizes.dim, MAX_HEAD_DIM, 2),
        "KEYS": _pieces(sizes.keys, choice["piece"], 3),
        "FULL": 0 if uneven else sizes.keys // 16 * 16,
        "ROWS": rows,
        "BLOCKS": min(choice["blocks"], cdiv(sizes.queries, rows)),
        "num_warps": choice["num_warps"],
        "num_stages": 1 if uneven else choice["num_stages"],
    }


def _short_backward_tile(sizes: Sizes, call: Call, choice: tuning.Choice) -> dict[str, object]:
    keys = _fitting(SHORT, sizes.keys)
    num_warps = max(
        4, keys // choice["keys_per_warp"]
    )  # the sums of so many keys' gradients fit into a warp's registers
    tile = _loop_tile(sizes, call, choice["rows"], keys, num_warps, choice["num_stages"])
    return tile | {"DIMS": _pieces(sizes.dim, MAX_HEAD_DIM, 1)}  # 48 cut into 32 + 16 spills, padded to 64 it does not


def _forward_outputs(query: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    heads, dim = query.shape[-2:]
    rows = math.prod(query.shape[:-2])
    return query.new_empty(*query.shape[:-2], heads * dim), query.new_empty(heads, rows, dtype=torch.float32)


def _launch_forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The output [B, Nq, H * D] or [tokens, H * D], and the base-2 log-sum-exp of the scores [H, rows]."""
    out, lse = _forward_outputs(query, value, call)
    sizes = _sizes(query, key, call)
    if out.numel() == 0:
        return out, lse
    query, key, value = map(_readable, (query, key, value))
    mask, mask_strides = _mask_arguments(call.mask)
    keep_scale = 1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0
    tensors = (query, key, value, mask, call.cu_seqlens, call.seed, out, lse)
    numbers = (
        *_strides(query), *_strides(key), *_strides(value), *mask_strides,
        sizes.heads, sizes.rows, sizes.queries, sizes.keys, call.scale, call.dropout_p, keep_scale,
    )  # fmt: skip
    programs = sizes.batch * sizes.heads

    def run(choice: tuning.Choice) -> None:
        if "piece" in choice:
            tile = _short_forward_tile(sizes, call, choice)
            grid = (programs * cdiv(sizes.queries, tile["ROWS"] * tile["BLOCKS"]),)
            launch(_attention_fwd_short, grid, tensors, numbers, tile)
        else:
            tile = _loop_tile(sizes, call, **choice)
            grid = (programs * cdiv(sizes.queries, tile["ROWS"]),)
            launch(_attention_fwd_long, grid, tensors, numbers, tile)

    run(tuning.choose("attention_forward", _shape(sizes, call), query.dtype, query.device, run))
    return out, lse


def _launch_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], grad_mask: Tensor | None, call: Call,
) -> None:  # fmt: skip
    """Writes the gradients of query, key, value (three of their own, or parts of one) and of an additive mask."""
    sizes = _sizes(query, key, call)
    if out.numel() == 0:
        for grad in (*grads, *([] if grad_mask is None else [grad_mask])):
            grad.zero_()
        return
    grad_out = _readable(grad_out.unflatten(-1, (sizes.heads, sizes.dim)))
    query, key, value = map(_readable, (query, key, value))
    mask, mask_strides = _mask_arguments(call.mask)
    keep_scale = 1.0 / (1.0 - call.dropout_p) if call.dropout_p < 1.0 else 0.0
    delta = torch.empty_like(lse)
    inputs = (mask, call.cu_seqlens, call.seed, lse)
    strides = (*_strides(query), *_strides(key), *_strides(value), *_strides(grad_out), *mask_strides)
    grad_query, grad_key, grad_value = grads
    counts = (sizes.heads, sizes.rows, sizes.queries, sizes.keys)
    numbers = (*strides, grad_query.stride(-3), *counts, call.scale, call.dropout_p, keep_scale)
    programs = sizes.batch * sizes.heads

    def run(choice: tuning.Choice) -> None:
        if "keys_per_warp" in choice:
            tile = _short_backward_tile(sizes, call, choice)
            outputs = (*grads, None if grad_mask is None else delta)
            launch(
                _attention_bwd_short, (programs,), (query, key, value, out, grad_out, *inputs, *outputs), numbers, tile
            )
            return
        # First by queries, which also computes the delta that the second reads.
        rows, keys, num_warps, num_stages = (choice[name] for name in ("rows", "keys", "num_warps", "num_stages"))
        tile = _loop_tile(sizes, call, rows, keys, num_warps, num_stages)
        grid = (programs * cdiv(sizes.queries, tile["ROWS"]),)
        tensors = (query, key, value, out, grad_out, *inputs, grad_query, delta)
        launch(_attention_bwd_query, grid, tensors, numbers, tile)
        rows, keys, num_warps = (choice[f"key_value_{name}"] for name in ("rows", "keys", "warps"))
        tile = _loop_tile(sizes, call, rows, keys, num_warps, num_stages)
        del tile["MASKED"]
        grid = (programs * cdiv(sizes.keys, tile["KEYS"]),)
        tensors = (query, key, value, grad_out, *inputs, delta, grad_key, grad_value)
        launch(_attention_bwd_key_value, grid, tensors, numbers, tile)

    run(tuning.choose("attention_backward", _shape(sizes, call), query.dtype, query.device, run))
    if grad_mask is not None:
        _launch_mask_backward(
            grad_mask, (query, key, value, grad_out, *inputs, delta), strides, sizes, call, keep_scale
        )


def _launch_mask_backward(grad_mask, tensors, strides, sizes: Sizes, call: Call, keep_scale: float) -> None:
    mask_batch, mask_heads = grad_mask.shape[:2]
    shared = sizes.batch * sizes.heads // (mask_batch * mask_heads)  # planes of scores that one of the mask is added to

    def run(choice: tuning.Choice) -> None:
        tile = _loop_tile(sizes, call, choice["rows"], choice["keys"], choice["num_warps"], choice["num_stages"])
        del tile["MASKED"]
        tiles = cdiv(sizes.queries, tile["ROWS"]) * cdiv(sizes.keys, tile["KEYS"])
        tiles *= mask_batch * mask_heads
        splits = max(1, min(shared, MASK_PROGRAMS // tiles))
        full = (mask_batch, mask_heads, sizes.queries, sizes.keys)
        partial = grad_mask
        if splits > 1 or grad_mask.shape != full:
            partial = grad_mask.new_empty(splits, *full, dtype=torch.float32)
        numbers = (
            *strides, sizes.batch, sizes.heads, sizes.rows, sizes.queries, sizes.keys,
            mask_batch, mask_heads, splits, call.scale, call.dropout_p, keep_scale,
        )  # fmt: skip
        launch(_attention_bwd_mask, (tiles * splits,), (*tensors, partial), numbers, tile)
        if partial is not grad_mask:
            grad_mask.copy_(partial.sum(0).sum_to_size(grad_mask.shape))

    run(tuning.choose("attention_mask_backward", _shape(sizes, call), tensors[0].dtype, grad_mask.device, run))


# ---------------------------------------------------------------------------------------------------------------------
# The operators: one for three tensors, one for the packed form, whose gradient is one tensor
# ---------------------------------------------------------------------------------------------------------------------


@operator("attention")
def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None,
    seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_forward(query, key, value, Call(mask, cu_seqlens, max_seqlen, seed, scale, dropout_p))


@_attention.register_fake
def _(query, key, value, *call):
    return _forward_outputs(query, value, Call(*call))


@operator("attention_backward")
def _attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int | None, seed: Tensor | None, scale: float, dropout_p: float,
    mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    grad_mask = _empty_mask_gradient(query, mask, mask_grad)
    call = Call(mask, cu_seqlens, max_seqlen, seed, scale, dropout_p)
    _launch_backward(grad_out, query, key, value, out, lse, grads, grad_mask if mask_grad else None, call)
    return (*grads, grad_mask)


@_attention_backward.register_fake
def _(grad_out, query, key, value, out, lse, mask, cu_seqlens, max_seqlen, seed, scale, dropout_p, mask_grad):
    grads = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return (*grads, _empty_mask_gradient(query, mask, mask_grad))


@operator("attention_packed")
def _attention_packed(
    qkv: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, seed: Tensor | None,
    scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch_forward(*qkv.unbind(-3), Call(mask, cu_seqlens, max_seqlen, seed, scale, dropout_p))


@_attention_packed.register_fake
def _(qkv, *call):
    query, _, value = qkv.unbind(-3)
    return _forward_outputs(query, value, Call(*call))


@operator("attention_packed_backward")
def _attention_packed_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None,
    max_seqlen: int | None, seed: Tensor | None, scale: float, dropout_p: float, mask_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_mask = _empty_mask_gradient(qkv, mask, mask_grad)
    call = Call(mask, cu_seqlens, max_seqlen, seed, scale, dropout_p)
    _launch_backward(grad_out, *qkv.unbind(-3), out, lse, grad_qkv.unbind(-3), grad_mask if mask_grad else None, call)
    return grad_qkv, grad_mask


@_attention_packed_backward.register_fake
def _(grad_out, qkv, out, lse, mask, cu_seqlens, max_seqlen, seed, scale, dropout_p, mask_grad):
    return qkv.new_empty(qkv.shape), _empty_mask_gradient(qkv, mask, mask_grad)


def _empty_mask_gradient(like: Tensor, mask: Tensor | None, wanted: bool) -> Tensor:
    """Without elements where it is not wanted: an operator returns a tensor in each place."""
    return mask.new_empty(mask.shape) if wanted else like.new_empty(0)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, mask, cu_seqlens, max_seqlen, seed, scale, dropout_p = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, out, lse, mask, cu_seqlens, seed)
    ctx.numbers = max_seqlen, scale, dropout_p


def _backward(ctx, grad_out, _):
    """For both operators: query, key, value or qkv come first among their inputs."""
    *tensors, out, lse, mask, cu_seqlens, seed = ctx.saved_tensors
    no_grads = (None,) * 5  # cu_seqlens, max_seqlen, seed, scale, dropout_p
    if grad_out is None:
        return (*(None for _ in tensors), None, *no_grads)
    max_seqlen, scale, dropout_p = ctx.numbers
    mask_grad = ctx.needs_input_grad[len(tensors)]
    operator = _attention_packed_backward if len(tensors) == 1 else _attention_backward
    *grads, grad_mask = operator(
        grad_out, *tensors, out, lse, mask, cu_seqlens, max_seqlen, seed, scale, dropout_p, mask_grad
    )
    return (*grads, grad_mask if mask_grad else None, *no_grads)


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_packed.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(query key^T * scale + mask)) value for each head, heads side by side.

    query: [B, Nq, H, D]; key, value: [B, Nk, H, D]; one dtype, float32, bfloat16 or float16; D a multiple of 8 from 16
        to 128. Any strides, read where they lie; a tensor is copied only where its last dimension is not contiguous, or
        its tokens lie 2**23 elements apart.
    scale: 1 / sqrt(D) if None.
    mask: broadcastable to [B, H, Nq, Nk]; boolean (True: may be attended to), or floating and added to the scores, with
        a gradient where it requires one. A row whose every key is hidden gives zeros. A key is hidden too by a number
        that in base 2 is below float32's range, such as the lowest float32.
    dropout_p: chance that a probability is dropped; apply it in training only. seed: int64 [1] on query's device, which
        decides what is dropped (`dropout_mask` tells); drawn from PyTorch's generator if None.
    cu_seqlens: int32 [B + 1], for pictures of different sizes in one batch: query, key and value are [tokens, H, D],
        picture i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1] and attends to itself alone. max_seqlen: at
        least as many as the largest has; this is not checked, which would wait for the GPU, and tokens beyond are not
        computed. mask is then [B, H, max_seqlen, max_seqlen].
    Returns [B, Nq, H * D] or [tokens, H * D], contiguous. Under autocast float32 inputs are cast as PyTorch's
    scaled_dot_product_attention casts them. Raises ValueError for what does not fit. No second derivatives.
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    _check(query, key, value, cu_seqlens, max_seqlen)
    call = _call(query, key, scale, dropout_p, mask, cu_seqlens, max_seqlen, seed)
    return _attention(query, key, value, *call)[0]


def attention_packed(
    qkv: Tensor,
    *,
    num_heads: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """`attention` of the three parts of one tensor, as a matrix product with the joined weights gives it.

    qkv: [B, N, 3, H, D], or [B, N, 3 * H * D] with num_heads; with cu_seqlens the same without B, N being all tokens.
    The gradient is one tensor as well: query's, key's and value's are written where they belong in it.
    Everything else: as in `attention`.
    """
    qkv = _autocast(qkv)
    packed_rank = 4 if cu_seqlens is None else 3
    if qkv.ndim == packed_rank - 1:
        if num_heads is None or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
            raise ValueError(
                f"num_heads: expected the heads in qkv's last dimension, a third of {qkv.shape[-1]}, got {num_heads}"
            )
        qkv = qkv.unflatten(-1, (3, num_heads, -1))
    elif num_heads not in (None, qkv.shape[-2]):
        raise ValueError(f"num_heads: expected {qkv.shape[-2]}, the heads of qkv {list(qkv.shape)}, got {num_heads}")
    if qkv.ndim != packed_rank + 1 or qkv.shape[-3] != 3:
        expected = "[B, N, 3, H, D]" if cu_seqlens is None else "[tokens, 3, H, D] with cu_seqlens"
        raise ValueError(f"qkv: expected {expected}, got {list(qkv.shape)}")
    query, key, value = qkv.unbind(-3)
    _check(query, key, value, cu_seqlens, max_seqlen)
    return _attention_packed(qkv, *_call(query, key, scale, dropout_p, mask, cu_seqlens, max_seqlen, seed))[0]


def dropout_mask(seed: Tensor, batch: int, heads: int, queries: int, keys: int, dropout_p: float) -> Tensor:
    """Which probabilities `attention` with this seed keeps, bool [B, H, Nq, Nk]. With cu_seqlens: of max_seqlen rows
    and columns, from which each picture takes the upper left."""
    kept = torch.empty(batch, heads, queries, keys, dtype=torch.bool, device=seed.device)
    if kept.numel():
        rows, cols = 16, 64
        grid = (batch * heads * cdiv(queries, rows) * cdiv(keys, cols),)
        launch(_dropout_mask, grid, (seed, kept), (queries, keys, dropout_p), {"ROWS": rows, "KEYS": cols})
    return kept


def takes_head_dim(dim: int) -> bool:
    return MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM and dim % 8 == 0


def _autocast(tensor: Tensor) -> Tensor:
    device = tensor.device.type
    if tensor.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _call(query, key, scale, dropout_p, mask, cu_seqlens, max_seqlen, seed) -> Call:
    """Defaults filled in, the mask brought to four dimensions, and all of them checked."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability, got {dropout_p}")
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        # On the device, and read there by the kernel: no wait, and a CUDA graph draws anew each time it is replayed.
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    else:
        check_tensor("seed", seed, (1,), (torch.int64,), query.device)
    if mask is not None:
        mask = _broadcast_mask(
            mask, _sizes(query, key, Call(None, cu_seqlens, max_seqlen, None, 0.0, 0.0)), query.device
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Call(mask, cu_seqlens, max_seqlen, seed, scale, dropout_p)


def _broadcast_mask(mask: Tensor, sizes: Sizes, device: torch.device) -> Tensor:
    """The mask in four dimensions, each as large as that of the scores or 1."""
    shape = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    fits = 1 <= mask.ndim <= 4 and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask: expected something broadcastable to {list(shape)}, got {list(mask.shape)}")
    check_tensor("mask", mask, mask.shape, (torch.bool, *DTYPES), device)
    return mask[(None,) * (4 - mask.ndim)]


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    if cu_seqlens is None:
        if query.ndim != 4 or query.shape[1] == 0:
            raise ValueError(f"query: expected [B, Nq, H, D] with at least one query, got {list(query.shape)}")
        if key.ndim != 4 or key.shape[1] == 0:
            raise ValueError(f"key: expected [B, Nk, H, D] with at least one key, got {list(key.shape)}")
        key_shape = (query.shape[0], key.shape[1], *query.shape[2:])
    else:
        if query.ndim != 3:
            raise ValueError(f"query: expected [tokens, H, D] with cu_seqlens, got {list(query.shape)}")
        if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens: expected [B + 1], got {list(cu_seqlens.shape)}")
        check_tensor("cu_seqlens", cu_seqlens, cu_seqlens.shape, (torch.int32,), query.device)
        if max_seqlen is None or max_seqlen < 1:
            raise ValueError(f"max_seqlen: expected the tokens of the largest picture, got {max_seqlen}")
        key_shape = query.shape
    dim = query.shape[-1]
    if not takes_head_dim(dim):
        raise ValueError(
            f"query: expected a head dim that is a multiple of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {dim}"
        )
    check_tensor("query", query, query.shape, DTYPES, query.device)
    check_tensor("key", key, key_shape, (query.dtype,), query.device)
    check_tensor("value", value, key_shape, (query.dtype,), query.device)
