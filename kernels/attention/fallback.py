"""What the operators compute in plain PyTorch where a kernel cannot be launched: the same results, a few times slower.

Scores are written to memory, so images are taken in parts. The log-sum-exp is returned for backward, which may be a
kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

MOST_SCORES = 2**28  # at once: 1 GiB in float32


def _parts(
    tensors: tuple[Tensor, ...], mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> Iterator[tuple[list[Tensor], Tensor | None]]:
    """Some images at a time: tensors [b, N, ...] as views, whatever the batch's form, and their mask.

    tensors: query or key first, of [B, N, ...] or [tokens, ...] each.
    """
    if cu_seqlens is None:
        (batch, queries, heads), keys = tensors[0].shape[:3], tensors[1].shape[1]
        step = max(1, MOST_SCORES // max(1, heads * queries * keys))
        for first in range(0, batch, step):
            own = slice(first, first + step)
            yield (
                [tensor[own] for tensor in tensors],
                mask if mask is None or mask.shape[0] == 1 else mask[own],
            )
        return
    for index, (first, end) in enumerate(pairwise(cu_seqlens.clamp(0, len(tensors[0])).tolist())):
        count = min(max(end - first, 0), max_seqlen)
        own_mask = mask
        if mask is not None:
            own_mask = mask.expand(len(cu_seqlens) - 1, -1, max_seqlen, max_seqlen)[index : index + 1]
            own_mask = own_mask[:, :, :count, :count]
        yield [tensor[None, first : first + count] for tensor in tensors], own_mask


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """float32 [b, H, Nq, Nk], natural logarithms."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query.float(), key.float()) * scale
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None,
    scale: float, candidate: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = torch.zeros_like(query, memory_format=torch.contiguous_format), query.new_zeros(query.shape[:-1])
    lse = lse.float()
    for (q, k, v, out_part, lse_part), own_mask in _parts((query, key, value, out, lse), mask, cu_seqlens, max_seqlen):
        scores = _scores(q, k, own_mask, scale)
        level = scores.logsumexp(-1, keepdim=True)
        level = level.masked_fill(level == float("-inf"), 0.0)  # every key is hidden: the row is zeros
        out_part.copy_(torch.einsum("bhqk,bkhd->bqhd", (scores - level).exp(), v.float()))
        lse_part.copy_(level.squeeze(-1).transpose(1, 2) / math.log(2))
    return out.flatten(-2), lse.flatten(0, -2).t().contiguous()


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    cu_seqlens: Tensor | None, max_seqlen: int | None, scale: float, candidate: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = tuple(torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))
    grad_out, out = (tensor.unflatten(-1, query.shape[-2:]) for tensor in (grad_out, out))
    level = lse.t().unflatten(0, query.shape[:-2]) * math.log(2)
    tensors = (query, key, value, grad_out, out, level, *grads)
    for (q, k, v, do, o, at, dq, dk, dv), own_mask in _parts(tensors, mask, cu_seqlens, max_seqlen):
        probabilities = (_scores(q, k, own_mask, scale) - at.transpose(1, 2)[..., None]).exp()
        delta = (do.float() * o.float()).sum(-1).transpose(1, 2)[..., None]
        grad = torch.einsum("bqhd,bkhd->bhqk", do.float(), v.float())
        grad_scores = probabilities * (grad - delta) * scale
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", grad_scores, k.float()))
        dk.copy_(torch.einsum("bhqk,bqhd->bkhd", grad_scores, q.float()))
        dv.copy_(torch.einsum("bhqk,bqhd->bkhd", probabilities, do.float()))
    return grads


def forward_packed(qkv: Tensor, *rest) -> tuple[Tensor, Tensor]:
    return forward(*qkv.unbind(-3), *rest)


def backward_packed(grad_out: Tensor, qkv: Tensor, *rest) -> Tensor:
    return torch.stack(backward(grad_out, *qkv.unbind(-3), *rest), -3)
