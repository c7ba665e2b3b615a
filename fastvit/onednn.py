"""Float32 matrix products on x86 processors by oneDNN, which PyTorch ships beside MKL and uses for half precision only.

On an AMD EPYC with AVX-512 MKL was measured to need about twice as long; on Intel's processors nobody compared them.
The product is oneDNN's float32 one, no lower precision (error against float64 within 1.5 times MKL's).
`torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def is_there() -> bool:
    """Whether this PyTorch has the product, for a processor on which it is worth taking."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these tensors is oneDNN's: plain float32 tensors on the CPU, and nobody traces."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and is_there()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias and its gradients, as torch.nn.functional.linear's; by oneDNN for what it `takes`."""
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """x @ weight^T + bias, then GELU in the form `gelu` ("none" or "tanh", as torch calls them). Not differentiable."""
    activation, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


class Linear(torch.autograd.Function):
    """`linear` with all three products by oneDNN."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
