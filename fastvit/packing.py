"""Pictures of different sizes as one sequence: their tokens one after the other, without padding.

    tokens of picture 0 | tokens of picture 1 | ...        [1, all tokens, D]

What a Vision Transformer does to each token by itself (LayerNorm, linear layers, activation, residual add) takes such a
sequence as it takes any other. Attention alone must know where a picture ends: a `Packing` goes where an attention mask
goes, and says that the tokens of a picture attend to one another and to nothing else. Dehghani et al. 2023 (NaViT),
arXiv:2307.06304, pack pictures for training likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Where the pictures lie in a sequence [1, all tokens, D]. A tuple: what moves the arguments of a module to its
    device, or goes through them in any other way, knows tuples."""

    lengths: tuple[int, ...]  # tokens of each picture
    cu_seqlens: Tensor  # int32 [B + 1]: picture i has the tokens from cu_seqlens[i] to cu_seqlens[i + 1]
    max_seqlen: int  # tokens of the largest picture


Mask = Tensor | Packing | None  # what may be attended to


def pack(lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of pictures with so many tokens each."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    return Packing(tuple(lengths), bounds, max(lengths))


def pictures_of(x: Tensor, mask: Mask) -> list[Tensor]:
    """A batch [B, N, ...] or, with a `Packing`, a sequence [1, all tokens, ...] as a list of [N, ...]; views."""
    return list(x[0].split(mask.lengths)) if isinstance(mask, Packing) else list(x.unbind())


def class_tokens_of(tokens: Tensor, mask: Mask) -> Tensor:
    """The class token of each picture, [B, 1, D], of a batch [B, N, D] or a sequence [1, all tokens, D]."""
    if isinstance(mask, Packing):
        return tokens[0].index_select(0, mask.cu_seqlens[:-1]).unsqueeze(1)
    return tokens[:, :1]


def attend(attention: Callable[..., Tensor], *tensors: Tensor, mask: Mask, **options: Any) -> Tensor:
    """`attention`, which is `ops.attention` or `ops.attention_packed`, of a batch [B, N, ...] or a packed sequence.

    Returns [B, N, D] or [1, all tokens, D].
    """
    if not isinstance(mask, Packing):
        return attention(*tensors, mask=mask, **options)
    sequences = (tensor[0] for tensor in tensors)
    return attention(*sequences, cu_seqlens=mask.cu_seqlens, max_seqlen=mask.max_seqlen, **options).unsqueeze(0)
