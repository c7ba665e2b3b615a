"""LayerNorm into the linear layer that reads it, with or without an activation behind it.

    residual' = x + residual                                          (optional)
    pre       = layer_norm(residual') @ weight^T + bias
    out       = activation(pre)                                       `layer_norm_gelu`, half a feed-forward
    out       = pre                                                   `layer_norm_linear`: query, key and value, say

    x, residual [..., D], weight [F, D]  ->  out [..., F]

Two ways to the same result, chosen by the table of `fastvit.kernels.tuning`:
    separate   LayerNorm kernel, cuBLAS, activation kernel
    fused      one product with the activation in its epilogue, after the LayerNorm kernel or (`normalize`) with only
               its statistics, the normalising done on the way in (see `fastvit.kernels.linear`)
ViT-B at batch 256 on an H100: the product is 298 us of arithmetic, the activation as a pass of its own 207 us of
memory, LayerNorm 52 us, with the residual add 103 us. Fused saves of the activation 103 us in training, where pre is
written all the same, and 207 us otherwise; normalising on the way in saves 26 us more. The price: our product may be
slower than cuBLAS's, and the error function's arithmetic runs while the tensor cores wait, unless two programs share a
multiprocessor.

Kept for backward: residual' (or x), mean and rstd, and, with an activation, pre. The normalised rows are not: where the
weight gradient needs them LayerNorm's backward, which has them in registers, writes them: D values a token.

Ba, Kiros & Hinton 2016, arXiv:1607.06450; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels import gelu, layer_norm, linear, tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.gelu import as_rows, check_activation, without_autocast
from fastvit.kernels.operators import operator
from fastvit.watchers import recorded

# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------

Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps


def launch_choice(
    choice, x, residual, norm, weight, bias, activation, keep_pre
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """residual' (empty without residual), the norm's statistics (empty without norm), pre (if kept, else empty), out.

    x, residual: [..., D]; pre, out: [rows, F].
    """
    on_the_way = norm is not None and bool(choice["fused"] and choice["normalize"])
    if norm is None:
        summed, statistics = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    else:
        norm_weight, norm_bias, eps = norm
        summed, normalized, statistics = layer_norm._launch_forward(
            x, residual, norm_weight, norm_bias, None, None, eps, y_dtype=weight.dtype, statistics_only=on_the_way
        )
        x = normalized if not on_the_way else x if residual is None else summed
    rows = as_rows(x)
    if choice["fused"]:
        factors = (statistics, norm_weight, norm_bias) if on_the_way else None
        pre, out = linear.launch_linear(
            choice, rows, weight, bias, norm=factors, activation=activation, keep_pre=keep_pre
        )
        return summed, statistics, pre, out
    pre = F.linear(rows, weight, bias)
    if activation is None:
        return summed, statistics, pre.new_empty(0), pre
    out = gelu.launch_forward(pre, None, activation, out=None if keep_pre else pre)
    return summed, statistics, pre if keep_pre else pre.new_empty(0), out


def launch_forward(x, residual, norm, weight, bias, activation, keep_pre) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def run(choice: tuning.Choice):
        return launch_choice(choice, x, residual, norm, weight, bias, activation, keep_pre)

    units, dim = weight.shape
    operation = "layer_norm_linear" if activation is None else "layer_norm_gelu"
    shape = linear.shape_class(x.numel() // dim, dim, units) + (", kept" if keep_pre else "")
    return run(tuning.choose(operation, shape, weight.dtype, weight.device, run))


def launch_backward(
    grad_pre, grad_sum, summed, statistics, norm, weight, x_dtype, residual_dtype, inputs, norm_grads, weight_grad
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, x, the norm's weight and bias (rows of one tensor) and weight, from that of pre [rows, F].

    Those not asked for have no elements; that of x has none where it is, value and dtype, that of residual.
    """
    rows = summed
    if not (inputs or norm_grads):
        grads = _no_input_gradients(summed)
        if norm is not None and weight_grad:
            _, rows, _ = layer_norm._launch_forward(summed, None, *norm[:2], None, None, norm[2], y_dtype=weight.dtype)
    elif norm is None:
        grads = ((grad_pre @ weight).view(summed.shape), *_no_input_gradients(summed)[1:])
    else:
        rows = torch.empty(summed.shape, dtype=weight.dtype, device=summed.device) if weight_grad else None
        grads = layer_norm._launch_backward(
            (grad_pre @ weight).view(summed.shape), grad_sum, summed, None, norm[0], None, None, statistics, x_dtype,
            residual_dtype, norm_grads, bias=norm[1], y=rows,
        )  # fmt: skip
    return *grads, grad_pre.t() @ as_rows(rows) if weight_grad else weight.new_empty(0)


