"""The feed-forward of a block as one operation, so that backward keeps the least that it can.

    residual' = x + residual                                                  (optional)
    pre       = layer_norm(residual') @ weight1^T + bias1                     (the norm is optional too)
    out       = activation(pre) @ weight2^T + bias2

    x, residual [..., D], weight1 [F, D], weight2 [E, F]  ->  out [..., E]

Forward is `layer_norm_gelu` and cuBLAS. Kept for backward, for a token: residual' (D values, which the residual stream
holds anyway), mean and rstd (8 bytes), pre (F values). Not kept: the normalised rows, written for weight1's
gradient by LayerNorm's backward, which makes them anyway, and the activation, made again for weight2's gradient by the
pass that multiplies by its derivative. PyTorch's chain keeps all four, 2 D + 2 F. With F = 4 D, and attention's
residual', query, key, value and output (PyTorch: and its normalised rows), a block keeps 10 D where PyTorch keeps 16 D.

Backward, by the table of `fastvit.kernels.tuning`: cuBLAS and one pass for derivative, bias gradient and activation, or
one product with that pass as its epilogue (`fastvit.kernels.linear`). ViT-B at batch 256 on an H100: the pass is 310 us
of memory, 413 us with the activation, of which the epilogue saves writing and reading the gradient, 207 us.

Vaswani et al. 2017, arXiv:1706.03762, eq. 2; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels import linear
from fastvit.kernels.checks import check_tensor
from fastvit.kernels.gelu import as_rows, without_autocast
from fastvit.kernels.layer_norm_gelu import (
    as_norm,
    autocast,
    check,
    contiguous,
    empty_gradients,
    empty_outputs,
    gradients_of_the_sum,
    launch_backward,
    launch_forward,
    needed,
    sort_gradients,
)
from fastvit.kernels.operators import operator
from fastvit.watchers import recorded


@operator("feed_forward")
@without_autocast
def _feed_forward(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = as_norm(norm_weight, norm_bias, eps)
    summed, statistics, pre, hidden = launch_forward(
        x, residual, norm, weight1.contiguous(), contiguous(bias1), activation, keep_pre
    )
    return summed, statistics, pre, F.linear(hidden, weight2, bias2).view(*x.shape[:-1], weight2.shape[0])


@_feed_forward.register_fake
def _(x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation, keep_pre):
    summed, statistics, pre, out = empty_outputs(x, residual, norm_weight, weight1, activation, keep_pre)
    return summed, statistics, pre, out.new_empty(*x.shape[:-1], weight2.shape[0])


@operator("feed_forward_backward")
@without_autocast
def _feed_forward_backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    statistics: Tensor,
    pre: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight1: Tensor,
    weight2: Tensor,
    activation: str,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """wanted: gradients of the inputs, the norm, weight1, bias1, weight2, bias2. summed: x where there is no norm."""
    *hidden_wanted, bias1_wanted, weight2_wanted, bias2_wanted = wanted
    grad_rows = as_rows(grad_out)
    grad_bias2 = grad_rows.sum(0) if bias2_wanted else weight2.new_empty(0)
    grad_pre, grad_bias1, hidden = linear.linear_activation_backward(
        grad_rows, weight2.contiguous(), pre, activation, bias_grad=bias1_wanted, with_y=weight2_wanted
    )
    grad_weight2 = grad_rows.t() @ hidden if weight2_wanted else weight2.new_empty(0)
    del hidden  # F values a token, and the largest temporaries are still to come
    norm = as_norm(norm_weight, norm_bias, eps)
    grads = launch_backward(
        grad_pre, grad_sum, summed, statistics, norm, weight1, x_dtype, residual_dtype, *hidden_wanted
    )
    return *grads, grad_bias1, grad_weight2, grad_bias2


@_feed_forward_backward.register_fake
def _(
    grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, eps, weight1, weight2, activation,
    x_dtype, residual_dtype, wanted,
):  # fmt: skip
    *hidden_wanted, bias1_wanted, weight2_wanted, bias2_wanted = wanted
    return (
        *empty_gradients(summed, norm_weight, weight1, x_dtype, residual_dtype, *hidden_wanted),
        weight1.new_empty(weight1.shape[0] if bias1_wanted else 0),
        weight2.new_empty(weight2.shape if weight2_wanted else 0),
        weight2.new_empty(weight2.shape[0] if bias2_wanted else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, residual, norm_weight, norm_bias, ctx.eps, weight1, _, weight2, _, ctx.activation, _ = inputs
    summed, statistics, pre, _ = output
    ctx.mark_non_differentiable(statistics, pre)
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    ctx.has_residual = residual is not None
    rows = summed if ctx.has_residual else x
    ctx.save_for_backward(rows, statistics, pre, norm_weight, norm_bias, weight1, weight2)


def _backward(ctx, grad_sum, _statistics, _pre, grad_out):
    summed, statistics, pre, norm_weight, norm_bias, weight1, weight2 = ctx.saved_tensors
    grad_sum = grad_sum if ctx.has_residual else None
    if grad_out is None:
        return *gradients_of_the_sum(ctx, grad_sum), *[None] * 9
    needs = ctx.needs_input_grad
    wanted = [needs[0] or needs[1], needs[2] or needs[3], *needs[5:9]]
    *grads, grad_bias1, grad_weight2, grad_bias2 = _feed_forward_backward(
        grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, ctx.eps, weight1, weight2,
        ctx.activation, *ctx.dtypes, wanted,
    )  # fmt: skip
    grads = (*sort_gradients(ctx, norm_weight, grads), grad_bias1, grad_weight2, grad_bias2)
    return *needed(ctx, grads), None, None


_feed_forward.register_autograd(_backward, setup_context=_setup_context)


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> Tensor:
    """activation(x @ weight1^T + bias1) @ weight2^T + bias2.

    x: [..., D]; weight1: [F, D]; bias1: [F] or None; weight2: [E, F]; bias2: [E] or None; all of one dtype, to which
        autocast casts them. activation: a key of `fastvit.kernels.gelu.FORMULAS`.
    Returns [..., E]. Keeps x and x @ weight1^T + bias1 for backward, and not the activation.
    Raises ValueError for shapes, dtypes or devices that do not fit. Second derivatives are not supported.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _apply(x, None, None, None, 0.0, weight1, bias1, weight2, bias2, activation)[1]


