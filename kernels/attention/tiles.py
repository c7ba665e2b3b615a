"""Pieces that attention's kernels share.

A tile is a tuple of blocks: its columns, the head dim, are cut into powers of two. `DIMS` and `KEYS` are such cuts,
(first, length) for each piece.

Steps from head to head are compile-time constants of the kernels: at a head dim like 72, which 16 does not divide,
their value alone tells the compiler that rows begin at multiples of 16 bytes (34 loads instead of 300).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(pair, heads, cu_seqlens_ptr, rows, num_queries, num_keys):
    """Image and head of a program: (image, first token, head, queries, keys).

    A tensor's head begins at image * stride_batch + first * stride_token + head * stride_head. Without cu_seqlens,
    first is 0; with it, image is 0 and the tokens of all images follow one another. 64 bit: a large batch passes 2**31
    elements. No bounds, whatever they say, lead beyond the `rows` tokens that there are.
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
    product, query, key, queries, keys, scale,
    mask_ptr, mask_start, stride_mask_query, stride_mask_key,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Scores in base 2; -inf where a key is hidden or, if MASKED, beyond the last.

    query and key are indices of shapes [R, 1] and [1, K], or [1, R] and [K, 1] for a transposed product. mask_start:
    where the mask of this image and head begins.
    """
    scores = product * (scale * LOG2E)
    if mask_ptr is not None:
        # Every element is asked for, also where the mask is one row for all queries: then its stride is zero.
        offset = mask_start + query.to(tl.int64) * stride_mask_query + key.to(tl.int64) * stride_mask_key
        exists = (query < queries) & (key < keys)
        if mask_ptr.dtype.element_ty == tl.uint8:
            scores = tl.where(tl.load(mask_ptr + offset, exists, other=1) != 0, scores, float("-inf"))
        else:
            scores += tl.load(mask_ptr + offset, exists, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        scores = tl.where(key < keys, scores, float("-inf"))
    return scores
