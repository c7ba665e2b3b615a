"""Images of different sizes as one sequence: their tokens are concatenated without padding.

    tokens of image 0 | tokens of image 1 | ...        [1, all tokens, D]

LayerNorm, linear layers, activation and residual add treat each token by itself and accept such a sequence like any
other. Attention alone needs to know where an image ends: a `Packing` is passed in place of an attention mask, and the
tokens of an image attend to one another only. NaViT packs images for training in the same way (Dehghani et al. 2023,
arXiv:2307.06304).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops


class Packing(NamedTuple):
    """The positions of the images in a sequence [1, all tokens, D]. A tuple, because code that moves or traverses a
    module's arguments handles tuples."""

    lengths: tuple[int, ...]  # tokens of each image
    cu_seqlens: Tensor  # int32 [B + 1]: image i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1]
    max_seqlen: int  # tokens of the largest image


Mask = Tensor | Packing | None  # what may be attended to


def pack(lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of images with these numbers of tokens."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Packing(tuple(lengths), bounds, max(lengths))


def split_images(x: Tensor, mask: Mask) -> list[Tensor]:
    """Split a batch [B, N, ...] or, with a `Packing`, a sequence [1, all tokens, ...] into views [N, ...]."""
    return list(x[0].split(mask.lengths)) if isinstance(mask, Packing) else list(x.unbind())


def select_class_tokens(tokens: Tensor, mask: Mask) -> Tensor:
    """The class tokens, [B, 1, D], of a batch [B, N, D] or a sequence [1, all tokens, D]."""
    if isinstance(mask, Packing):
        return tokens[0].index_select(0, mask.cu_seqlens[:-1]).unsqueeze(1)
    return tokens[:, :1]


def attend(attention: Callable[..., Tensor], *tensors: Tensor, mask: Mask, **options: Any) -> Tensor:
    """Apply `ops.attention` or `ops.attention_packed` to a batch [B, N, ...] or a packed sequence.

    Returns [B, N, D] or [1, all tokens, D].
    """
    if not isinstance(mask, Packing):
        return attention(*tensors, mask=mask, **options)
    sequences = (tensor[0] for tensor in tensors)
    return attention(*sequences, cu_seqlens=mask.cu_seqlens, max_seqlen=mask.max_seqlen, **options).unsqueeze(0)


def attention_probabilities(query: Tensor, key: Tensor, mask: Mask, scale: float | None = None) -> Any:
    """Attention maps [B, heads, Nq, Nk] of query and key [B, N, heads, head_dim].

    Packed, a list with [heads, N, N] for each image.
    """
    if not isinstance(mask, Packing):
        return ops.attention_probabilities(query, key, scale=scale, mask=mask)
    pairs = zip(split_images(query, mask), split_images(key, mask), strict=True)
    return [ops.attention_probabilities(q[None], k[None], scale=scale)[0] for q, k in pairs]


def attend_with_maps(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask = None, *, scale: float | None = None, dropout_p: float = 0.0
) -> tuple[Tensor, Any]:
    """Compute attention operation by operation. The context is computed from the maps, which therefore have gradients.

    Args:
        query: [B, N, heads, head_dim], as are `key` and `value`.
        mask: broadcastable to [B, heads, N, N], a `Packing`, or None.
        scale: factor of the scores; None for 1 / sqrt(head_dim).
        dropout_p: probability of dropping an attention probability.

    Returns:
        The context [B, N, heads * head_dim], and the probabilities after dropout, [B, heads, N, N]. Packed, a list with
        [heads, N, N] for each image.
    """
    maps = attention_probabilities(query, key, mask, scale)  # softmax(scale Q K^T + mask)
    if dropout_p:
        is_packed = isinstance(mask, Packing)
        maps = [F.dropout(own, dropout_p) for own in maps] if is_packed else F.dropout(maps, dropout_p)
    if not isinstance(mask, Packing):
        return torch.einsum("bhqk,bkhd->bqhd", maps, value).flatten(2), maps
    contexts = [torch.einsum("hqk,khd->qhd", *pair) for pair in zip(maps, split_images(value, mask), strict=True)]
    return torch.cat(contexts).flatten(1).unsqueeze(0), maps


def embed_images(embeddings: Callable[..., Tensor], images: Sequence[Tensor]) -> Tensor:
    """`embeddings` of images [C, H, W] of any sizes, [1, tokens of all, D] in order; equal sizes are batched."""
    same: dict[Any, list[int]] = {}
    for index, image in enumerate(images):
        same.setdefault((image.shape, image.dtype), []).append(index)
    tokens: dict[int, Tensor] = {}
    for indices in same.values():
        batch = torch.stack([images[index] for index in indices])
        tokens.update(zip(indices, embeddings(batch, None, True).unbind(), strict=True))
    return torch.cat([tokens[index] for index in range(len(images))]).unsqueeze(0)


def stack_or_pack(images: Any, grids: Sequence[tuple[int, int]]) -> tuple[Any, Packing | None]:
    """Stack a list of images with these (rows, columns) of patches if all have one size; otherwise return the list and
    its packing."""
    if len({(image.shape, image.dtype) for image in images}) == 1:
        return torch.stack(list(images)), None
    return list(images), pack([1 + rows * columns for rows, columns in grids], images[0].device)
