"""PyTorch implementations of the operations that hold a matmul, where no kernel runs.

Same names, arguments and results as in `fastvit.ops.reference`, and two things that a definition does not have:

- On x86 processors larger float32 matmuls are oneDNN's. PyTorch takes MKL's, which needed about twice as long on one
  AMD EPYC with AVX-512 and 1.0 to 1.7 times as long on another; Intel's processors were not measured. It is oneDNN's
  float32 matmul, no lower precision: its error against float64 is within 1.5 times MKL's.
  `torch.backends.mkldnn.flags(enabled=False)` turns it off.
- GELU is computed again in backward instead of being saved: a third of what a block saves.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.ops import reference
from fastvit.ops.tracing import is_traced_or_transformed, needs_backward


@functools.cache
def is_onednn_available() -> bool:
    """Whether this PyTorch has the product, for a processor on which it is worth taking."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


# The `approximate` argument of torch's GELU for each activation.
GELU_APPROXIMATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

PLAIN_TYPES = (Tensor, nn.Parameter)
MIN_WEIGHTS, MIN_MULTIPLICATIONS = 2**18, 2**24  # either is enough


def supports_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain tensors on a CPU that has the products, and nobody watches; shapes that do not fit are
    left to PyTorch, which says so."""
    return (
        not is_traced_or_transformed()
        and type(x) in PLAIN_TYPES
        and type(weight) in PLAIN_TYPES
        and x.is_cpu
        and x.numel() > 0
        and x.shape[-1] == weight.shape[-1]
        and torch._C._get_mkldnn_enabled()  # what torch.backends.mkldnn.enabled reads, four times as fast
        and is_onednn_available()
    )


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the matmul of these tensors is oneDNN's: float32, and large enough to pay for a longer call."""
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and supports_onednn(x, weight)
        and (weight.numel() >= MIN_WEIGHTS or x.numel() * len(weight) >= MIN_MULTIPLICATIONS)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, like torch.nn.functional.linear; by oneDNN where it `prefers_onednn` the operands.

    x: [..., D]; weight: [F, D]; bias: [F] or None. Returns [..., F].
    """
    if not prefers_onednn(x, weight):
        return F.linear(x, weight, bias)
    if needs_backward(x, weight, bias):
        return OneDnnLinear.apply(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str | None = None) -> Tensor:
    """x @ weight^T + bias, then GELU in the form `gelu` ("none" or "tanh", as torch calls them). Not differentiable."""
    activation, algorithm = ("none", "") if approximate is None else ("gelu", approximate)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


class OneDnnLinear(torch.autograd.Function):
    """`linear` with all three products by oneDNN."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # setup_context would take 40 us a call
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def disable_onednn_after(error: BaseException) -> None:
    """Where oneDNN found no memory for the code of a product: PyTorch's other products from now on, with a warning.

    The error flag of its assembler is a thread's own and nothing clears it: in that thread each product of a new shape
    would fail, however much memory there is by then.
    """
    if str(error) == "could not create a primitive" and torch.backends.mkldnn.enabled:
        torch.backends.mkldnn.set_flags(False)
        warnings.warn("oneDNN is off from now on: it goes on failing after it once lacked memory", stacklevel=2)


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    pos_embed: Tensor | None,
    *,
    patch_size: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    patches = reference.cut_into_patches(pixels, weight, patch_size, mean, std)
    tokens = linear(patches, weight.flatten(1), bias)
    return reference.join_tokens(tokens, cls_token, pos_embed, mask_token=mask_token, mask=mask)


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> Tensor:
    needs_grad = needs_backward(x, weight1, bias1, weight2, bias2)
    if activation in GELU_APPROXIMATIONS and not needs_grad and prefers_onednn(x, weight1):
        return linear(onednn_linear(x, weight1, bias1, approximate=GELU_APPROXIMATIONS[activation]), weight2, bias2)
    hidden = linear(x, weight1, bias1)  # [..., F]
    if activation not in GELU_APPROXIMATIONS or is_traced_or_transformed():  # a compiler decides by itself what to keep
        return linear(reference.ACTIVATIONS[activation](hidden), weight2, bias2)
    approximate = GELU_APPROXIMATIONS[activation]
    if not needs_grad:
        # No other reference to `hidden` exists. Overwriting it matters on a CPU: touching a new tensor of this size for
        # the first time costs several times the arithmetic.
        return linear(torch.ops.aten.gelu_.default(hidden, approximate=approximate), weight2, bias2)
    if torch.is_autocast_enabled(hidden.device.type):
        weight2 = weight2.to(hidden.dtype)
        bias2 = bias2.to(hidden.dtype) if bias2 is not None else None
    return GeluLinear.apply(hidden, weight2, bias2, approximate)


class GeluLinear(torch.autograd.Function):
    """gelu(hidden) @ weight^T + bias, saving `hidden` for backward and not gelu(hidden)."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(hidden, weight)
        return linear(F.gelu(hidden, approximate=approximate), weight, bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        hidden, weight = ctx.saved_tensors
        rows = grad_output.flatten(0, -2)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = linear(rows.t(), F.gelu(hidden, approximate=ctx.approximate).flatten(0, -2).t())
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        if ctx.needs_input_grad[0]:
            grad_hidden = linear(grad_output, weight.t())
            if torch.is_grad_enabled():  # a gradient of this gradient is wanted
                grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, hidden, approximate=ctx.approximate)
            else:
                torch.ops.aten.gelu_backward.grad_input(
                    grad_hidden, hidden, approximate=ctx.approximate, grad_input=grad_hidden
                )
        return grad_hidden, grad_weight, grad_bias, None


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    return linear(reference.layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def add_layer_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    residual, normed = reference.add_layer_norm(x, residual, norm_weight, norm_bias, eps)
    return residual, linear(normed, weight, bias)


def add_layer_norm_feed_forward(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor]:
    residual, normed = reference.add_layer_norm(x, residual, norm_weight, norm_bias, eps)
    return residual, feed_forward(normed, weight1, bias1, weight2, bias2, activation)
