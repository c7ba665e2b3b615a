"""Who follows operations one by one and must be shown PyTorch's own; whether backward is to follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether backward may be asked for what is computed from these, so that what it needs must be kept."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_transform_active() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work, and no compiler."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_traced_or_transformed() -> bool:
    """Whether one of these is at work, a compiler or torch.jit."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
