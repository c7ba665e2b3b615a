"""Matrix products on x86 processors by oneDNN, and attention made of them.

In float32 PyTorch takes MKL's product, which needed about twice as long on one AMD EPYC with AVX-512 and 1.0 to 1.7
times as long on another; on Intel's nobody compared them. The product is oneDNN's float32 one, no lower precision: its
error against float64 is within 1.5 times MKL's. In bfloat16 PyTorch takes oneDNN too, but with GELU and bias as passes
of their own, and attention as many small products. `torch.backends.mkldnn.flags(enabled=False)` turns all of it off.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from types import EllipsisType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastvit.watchers import is_watched


@functools.cache
def is_there() -> bool:
    """Whether this PyTorch has the product, for a processor on which it is worth taking."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, but not in tiles (AMX): those serve PyTorch's own attention well."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16")


PLAIN = (Tensor, nn.Parameter)
FEWEST_WEIGHTS, FEWEST_PRODUCTS = 2**18, 2**24  # either is enough


def can_take(x: Tensor, weight: Tensor) -> bool:
    """Whether these are plain tensors of one dtype on a CPU that has the products, and nobody watches."""
    return (
        not is_watched()
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and x.is_cpu
        and x.dtype == weight.dtype
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()  # what torch.backends.mkldnn.enabled reads, four times as fast
        and is_there()
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these tensors is oneDNN's: float32 of some size, for which a call takes longer than MKL's,
    or bfloat16 when no gradient is recorded."""
    if not can_take(x, weight) or torch.is_autocast_enabled("cpu"):
        return False
    dtype = x.dtype
    if dtype is torch.float32:
        return weight.numel() >= FEWEST_WEIGHTS or x.numel() * len(weight) >= FEWEST_PRODUCTS
    return dtype is torch.bfloat16 and not torch.is_grad_enabled() and has_bfloat16()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias and its gradients, as torch.nn.functional.linear's; by oneDNN for what it `takes`."""
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None = None) -> Tensor:
    """x @ weight^T + bias, then GELU in the form `gelu` ("none" or "tanh", as torch calls them). Not differentiable."""
    activation, algorithm = ("none", "") if gelu is None else ("gelu", gelu)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


class Linear(torch.autograd.Function):
    """`linear` with all three products by oneDNN."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # setup_context would take 40 us a call
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = linear(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def turn_off_after(error: BaseException) -> None:
    """Where oneDNN found no memory for the code of a product: PyTorch's other products from now on, with a warning.

    The error flag of its assembler is a thread's own and nothing clears it: in that thread each product of a new shape
    would fail, however much memory there is by then.
    """
    if str(error) == "could not create a primitive" and torch.backends.mkldnn.enabled:
        torch.backends.mkldnn.set_flags(False)
        warnings.warn("oneDNN is off from now on: it goes on failing after it once lacked memory", stacklevel=2)


# Scores that are computed at a time: few enough for the cache, enough for both cores. The fewest multiplications of
# queries with keys that are worth the trouble, in inference and in training, where backward gains more.
SCORES_AT_A_TIME, FEWEST_FOR_SCORES, FEWEST_IN_TRAINING = 2**19, 6 * 10**6, 2**21


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` computes this (shapes as there): bfloat16 of some size."""
    fewest = FEWEST_IN_TRAINING if torch.is_grad_enabled() else FEWEST_FOR_SCORES
    return (
        can_take(query, key)
        and query.dtype == value.dtype == torch.bfloat16
        and key.shape[-1] == value.shape[-1]
        and query.numel() * key.shape[1] >= fewest
        and has_bfloat16()
    )


Scratch = tuple[Tensor, Tensor, Tensor, Tensor]  # two of bfloat16, two of float32