def _no_input_gradients(summed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return summed.new_empty(0), summed.new_empty(0), summed.new_empty(0, dtype=torch.float32)


def empty_outputs(x, residual, norm_weight, weight, activation, keep_pre) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch_forward` returns, uninitialised."""
    rows, units = x.numel() // x.shape[-1], weight.shape[0]
    return (
        x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=torch.result_type(x, residual)),
        x.new_empty((0,) if norm_weight is None else (2, rows), dtype=torch.float32),
        weight.new_empty((rows, units) if keep_pre and activation is not None else 0),
        weight.new_empty(rows, units),
    )


def empty_gradients(
    summed, norm_weight, weight, x_dtype, residual_dtype, inputs, norm_grads, weight_grad
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `launch_backward` returns, uninitialised."""
    if not (inputs or norm_grads):
        grads = _no_input_gradients(summed)
    elif norm_weight is None:
        grads = summed.new_empty(summed.shape), *_no_input_gradients(summed)[1:]
    else:
        grads = layer_norm._empty_gradients(summed, None, norm_weight, None, None, x_dtype, residual_dtype, norm_grads)
    return *grads, weight.new_empty(weight.shape if weight_grad else 0)


def as_norm(norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float) -> Norm | None:
    return None if norm_weight is None else (norm_weight.contiguous(), norm_bias.contiguous(), eps)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm and one linear layer: the operator
# ---------------------------------------------------------------------------------------------------------------------


@operator("layer_norm_linear")
@without_autocast
def _layer_norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    keep_pre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = as_norm(norm_weight, norm_bias, eps)
    summed, statistics, pre, out = launch_forward(
        x, residual, norm, weight.contiguous(), contiguous(bias), activation, keep_pre
    )
    return summed, statistics, pre, out.view(*x.shape[:-1], out.shape[-1])


@_layer_norm_linear.register_fake
def _(x, residual, norm_weight, norm_bias, eps, weight, bias, activation, keep_pre):
    summed, statistics, pre, out = empty_outputs(x, residual, norm_weight, weight, activation, keep_pre)
    return summed, statistics, pre, out.new_empty(*x.shape[:-1], weight.shape[0])


@operator("layer_norm_linear_backward")
@without_autocast
def _layer_norm_linear_backward(
    grad_out: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    statistics: Tensor,
    pre: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    activation: str | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """wanted: gradients of the inputs, the norm, the weight, the bias."""
    *hidden_wanted, bias_wanted = wanted
    grad_pre = as_rows(grad_out)
    if activation is not None:
        grad_pre, grad_bias, _ = gelu.launch_backward(grad_pre, pre, None, activation, bias_grad=bias_wanted)
    else:
        grad_bias = grad_pre.sum(0) if bias_wanted else weight.new_empty(0)
    norm = as_norm(norm_weight, norm_bias, eps)
    grads = launch_backward(
        grad_pre, grad_sum, summed, statistics, norm, weight, x_dtype, residual_dtype, *hidden_wanted
    )
    return *grads, grad_bias


@_layer_norm_linear_backward.register_fake
def _(
    grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, eps, weight, activation,
    x_dtype, residual_dtype, wanted,
):  # fmt: skip
    *hidden_wanted, bias_wanted = wanted
    grads = empty_gradients(summed, norm_weight, weight, x_dtype, residual_dtype, *hidden_wanted)
    return *grads, weight.new_empty(weight.shape[0] if bias_wanted else 0)


def _layer_norm_linear_setup(ctx, inputs, output) -> None:
    x, residual, norm_weight, norm_bias, ctx.eps, weight, _, ctx.activation, _ = inputs
    summed, statistics, pre, _ = output
    ctx.mark_non_differentiable(statistics, pre)
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, statistics, pre, norm_weight, norm_bias, weight)


def _layer_norm_linear_autograd(ctx, grad_sum, _statistics, _pre, grad_out):
    summed, statistics, pre, norm_weight, norm_bias, weight = ctx.saved_tensors
    grad_sum = grad_sum if ctx.has_residual else None
    if grad_out is None:
        return *gradients_of_the_sum(ctx, grad_sum), *[None] * 7
    needs = ctx.needs_input_grad
    wanted = [needs[0] or needs[1], needs[2] or needs[3], needs[5], needs[6]]
    *grads, grad_bias = _layer_norm_linear_backward(
        grad_out, grad_sum, summed, statistics, pre, norm_weight, norm_bias, ctx.eps, weight, ctx.activation,
        *ctx.dtypes, wanted,
    )  # fmt: skip
    grads = (*sort_gradients(ctx, norm_weight, grads), grad_bias)
    return *needed(ctx, grads), None, None


def gradients_of_the_sum(ctx, grad_sum: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Of x and residual where nothing but their sum was used."""
    if grad_sum is None:
        return None, None
    grads = [grad_sum.to(dtype) for dtype in ctx.dtypes]
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))


def sort_gradients(ctx, norm_weight: Tensor | None, grads) -> tuple[Tensor | None, ...]:
    """From those of `launch_backward` to those of the operators' inputs: x, residual, norm's weight, bias and eps,
    weight."""
    grad_residual, grad_x, norm_grads, grad_weight = grads
    if ctx.dtypes[0] == ctx.dtypes[1]:
        grad_x = grad_residual
    grad_norm_weight, grad_norm_bias = None, None
    if norm_grads.numel():
        grad_norm_weight, grad_norm_bias, _ = layer_norm.split_parameter_gradients(norm_grads, norm_weight)
    return grad_x, grad_residual, grad_norm_weight, grad_norm_bias, None, grad_weight


def needed(ctx, grads) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]


_layer_norm_linear.register_autograd(_layer_norm_linear_autograd, setup_context=_layer_norm_linear_setup)


# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """layer_norm(x) @ weight^T + bias: a block's first norm and its query, key and value, say.

    x: [..., D], float32, bfloat16 or float16, D at most 8,192; rows may be strided. norm_weight, norm_bias: [D], of one
        dtype. weight: [F, D] and bias: [F] or None, of one dtype, which may be another: the normalised rows are rounded
        to it. Under autocast weight and bias are cast like a linear layer's; the norm's sums are float32 throughout.
    Returns [..., F] in weight's dtype, contiguous. Keeps x and 8 bytes a token for backward.
    Raises ValueError for shapes, dtypes or devices that do not fit. Second derivatives are not supported.
    """
    return _apply(x, None, norm_weight, norm_bias, eps, weight, bias, None)[1]


def add_layer_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm_linear of it). residual: [..., D], of x's shape; its dtype may be another.

    The sum is in the dtype that x and residual promote to, and is what is kept for backward.
    """
    return _apply(x, residual, norm_weight, norm_bias, eps, weight, bias, None)


def layer_norm_gelu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """activation(layer_norm(x) @ weight^T + bias): the first half of a feed-forward.

    Arguments as in `layer_norm_linear`; activation: a key of `fastvit.kernels.gelu.FORMULAS`.
    Returns [..., F] in weight's dtype. Keeps for backward x, 8 bytes a token and what the activation is taken of. Where
    the second half follows, `fastvit.kernels.feed_forward` keeps the activation out of memory too.
    """
    return _apply(x, None, norm_weight, norm_bias, eps, weight, bias, activation)[1]


def add_layer_norm_gelu(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm_gelu of it); see `add_layer_norm_linear`."""
    return _apply(x, residual, norm_weight, norm_bias, eps, weight, bias, activation)


def _apply(x, residual, norm_weight, norm_bias, eps, weight, bias, activation) -> tuple[Tensor, Tensor]:
    weight, bias = autocast(x, weight, bias)
    check(x, residual, norm_weight, norm_bias, weight, bias, activation)
    keep_pre = activation is not None and recorded(x, residual, norm_weight, norm_bias, weight, bias)
    summed, _, _, out = _layer_norm_linear(x, residual, norm_weight, norm_bias, eps, weight, bias, activation, keep_pre)
    return summed, out


def autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Weights and biases in autocast's dtype where it is on, differentiably: their gradients come back in their own."""
    if not torch.is_autocast_enabled(x.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(x.device.type)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def check(x, residual, norm_weight, norm_bias, weight, bias, activation, suffix="") -> None:
    if activation is not None:
        check_activation(activation)
    linear.check_linear(x, weight, bias, suffix)
    if norm_weight is None:
        return
    if x.shape[-1] > layer_norm.MAX_DIM:
        raise ValueError(f"x: expected [..., D] with D at most {layer_norm.MAX_DIM}, got {list(x.shape)}")
    check_tensor("norm_weight", norm_weight, x.shape[-1:], DTYPES, x.device)
    check_tensor("norm_bias", norm_bias, x.shape[-1:], (norm_weight.dtype,), x.device)
    if residual is not None:
        check_tensor("residual", residual, x.shape, DTYPES, x.device)
