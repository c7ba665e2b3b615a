"""What is a whole block worth beside the same block op by op: attention, feed-forward, both norms, the first add?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.benchmarks.harness import Cost, Operation, Shape, as_test
from fastvit.reference import BlockWeights
from fastvit.side_by_side import joined

EPS = 1e-6


def setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    hidden, wide = shape.hidden, 4 * shape.hidden

    def random(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return (shift + scale * torch.randn(*size, dtype=dtype, device=device)).requires_grad_()

    def norm() -> tuple[Tensor, Tensor]:
        return random(hidden, scale=0.1, shift=1.0), random(hidden, scale=0.1)

    def linear(units: int, inputs: int) -> tuple[Tensor, Tensor]:
        return random(units, inputs, scale=inputs**-0.5), random(units, scale=0.1)

    attention = [linear(hidden, hidden) for _ in ("query", "key", "value", "output")]
    attention[1][1].requires_grad_(False)  # softmax does not see the key's bias: its gradient is rounding
    return {
        "x": random(shape.batch, shape.tokens, hidden),
        "residual": random(shape.batch, shape.tokens, hidden),
        "tensors": [*norm(), *sum(attention, ()), *norm(), *linear(wide, hidden), *linear(hidden, wide)],
        "heads": shape.heads,
    }


def cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    hidden = shape.hidden
    flops = 24 * shape.rows * hidden**2 + 4 * shape.rows * shape.tokens * hidden
    rows, weights = itemsize * shape.rows * hidden, itemsize * 12 * hidden**2
    return {
        "forward": Cost(flops, 4 * rows + weights),  # both inputs and both outputs
        # What was kept (ten such sets of rows), both gradients coming and going; weights and their gradients.
        "backward": Cost(2 * flops, 14 * rows + 2 * weights),
    }


def chain(x: Tensor, residual: Tensor, tensors: list[Tensor], heads: int) -> tuple[Tensor, Tensor]:
    weights = BlockWeights.of(tensors, EPS, EPS)
    residual = x + residual
    normed = F.layer_norm(residual, x.shape[-1:], *weights.norm_before)
    query, key, value = (
        F.linear(normed, *affine).unflatten(-1, (heads, -1)).transpose(1, 2) for affine in weights[1:4]
    )
    context = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    h = residual + F.linear(context, *weights.output)
    hidden = F.gelu(F.linear(F.layer_norm(h, x.shape[-1:], *weights.norm_after), *weights.first))
    return F.linear(hidden, *weights.second), h


transformer_block = Operation("transformer_block", setup=setup, definition=chain, cost=cost)
transformer_block.targets = {"forward": {"speed_up": 1.2}, "forward + backward": {"speed_up": 1.2}}


@transformer_block.provider("fastvit", kernel="transformer_block")
def ours(x: Tensor, residual: Tensor, tensors: list[Tensor], heads: int) -> tuple[Tensor, Tensor]:
    block = (x, residual, BlockWeights.of(tensors, EPS, EPS), heads, "gelu")
    return (ops.whole_block(*block) or ops.transformer_block)(*block)


@transformer_block.provider("fastvit in pieces", kernel="transformer_block")
def pieces(x: Tensor, residual: Tensor, tensors: list[Tensor], heads: int) -> tuple[Tensor, Tensor]:
    weights = BlockWeights.of(tensors, EPS, EPS)
    residual, qkv = ops.add_layer_norm_linear(x, residual, *weights.norm_before, *joined(weights[1:4]))
    branch = ops.linear(ops.attention_packed(qkv, num_heads=heads), *weights.output)
    linears = (*weights.first, *weights.second)
    h, branch = ops.add_layer_norm_feed_forward(branch, residual, *weights.norm_after, *linears)
    return branch, h


transformer_block.provider("PyTorch")(chain)
transformer_block.compiled("PyTorch")

OPERATIONS = (transformer_block,)

test_transformer_block = as_test(transformer_block)
