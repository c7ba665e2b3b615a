"""Attention for the short sequences of a Vision Transformer.

    scores = query @ key^T * scale + mask;   out = softmax(scores) @ value          for each image and head

    query [B, Nq, H, D], key and value [B, Nk, H, D], any strides  ->  out [B, Nq, H * D]
    or qkv [B, N, 3, H, D] as one GEMM wrote it                    ->  out [B, N, H * D]

The inputs are read where they lie, and out is written as the output projection reads it: no transpose, no copy. The
gradient of qkv is one tensor too, its three parts written in place by strides.

Read in this order: `tiles.py` (shared pieces), `forward.py`, `backward.py` (the kernels), `launch.py` (launchers and
operators), `fallback.py` (the same in PyTorch, for a GPU on which a launch fails), and the public functions here.

At N = 197, D = 64 (ViT-B/16, batch 256, bfloat16) forward moves 310 MB, 103 microseconds at 3 TB/s, and computes for
38: it is bound by memory. So a program takes one head, reads its keys and values once into shared memory, and passes
over the queries; all scores of a query are in registers at once and the softmax needs no second look (`short`: up to
256 keys). The keys are cut into powers of two, 197 into 128 + 64 + 16, so that 208 columns are computed and not 256;
head dims too, 80 into 64 + 16. With more keys, with a mask, or with too few heads for a GPU, the softmax runs along
(`long`; Milakov & Gimelshein 2018).

Saved for backward: qkv, out, and one float32 a row, the log-sum-exp in base 2, from which the probabilities are
computed again (Dao et al. 2022): beside qkv 0.31 MB an image of ViT-B, where the probabilities would take 0.93.
Backward of `short` is one kernel: it computes the probabilities once, holds the gradients of all keys and values of its
head in registers, and writes each query's gradient once: 620 MB, 207 microseconds. `long` takes two kernels, one by
queries and one by keys. Every sum has one place and one order, without atomics: two runs give the same bits. Scores are
float32, scaled by scale * log2(e) in one multiplication for exp2.

A prediction from counts, nothing was timed: FlashAttention-3's 192 x 192 tiles pad 197 tokens to 384 both ways, 147,456
scores a head; `short` computes 256 x 208 = 53,248, 2.8 times fewer, by 17,600 warp instructions a head on sm_90 (971
for 16 rows of queries and a warp, Triton 3.6), where our `long` takes 35,200. All of them move the same bytes, so where
memory decides the win is smaller: 1.3 times is the aim. Backward's `short`, 224 x 256, fills a multiprocessor's
registers with one program and waits for each product (52,800 instructions a head, transposed 36,200): no win is
predicted there.

Dropout of probabilities and the gradient of an additive mask are left to PyTorch.

Vaswani et al. 2017, arXiv:1706.03762; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels.attention.launch import MAX_HEAD_DIM, _attention, _attention_packed, _sizes
from fastvit.kernels.checks import DTYPES, check_tensor

MIN_HEAD_DIM = 16


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    candidate: int = 0,
) -> Tensor:
    """softmax(query key^T * scale + mask) value for each head, heads side by side.

    Args:
        query: [B, Nq, H, D], float32, bfloat16 or float16; D a multiple of 8 from 16 to 128. Any strides, read where
            they lie; a tensor is copied only where its last dimension is not contiguous, or its tokens lie 2**23
            elements apart.
        key, value: [B, Nk, H, D], query's dtype.
        scale: 1 / sqrt(D) if None.
        mask: broadcastable to [B, H, Nq, Nk]; boolean (True: may be attended to), or floating and added to the scores,
            without a gradient. A row whose every key is hidden gives zeros. A key is hidden too by a number that in
            base 2 is below float32's range, such as the lowest float32.
        cu_seqlens: int32 [B + 1], for images of different sizes in one batch: query, key and value are [tokens, H, D],
            image i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1] and attends to itself alone. A token of no
            image gives zeros. On a GPU the values are not checked, which would wait for it; none leads beyond the
            tensors.
        max_seqlen: with cu_seqlens, at least the tokens of the largest image; those beyond are not computed and give
            zeros. mask is then broadcastable to [B, H, max_seqlen, max_seqlen].
        candidate: which of the tuning table's candidates runs.

    Returns:
        [B, Nq, H * D] or [tokens, H * D], contiguous. Under autocast float32 inputs are cast as PyTorch's
        scaled_dot_product_attention casts them. Differentiable once.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    query, key, value = (_autocast(tensor) for tensor in (query, key, value))
    _check(query, key, value, cu_seqlens, max_seqlen)
    return _attention(query, key, value, *_call(query, key, scale, mask, cu_seqlens, max_seqlen, candidate))[0]


def attention_packed(
    qkv: Tensor,
    *,
    num_heads: int | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    candidate: int = 0,
) -> Tensor:
    """`attention` of the three parts of one tensor, as a GEMM with the joined weights gives it.

    Args:
        qkv: [B, N, 3, H, D], or [B, N, 3 * H * D] with num_heads; with cu_seqlens the same without B, N being all
            tokens. Its gradient is one tensor as well.
        num_heads: H, needed where qkv's last dimension is flat.
        scale, mask, cu_seqlens, max_seqlen, candidate: as in `attention`.

    Returns:
        [B, N, H * D] or [tokens, H * D], contiguous.

    Raises:
        ValueError: an argument does not fit; the message names it.
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
    return _attention_packed(qkv, *_call(query, key, scale, mask, cu_seqlens, max_seqlen, candidate))[0]


def takes_head_dim(dim: int) -> bool:
    return MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM and dim % 8 == 0


def _autocast(tensor: Tensor) -> Tensor:
    """As PyTorch's autocast casts. Kernels run on GPUs, or interpreted on CPUs; it knows no "meta" device."""
    device = tensor.device.type
    if tensor.dtype == torch.float32 and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def _call(query, key, scale, mask, cu_seqlens, max_seqlen, candidate) -> tuple:
    """The operators' arguments after their tensors: defaults filled in, the mask checked and of four dimensions."""
    if mask is not None:
        sizes = _sizes(query, key, cu_seqlens, max_seqlen)
        mask = _broadcast_mask(mask, (sizes.batch, sizes.heads, sizes.queries, sizes.keys), query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return mask, cu_seqlens, max_seqlen, float(scale), candidate


def _broadcast_mask(mask: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """The mask in four dimensions, each as large as that of the scores or 1."""
    fits = 1 <= mask.ndim <= 4 and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask: expected something broadcastable to {list(shape)}, got {list(mask.shape)}")
    check_tensor("mask", mask, mask.shape, (torch.bool, *DTYPES), device)
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask: expected one that requires no gradient, which the kernels do not compute")
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
            raise ValueError(f"max_seqlen: expected the tokens of the largest image, got {max_seqlen}")
        key_shape = query.shape
    dim = query.shape[-1]
    if not takes_head_dim(dim):
        raise ValueError(
            f"query: expected a head dim that is a multiple of 8 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {dim}"
        )
    check_tensor("query", query, query.shape, DTYPES, query.device)
    check_tensor("key", key, key_shape, (query.dtype,), query.device)
    check_tensor("value", value, key_shape, (query.dtype,), query.device)
