"""Is attention over a few hundred tokens faster than each backend of scaled_dot_product_attention, called by name?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import ops
from fastvit.benchmarks.cases import Cost, Operation, Shape
from fastvit.ops import reference

# Query, key and value from one fused projection, one tensor with one gradient; or three tensors.
PACKED, SEPARATE = "packed qkv", "separate q k v"


def setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    size = (shape.batch, shape.tokens, shape.heads, shape.hidden // shape.heads)
    if shape.variant == PACKED:
        qkv = torch.randn(*size[:2], 3, *size[2:], dtype=dtype, device=device).requires_grad_()
        return {"qkv": qkv}
    return {"qkv": tuple(torch.randn(size, dtype=dtype, device=device).requires_grad_() for _ in range(3))}


def split_qkv(qkv: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns query, key and value, each [batch, tokens, heads, head_dim]."""
    return qkv.unbind(2) if isinstance(qkv, Tensor) else qkv


def cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    matmul = 2 * shape.batch * shape.hidden * shape.tokens**2  # all heads: queries x keys x head_dim
    tensor = shape.rows * shape.hidden * itemsize
    return {
        "forward": Cost(2 * matmul, 4 * tensor),  # q, k, v, out
        "backward": Cost(5 * matmul, 8 * tensor),  # q, k, v, out, grad_out, three gradients
    }


attention = Operation(
    "attention",
    setup=setup,
    definition=lambda qkv: reference.attention(*split_qkv(qkv)),
    cost=cost,
    variants=(PACKED, SEPARATE),
)
attention.baseline = "PyTorch SDPA math"
attention.targets = {"forward": {"speed_up": 1.3, "of_floor": 0.65}, "backward": {"speed_up": 1.3}}


@attention.provider("fastvit", kernel="attention")
def ours(qkv: Tensor | Sequence[Tensor]) -> Tensor:
    return ops.attention_packed(qkv) if isinstance(qkv, Tensor) else ops.attention(*qkv)


def sdpa(qkv: Tensor | Sequence[Tensor]) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in split_qkv(qkv))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def add_backend(name: str, backend: SDPBackend, devices: tuple[str, ...] = ("cpu", "cuda")) -> None:
    @attention.provider(f"PyTorch SDPA {name}", devices=devices)
    def pinned(qkv: Tensor | Sequence[Tensor]) -> Tensor:
        with sdpa_kernel(backend):  # chooses backward, too
            return sdpa(qkv)


add_backend("math", SDPBackend.MATH)
add_backend("flash", SDPBackend.FLASH_ATTENTION)
add_backend("cuDNN", SDPBackend.CUDNN_ATTENTION, ("cuda",))
add_backend("efficient", SDPBackend.EFFICIENT_ATTENTION, ("cuda",))


@attention.provider("flash-attn", needs=("flash_attn",), devices=("cuda",))
def flash_attn(qkv: Tensor | Sequence[Tensor]) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func

    packed = isinstance(qkv, Tensor)
    return (flash_attn_qkvpacked_func(qkv) if packed else flash_attn_func(*qkv)).flatten(2)


@attention.provider("PyTorch")
def write_out(qkv: Tensor | Sequence[Tensor]) -> Tensor:
    """Separate matmuls and softmax, for compilers to fuse."""
    query, key, value = (tensor.transpose(1, 2) for tensor in split_qkv(qkv))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


attention.add_compiled("PyTorch")

OPERATIONS = (attention,)
