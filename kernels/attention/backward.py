"""Attention's backward kernels: `short` takes a head whole; otherwise one kernel by queries and one by keys.

    grad_value = probabilities^T grad_out,   grad_scores = probabilities * (grad_out value^T - delta)
    grad_key = grad_scores^T query * scale,  grad_query = grad_scores key * scale

with delta = the row's sum of grad_out * out.
"""

import triton
import triton.language as tl

from fastvit.kernels.attention.tiles import (
    _add_product,
    _finish_scores,
    _load,
    _locate,
    _product,
    _row_dot,
    _store,
    _transposed,
    _zeros,
)


@triton.jit
def _attention_bwd_short(
    query_ptr, key_ptr, value_ptr, grad_out_ptr,    # in:  [B, N, H, D] by strides
    mask_ptr, cu_seqlens_ptr, out_ptr, lse_ptr,     # in:  as in forward; [rows, H, D], [H, rows] float32
    grad_query_ptr, grad_key_ptr, grad_value_ptr,   # out: [rows, H, D], their rows stride_grad_token apart
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_grad_token, heads, rows, num_queries, num_keys, scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,          # DIMS: one piece
    MASKED: tl.constexpr, KEYS: tl.constexpr,       # KEYS: power of two, all keys; MASKED: fewer exist
    ROWS: tl.constexpr, TRANSPOSED: tl.constexpr,   # TRANSPOSED: how the product for grad_query is taken
):  # fmt: skip
    """One program takes one head of one image.

    Scores are computed transposed, [keys, queries]: so the probabilities go from registers straight into the products
    with grad_out and query, whose sums, one row a key, stay in registers while the loop passes over the queries.
    """
    pair = tl.program_id(0)
    image, first, head, queries, keys = _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys)
    query_ptr += image * stride_query_batch + first * stride_query_token + head * stride_query_head
    key_ptr += image * stride_key_batch + first * stride_key_token + head * stride_key_head
    value_ptr += image * stride_value_batch + first * stride_value_token + head * stride_value_head
    grad_out_ptr += image * stride_grad_out_batch + first * stride_grad_out_token + head * stride_grad_out_head
    mask_start = (pair // heads).to(tl.int64) * stride_mask_batch + head * stride_mask_head
    row, key_row = image * num_queries + first, image * num_keys + first
    out_ptr += (row * heads + head) * DIM
    lse_ptr += head * rows + row
    grad_query_ptr += row * stride_grad_token + head * DIM
    grad_key_ptr += key_row * stride_grad_token + head * DIM
    grad_value_ptr += key_row * stride_grad_token + head * DIM

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
        lse = tl.load(lse_ptr + at_query, at_query < queries, other=0.0)
        scores = _finish_scores(
            _product(key, _transposed(query)), at_query[None, :], at[:, None], queries, keys, scale,
            mask_ptr, mask_start, stride_mask_query, stride_mask_key, MASKED,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[None, :])
        grad_value = _add_product(grad_value, probabilities, grad_out)
        grad = _product(value, _transposed(grad_out))
        grad_scores = (probabilities * (grad - delta[None, :])).to(query[0].dtype)
        grad_key = _add_product(grad_key, grad_scores, query)
        if TRANSPOSED:  # wgmma takes 64 rows, which the head dim has and the queries have not
            grad_query = (tl.trans(tl.dot(tl.trans(key[0]), grad_scores, input_precision="ieee")),)
        else:
            grad_query = _add_product(_zeros(ROWS, DIMS), tl.trans(grad_scores), key)
        _store(grad_query_ptr, grad_query, scale, start, queries, stride_grad_token, ROWS, DIM, DIMS)
    _store(grad_key_ptr, grad_key, scale, 0, keys, stride_grad_token, KEYS, DIM, DIMS)
    _store(grad_value_ptr, grad_value, 1.0, 0, keys, stride_grad_token, KEYS, DIM, DIMS)


@triton.jit
def _attention_bwd_query(
    query_ptr, key_ptr, value_ptr, grad_out_ptr,    # in:  [B, N, H, D] by strides
    mask_ptr, cu_seqlens_ptr, out_ptr, lse_ptr,     # in:  as in forward; [rows, H, D], [H, rows] float32
    grad_query_ptr, delta_ptr,                      # out: [rows, H, D] by stride_grad_token, [H, rows] float32
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_grad_token, heads, rows, num_queries, num_keys, scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    MASKED: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of ROWS queries, and their delta, which the gradient of keys needs."""
    blocks = tl.cdiv(num_queries, ROWS)
    pair = tl.program_id(0) // blocks
    image, first, head, queries, keys = _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys)
    query_ptr += image * stride_query_batch + first * stride_query_token + head * stride_query_head
    key_ptr += image * stride_key_batch + first * stride_key_token + head * stride_key_head
    value_ptr += image * stride_value_batch + first * stride_value_token + head * stride_value_head
    grad_out_ptr += image * stride_grad_out_batch + first * stride_grad_out_token + head * stride_grad_out_head
    mask_start = (pair // heads).to(tl.int64) * stride_mask_batch + head * stride_mask_head
    row = image * num_queries + first
    out_ptr += (row * heads + head) * DIM
    lse_ptr += head * rows + row
    delta_ptr += head * rows + row
    grad_query_ptr += row * stride_grad_token + head * DIM

    begin = tl.program_id(0) % blocks * ROWS
    if cu_seqlens_ptr is not None:  # noqa: SIM102 (one is known at compile time, the other not)
        if begin >= queries:
            return
    at_query = begin + tl.arange(0, ROWS)
    query = _load(query_ptr, begin, queries, stride_query_token, True, ROWS, DIM, DIMS)
    grad_out = _load(grad_out_ptr, begin, queries, stride_grad_out_token, True, ROWS, DIM, DIMS)
    delta = _row_dot(grad_out, _load(out_ptr, begin, queries, heads * DIM, True, ROWS, DIM, DIMS))
    tl.store(delta_ptr + at_query, delta, at_query < queries)
    lse = tl.load(lse_ptr + at_query, at_query < queries, other=0.0)
    grad_query = _zeros(ROWS, DIMS)
    for start in range(0, keys, KEYS):
        at = start + tl.arange(0, KEYS)
        key = _load(key_ptr, start, keys, stride_key_token, MASKED, KEYS, DIM, DIMS)
        value = _load(value_ptr, start, keys, stride_value_token, MASKED, KEYS, DIM, DIMS)
        scores = _finish_scores(
            _product(query, _transposed(key)), at_query[:, None], at[None, :], queries, keys, scale,
            mask_ptr, mask_start, stride_mask_query, stride_mask_key, MASKED,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[:, None])
        grad = _product(grad_out, _transposed(value))
        grad_query = _add_product(grad_query, probabilities * (grad - delta[:, None]), key)
    _store(grad_query_ptr, grad_query, scale, begin, queries, stride_grad_token, ROWS, DIM, DIMS)


@triton.jit
def _attention_bwd_key_value(
    query_ptr, key_ptr, value_ptr, grad_out_ptr,    # in:  [B, N, H, D] by strides
    mask_ptr, cu_seqlens_ptr, lse_ptr, delta_ptr,   # in:  as in forward; [H, rows] float32 x2
    grad_key_ptr, grad_value_ptr,                   # out: [rows, H, D], their rows stride_grad_token apart
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_grad_token, heads, rows, num_queries, num_keys, scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS keys and values. Scores are computed transposed, [keys, queries]: so the probabilities go
    from registers straight into the product with grad_out."""
    blocks = tl.cdiv(num_keys, KEYS)
    pair = tl.program_id(0) // blocks
    image, first, head, queries, keys = _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys)
    query_ptr += image * stride_query_batch + first * stride_query_token + head * stride_query_head
    key_ptr += image * stride_key_batch + first * stride_key_token + head * stride_key_head
    value_ptr += image * stride_value_batch + first * stride_value_token + head * stride_value_head
    grad_out_ptr += image * stride_grad_out_batch + first * stride_grad_out_token + head * stride_grad_out_head
    mask_start = (pair // heads).to(tl.int64) * stride_mask_batch + head * stride_mask_head
    row, key_row = image * num_queries + first, image * num_keys + first
    lse_ptr += head * rows + row
    delta_ptr += head * rows + row
    grad_key_ptr += key_row * stride_grad_token + head * DIM
    grad_value_ptr += key_row * stride_grad_token + head * DIM

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
        lse = tl.load(lse_ptr + at_query, at_query < queries, other=0.0)
        delta = tl.load(delta_ptr + at_query, at_query < queries, other=0.0)
        scores = _finish_scores(
            _product(key, _transposed(query)), at_query[None, :], at[:, None], queries, keys, scale,
            mask_ptr, mask_start, stride_mask_query, stride_mask_key, False,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[None, :])
        grad = _product(value, _transposed(grad_out))
        grad_value = _add_product(grad_value, probabilities, grad_out)
        grad_key = _add_product(grad_key, probabilities * (grad - delta[None, :]), query)
    _store(grad_key_ptr, grad_key, scale, begin, keys, stride_grad_token, KEYS, DIM, DIMS)
    _store(grad_value_ptr, grad_value, 1.0, begin, keys, stride_grad_token, KEYS, DIM, DIMS)
