"""What a Vision Transformer knows of a picture, token by token: for retrieval, segmentation, probes and other heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit.errors import InputError


@dataclass(frozen=True, eq=False)
class Features:
    """The tokens of a batch of pictures, and names for what one takes from them.

    tokens: [B, N, D], the class token first and then the patches, row by row; grid: their (rows, columns). For a list
    of pictures both are lists, of [N, D] and (rows, columns). What one takes is a view where it can be one.
    """

    tokens: Tensor | list[Tensor]
    grid: Any

    @property
    def cls_token(self) -> Tensor:
        """[B, D], of a list too."""
        tokens = self.tokens
        return tokens[:, 0] if isinstance(tokens, Tensor) else torch.stack([own[0] for own in tokens])

    @property
    def patch_tokens(self) -> Tensor | list[Tensor]:
        """[B, P, D]; of a list, a list of [P, D]."""
        return self._map_patches(lambda patches, grid: patches)

    @property
    def patch_map(self) -> Tensor | list[Tensor]:
        """The patch tokens as a picture, [B, D, rows, columns]; of a list, a list of [D, rows, columns]."""
        return self._map_patches(lambda patches, grid: patches.transpose(-1, -2).unflatten(-1, grid))

    @property
    def mean(self) -> Tensor:
        """The mean of the patch tokens, [B, D], of a list too."""
        means = self._map_patches(lambda patches, grid: patches.mean(-2))
        return means if isinstance(means, Tensor) else torch.stack(means)

    def _map_patches(self, function: Callable[[Tensor, Any], Tensor]) -> Tensor | list[Tensor]:
        """`function` of the patch tokens [.., P, D] and their grid, for the batch or for each picture of a list."""
        if not isinstance(self.tokens, Tensor):
            return [function(tokens[1:], grid) for tokens, grid in zip(self.tokens, self.grid, strict=True)]
        if self.tokens.shape[1] == 1:
            raise InputError("features: expected patch tokens, got the class token alone (class_token_only=True)")
        return function(self.tokens[:, 1:], self.grid)


def resolve_block_indices(n: int | Sequence[int], count: int) -> list[int]:
    """The indices of the `n` last of `count` blocks, or of those that n lists; negative ones count from the end."""
    if isinstance(n, int):
        if not 1 <= n <= count:
            raise InputError(f"n: expected 1 to {count} blocks, got {n}")
        return list(range(count - n, count))
    blocks = [index + count if index < 0 else index for index in n]
    if not blocks or blocks != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < count:
        raise InputError(f"n: expected rising indices of {count} blocks, from 0 to {count - 1}, got {list(n)}")
    return blocks
