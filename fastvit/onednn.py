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


# Scores that are computed at a time: few enough for the cache, enough for both cores; and the fewest worth the trouble,
# in inference and in training, where backward gains more.
SCORES_AT_A_TIME, FEWEST_SCORES, FEWEST_IN_TRAINING = 2**19, 2**17, 2**16


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` computes this (shapes as there): bfloat16 of some size."""
    batch, queries, heads, _ = query.shape
    fewest = FEWEST_IN_TRAINING if torch.is_grad_enabled() else FEWEST_SCORES
    return (
        can_take(query, key)
        and query.dtype == value.dtype == torch.bfloat16
        and key.shape[-1] == value.shape[-1]
        and batch * heads * queries * key.shape[1] >= fewest
        and has_bfloat16()
    )


kept = threading.local()


def scratch_of(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    halves = torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16)
    return *halves, torch.empty(size), torch.empty(size)


def scratch(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for `size` scores: two of bfloat16, two of float32.

    What `SCORES_AT_A_TIME` needs, 6 MB, is kept for each thread: touching new memory takes longer than multiplying.
    """
    if size > SCORES_AT_A_TIME:
        return scratch_of(size)
    if not hasattr(kept, "scratch"):
        with torch.inference_mode(False):
            kept.scratch = scratch_of(SCORES_AT_A_TIME)
    return kept.scratch


def pieces(query: Tensor, key: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Some heads at a time, and the scratch for their scores, each [some of the heads, Nq, Nk].

    query: [B * heads, Nq, head_dim]; key: [B * heads, Nk, head_dim].
    """
    each = query.shape[1] * key.shape[1]
    count = min(len(query), max(1, SCORES_AT_A_TIME // each))
    buffers = [buffer[: count * each].view(count, query.shape[1], -1) for buffer in scratch(count * each)]
    for first in range(0, len(query), count):
        size = min(count, len(query) - first)
        yield slice(first, first + size), tuple(buffer[:size] for buffer in buffers)


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
    q, k, v = by_heads(query), by_heads(key), by_heads(value)
    context = torch.empty_like(q)
    for some, (rounded, rest, scores, _) in pieces(q, k):
        probabilities = rounded if kept is None else kept[some]
        exact_product(q[some], k[some].transpose(1, 2), scale, rounded, rest, out=scores)
        torch.softmax(scores, -1, out=scores)
        torch.bmm(probabilities.copy_(scores), v[some], out=context[some])
    return by_tokens(context, query).flatten(2)


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
            exact_product(g[some], v[some].transpose(1, 2), 1.0, rounded, rest, out=scores)
            if kept is None:
                exact_product(q[some], k[some].transpose(1, 2), ctx.scale, rounded, rest, out=probabilities)
                halves = rounded.copy_(torch.softmax(probabilities, -1, out=probabilities))
            else:
                halves = kept[some]
                probabilities.copy_(halves)
            torch.bmm(halves.transpose(1, 2), g[some], out=grad_v[some])
            # From the gradient of the probabilities to that of the scores, which is a difference: in float32.
            torch._softmax_backward_data(scores, probabilities, -1, torch.float32, grad_input=scores)
            rounded.copy_(scores)
            torch.baddbmm(grad_q[some], rounded, k[some], beta=0, alpha=ctx.scale, out=grad_q[some])
            torch.baddbmm(grad_k[some], rounded.transpose(1, 2), q[some], beta=0, alpha=ctx.scale, out=grad_k[some])
        return by_tokens(grad_q, query), by_tokens(grad_k, key), by_tokens(grad_v, value), None