class Kept(threading.local):
    """Each thread's scratch, 6 MB, and its views by shape: touching new memory takes longer than multiplying."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.memory = scratch_of(SCORES_AT_A_TIME)
        self.views: dict[tuple[int, int, int], Scratch] = {}


def scratch_of(*shape: int) -> Scratch:
    halves = torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16)
    return *halves, torch.empty(shape), torch.empty(shape)


kept: Kept | None = None


def scratch(count: int, queries: int, keys: int) -> Scratch:
    """Memory for the scores of so many heads, each [count, queries, keys]."""
    global kept
    size = count * queries * keys
    if size > SCORES_AT_A_TIME:
        return scratch_of(count, queries, keys)
    kept = kept or Kept()
    found = kept.views.get((count, queries, keys))
    if found is None:
        if len(kept.views) >= 64:  # pictures of ever new sizes
            kept.views.clear()
        with torch.inference_mode(False):
            first, second, third, fourth = (part[:size].view(count, queries, keys) for part in kept.memory)
        found = kept.views[count, queries, keys] = (first, second, third, fourth)
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


def exact_product(x: Tensor, y: Tensor, scale: float, rounded: Tensor, rest: Tensor, out: Tensor) -> Tensor:
    """x @ y * scale of bfloat16 as float32, in `out`; the others are scratch.

    A bfloat16 product is rounded, to a hundredth of a score of 4: what was rounded off is computed by a second product,
    of which oneDNN subtracts the first before it rounds. The sum of both is as good as a float32 product.
    """
    torch.baddbmm(rounded, x, y, beta=0, alpha=scale, out=rounded)
    torch.baddbmm(rounded, x, y, beta=-1, alpha=scale, out=rest)
    return out.copy_(rounded).add_(rest)


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

    PyTorch's own multiplies 64 queries of one head at a time, too little work for a call.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return Attention.apply(query, key, value, scale)
    return attend(query, key, value, scale)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, kept: Tensor | None = None) -> Tensor:
    """`attention` without derivatives; the probabilities are left in kept [B * heads, Nq, Nk], bfloat16."""
    context = attend_by_heads(by_heads(query), by_heads(key), by_heads(value), scale, kept)
    return by_tokens(context, query).flatten(2)


def attend_packed(qkv: Tensor, scale: float) -> Tensor:
    """`attend` of qkv [B, N, 3, heads, head_dim], of which one copy is made."""
    batch, tokens, _, heads, head_dim = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().view(3, batch * heads, tokens, head_dim).unbind()
    context = attend_by_heads(q, k, v, scale)
    return context.view(batch, heads, tokens, head_dim).transpose(1, 2).flatten(2)


def attend_by_heads(q: Tensor, k: Tensor, v: Tensor, scale: float, kept: Tensor | None = None) -> Tensor:
    """`attend` of contiguous [B * heads, N, head_dim], which is what it returns."""
    context = torch.empty_like(q)
    for some, (rounded, rest, scores, exact) in pieces(q, k):
        probabilities = rounded if kept is None else part(kept, some)
        exact_product(part(q, some), part(k, some).transpose(1, 2), scale, rounded, rest, out=scores)
        torch.softmax(scores, -1, out=exact)  # in place it takes a quarter longer
        torch.bmm(probabilities.copy_(exact), part(v, some), out=part(context, some))
    return context


class Attention(torch.autograd.Function):
    """`attention` with derivatives. Few keys: the probabilities are kept, where they are no larger than query, key,
    value and output together. Many: backward computes them again.

    Autocast does not reach functions that are told where their result goes, which is how all of it is computed.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        batch, queries, heads, head_dim = query.shape
        kept = None
        if key.shape[1] <= 4 * head_dim:
            kept = query.new_empty(batch * heads, queries, key.shape[1])
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, kept)
        return attend(query, key, value, scale, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        query, key, value, kept = ctx.saved_tensors
        q, k, v, g = (by_heads(x) for x in (query, key, value, grad.unflatten(-1, query.shape[2:])))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for some, (rounded, rest, probabilities, scores) in pieces(q, k):
            some_q, some_k, some_v, some_g = (part(x, some) for x in (q, k, v, g))
            exact_product(some_g, some_v.transpose(1, 2), 1.0, rounded, rest, out=scores)
            if kept is None:
                exact_product(some_q, some_k.transpose(1, 2), ctx.scale, rounded, rest, out=probabilities)
                halves = rounded.copy_(torch.softmax(probabilities, -1, out=probabilities))
            else:
                halves = part(kept, some)
                probabilities.copy_(halves)
            torch.bmm(halves.transpose(1, 2), some_g, out=part(grad_v, some))
            # From the gradient of the probabilities to that of the scores, which is a difference: in float32.
            torch._softmax_backward_data(scores, probabilities, -1, torch.float32, grad_input=scores)
            rounded.copy_(scores)
            some_grad_q, some_grad_k = part(grad_q, some), part(grad_k, some)
            torch.baddbmm(some_grad_q, rounded, some_k, beta=0, alpha=ctx.scale, out=some_grad_q)
            torch.baddbmm(some_grad_k, rounded.transpose(1, 2), some_q, beta=0, alpha=ctx.scale, out=some_grad_k)
        return by_tokens(grad_q, query), by_tokens(grad_k, key), by_tokens(grad_v, value), None
