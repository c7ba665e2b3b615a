"""The tokens of a backbone as features, for retrieval, segmentation, linear probes and other heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit.errors import InputError


@dataclass(frozen=True, eq=False)
class Features:
    """The tokens of a batch of images, with named parts. The parts are views of the tokens where possible.

    Attributes:
        tokens: [B, N, D], the class token first, then the patches row by row. For a list of images, a list of [N, D].
        grid: (rows, columns) of the patches. For a list of images, a list of them.
    """

    tokens: Tensor | list[Tensor]
    grid: Any

    @property
    def cls_token(self) -> Tensor:
        """The class tokens, [B, D]; also for a list of images."""
        tokens = self.tokens
        return tokens[:, 0] if isinstance(tokens, Tensor) else torch.stack([own[0] for own in tokens])

    @property
    def patch_tokens(self) -> Tensor | list[Tensor]:
        """The patch tokens, [B, P, D]; for a list of images, a list of [P, D]."""
        return self._map_patches(lambda patches, grid: patches)

    @property
    def patch_map(self) -> Tensor | list[Tensor]:
        """The patch tokens as an image, [B, D, rows, columns]; for a list of images, a list of [D, rows, columns]."""
        return self._map_patches(lambda patches, grid: patches.transpose(-1, -2).unflatten(-1, grid))

    @property
    def mean(self) -> Tensor:
        """The mean of the patch tokens, [B, D]; also for a list of images."""
        means = self._map_patches(lambda patches, grid: patches.mean(-2))
        return means if isinstance(means, Tensor) else torch.stack(means)

    def _map_patches(self, function: Callable[[Tensor, Any], Tensor]) -> Tensor | list[Tensor]:
        """Apply `function` to patch tokens [..., P, D] and grid, of the batch or of each image of a list."""
        if not isinstance(self.tokens, Tensor):
            return [function(tokens[1:], grid) for tokens, grid in zip(self.tokens, self.grid, strict=True)]
        if self.tokens.shape[1] == 1:
            raise InputError("features: expected patch tokens, got the class token alone (class_token_only=True)")
        return function(self.tokens[:, 1:], self.grid)


def resolve_block_indices(n: int | Sequence[int], count: int) -> list[int]:
    """Return the indices of the last `n` of `count` blocks, or of those listed in `n` (negative: from the end)."""
    if isinstance(n, int):
        if not 1 <= n <= count:
            raise InputError(f"n: expected 1 to {count} blocks, got {n}")
        return list(range(count - n, count))
    blocks = [index + count if index < 0 else index for index in n]
    if not blocks or blocks != sorted(set(blocks)) or not 0 <= blocks[0] <= blocks[-1] < count:
        raise InputError(f"n: expected increasing block indices from 0 to {count - 1}, got {list(n)}")
    return blocks


@torch.inference_mode()
def compute_pooled(model: Any, pixels: Tensor) -> Tensor:
    """Compute the features that a classifier of any family classifies: uint8 [B, H, W, 3] -> float32 [B, D]."""
    inputs: list[Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        model(pixels.to(model.device))
    finally:
        hook.remove()
    return inputs[0].float()
