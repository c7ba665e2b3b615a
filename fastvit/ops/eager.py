"""PyTorch implementations of the operations with a matmul, used where no kernel runs.

Names, arguments and results are as in `fastvit.ops.reference`, with two optimisations:

- On x86 processors, larger float32 matmuls use oneDNN. PyTorch uses MKL, which took about twice as long on one AMD EPYC
  with AVX-512 and 1.0 to 1.7 times as long on another; Intel's processors were not measured. Precision is the same: the
  error against float64 is within 1.5 times MKL's. `torch.backends.mkldnn.flags(enabled=False)` disables it.
- GELU is recomputed in backward instead of being saved, a third of the memory that a block saves for backward.
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
    """Whether this PyTorch has oneDNN's linear operator, and the processor is one that benefits from it."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


# The `approximate` argument of torch's GELU for each activation.
GELU_APPROXIMATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

PLAIN_TYPES = (Tensor, nn.Parameter)
MIN_WEIGHTS, MIN_MULTIPLICATIONS = 2**18, 2**24  # reaching either is enough


def supports_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain, untraced tensors on a CPU with oneDNN. Mismatched shapes return False, so that PyTorch
    raises its error."""
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
    """Whether to use oneDNN for this matmul: float32, and large enough to outweigh the longer call."""
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and not torch.is_autocast_enabled("cpu")
        and supports_onednn(x, weight)
        and (weight.numel() >= MIN_WEIGHTS or x.numel() * len(weight) >= MIN_MULTIPLICATIONS)
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias, like torch.nn.functional.linear, by oneDNN if `prefers_onednn`.

    Args:
        x: [..., D].
        weight: [F, D].
        bias: [F] or None.

    Returns:
        [..., F].
    """
    if not prefers_onednn(x, weight):
        return F.linear(x, weight, bias)
    if needs_backward(x, weight, bias):
        return OneDnnLinear.apply(x, weight, bias)
    return onednn_linear(x, weight, bias)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str | None = None) -> Tensor:
    """x @ weight^T + bias, then GELU if `approximate` is torch's "none" or "tanh". Not differentiable."""
    activation, algorithm = ("none", "") if approximate is None else ("gelu", approximate)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


class OneDnnLinear(torch.autograd.Function):
    """`linear` with forward and both matmuls of backward by oneDNN."""

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
    """Disable oneDNN, with a warning, after it ran out of memory for a matmul's generated code.

    Its assembler's error flag is thread-local and never cleared: in that thread every matmul of a new shape would fail,
    even if memory is available again.
    """
    if str(error) == "could not create a primitive" and torch.backends.mkldnn.enabled:
        torch.backends.mkldnn.set_flags(False)
        warnings.warn("oneDNN is off from now on: it keeps failing once it has run out of memory", stacklevel=2)


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
    if activation not in GELU_APPROXIMATIONS or is_traced_or_transformed():  # a compiler decides what to recompute
        return linear(reference.ACTIVATIONS[activation](hidden), weight2, bias2)
    approximate = GELU_APPROXIMATIONS[activation]
    if not needs_grad:
        # There is no other reference to `hidden`. In place because on a CPU the first access to a new tensor of this
        # size costs several times the arithmetic.
        return linear(torch.ops.aten.gelu_.default(hidden, approximate=approximate), weight2, bias2)
    if torch.is_autocast_enabled(hidden.device.type):
        weight2 = weight2.to(hidden.dtype)
        bias2 = bias2.to(hidden.dtype) if bias2 is not None else None
    return GeluLinear.apply(hidden, weight2, bias2, approximate)


class GeluLinear(torch.autograd.Function):
    """gelu(hidden) @ weight^T + bias, saving `hidden` for backward instead of gelu(hidden)."""

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
            if torch.is_grad_enabled():  # double backward
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
