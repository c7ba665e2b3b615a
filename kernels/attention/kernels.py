"""Attention's kernels: shared helpers, two forward kernels and two backward kernels.

`_attention_fwd_short` holds all keys of a head, `_attention_fwd_long` loops over them. Backward:

    grad_value = probabilities^T grad_out,   grad_scores = probabilities * (grad_out value^T - delta)
    grad_key = grad_scores^T query * scale,  grad_query = grad_scores key * scale

with delta = sum(grad_out * out) per row. `_attention_bwd_key_value` computes all three where one tile holds all keys of
a head; otherwise `_attention_bwd_query` runs first and computes delta and grad_query.

A tile is a tuple of blocks: its columns, the head dim, are split into powers of two. `DIMS` and `KEYS` are such splits,
(first, length) per block.

Strides between heads are compile-time constants: at a head dim such as 72, which is not a multiple of 16, only their
values tell the compiler that rows are aligned to 16 bytes (34 loads instead of 300).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys):
    """A program's (image, first token, head, queries, keys).

    A tensor's head begins at image * stride_batch + first * stride_token + head * stride_head, in 64 bit: a large batch
    has more than 2**31 elements. Without cu_seqlens first is 0; with it image is 0 and all images' tokens follow one
    another. Its values are clamped to the `rows` tokens that exist.
    """
    image = (pair // heads).to(tl.int64)
    first = image * 0
    queries, keys = num_queries, num_keys
    if cu_seqlens_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + image), 0), rows).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + image + 1), rows).to(tl.int64)
        queries = tl.minimum(tl.maximum(end - first, 0).to(tl.int32), num_queries)
        keys = queries
        image = image * 0
    return image, first, (pair % heads).to(tl.int64), queries, keys


@triton.jit
def _load(
    ptr, start, count, stride_token, MASKED: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr
):
    """ROWS tokens of a head from `start` as a tile; zeros for tokens that do not exist."""
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
def _transpose(tile):
    """Transposed blocks. Those made before a loop stay in shared memory; inside they would be written every time."""
    turned = ()
    for i in tl.static_range(len(tile)):
        turned = turned + (tl.trans(tile[i]),)
    return turned


@triton.jit
def _matmul(a, b):
    """a @ b for a tile a and a transposed tile b, in float32."""
    sums = tl.dot(a[0], b[0], input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        sums = tl.dot(a[i], b[i], sums, input_precision="ieee")
    return sums


@triton.jit
def _add_matmul(sums, a, b):
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
    scores, query, key, queries, keys, scale,
    mask_ptr, mask_start, stride_mask_query, stride_mask_key,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Scale the matmul's scores, in base 2; -inf where a key is masked or, if MASKED, out of bounds.

    query and key are indices of shapes [R, 1] and [1, K], or [1, R] and [K, 1] for transposed scores. mask_start:
    offset of the mask of this image and head.
    """
    scores = scores * (scale * LOG2E)
    if mask_ptr is not None:
        # Every element is loaded, even if the mask is one row for all queries: its stride is then zero.
        offset = mask_start + query.to(tl.int64) * stride_mask_query + key.to(tl.int64) * stride_mask_key
        exists = (query < queries) & (key < keys)
        if mask_ptr.dtype.element_ty == tl.uint8:
            scores = tl.where(tl.load(mask_ptr + offset, exists, other=1) != 0, scores, float("-inf"))
        else:
            scores += tl.load(mask_ptr + offset, exists, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        scores = tl.where(key < keys, scores, float("-inf"))
    return scores


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
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,       # a program processes BLOCKS times ROWS queries
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

    key_tiles, value_tiles = (), ()  # a tile per piece of the keys; Triton's collections are tuples, built by adding
    for c in tl.static_range(len(KEYS)):
        key = _load(key_ptr, KEYS[c][0], keys, stride_key_token, KEYS[c][0] + KEYS[c][1] > FULL, KEYS[c][1], DIM, DIMS)
        value = _load(
            value_ptr, KEYS[c][0], keys, stride_value_token, KEYS[c][0] + KEYS[c][1] > FULL, KEYS[c][1], DIM, DIMS
        )
        key_tiles = key_tiles + (_transpose(key),)
        value_tiles = value_tiles + (value,)

    begin = tl.program_id(0) % blocks * (ROWS * BLOCKS)
    for start in range(begin, tl.minimum(begin + ROWS * BLOCKS, queries), ROWS):
        at_query = start + tl.arange(0, ROWS)
        query = _load(query_ptr, start, queries, stride_query_token, True, ROWS, DIM, DIMS)
        scores = ()
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        for c in tl.static_range(len(KEYS)):
            at_key = KEYS[c][0] + tl.arange(0, KEYS[c][1])
            piece = _finish_scores(
                _matmul(query, key_tiles[c]), at_query[:, None], at_key[None, :], queries, keys, scale,
                mask_ptr, mask_start, stride_mask_query, stride_mask_key, KEYS[c][0] + KEYS[c][1] > FULL,
            )  # fmt: skip
            highest = tl.maximum(highest, tl.max(piece, 1))
            scores = scores + (piece,)
        if mask_ptr is not None:  # a row in which every key is masked has probabilities of zero, not NaN
            highest = tl.where(highest == float("-inf"), 0.0, highest)

        total = tl.zeros([ROWS], tl.float32)
        out = _zeros(ROWS, DIMS)
        for c in tl.static_range(len(KEYS)):
            probabilities = tl.exp2(scores[c] - highest[:, None])
            total += tl.sum(probabilities, 1)
            out = _add_matmul(out, probabilities, value_tiles[c])
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
    if cu_seqlens_ptr is not None and begin >= queries:
        return
    at_query = begin + tl.arange(0, ROWS)
    query = _load(query_ptr, begin, queries, stride_query_token, True, ROWS, DIM, DIMS)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = _zeros(ROWS, DIMS)
    for start in range(0, keys, KEYS):
        at_key = start + tl.arange(0, KEYS)
        key = _transpose(_load(key_ptr, start, keys, stride_key_token, MASKED, KEYS, DIM, DIMS))
        scores = _finish_scores(
            _matmul(query, key), at_query[:, None], at_key[None, :], queries, keys, scale,
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
        out = _add_matmul(_scale_rows(out, correction), probabilities, value)
    if mask_ptr is not None:
        highest = tl.where(total == 0.0, 0.0, highest)
        total = tl.where(total == 0.0, 1.0, total)
    _store(out_ptr, out, (1.0 / total)[:, None], begin, queries, heads * DIM, ROWS, DIM, DIMS)
    tl.store(lse_ptr + at_query, highest + tl.log2(total), at_query < queries)


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
    """The gradient of ROWS queries, and their delta, which the keys' gradient needs."""
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
    if cu_seqlens_ptr is not None and begin >= queries:
        return
    at_query = begin + tl.arange(0, ROWS)
    query = _load(query_ptr, begin, queries, stride_query_token, True, ROWS, DIM, DIMS)
    grad_out = _load(grad_out_ptr, begin, queries, stride_grad_out_token, True, ROWS, DIM, DIMS)
    delta = _row_dot(grad_out, _load(out_ptr, begin, queries, heads * DIM, True, ROWS, DIM, DIMS))
    tl.store(delta_ptr + at_query, delta, at_query < queries)
    lse = tl.load(lse_ptr + at_query, at_query < queries, other=0.0)
    grad_query = _zeros(ROWS, DIMS)
    for start in range(0, keys, KEYS):
        at_key = start + tl.arange(0, KEYS)
        key = _load(key_ptr, start, keys, stride_key_token, MASKED, KEYS, DIM, DIMS)
        value = _load(value_ptr, start, keys, stride_value_token, MASKED, KEYS, DIM, DIMS)
        scores = _finish_scores(
            _matmul(query, _transpose(key)), at_query[:, None], at_key[None, :], queries, keys, scale,
            mask_ptr, mask_start, stride_mask_query, stride_mask_key, MASKED,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[:, None])
        grad = _matmul(grad_out, _transpose(value))
        grad_query = _add_matmul(grad_query, probabilities * (grad - delta[:, None]), key)
    _store(grad_query_ptr, grad_query, scale, begin, queries, stride_grad_token, ROWS, DIM, DIMS)


@triton.jit
def _attention_bwd_key_value(
    query_ptr, key_ptr, value_ptr, grad_out_ptr,    # in:  [B, N, H, D] by strides
    mask_ptr, cu_seqlens_ptr, out_ptr, lse_ptr,     # in:  as in forward; [rows, H, D], [H, rows] float32
    grad_query_ptr, delta_ptr,                      # out: [rows, H, D]; or in: [H, rows] float32. The other is None
    grad_key_ptr, grad_value_ptr,                   # out: [rows, H, D], their rows stride_grad_token apart
    stride_query_batch, stride_query_token, stride_query_head: tl.constexpr,
    stride_key_batch, stride_key_token, stride_key_head: tl.constexpr,
    stride_value_batch, stride_value_token, stride_value_head: tl.constexpr,
    stride_grad_out_batch, stride_grad_out_token, stride_grad_out_head: tl.constexpr,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_grad_token, heads, rows, num_queries, num_keys, scale,
    DIM: tl.constexpr, DIMS: tl.constexpr,          # DIMS: one piece if there is a grad_query
    MASKED: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,                       # compute grad_query by the transposed matmul
):  # fmt: skip
    """The gradients of KEYS keys and values; with grad_query, of all keys of a head, and of its queries as well.

    Scores are computed transposed, [keys, queries]: the probabilities go directly from registers into the matmuls with
    grad_out and query, whose sums, one row per key, stay in registers while the loop runs over the queries.
    """
    blocks = 1 if grad_query_ptr is not None else tl.cdiv(num_keys, KEYS)
    pair = tl.program_id(0) // blocks
    image, first, head, queries, keys = _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys)
    query_ptr += image * stride_query_batch + first * stride_query_token + head * stride_query_head
    key_ptr += image * stride_key_batch + first * stride_key_token + head * stride_key_head
    value_ptr += image * stride_value_batch + first * stride_value_token + head * stride_value_head
    grad_out_ptr += image * stride_grad_out_batch + first * stride_grad_out_token + head * stride_grad_out_head
    mask_start = (pair // heads).to(tl.int64) * stride_mask_batch + head * stride_mask_head
    row, key_row = image * num_queries + first, image * num_keys + first
    lse_ptr += head * rows + row
    if grad_query_ptr is not None:
        out_ptr += (row * heads + head) * DIM
        grad_query_ptr += row * stride_grad_token + head * DIM
    else:
        delta_ptr += head * rows + row
    grad_key_ptr += key_row * stride_grad_token + head * DIM
    grad_value_ptr += key_row * stride_grad_token + head * DIM

    begin = tl.program_id(0) % blocks * KEYS
    if cu_seqlens_ptr is not None and begin >= keys:
        return
    at_key = begin + tl.arange(0, KEYS)
    key = _load(key_ptr, begin, keys, stride_key_token, MASKED, KEYS, DIM, DIMS)
    value = _load(value_ptr, begin, keys, stride_value_token, MASKED, KEYS, DIM, DIMS)
    grad_key, grad_value = _zeros(KEYS, DIMS), _zeros(KEYS, DIMS)
    for start in range(0, queries, ROWS):
        at_query = start + tl.arange(0, ROWS)
        query = _load(query_ptr, start, queries, stride_query_token, True, ROWS, DIM, DIMS)
        grad_out = _load(grad_out_ptr, start, queries, stride_grad_out_token, True, ROWS, DIM, DIMS)
        lse = tl.load(lse_ptr + at_query, at_query < queries, other=0.0)
        if grad_query_ptr is not None:
            delta = _row_dot(grad_out, _load(out_ptr, start, queries, heads * DIM, True, ROWS, DIM, DIMS))
        else:
            delta = tl.load(delta_ptr + at_query, at_query < queries, other=0.0)
        # Only grad_query sums over keys; the values of keys out of bounds are otherwise not stored.
        scores = _finish_scores(
            _matmul(key, _transpose(query)), at_query[None, :], at_key[:, None], queries, keys, scale,
            mask_ptr, mask_start, stride_mask_query, stride_mask_key, MASKED and grad_query_ptr is not None,
        )  # fmt: skip
        probabilities = tl.exp2(scores - lse[None, :])
        grad_value = _add_matmul(grad_value, probabilities, grad_out)
        grad = _matmul(value, _transpose(grad_out))
        grad_scores = (probabilities * (grad - delta[None, :])).to(query[0].dtype)
        grad_key = _add_matmul(grad_key, grad_scores, query)
        if grad_query_ptr is not None:
            if TRANSPOSED:  # wgmma needs 64 rows: the head dim has them, the queries do not
                grad_query = (tl.trans(tl.dot(tl.trans(key[0]), grad_scores, input_precision="ieee")),)
            else:
                grad_query = _add_matmul(_zeros(ROWS, DIMS), tl.trans(grad_scores), key)
            _store(grad_query_ptr, grad_query, scale, start, queries, stride_grad_token, ROWS, DIM, DIMS)
    _store(grad_key_ptr, grad_key, scale, begin, keys, stride_grad_token, KEYS, DIM, DIMS)
    _store(grad_value_ptr, grad_value, 1.0, begin, keys, stride_grad_token, KEYS, DIM, DIMS)
