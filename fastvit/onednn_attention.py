"""Attention in bfloat16 on x86 processors, made of oneDNN's matrix products of many heads at a time.

PyTorch's own multiplies 64 queries of one head at a time, too little work for a call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvit.onednn import can_take, has_bfloat16
from fastvit.watchers import recorded

# Scores that are computed at a time: few enough for the cache, enough for both cores. The fewest multiplications of
# queries with keys that are worth the trouble, in inference and in training, where backward gains more.
SCORES_AT_A_TIME, FEWEST_FOR_SCORES, FEWEST_IN_TRAINING = 2**19, 6 * 10**6, 2**21


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` computes this (shapes as there): bfloat16 of some size."""
    return (
        can_take(query, key)
        and query.dtype == value.dtype == torch.bfloat16
        and key.shape[-1] == value.shape[-1]
        and is_enough(query.numel(), key.shape[1])
        and has_bfloat16()
    )


def is_enough(numbers: int, keys: int) -> bool:
    """Whether so many numbers in the queries, and so many keys, are worth the trouble."""
    return numbers * keys >= (FEWEST_IN_TRAINING if torch.is_grad_enabled() else FEWEST_FOR_SCORES)


Scratch = tuple[Tensor, Tensor, Tensor]  # one of bfloat16, two of float32


