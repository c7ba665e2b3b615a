"""LayerNorm and the linear layer that reads it, optionally followed by an activation.

    residual' = x + residual                                          (optional)
    pre       = layer_norm(residual') @ weight^T + bias
    out       = activation(pre)                                       `layer_norm_gelu`, half a feed-forward
    out       = pre                                                   `layer_norm_linear`, as for query, key and value

    x, residual [..., D], weight [F, D]  ->  out [..., F]

LayerNorm (with the residual add) is a kernel of its own, `fastvit.kernels.layer_norm`. The `candidate` decides whether
cuBLAS and a separate activation pass follow, or one fused kernel (`fastvit.kernels.linear`).

Saved for backward: residual' (or x), mean and rstd, and, with an activation, pre. The normalised rows are not saved: if
the weight gradient needs them, LayerNorm's backward, which holds them in registers, writes D values per token.

Ba, Kiros & Hinton 2016, arXiv:1607.06450; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels import gelu, layer_norm, linear
from fastvit.kernels.checks import DTYPES, check_optional, check_tensor, check_tensors, make_contiguous, needs_grad
from fastvit.kernels.gelu import as_rows, check_activation, disable_autocast
from fastvit.kernels.operators import register, select_gradients


@disable_autocast
def launch_forward(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    weight: Tensor, bias: Tensor | None, activation: str | None, keep_pre: bool, candidate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns residual', statistics [2, rows] (mean and rstd, float32), pre [rows, F] and out [..., F].

    residual' is empty without residual, statistics without norm, and pre unless keep_pre is set, which requires an
    activation. Also called by `fastvit.kernels.feed_forward`, possibly without a norm.
    """
    summed, normed, statistics = x.new_empty(0), x, x.new_empty(0, dtype=torch.float32)
    if norm_weight is not None:
        norm = (norm_weight, norm_bias, None, None, eps)
        summed, normed, statistics = layer_norm.launch_forward(x, residual, *norm, weight.dtype)
    layer = make_contiguous(weight, bias)
    pre, out = linear.launch_forward(as_rows(normed), *layer, activation, keep_pre, candidate)
    return summed, statistics, pre, out.view(*x.shape[:-1], weight.shape[0])


