"""Whether a tracer or transform needs PyTorch's own operations, and whether backward may follow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether any of these tensors requires a gradient, so that the operation has to save tensors for backward."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_transform_active() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is active, outside of a compiler."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def is_traced_or_transformed() -> bool:
    """Whether a compiler, torch.jit, torch.func or forward-mode differentiation is active."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
