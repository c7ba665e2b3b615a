"""The feed-forward of a block as one operation, which saves as little as possible for backward.

    residual' = x + residual
    pre       = layer_norm(residual') @ weight1^T + bias1            (`feed_forward`: x @ weight1^T + bias1)
    out       = activation(pre) @ weight2^T + bias2

    x, residual [..., D], weight1 [F, D], weight2 [E, F]  ->  out [..., E]

The first layer is computed as in `layer_norm_gelu`, the second by cuBLAS. Saved for backward, per token: residual' (D
values, which the residual stream holds anyway), mean and rstd (8 bytes) and pre (F values). Two intermediates are
recomputed: LayerNorm's backward writes the normalised rows for weight1's gradient, and the pass that applies the
activation's derivative writes the activation for weight2's gradient. PyTorch saves all four, 2 D + 2 F values. With
F = 4 D, a block including its attention (residual', query, key, value, output) saves 10 D; PyTorch saves 16 D.

In backward, the `candidate` decides whether derivative, bias gradient and activation are a separate kernel after cuBLAS
or the epilogue of a fused matmul (`fastvit.kernels.linear`).

Vaswani et al. 2017, arXiv:1706.03762, eq. 2; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels import gelu, linear
from fastvit.kernels import layer_norm_linear as first_layer
from fastvit.kernels.checks import check_optional, check_tensor, check_tensors, needs_grad
from fastvit.kernels.gelu import as_rows, check_activation, disable_autocast
from fastvit.kernels.operators import register


@disable_autocast
def _forward_fallback(
    x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation, keep_pre, candidate
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first = (x, residual, norm_weight, norm_bias, eps, weight1, bias1, activation, keep_pre, candidate)
    *saved, hidden = first_layer.forward_fallback(*first)
    return *saved, F.linear(hidden, weight2, bias2)


@disable_autocast
def _backward_fallback(
    grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, weight1, weight2, eps, activation,
    x_dtype, residual_dtype, output_mask, candidate,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_feed_forward_backward` in plain PyTorch, used on a GPU where a kernel fails."""
    *first_mask, needs_weight2, needs_bias2 = output_mask
    grad_rows, nothing = as_rows(grad_out), weight2.new_empty(0)
    grad_pre, _ = gelu.backward_fallback(grad_rows @ weight2, pre, None, activation, False)
    first = (summed, statistics, pre, norm_weight, norm_bias, weight1, eps, None, x_dtype, residual_dtype)
    grads = first_layer.backward_fallback(grad_pre, grad_sum, *first, first_mask)
    grad_weight2 = grad_rows.t() @ gelu.forward_fallback(pre, None, activation) if needs_weight2 else nothing
    return *grads, grad_weight2, grad_rows.sum(0) if needs_bias2 else nothing


