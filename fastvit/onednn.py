"""Matrix products on x86 processors by oneDNN, and attention made of them.

In float32 PyTorch takes MKL's product, which needed about twice as long on an AMD EPYC with AVX-512; on Intel's nobody
compared them. The product is oneDNN's float32 one, no lower precision (error against float64 within 1.5 times
MKL's). In bfloat16 PyTorch takes oneDNN too, but with GELU and bias as passes of their own, and attention as many small
products. `torch.backends.mkldnn.flags(enabled=False)` turns all of it off.
"""

from __future__ import annotations

import functools
import threading
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these tensors is oneDNN's: plain tensors on the CPU, and nobody traces.

    They are float32, or bfloat16 when no gradient is recorded.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and has_bfloat16()))
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and is_there()
    )


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
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

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


# Scores that are computed at a time: few enough for the cache, enough for both cores; and the fewest worth the trouble.
SCORES_AT_A_TIME, FEWEST_SCORES = 2**19, 2**18


def attends(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` computes this (shapes as there): bfloat16 inference of some size."""
    batch, queries, heads, _ = query.shape
    return (
        query.dtype == value.dtype == torch.bfloat16
        and takes(query, key)
        and key.shape[-1] == value.shape[-1]
        and batch * heads * queries * key.shape[1] >= FEWEST_SCORES
    )


kept = threading.local()


def scratch_of(size: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16), torch.empty(size)


def scratch(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for `size` scores: two of bfloat16, one of float32.

    What `SCORES_AT_A_TIME` needs, 4 MB, is kept for each thread: touching new memory takes longer than multiplying.
    """
    if size > SCORES_AT_A_TIME:
        return scratch_of(size)
    if not hasattr(kept, "scratch"):
        with torch.inference_mode(False):
            kept.scratch = scratch_of(SCORES_AT_A_TIME)
    return kept.scratch


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(query key^T * scale) value, many heads a product. Not differentiable.

    query: [B, Nq, heads, head_dim]; key, value: [B, Nk, heads, head_dim]; bfloat16. scale: 1 / sqrt(head_dim) if None.
    Returns [B, Nq, heads * head_dim].

    PyTorch's own multiplies 64 queries of one head at a time, too little work for a call. A bfloat16 product rounds the
    scores, to a hundredth of a score of 4: what it rounded off is computed by a second product, of which oneDNN
    subtracts the first before it rounds. The sum of both is as good as a float32 score.
    """
    batch, queries, heads, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2).reshape(batch * heads, -1, head_dim) for x in (query, key, value))
    key = key.transpose(1, 2)
    context = torch.empty_like(query)
    count = min(len(query), max(1, SCORES_AT_A_TIME // (queries * key.shape[-1])))
    rounded, rest, exact = (
        buffer[: count * queries * key.shape[-1]].view(count, queries, -1)
        for buffer in scratch(count * queries * key.shape[-1])
    )
    for first in range(0, len(query), count):
        part = slice(first, first + count)
        size = len(query[part])
        scores, probabilities = exact[:size], rounded[:size]
        torch.baddbmm(rounded[:size], query[part], key[part], beta=0, alpha=scale, out=rounded[:size])
        torch.baddbmm(rounded[:size], query[part], key[part], beta=-1, alpha=scale, out=rest[:size])
        torch.softmax(scores.copy_(rounded[:size]).add_(rest[:size]), -1, out=scores)
        torch.bmm(probabilities.copy_(scores), value[part], out=context[part])
    return context.view(batch, heads, queries, head_dim).transpose(1, 2).flatten(2)
