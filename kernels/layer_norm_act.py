"""LayerNorm with an activation behind it, elementwise, for heads and necks.

    y = activation((x - mean) * rstd * weight + bias)        x, y: [..., D]

Apart the two read and write 4 row-lengths of memory, here 2. Backward computes the normalised row, the activation's
argument and its derivative again from x, mean and rstd: it reads the gradient and x and writes that of x, 3 row-lengths
where PyTorch's two steps need 6. The kernels are those of `fastvit.kernels.layer_norm`, given the activation's formula.

Ba, Kiros & Hinton 2016, arXiv:1607.06450; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels import layer_norm
from fastvit.kernels.gelu import check_activation, plain_activation, plain_activation_backward
from fastvit.kernels.operators import operator


def _fallback(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str, candidate: int
) -> tuple[Tensor, Tensor]:
    y, statistics = layer_norm.plain_layer_norm(x, weight, bias, eps)
    return plain_activation(y, activation).to(x.dtype).contiguous(), statistics


def _fallback_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    activation: str,
    parameter_grads: bool,
    candidate: int,
) -> tuple[Tensor, Tensor]:
    mean, rstd = statistics.view(2, *x.shape[:-1], 1)
    affine = (x.float() - mean) * rstd * weight.float() + bias.float()
    grad_affine = plain_activation_backward(grad_y.float(), affine, activation)
    options = (x.dtype, x.dtype, parameter_grads, candidate)
    grad_x, _, grads = layer_norm._fallback_backward(
        grad_affine, None, x, None, weight, None, None, statistics, *options
    )
    return grad_x, grads


@operator("layer_norm_act", fallback=_fallback)
def _layer_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str, candidate: int
) -> tuple[Tensor, Tensor]:
    vectors = weight.contiguous(), bias.contiguous()
    _, y, statistics = layer_norm._launch_forward(
        x, None, *vectors, None, None, eps, activation=activation, candidate=candidate
    )
    return y, statistics


@_layer_norm_act.register_fake
def _(x, weight, bias, eps, activation, candidate):
    return x.new_empty(x.shape), x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


@operator("layer_norm_act_backward", fallback=_fallback_backward)
def _layer_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    activation: str,
    parameter_grads: bool,
    candidate: int,
) -> tuple[Tensor, Tensor]:
    weight, bias = weight.contiguous(), bias.contiguous()
    options = (x.dtype, x.dtype, parameter_grads)
    grad_x, _, grads = layer_norm._launch_backward(
        grad_y, None, x, None, weight, None, None, statistics, *options,
        bias=bias, activation=activation, candidate=candidate,
    )  # fmt: skip
    return grad_x, grads


@_layer_norm_act_backward.register_fake
def _(grad_y, x, weight, bias, statistics, activation, parameter_grads, candidate):
    shape = (2, *weight.shape) if parameter_grads else (0,)
    return x.new_empty(x.shape), statistics.new_empty(shape)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.activation, ctx.candidate = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, weight, bias, statistics)


def _backward(ctx, grad_y, _):
    saved = ctx.saved_tensors
    options = (ctx.activation, any(ctx.needs_input_grad[1:3]), ctx.candidate)
    grad_x, grads = _layer_norm_act_backward(grad_y, *saved, *options)
    grads = layer_norm.split_parameter_gradients(grads, saved[1])
    return (*layer_norm._wanted(ctx, grad_x, *grads[:2]), None, None, None)


_layer_norm_act.register_autograd(_backward, setup_context=_setup_context)


def layer_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "gelu", *, candidate: int = 0
) -> Tensor:
    """activation(layer_norm(x)), elementwise.

    Autocast changes nothing, as in `fastvit.kernels.layer_norm`. x and 8 bytes a row are saved for backward. Second
    derivatives are not supported.

    Args:
        x, weight, bias, eps, candidate: as in `layer_norm.layer_norm`.
        activation: a key of `gelu.FORMULAS`.

    Returns:
        [..., D] in x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_activation(activation)
    layer_norm.check_norm(x, weight, bias)
    return _layer_norm_act(x, weight, bias, eps, activation, candidate)[0]
