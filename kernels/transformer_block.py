"""A whole pre-LayerNorm block as one operation, for what the pieces cost between the kernels.

    residual' = residual + x                                          (residual may be None: residual' = x)
    h         = residual' + attention(layer_norm(residual') @ qkv^T) @ output^T
    branch    = activation(layer_norm(h) @ weight1^T) @ weight2^T     (each product with its bias)

    x, residual [B, N, D]  ->  branch, h [B, N, D]; the next block adds them

It launches what `layer_norm_linear`, `attention_packed`, a linear layer and `feed_forward` launch, in their order, and
gives the same bits. What it saves is the host's: one check of the arguments, one node of the autograd graph where the
pieces make ten, and the joined weight of query, key and value is a view where they lie side by side, whose gradient is
three views: no concatenation, forward or backward. Backward keeps for a token what the pieces keep: residual' and h (D
values each), qkv (3 D), attention's output (D), what the activation is taken of (F), 16 bytes of the norms' statistics
and 4 bytes a head.

Vaswani et al. 2017, arXiv:1706.03762; pre-LayerNorm: Dosovitskiy et al. 2021, eq. 2 and 3, arXiv:2010.11929.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvit.kernels import attention, feed_forward, layer_norm_gelu
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.gelu import as_rows, check_activation, without_autocast
from fastvit.kernels.layer_norm_gelu import as_norm
from fastvit.kernels.operators import wants_operators
from fastvit.reference import BlockWeights
from fastvit.side_by_side import joined
from fastvit.watchers import recorded


def _attention_call(heads: Tensor) -> attention.Call:
    """No mask, no packing, no dropout."""
    return attention.Call(None, None, None, None, heads.shape[-1] ** -0.5, 0.0)


def _ready(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """Contiguous, and in autocast's dtype where there is one."""
    if tensor is None:
        return None
    return (tensor if dtype is None else tensor.to(dtype)).contiguous()


@without_autocast
def _forward(x, residual, weights: BlockWeights, num_heads, activation, dtype, keep_pre):
    """branch and h, what backward needs of the rows, and of the weights."""
    norm_before, query, key, value, output, norm_after, first, second = weights
    qkv = joined((query, key, value))
    qkv, output, first, second = ([_ready(t, dtype) for t in affine] for affine in (qkv, output, first, second))
    norm_before, norm_after = as_norm(*norm_before), as_norm(*norm_after)

    summed, statistics, _, rows = layer_norm_gelu.launch_forward(x, residual, norm_before, *qkv, None, False)
    if residual is None:
        summed = x
    heads = rows.view(*x.shape[:2], 3, num_heads, x.shape[2] // num_heads)
    context, lse = attention._launch_forward(*heads.unbind(2), _attention_call(heads))
    h, h_statistics, pre, hidden = layer_norm_gelu.launch_forward(
        F.linear(context, *output), summed, norm_after, *first, activation, keep_pre
    )
    branch = F.linear(hidden, *second).view(x.shape)
    kept_rows = (summed, statistics, heads, context, lse, h, h_statistics, pre)
    return branch, h, kept_rows, (*norm_before[:2], qkv[0], output[0], *norm_after[:2], first[0], second[0])


class _TransformerBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, eps_before, eps_after, num_heads, activation, dtype, *tensors):
        weights = BlockWeights.of(tensors, eps_before, eps_after)
        branch, h, kept_rows, kept_weights = _forward(x, residual, weights, num_heads, activation, dtype, True)
        # Kept as one with query's they are not seen by autograd, which is to notice a change of what is kept.
        lie_side_by_side = kept_weights[2].data_ptr() == weights.query[0].data_ptr()
        watched = (weights.key[0], weights.value[0]) if lie_side_by_side else ()
        ctx.save_for_backward(*kept_rows, *kept_weights, *watched)
        ctx.eps, ctx.activation, ctx.has_residual = (eps_before, eps_after), activation, residual is not None
        ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
        ctx.weight_dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        return branch, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_branch, grad_h):
        summed, statistics, heads, context, lse, h, h_statistics, pre, *weights = ctx.saved_tensors
        norm_weight, norm_bias, qkv, output, h_norm_weight, h_norm_bias, first, second, *_ = weights
        x_wanted, residual_wanted, *_ = ctx.needs_input_grad
        wanted = ctx.needs_input_grad[7:]  # in the order of BlockWeights.of
        inputs_wanted = x_wanted or residual_wanted
        heads_wanted = inputs_wanted or any(wanted[:8])
        attended_wanted = heads_wanted or any(wanted[8:10])
        grads: list[Tensor | None] = [None] * 16

        grad_summed, grad_attended, norm_grads, *grads[12:] = feed_forward._feed_forward_backward.function(
            grad_branch, grad_h, h, h_statistics, pre, h_norm_weight, h_norm_bias, ctx.eps[1], first, second,
            ctx.activation, context.dtype, summed.dtype,
            [attended_wanted, any(wanted[10:12]), *wanted[12:]],
        )  # fmt: skip
        if norm_grads.numel():
            grads[10:12] = norm_grads
        if context.dtype == summed.dtype:
            grad_attended = grad_summed
        if attended_wanted:
            rows = as_rows(grad_attended)
        if wanted[8]:
            grads[8] = rows.t() @ as_rows(context)
        if wanted[9]:
            grads[9] = rows.sum(0)
        grad_x = grad_residual = None
        if heads_wanted:
            grad_heads, _ = attention._attention_packed_backward.function(
                (rows @ output).view(context.shape), heads, context, lse, *_attention_call(heads), False
            )
            grad_residual, grad_x, norm_grads, grad_weight, grad_bias = (
                layer_norm_gelu._layer_norm_linear_backward.function(
                    grad_heads.flatten(2).flatten(0, 1), grad_summed, summed, statistics, pre, norm_weight, norm_bias,
                    ctx.eps[0], qkv, None, *ctx.dtypes,
                    [inputs_wanted, any(wanted[:2]), any(wanted[2:8:2]), any(wanted[3:8:2])],
                )
            )  # fmt: skip
            if norm_grads.numel():
                grads[:2] = norm_grads
            if grad_weight.numel():
                grads[2:8:2] = grad_weight.chunk(3)
            if grad_bias.numel():
                grads[3:8:2] = grad_bias.chunk(3)
            if ctx.dtypes[0] == ctx.dtypes[1]:
                grad_x = grad_residual
        return (
            grad_x if x_wanted else None, grad_residual if residual_wanted else None, *[None] * 5,
            *[None if not needed else grad if grad.dtype is dtype else grad.to(dtype)
              for grad, dtype, needed in zip(grads, ctx.weight_dtypes, wanted, strict=True)],
        )  # fmt: skip


