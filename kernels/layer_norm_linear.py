"""LayerNorm into the linear layer that reads it, with or without an activation behind it.

    residual' = x + residual                                          (optional)
    pre       = layer_norm(residual') @ weight^T + bias
    out       = activation(pre)                                       `layer_norm_gelu`, half a feed-forward
    out       = pre                                                   `layer_norm_linear`: query, key and value, say

    x, residual [..., D], weight [F, D]  ->  out [..., F]

LayerNorm (with the residual add) is a kernel of its own, `fastvit.kernels.layer_norm`. The product and its activation
follow: cuBLAS and a pass for the activation, or one fused kernel, by the `candidate` (`fastvit.kernels.linear`).
ViT-B at batch 256, computed for an H100: the product is 298 us of arithmetic, LayerNorm 52 us of memory traffic, 103 us
with the residual add, the activation as a pass of its own 207 us.

Saved for backward: residual' (or x), mean and rstd, and, with an activation, pre. The normalised rows are not: where
the weight gradient needs them, LayerNorm's backward, which has them in registers, writes them, D values per token.

Ba, Kiros & Hinton 2016, arXiv:1607.06450; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels import gelu, layer_norm, linear
from fastvit.kernels.checks import DTYPES, check_tensor, check_tensors, needs_grad
from fastvit.kernels.gelu import (
    as_rows,
    check_activation,
    plain_activation,
    plain_activation_backward,
    without_autocast,
)
from fastvit.kernels.operators import operator

# ---------------------------------------------------------------------------------------------------------------------
# Launchers. `fastvit.kernels.feed_forward` calls them too, without a norm where it has none
# ---------------------------------------------------------------------------------------------------------------------


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


@without_autocast
def launch_forward(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    keep_pre: bool,
    candidate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """residual', statistics [2, rows] (mean and rstd, float32), pre [rows, F] and out [..., F].

    residual' has no elements without residual, statistics none without norm, pre none unless it is kept, which takes an
    activation.
    """
    norm_weight, norm_bias, bias = _contiguous(norm_weight, norm_bias, bias)
    if norm_weight is None:
        summed, normed, statistics = x.new_empty(0), x, x.new_empty(0, dtype=torch.float32)
    else:
        summed, normed, statistics = layer_norm._launch_forward(
            x, residual, norm_weight, norm_bias, None, None, eps, y_dtype=weight.dtype
        )
    pre, out = linear.launch_forward(as_rows(normed), weight.contiguous(), bias, activation, keep_pre, candidate)
    return summed, statistics, pre, out.view(*x.shape[:-1], weight.shape[0])


@without_autocast
def launch_backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    statistics: Tensor,
    pre: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    eps: float,
    activation: str | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, x, the norm's weight and bias (rows of one tensor, float32), weight and bias.

    wanted: those of the inputs, the norm, weight, bias. What is not wanted has no elements, nor has the gradient of x
    where it is, value and dtype, that of residual. summed is residual', or x where nothing was added.

    There is one way only: cuBLAS and the kernels of LayerNorm and activation. So there is no candidate.
    """
    inputs, norm_grads, weight_grad, bias_grad = wanted
    norm_weight, norm_bias = _contiguous(norm_weight, norm_bias)
    grad_pre, grad_bias = as_rows(grad_out), weight.new_empty(0)
    if activation is not None:
        grad_pre, grad_bias, _ = gelu.launch_backward(grad_pre, pre, None, activation, bias_grad=bias_grad)
    elif bias_grad:
        grad_bias = grad_pre.sum(0)
    rows, grads = summed, _no_gradients(summed)
    if norm_weight is None and inputs:
        grads = ((grad_pre @ weight).view(summed.shape), *grads[1:])
    elif norm_weight is not None and (inputs or norm_grads):
        rows = torch.empty(summed.shape, dtype=weight.dtype, device=summed.device) if weight_grad else None
        grads = layer_norm._launch_backward(
            (grad_pre @ weight).view(summed.shape), grad_sum, summed, None, norm_weight, None, None, statistics,
            x_dtype, residual_dtype, norm_grads, bias=norm_bias, y=rows,
        )  # fmt: skip
    elif norm_weight is not None and weight_grad:
        norm = (norm_weight, norm_bias, None, None, eps)
        _, rows, _ = layer_norm._launch_forward(summed, None, *norm, y_dtype=weight.dtype)
    grad_weight = grad_pre.t() @ as_rows(rows) if weight_grad else weight.new_empty(0)
    return *grads, grad_weight, grad_bias


