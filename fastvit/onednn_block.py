"""A whole pre-LayerNorm block in bfloat16 on x86 processors as one operation.

It calls what the pieces call, in their order, and gives the same bits (`fastvit.onednn`, `fastvit.onednn_attention`). A
small model waits for Python between them: this saves a dozen nodes of the autograd graph, query, key and value apart,
and the copies of their heads in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvit import onednn_attention
from fastvit.onednn import (
    GELU_FORMS,
    can_take,
    grads_of_biases,
    grads_of_weights,
    has_bfloat16,
    product,
    room_for,
    rounded,
    rounds,
    scratch,
)
from fastvit.side_by_side import joined
from fastvit.watchers import recorded

if TYPE_CHECKING:
    from fastvit.reference import Affine, BlockWeights


def takes(x: Tensor, residual: Tensor | None, weights: BlockWeights, num_heads: int, activation: str) -> bool:
    """Whether `transformer_block` computes this: a float32 block that autocast has rounded, or a bfloat16 one of which
    no gradient is recorded; with enough tokens for attention by oneDNN.

    The layers are plain ones (`plain_tensors` in `fastvit.modeling`). Kept short: it is asked for each block, after
    products that leave nothing of Python's in the cache.
    """
    (norm, _, _), (query, bias), (key, key_bias), (value, value_bias), (output, _), _, (first, _), (second, _) = weights
    dtype = query.dtype
    if dtype is torch.float32:
        if not rounds(x, query):
            return False
    elif (
        x.dtype is not torch.bfloat16
        or torch.is_autocast_enabled("cpu")
        or not (can_take(x, query) and has_bfloat16())
        or recorded(x, residual, *weights.tensors())
    ):
        return False
    return (
        activation in GELU_FORMS
        and onednn_attention.is_enough(x.numel(), x.shape[1])
        and (x if residual is None else residual).dtype is norm.dtype is dtype
        and key.dtype is value.dtype is output.dtype is first.dtype is second.dtype is dtype
        and (bias is None) is (key_bias is None) is (value_bias is None)
    )


def groups_of(tensors: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Of what `BlockWeights.tensors` gives, those of each product, weights first: query, key and value together, the
    output, and the feed-forward's two."""
    return (*tensors[2:8:2], *tensors[3:8:2]), tensors[8:10], tensors[12:14], tensors[14:16]


def transformer_block(
    x: Tensor, residual: Tensor | None, weights: BlockWeights, num_heads: int, activation: str
) -> tuple[Tensor, Tensor]:
    """As `fastvit.reference.transformer_block`, where that `takes`; with first derivatives."""
    tensors, eps, gelu = weights.tensors(), (weights.norm_before[2], weights.norm_after[2]), GELU_FORMS[activation]
    if recorded(x, residual, *tensors):
        return TransformerBlock.apply(x, residual, eps, num_heads, gelu, *tensors)
    layers: Iterator[Affine]
    if weights.query[0].dtype is torch.float32:
        layers = map(scratch.round, groups_of(tensors))
    else:
        layers = iter((joined(weights[1:4]), weights.output, weights.first, weights.second))
    branch, h, *_ = forward(x, residual, norms_of(tensors, eps), layers, num_heads, gelu, keep=False)
    return branch, h


def norms_of(tensors: Sequence[Any], eps: Sequence[float]) -> Sequence[Any]:
    """What torch.native_layer_norm takes after its input, for both norms."""
    shape = tensors[0].shape
    return (shape, *tensors[:2], eps[0]), (shape, *tensors[10:12], eps[1])


def forward(
    x: Tensor,
    residual: Tensor | None,
    norms: Sequence[Any],
    layers: Iterator[Affine],
    num_heads: int,
    gelu: str,
    keep: bool,
) -> Sequence[Any]:
    """The branch and h, and with `keep` what backward needs besides weights. layers: weight and bias in bfloat16, one
    after the other as `groups_of` has them; each is rounded when it is asked for, and so in the cache."""
    before, after = norms
    batch, tokens, _ = x.shape
    summed = x if residual is None else x + residual
    normed, *statistics = torch.native_layer_norm(summed, *before)
    normed = normed.to(torch.bfloat16)
    qkv = product(normed, *next(layers)).view(batch, tokens, 3, num_heads, -1)
    q, k, v = onednn_attention.packed_by_heads(qkv)
    head_dim = qkv.shape[-1]
    probabilities = None
    if keep and onednn_attention.keeps_probabilities(tokens, head_dim):
        probabilities = normed.new_empty(batch * num_heads, tokens, tokens)
    context = onednn_attention.attend_by_heads(q, k, v, batch, head_dim**-0.5, probabilities)
    h = product(context, *next(layers)) + summed
    h_normed, *h_statistics = torch.native_layer_norm(h, *after)
    h_normed = h_normed.to(torch.bfloat16)
    if not keep:
        weight, bias = next(layers)
        hidden = product(h_normed, weight, bias, gelu)
        return product(hidden, *next(layers)), h
    hidden = product(h_normed, *next(layers))
    branch = product(F.gelu(hidden, approximate=gelu), *next(layers))
    return branch, h, summed, normed, *statistics, q, k, v, probabilities, context, h, h_normed, *h_statistics, hidden