def transformer_block(
    x: Tensor, residual: Tensor | None, weights: BlockWeights, num_heads: int, activation: str = "gelu"
) -> tuple[Tensor, Tensor]:
    """(branch, h), of which the next block's residual' is the sum.

    x: [B, N, D], float32, bfloat16 or float16; residual: of x's shape, its dtype may be another, or None.
    weights: see `fastvit.reference.BlockWeights`. Those of a norm are of one dtype, so are those of attention's linear
        layers, and those of the feed-forward's; autocast casts all linear layers. The head dim, D / num_heads, is a
        multiple of 8 from 16 to 128. activation: a key of `fastvit.kernels.gelu.FORMULAS`.
    Raises ValueError for shapes, dtypes or devices that do not fit. Second derivatives are not supported.
    """
    _check(x, residual, weights, num_heads, activation)
    tensors = weights.tensors()
    if wants_operators((x, residual, *tensors)):
        return _pieces(x, residual, weights, num_heads, activation)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if recorded(x, residual, *tensors):
        eps = weights.norm_before[2], weights.norm_after[2]
        return _TransformerBlock.apply(x, residual, *eps, num_heads, activation, dtype, *tensors)
    return _forward(x, residual, weights, num_heads, activation, dtype, False)[:2]


def _pieces(x, residual, weights: BlockWeights, num_heads, activation) -> tuple[Tensor, Tensor]:
    """The same by the operations that a compiler, an export or a transform can follow."""
    qkv = joined(weights[1:4])
    if residual is None:
        residual, heads = x, layer_norm_gelu.layer_norm_linear(x, *weights.norm_before, *qkv)
    else:
        residual, heads = layer_norm_gelu.add_layer_norm_linear(x, residual, *weights.norm_before, *qkv)
    context = attention.attention_packed(heads, num_heads=num_heads)
    h, branch = feed_forward.add_layer_norm_feed_forward(
        F.linear(context, *weights.output), residual, *weights.norm_after, *weights.first, *weights.second, activation
    )
    return branch, h


def _check(x: Tensor, residual: Tensor | None, weights: BlockWeights, num_heads: int, activation: str) -> None:
    check_activation(activation)
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected [B, N, D] with at least one token, got {list(x.shape)}")
    dim, units, device = x.shape[2], weights.first[0].shape[0], x.device
    if num_heads < 1 or dim % num_heads or not attention.takes_head_dim(dim // num_heads):
        raise ValueError(
            f"num_heads: expected D / num_heads to be a multiple of 8 from {attention.MIN_HEAD_DIM} to"
            f" {attention.MAX_HEAD_DIM}, got {dim} / {num_heads}"
        )
    check_tensor("x", x, x.shape, DTYPES, device)
    if residual is not None:
        check_tensor("residual", residual, x.shape, DTYPES, device)
    for name in ("norm_before", "norm_after"):
        weight, bias, _ = getattr(weights, name)
        check_tensor(f"weights.{name}", weight, (dim,), DTYPES, device)
        check_tensor(f"weights.{name}", bias, (dim,), (weight.dtype,), device)
    square = (dim, dim)
    for first, parts in (
        (weights.query[0], (("query", square), ("key", square), ("value", square), ("output", square))),
        (weights.first[0], (("first", (units, dim)), ("second", (dim, units)))),
    ):
        dtypes = (first.dtype,) if first.dtype in DTYPES else DTYPES
        for name, shape in parts:
            weight, bias = getattr(weights, name)
            check_tensor(f"weights.{name}", weight, shape, dtypes, device)
            if bias is not None:
                check_tensor(f"weights.{name}", bias, shape[:1], dtypes, device)