class Memory(threading.local):
    """Each thread's scratch, 5 MB, and its views by shape: touching new memory takes longer than multiplying."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.whole = scratch_of(SCORES_AT_A_TIME)
        self.views: dict[tuple[int, int, int], Scratch] = {}


def scratch_of(*shape: int) -> Scratch:
    return torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape), torch.empty(shape)


memory: Memory | None = None


def scratch(count: int, queries: int, keys: int) -> Scratch:
    """Memory for the scores of so many heads, each [count, queries, keys]."""
    global memory
    size = count * queries * keys
    if size > SCORES_AT_A_TIME:
        return scratch_of(count, queries, keys)
    memory = memory or Memory()
    found = memory.views.get((count, queries, keys))
    if found is None:
        if len(memory.views) >= 64:  # pictures of ever new sizes
            memory.views.clear()
        with torch.inference_mode(False):
            halves, first, second = (part[:size].view(count, queries, keys) for part in memory.whole)
        found = memory.views[count, queries, keys] = (halves, first, second)
    return found


def pieces(query: Tensor, key: Tensor) -> Iterator[tuple[slice | EllipsisType, Scratch]]:
    """Some heads at a time, and the scratch for their scores, each [some of the heads, Nq, Nk].

    query: [B * heads, Nq, head_dim]; key: [B * heads, Nk, head_dim].
    """
    heads, queries, keys = len(query), query.shape[1], key.shape[1]
    count = max(1, SCORES_AT_A_TIME // (queries * keys))
    if count >= heads:
        yield ..., scratch(heads, queries, keys)
        return
    for first in range(0, heads, count):
        size = min(count, heads - first)
        yield slice(first, first + size), scratch(size, queries, keys)


def part(x: Tensor, some: slice | EllipsisType) -> Tensor:
    return x if some is ... else x[some]


def exact_product(x: Tensor, y: Tensor, scale: float, halves: Tensor, out: Tensor) -> Tensor:
    """x @ y * scale of bfloat16 as float32, in `out`; `halves`, bfloat16, is scratch.

    A bfloat16 product is rounded, to a hundredth of a score of 4: what was rounded off is computed by a second product,
    of which oneDNN subtracts the first before it rounds. The sum of both is as good as a float32 product.
    """
    torch.baddbmm(halves, x, y, beta=0, alpha=scale, out=halves)
    out.copy_(halves)
    torch.baddbmm(halves, x, y, beta=-1, alpha=scale, out=halves)
    return out.add_(halves)


def by_heads(x: Tensor) -> Tensor:
    """[B, N, heads, head_dim] -> [B * heads, N, head_dim], a copy: of a view each product would make one."""
    return x.transpose(1, 2).contiguous().view(-1, x.shape[1], x.shape[3])


def by_tokens(x: Tensor, like: Tensor) -> Tensor:
    """The way back, to the shape [B, N, heads, head_dim] of `like`."""
    batch, tokens, heads, head_dim = like.shape
    return x.view(batch, heads, tokens, head_dim).transpose(1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(query key^T * scale) value, many heads a product, and its first derivatives.

    query: [B, Nq, heads, head_dim]; key, value: [B, Nk, heads, head_dim]; bfloat16. scale: 1 / sqrt(head_dim) if None.
    Returns [B, Nq, heads * head_dim].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if recorded(query, key, value):
        return Attention.apply(query, key, value, scale)
    return attend(query, key, value, scale)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, kept: Tensor | None = None) -> Tensor:
    """`attention` without derivatives; the probabilities are left in kept [B * heads, Nq, Nk], bfloat16."""
    return attend_by_heads(by_heads(query), by_heads(key), by_heads(value), len(query), scale, kept)


def attend_packed(qkv: Tensor, scale: float) -> Tensor:
    """`attend` of qkv [B, N, 3, heads, head_dim], of which one copy is made."""
    q, k, v = packed_by_heads(qkv)
    return attend_by_heads(q, k, v, len(qkv), scale)


def packed_by_heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value [B * heads, N, head_dim], one after the other, of qkv [B, N, 3, heads, head_dim]."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.permute(2, 0, 3, 1, 4).contiguous().view(3, batch * heads, tokens, head_dim).unbind()


def keeps_probabilities(keys: int, head_dim: int) -> bool:
    """Whether they are no larger than query, key, value and output together: then backward does not compute them."""
    return keys <= 4 * head_dim


def attend_by_heads(q: Tensor, k: Tensor, v: Tensor, batch: int, scale: float, kept: Tensor | None = None) -> Tensor:
    """`attend` of contiguous [B * heads, N, head_dim], where B is `batch`. Returns [B, Nq, heads * head_dim]."""
    output = q.new_empty(batch, q.shape[1], len(q) // batch, q.shape[2])
    # Of one picture the products write what is returned.
    context = output[0].transpose(0, 1) if batch == 1 else torch.empty_like(q)
    for some, (halves, scores, exact) in pieces(q, k):
        probabilities = halves if kept is None else part(kept, some)
        exact_product(part(q, some), part(k, some).transpose(1, 2), scale, probabilities, out=scores)
        torch.softmax(scores, -1, out=exact)  # in place it takes a quarter longer
        torch.bmm(probabilities.copy_(exact), part(v, some), out=part(context, some))
    if batch != 1:
        output.copy_(context.view(batch, -1, *q.shape[1:]).transpose(1, 2))
    return output.flatten(2)


def grads_by_heads(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, kept: Tensor | None, grads: Sequence[Tensor]
) -> None:
    """Backward of `attend_by_heads` for the gradient g: writes `grads`, those of q, k and v."""
    grad_q, grad_k, grad_v = grads
    for some, (halves, probabilities, scores) in pieces(q, k):
        some_q, some_k, some_v, some_g = (part(x, some) for x in (q, k, v, g))
        exact_product(some_g, some_v.transpose(1, 2), 1.0, halves, out=scores)
        if kept is None:
            exact_product(some_q, some_k.transpose(1, 2), scale, halves, out=probabilities)
            rounded = halves.copy_(torch.softmax(probabilities, -1, out=probabilities))
        else:
            rounded = part(kept, some)
            probabilities.copy_(rounded)
        torch.bmm(rounded.transpose(1, 2), some_g, out=part(grad_v, some))
        # From the gradient of the probabilities to that of the scores, which is a difference: in float32.
        torch._softmax_backward_data(scores, probabilities, -1, torch.float32, grad_input=scores)
        halves.copy_(scores)
        some_grad_q, some_grad_k = part(grad_q, some), part(grad_k, some)
        torch.baddbmm(some_grad_q, halves, some_k, beta=0, alpha=scale, out=some_grad_q)
        torch.baddbmm(some_grad_k, halves.transpose(1, 2), some_q, beta=0, alpha=scale, out=some_grad_k)


class Attention(torch.autograd.Function):
    """`attention` with derivatives. Few keys: the probabilities are kept. Many: backward computes them again.

    Autocast does not reach functions that are told where their result goes, which is how all of it is computed.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, queries, heads, head_dim = query.shape
        kept = None
        if keeps_probabilities(key.shape[1], head_dim):
            kept = query.new_empty(batch * heads, queries, key.shape[1])
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, kept)
        return attend(query, key, value, scale, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        query, key, value, kept = ctx.saved_tensors
        q, k, v, g = (by_heads(x) for x in (query, key, value, grad.unflatten(-1, query.shape[2:])))
        grads = [torch.empty_like(x) for x in (q, k, v)]
        grads_by_heads(g, q, k, v, ctx.scale, kept, grads)
        return *(by_tokens(x, like) for x, like in zip(grads, (query, key, value), strict=True)), None