@disable_autocast
def launch_backward(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, statistics: Tensor, pre: Tensor,
    norm_weight: Tensor | None, norm_bias: Tensor | None, weight: Tensor, eps: float, activation: str | None,
    x_dtype: torch.dtype, residual_dtype: torch.dtype, output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of residual, x, the norm's weight and bias (rows of one tensor, float32), weight and bias.

    output_mask: whether to compute the gradients of the inputs, the norm, weight, bias; those not computed are empty.
    The gradient of x is also empty if it equals that of residual in value and dtype. summed is residual', or x without
    residual. cuBLAS and the kernels of LayerNorm and activation are the only implementation: there is no candidate.
    """
    inputs, norm_grads, weight_grad, bias_grad = output_mask
    grad_pre, grad_bias = as_rows(grad_out), weight.new_empty(0)
    if activation is not None:
        grad_pre, grad_bias, _ = gelu.launch_backward(grad_pre, pre, None, activation, bias_grad)
    elif bias_grad:
        grad_bias = grad_pre.sum(0)
    rows, grads = summed, _empty_gradients(summed)
    if norm_weight is None and inputs:
        grads = ((grad_pre @ weight).view(summed.shape), *grads[1:])
    elif norm_weight is not None and (inputs or norm_grads):
        *grads, rows = layer_norm.launch_backward(
            (grad_pre @ weight).view(summed.shape), grad_sum, summed, None, norm_weight, norm_bias, None, None,
            statistics, x_dtype, residual_dtype, norm_grads, weight.dtype if weight_grad else None,
        )  # fmt: skip
    elif norm_weight is not None and weight_grad:
        _, rows, _ = layer_norm.launch_forward(summed, None, norm_weight, norm_bias, None, None, eps, weight.dtype)
    grad_weight = grad_pre.t() @ as_rows(rows) if weight_grad else weight.new_empty(0)
    return *grads, grad_weight, grad_bias


def _empty_gradients(summed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return summed.new_empty(0), summed.new_empty(0), summed.new_empty(0, dtype=torch.float32)


@disable_autocast
def forward_fallback(
    x, residual, norm_weight, norm_bias, eps, weight, bias, activation, keep_pre, candidate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed, normed, statistics = x.new_empty(0), x, x.new_empty(0, dtype=torch.float32)
    if norm_weight is not None:
        norm = (norm_weight, norm_bias, None, None, eps)
        summed, normed, statistics = layer_norm.forward_fallback(x, residual, *norm, weight.dtype)
    pre = torch.nn.functional.linear(as_rows(normed), weight, bias)
    out = pre if activation is None else gelu.forward_fallback(pre, None, activation)
    return summed, statistics, pre if keep_pre else pre.new_empty(0), out.view(*x.shape[:-1], weight.shape[0])


@disable_autocast
def backward_fallback(
    grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, weight, eps, activation,
    x_dtype, residual_dtype, output_mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs, norm_grads, weight_grad, bias_grad = output_mask
    grad_pre, rows, grads = as_rows(grad_out), summed, _empty_gradients(summed)
    if activation is not None:
        grad_pre, _ = gelu.backward_fallback(grad_pre, pre, None, activation, False)
    grad_rows = (grad_pre @ weight).view(summed.shape)
    if norm_weight is not None:
        *found, rows = layer_norm.backward_fallback(
            grad_rows, grad_sum, summed, None, norm_weight, norm_bias, None, None, statistics,
            x_dtype, residual_dtype, norm_grads, weight.dtype,
        )  # fmt: skip
        grads = found if inputs or norm_grads else grads
    elif inputs:
        grads = (grad_rows, *grads[1:])
    grad_weight = grad_pre.t() @ as_rows(rows) if weight_grad else weight.new_empty(0)
    return *grads, grad_weight, grad_pre.sum(0) if bias_grad else weight.new_empty(0)


_layer_norm_linear = register("layer_norm_linear", fallback=forward_fallback)(launch_forward)
_layer_norm_linear_backward = register("layer_norm_linear_backward", fallback=backward_fallback)(launch_backward)


def save_for_backward(ctx, x: Tensor, residual: Tensor | None, outputs, *weights: Tensor | None) -> None:
    """Save what backward needs, for an operator whose first outputs are those of `launch_forward`."""
    summed, statistics, pre, _ = outputs
    ctx.mark_non_differentiable(statistics, pre, *([summed] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else summed, statistics, pre, *weights)


def collect_sum_gradients(ctx, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs when only residual' was used."""
    return select_gradients(ctx, *(None if grad_sum is None else grad_sum.to(dtype) for dtype in ctx.dtypes))


def collect_gradients(ctx, norm_weight, grad_residual, grad_x, norm_grads, *others) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs (x, residual, the norm's weight, bias and eps, weight, ...) from backward's results."""
    if ctx.dtypes[0] == ctx.dtypes[1]:
        grad_x = grad_residual
    norm = (None, None) if norm_weight is None else layer_norm.split_parameter_gradients(norm_grads, norm_weight)[:2]
    return select_gradients(ctx, grad_x, grad_residual, *norm, None, *others)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, norm_weight, norm_bias, ctx.eps, weight, _, ctx.activation, _, _ = inputs
    save_for_backward(ctx, x, residual, output, norm_weight, norm_bias, weight)


def _backward(ctx, grad_sum, _statistics, _pre, grad_out):
    if grad_out is None:
        return collect_sum_gradients(ctx, grad_sum)
    needs, saved = ctx.needs_input_grad, ctx.saved_tensors
    output_mask = [needs[0] or needs[1], needs[2] or needs[3], needs[5], needs[6]]
    grads = _layer_norm_linear_backward(grad_out, grad_sum, *saved, ctx.eps, ctx.activation, *ctx.dtypes, output_mask)
    return collect_gradients(ctx, saved[3], *grads)


_layer_norm_linear.register_autograd(_backward, setup_context=_setup_context)


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None,
    *, candidate: int = 0,
) -> Tensor:  # fmt: skip
    """layer_norm(x) @ weight^T + bias, as for a block's query, key and value.

    x and 8 bytes per row are saved for backward. Not twice differentiable.

    Args:
        x: [..., D], float32, bfloat16 or float16, D at most 8,192; rows may be strided.
        norm_weight, norm_bias: [D], of one dtype.
        eps: added to the variance.
        weight: [F, D], any of the dtypes: the normalised rows are rounded to it. Autocast casts weight and bias as in a
            linear layer; the norm is computed in float32.
        bias: [F], of weight's dtype, or None.
        candidate: the implementation of the matmul, see `fastvit.kernels.linear`.

    Returns:
        [..., F] in weight's dtype, contiguous.

    Raises:
        ValueError: if shapes, dtypes or devices do not match.
    """
    return _apply(x, None, norm_weight, norm_bias, eps, weight, bias, None, candidate)[1]


def add_layer_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor,
    bias: Tensor | None, *, candidate: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + residual, and `layer_norm_linear` of the sum, which is saved for backward.

    Args:
        x, norm_weight, norm_bias, eps, weight, bias, candidate: as in `layer_norm_linear`.
        residual: [..., D], x's shape, any of the dtypes.

    Returns:
        The sum [..., D] in the dtype that x and residual promote to, and [..., F] in weight's dtype.

    Raises:
        ValueError: as in `layer_norm_linear`.
    """
    check_tensors(residual=residual)
    return _apply(x, residual, norm_weight, norm_bias, eps, weight, bias, None, candidate)


def layer_norm_gelu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None,
    activation: str = "gelu", *, candidate: int = 0,
) -> Tensor:  # fmt: skip
    """activation(layer_norm(x) @ weight^T + bias): the first half of a feed-forward.

    x, 8 bytes per row and the input of the activation are saved for backward. `fastvit.kernels.feed_forward`, which
    includes the second half, does not store the activation either.

    Args, Returns, Raises: as in `layer_norm_linear`; activation: a key of `fastvit.kernels.gelu.FORMULAS`.
    """
    check_activation(activation)
    return _apply(x, None, norm_weight, norm_bias, eps, weight, bias, activation, candidate)[1]


def _apply(x, residual, norm_weight, norm_bias, eps, weight, bias, activation, candidate) -> tuple[Tensor, Tensor]:
    check_tensors(x=x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, optional={"bias": bias})
    weight, bias = cast_for_autocast(x, weight, bias)
    linear.check_linear(x, weight, bias)
    check_norm(x, residual, norm_weight, norm_bias)
    keep_pre = activation is not None and needs_grad(x, residual, norm_weight, norm_bias, weight, bias)
    summed, _, _, out = _layer_norm_linear(
        x, residual, norm_weight, norm_bias, eps, weight, bias, activation, keep_pre, candidate
    )
    return summed, out


def cast_for_autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Cast weights and biases to autocast's dtype if it is enabled; differentiable, so gradients keep their dtypes."""
    if not torch.is_autocast_enabled(x.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def check_norm(x: Tensor, residual: Tensor | None, norm_weight: Tensor, norm_bias: Tensor) -> None:
    """Raise ValueError unless residual and the norm's parameters match x [..., D]."""
    if x.shape[-1] > layer_norm.MAX_DIM:
        raise ValueError(f"x: expected [..., D] with D at most {layer_norm.MAX_DIM}, got {list(x.shape)}")
    check_tensor("norm_weight", norm_weight, x.shape[-1:], DTYPES, x.device)
    check_tensor("norm_bias", norm_bias, x.shape[-1:], (norm_weight.dtype,), x.device)
    check_optional("residual", residual, x.shape, DTYPES, x.device)