def _no_gradients(summed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return summed.new_empty(0), summed.new_empty(0), summed.new_empty(0, dtype=torch.float32)


@without_autocast
def forward_in_pytorch(
    x, residual, norm_weight, norm_bias, eps, weight, bias, activation, keep_pre, candidate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`launch_forward` in plain PyTorch."""
    summed = (x if residual is None else x + residual).contiguous()
    rows, statistics = as_rows(summed), summed.new_empty(0, dtype=torch.float32)
    if norm_weight is not None:
        variance, mean = torch.var_mean(rows.float(), dim=-1, correction=0)
        statistics = torch.stack((mean, (variance + eps).rsqrt()))
        norm = (norm_weight.float(), norm_bias.float(), eps)
        rows = F.layer_norm(rows.float(), norm_weight.shape, *norm).to(weight.dtype)
    pre = F.linear(rows, weight, bias)
    out = pre if activation is None else plain_activation(pre.float(), activation).to(pre.dtype)
    summed, pre = x.new_empty(0) if residual is None else summed, pre if keep_pre else pre.new_empty(0)
    return summed, statistics, pre, out.view(*x.shape[:-1], weight.shape[0])


@without_autocast
def backward_in_pytorch(
    grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, weight, eps, activation,
    x_dtype, residual_dtype, wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch_backward` in plain PyTorch. By formula: autograd does not record below an operator."""
    grad_pre, rows = as_rows(grad_out), as_rows(summed)
    if activation is not None:
        grad_pre = plain_activation_backward(grad_pre.float(), pre.float(), activation).to(pre.dtype)
    grad_rows, norm_grads = grad_pre @ weight, None
    if norm_weight is not None:
        mean, rstd = statistics[:, :, None]
        grad_normed, normed = grad_rows.float(), (rows.float() - mean) * rstd
        norm_grads = torch.stack(((grad_normed * normed).sum(0), grad_normed.sum(0)))
        grad_normed *= norm_weight.float()
        shared = grad_normed.mean(-1, keepdim=True) + normed * (grad_normed * normed).mean(-1, keepdim=True)
        grad_rows = (grad_normed - shared) * rstd
        grad_rows += 0 if grad_sum is None else as_rows(grad_sum)
        rows = (normed * norm_weight.float() + norm_bias.float()).to(weight.dtype)
    found = (grad_rows, grad_rows, norm_grads, grad_pre.t() @ rows, grad_pre.sum(0))
    outputs = empty_gradients(
        grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, weight, eps, activation,
        x_dtype, residual_dtype, wanted,
    )  # fmt: skip
    return tuple(
        grad.to(out.dtype).view(out.shape) if out.numel() else out for out, grad in zip(outputs, found, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------

_layer_norm_linear = operator("layer_norm_linear", fallback=forward_in_pytorch)(launch_forward)
_layer_norm_linear_backward = operator("layer_norm_linear_backward", fallback=backward_in_pytorch)(launch_backward)


@_layer_norm_linear.register_fake
def empty_outputs(
    x, residual, norm_weight, norm_bias, eps, weight, bias, activation, keep_pre, candidate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch_forward` returns, uninitialised."""
    rows, units = x.numel() // x.shape[-1], weight.shape[0]
    return (
        x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=torch.result_type(x, residual)),
        x.new_empty((0,) if norm_weight is None else (2, rows), dtype=torch.float32),
        weight.new_empty((rows, units) if keep_pre else 0),
        weight.new_empty(*x.shape[:-1], units),
    )


@_layer_norm_linear_backward.register_fake
def empty_gradients(
    grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, weight, eps, activation,
    x_dtype, residual_dtype, wanted,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `launch_backward` returns, uninitialised."""
    inputs, norm_grads, weight_grad, bias_grad = wanted
    grads = _no_gradients(summed)
    if norm_weight is None and inputs:
        grads = (summed.new_empty(summed.shape), *grads[1:])
    elif norm_weight is not None and (inputs or norm_grads):
        grads = layer_norm._empty_gradients(summed, None, norm_weight, None, None, x_dtype, residual_dtype, norm_grads)
    grad_weight = weight.new_empty(weight.shape if weight_grad else 0)
    return *grads, grad_weight, weight.new_empty(weight.shape[0] if bias_grad else 0)


def save(ctx, x: Tensor, residual: Tensor | None, outputs, *weights: Tensor | None) -> None:
    """What backward needs of an operator whose first outputs are those of `launch_forward`."""
    summed, statistics, pre, _ = outputs
    ctx.mark_non_differentiable(statistics, pre, *([summed] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else summed, statistics, pre, *weights)


def gradients_of_the_sum(ctx, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs where nothing but residual' was used."""
    return needed(ctx, *(None if grad_sum is None else grad_sum.to(dtype) for dtype in ctx.dtypes))


def gradients(ctx, norm_weight: Tensor | None, grad_residual, grad_x, norm_grads, *others) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs (x, residual, the norm's weight, bias and eps, weight, ...) from backward's results."""
    if ctx.dtypes[0] == ctx.dtypes[1]:
        grad_x = grad_residual
    norm = (None, None) if norm_weight is None else layer_norm.split_parameter_gradients(norm_grads, norm_weight)[:2]
    return needed(ctx, grad_x, grad_residual, *norm, None, *others)


def needed(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """A gradient for each input: None where none is needed, and for the inputs after the last of `grads`."""
    padded = (*grads, *[None] * (len(ctx.needs_input_grad) - len(grads)))
    return tuple(grad if needs else None for grad, needs in zip(padded, ctx.needs_input_grad, strict=True))


def _setup_context(ctx, inputs, output) -> None:
    x, residual, norm_weight, norm_bias, ctx.eps, weight, _, ctx.activation, _, _ = inputs
    save(ctx, x, residual, output, norm_weight, norm_bias, weight)


def _backward(ctx, grad_sum, _statistics, _pre, grad_out):
    if grad_out is None:
        return gradients_of_the_sum(ctx, grad_sum)
    needs, saved = ctx.needs_input_grad, ctx.saved_tensors
    wanted = [needs[0] or needs[1], needs[2] or needs[3], needs[5], needs[6]]
    grads = _layer_norm_linear_backward(grad_out, grad_sum, *saved, ctx.eps, ctx.activation, *ctx.dtypes, wanted)
    return gradients(ctx, saved[3], *grads)


_layer_norm_linear.register_autograd(_backward, setup_context=_setup_context)

# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    candidate: int = 0,
) -> Tensor:
    """layer_norm(x) @ weight^T + bias: a block's first norm and its query, key and value, say.

    Second derivatives are not supported. x and 8 bytes per row are saved for backward.

    Args:
        x: [..., D], float32, bfloat16 or float16, D at most 8,192; rows may be strided.
        norm_weight, norm_bias: [D], of one dtype.
        eps: added to the variance.
        weight: [F, D]. Its dtype may be another than x's: the normalised rows are rounded to it. Under autocast weight
            and bias are cast as a linear layer's are; the norm is computed in float32 throughout.
        bias: [F], of weight's dtype, or None.
        candidate: how the product is computed, see `fastvit.kernels.linear`.

    Returns:
        [..., F] in weight's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    return _apply(x, None, norm_weight, norm_bias, eps, weight, bias, None, candidate)[1]


def add_layer_norm_linear(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    *,
    candidate: int = 0,
) -> tuple[Tensor, Tensor]:
    """x + residual, and `layer_norm_linear` of the sum, which is saved for backward.

    Args:
        residual: [..., D], of x's shape; its dtype may be another.
        x, norm_weight, norm_bias, eps, weight, bias, candidate: as in `layer_norm_linear`.

    Returns:
        The sum [..., D], in the dtype that x and residual promote to, and [..., F] in weight's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_tensors(residual=residual)
    return _apply(x, residual, norm_weight, norm_bias, eps, weight, bias, None, candidate)


def layer_norm_gelu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
    *,
    candidate: int = 0,
) -> Tensor:
    """activation(layer_norm(x) @ weight^T + bias): the first half of a feed-forward.

    Saved for backward are x, 8 bytes per row and the input of the activation. Where the second half follows,
    `fastvit.kernels.feed_forward` keeps the activation out of memory too.

    Args:
        activation: a key of `fastvit.kernels.gelu.FORMULAS`.
        x, norm_weight, norm_bias, eps, weight, bias, candidate: as in `layer_norm_linear`.

    Returns:
        [..., F] in weight's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the activation is unknown.
    """
    check_activation(activation)
    return _apply(x, None, norm_weight, norm_bias, eps, weight, bias, activation, candidate)[1]


def _apply(x, residual, norm_weight, norm_bias, eps, weight, bias, activation, candidate) -> tuple[Tensor, Tensor]:
    check_tensors(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, optional={"bias": bias})
    weight, bias = autocast(x, weight, bias)
    linear.check_linear(x, weight, bias)
    check_norm(x, residual, norm_weight, norm_bias)
    keep_pre = activation is not None and needs_grad(x, residual, norm_weight, norm_bias, weight, bias)
    summed, _, _, out = _layer_norm_linear(
        x, residual, norm_weight, norm_bias, eps, weight, bias, activation, keep_pre, candidate
    )
    return summed, out


def autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Weights and biases in autocast's dtype where it is on, differentiably: their gradients come back in their own."""
    if not torch.is_autocast_enabled(x.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def check_norm(x: Tensor, residual: Tensor | None, norm_weight: Tensor, norm_bias: Tensor) -> None:
    """Raise ValueError unless these fit x [..., D]."""
    if x.shape[-1] > layer_norm.MAX_DIM:
        raise ValueError(f"x: expected [..., D] with D at most {layer_norm.MAX_DIM}, got {list(x.shape)}")
    check_tensor("norm_weight", norm_weight, x.shape[-1:], DTYPES, x.device)
    check_tensor("norm_bias", norm_bias, x.shape[-1:], (norm_weight.dtype,), x.device)
    if residual is not None:
        check_tensor("residual", residual, x.shape, DTYPES, x.device)