@register("feed_forward", fallback=_forward_fallback)
@disable_autocast
def _feed_forward(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
    activation: str, keep_pre: bool, candidate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns residual', statistics and pre as `layer_norm_linear.launch_forward` does, and out [..., E]."""
    first = (x, residual, norm_weight, norm_bias, eps, weight1, bias1, activation, keep_pre, candidate)
    *saved, hidden = first_layer.launch_forward(*first)
    return *saved, F.linear(hidden, weight2, bias2)


@register("feed_forward_backward", fallback=_backward_fallback)
@disable_autocast
def _feed_forward_backward(
    grad_out: Tensor, grad_sum: Tensor | None, summed: Tensor, statistics: Tensor, pre: Tensor,
    norm_weight: Tensor | None, norm_bias: Tensor | None, weight1: Tensor, weight2: Tensor, eps: float,
    activation: str, x_dtype: torch.dtype, residual_dtype: torch.dtype, output_mask: list[bool], candidate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The five gradients of `layer_norm_linear.launch_backward`, then those of weight2 and bias2.

    output_mask: whether to compute the gradients of the inputs, the norm, weight1, bias1, weight2, bias2; empty if not.
    """
    *first_mask, needs_bias1, needs_weight2, needs_bias2 = output_mask
    grad_rows, options = as_rows(grad_out), {"bias_grad": needs_bias1, "with_y": needs_weight2}
    grad_bias2 = grad_rows.sum(0) if needs_bias2 else weight2.new_empty(0)
    grad_pre, grad_bias1, hidden = linear.launch_backward(
        grad_rows, weight2.contiguous(), pre, activation, **options, candidate=candidate
    )
    grad_weight2 = grad_rows.t() @ hidden if needs_weight2 else weight2.new_empty(0)
    del hidden  # F values per token; the largest temporaries are still to be allocated
    first = (summed, statistics, pre, norm_weight, norm_bias, weight1, eps, None, x_dtype, residual_dtype)
    *grads, _ = first_layer.launch_backward(grad_pre, grad_sum, *first, [*first_mask, False])
    return *grads, grad_bias1, grad_weight2, grad_bias2


def _setup_context(ctx, inputs, output) -> None:
    x, residual, norm_weight, norm_bias, ctx.eps, weight1, _, weight2, _, ctx.activation, _, ctx.candidate = inputs
    first_layer.save_for_backward(ctx, x, residual, output, norm_weight, norm_bias, weight1, weight2)


def _backward(ctx, grad_sum, _statistics, _pre, grad_out):
    if grad_out is None:
        return first_layer.collect_sum_gradients(ctx, grad_sum)
    needs, saved = ctx.needs_input_grad, ctx.saved_tensors
    output_mask = [needs[0] or needs[1], needs[2] or needs[3], *needs[5:9]]
    grads = _feed_forward_backward(
        grad_out, grad_sum, *saved, ctx.eps, ctx.activation, *ctx.dtypes, output_mask, ctx.candidate
    )
    return first_layer.collect_gradients(ctx, saved[3], *grads)


_feed_forward.register_autograd(_backward, setup_context=_setup_context)


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str,
    *, candidate: int = 0,
) -> Tensor:  # fmt: skip
    """activation(x @ weight1^T + bias1) @ weight2^T + bias2.

    x and x @ weight1^T + bias1 are saved for backward, the activation is not. Not twice differentiable.

    Args:
        x: [..., D], float32, bfloat16 or float16. All other tensors have its dtype, or autocast casts them all.
        weight1, bias1, weight2, bias2: [F, D], [F] or None, [E, F], [E] or None.
        activation: a key of `fastvit.kernels.gelu.FORMULAS`.
        candidate: the implementation of the matmul with the activation, see `fastvit.kernels.linear`.

    Returns:
        [..., E], contiguous.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or the activation is unknown.
    """
    check_tensors(x=x)
    (x,) = first_layer.cast_for_autocast(x, x)
    return _apply(x, None, None, None, 0.0, weight1, bias1, weight2, bias2, activation, candidate)[1]


def add_layer_norm_feed_forward(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight1: Tensor,
    bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str = "gelu", *, candidate: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + residual, and `feed_forward` of its LayerNorm: a block from its attention's output to its last residual add.

    Saves the sum, 8 bytes per token and the input of the activation for backward. Not twice differentiable.

    Args:
        x, residual, norm_weight, norm_bias, eps: as in `layer_norm_linear.add_layer_norm_linear`.
        weight1, bias1, weight2, bias2, activation, candidate: as in `feed_forward`; all weights have one dtype.

    Returns:
        The sum [..., D] in the dtype that x and residual promote to, and [..., E] in weight1's dtype.

    Raises:
        ValueError: as in `feed_forward`.
    """
    check_tensors(x=x, residual=residual, norm_weight=norm_weight, norm_bias=norm_bias)
    return _apply(x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation, candidate)


def _apply(
    x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation, candidate
) -> tuple[Tensor, Tensor]:
    check_activation(activation)
    check_tensors(weight1=weight1, weight2=weight2, optional={"bias1": bias1, "bias2": bias2})
    weight1, bias1, weight2, bias2 = first_layer.cast_for_autocast(x, weight1, bias1, weight2, bias2)
    linear.check_linear(x, weight1, bias1, suffix="1")
    if norm_weight is None:
        check_tensor("x", x, x.shape, (weight1.dtype,), x.device)
    else:
        first_layer.check_norm(x, residual, norm_weight, norm_bias)
    if weight2.ndim != 2 or weight2.shape[1] != weight1.shape[0]:
        raise ValueError(f"weight2: expected [units, {weight1.shape[0]}], got {list(weight2.shape)}")
    check_tensor("weight2", weight2, weight2.shape, (weight1.dtype,), x.device)
    check_optional("bias2", bias2, weight2.shape[:1], (weight1.dtype,), x.device)
    keep_pre = needs_grad(x, residual, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    summed, _, _, out = _feed_forward(
        x, residual, norm_weight, norm_bias, eps, weight1, bias1, weight2, bias2, activation, keep_pre, candidate
    )
    return summed, out