class TransformerBlock(torch.autograd.Function):
    """`transformer_block` under autocast, with derivatives."""

    @staticmethod
    def forward(ctx, x, residual, eps, num_heads, gelu, *tensors):
        groups = groups_of(tensors)
        lent = rounded.lend(ctx, groups)
        layers = (layer.round(group) for layer, group in zip(lent, groups, strict=True))
        branch, h, *kept = forward(x, residual, norms_of(tensors, eps), layers, num_heads, gelu, keep=True)
        ctx.x_dtype, ctx.gelu = x.dtype, gelu
        ctx.save_for_backward(*[layer.weight for layer in lent], *tensors[:2], *tensors[10:12], *kept)
        return branch, h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_branch, grad_h):
        qkv, output, first, second, *saved = ctx.saved_tensors
        norms, saved = saved[:4], saved[4:]
        summed, normed, mean, deviation, q, k, v, probabilities, context, h, h_normed, h_mean, h_deviation, hidden = (
            saved
        )
        batch, tokens, dim = h.shape
        if ctx.layers is None:  # a second backward pass
            rounded.check(ctx)
            qkv, output, first, second = (room_for(group).round(group)[0] for group in ctx.groups)
        x_wanted, residual_wanted, _, _, _, *wanted = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 16

        def linear_backward(grad: Tensor, x: Tensor, weight: Tensor, where: slice) -> Tensor:
            """The gradient of x; those of the layers whose tensors are `where` go to `grads`."""
            weights, biases = slice(where.start, where.stop, 2), slice(where.start + 1, where.stop, 2)
            rows, units = grad.flatten(0, 1), [len(weight) // len(wanted[weights])] * len(wanted[weights])
            grads[biases] = grads_of_biases(rows, units, wanted[biases])
            grads[weights] = grads_of_weights(rows, x.flatten(0, 1), units, wanted[weights])
            return torch.mm(rows, weight).view(x.shape)

        def norm_backward(grad: Tensor, x: Tensor, *statistics_and_norm: Tensor, where: slice) -> Tensor:
            """Likewise of a LayerNorm."""
            grad, *grads[where] = torch.ops.aten.native_layer_norm_backward(
                grad.float(), x, [dim], *statistics_and_norm, [True, *wanted[where]]
            )
            return grad

        grad = linear_backward(grad_branch, F.gelu(hidden, approximate=ctx.gelu), second, slice(14, 16))
        torch.ops.aten.gelu_backward.grad_input(grad, hidden, approximate=ctx.gelu, grad_input=grad)
        grad = linear_backward(grad, h_normed, first, slice(12, 14))
        grad_h = norm_backward(grad, h, h_mean, h_deviation, *norms[2:], where=slice(10, 12)).add_(grad_h)

        grad = linear_backward(grad_h.to(torch.bfloat16), context, output, slice(8, 10))
        g = onednn_attention.by_heads(grad.view(batch, tokens, -1, q.shape[2]))
        heads_grads = q.new_empty(3, *q.shape)
        onednn_attention.grads_by_heads(g, q, k, v, q.shape[2] ** -0.5, probabilities, heads_grads.unbind())
        grad = heads_grads.view(3, batch, -1, tokens, q.shape[2]).permute(1, 3, 0, 2, 4).flatten(2)
        grad = linear_backward(grad, normed, qkv, slice(2, 8))
        grad = norm_backward(grad, summed, mean, deviation, *norms[:2], where=slice(0, 2)).add_(grad_h)
        rounded.take_back(ctx)
        return (
            grad.to(ctx.x_dtype) if x_wanted else None, grad if residual_wanted else None, None, None, None, *grads,
        )  # fmt: skip