def layer_norm_feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """feed_forward(layer_norm(x)), keeping neither the normalised rows nor the activation for backward.

    x, norm_weight and norm_bias as in `layer_norm_linear`, the others, of one dtype, as in `feed_forward`.
    Returns [..., E] in weight1's dtype. Keeps x, 8 bytes a token and the pre-activation.
    """
    return _apply(x, None, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation)[1]


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
    """(x + residual, layer_norm_feed_forward of it): all of a block after its attention but the last residual add."""
    return _apply(x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation)


def _apply(
    x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation
) -> tuple[Tensor, Tensor]:
    weight1, bias1, weight2, bias2 = autocast(x, weight1, bias1, weight2, bias2)
    check(x, residual, norm_weight, norm_bias, weight1, bias1, activation, suffix="1")
    if norm_weight is None:
        check_tensor("x", x, x.shape, (weight1.dtype,), x.device)
    if weight2.ndim != 2 or weight2.shape[1] != weight1.shape[0]:
        raise ValueError(f"weight2: expected [units, {weight1.shape[0]}], got {list(weight2.shape)}")
    check_tensor("weight2", weight2, weight2.shape, (weight1.dtype,), x.device)
    if bias2 is not None:
        check_tensor("bias2", bias2, weight2.shape[:1], (weight1.dtype,), x.device)
    keep_pre = recorded(x, residual, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    summed, _, _, out = _feed_forward(
        x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation, keep_pre
    )
    return summed, out
