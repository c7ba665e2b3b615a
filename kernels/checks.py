"""Argument checks shared by all operations; they run before any kernel is launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # supported by every kernel


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise ValueError, naming the argument, unless the tensor has this shape and device and one of these dtypes."""
    if tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} like the others, got {tensor.device}")


def check_optional(name: str, tensor: Tensor | None, *expected: object) -> None:
    if tensor is not None:
        check_tensor(name, tensor, *expected)


def check_tensors(*, optional: Mapping[str, object] = {}, **tensors: object) -> None:
    """Raise ValueError unless every value is a tensor; values in `optional` may also be None."""
    for name, value in (*tensors.items(), *optional.items()):
        if not isinstance(value, Tensor) and (value is not None or name in tensors):
            raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether any of these tensors requires a gradient, so that the operation has to save tensors for backward."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def make_contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
