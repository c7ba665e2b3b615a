"""How close do LayerNorm, residual add + LayerNorm, LayerNorm + GELU and bias + GELU come to the speed of a copy?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.benchmarks.cases import Cost, Operation, Shape
from fastvit.ops import reference

EPS = 1e-6
# FLOPs per element, roughly: two sums, center, square, scale, shift; a GELU. Memory bandwidth decides, not these.
NORM, GELU = 8, 20
TARGETS = {"forward": {"of_floor": 0.9}, "backward": {"of_floor": 0.8}}


def draw_inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, names: tuple[str, ...], width: int = 1
) -> dict[str, Any]:
    """Draws tensors of [batch, tokens, width * hidden] and parameters `weight` and `bias`."""
    dim = width * shape.hidden
    inputs = {}
    for name in names:
        is_parameter = name in ("weight", "bias")
        random = torch.randn(dim if is_parameter else (shape.batch, shape.tokens, dim), dtype=dtype, device=device)
        inputs[name] = ((0.1 * random if is_parameter else random) + (name == "weight")).requires_grad_()
    return inputs


def make_cost(flops: int, forward: int, backward: int, width: int = 1) -> Callable[[Shape, int], dict[str, Cost]]:
    """Returns the cost function; forward, backward: tensors that are read or written; flops: of forward per element."""

    def cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
        size = width * shape.rows * shape.hidden
        return {
            "forward": Cost(flops * size, forward * size * itemsize),
            "backward": Cost(2 * flops * size, backward * size * itemsize),
        }

    return cost


layer_norm = Operation(
    "layer_norm",
    setup=partial(draw_inputs, names=("x", "weight", "bias")),
    definition=lambda x, weight, bias: reference.layer_norm(x, weight, bias, EPS),
    cost=make_cost(NORM, 2, 3),  # x, y; grad_y, x, grad_x
)
add_layer_norm = Operation(
    "add_layer_norm",
    setup=partial(draw_inputs, names=("x", "residual", "weight", "bias")),
    definition=lambda x, residual, weight, bias: reference.add_layer_norm(x, residual, weight, bias, EPS),
    cost=make_cost(NORM + 1, 4, 4),  # x, residual, their sum, y; grad_y, grad_sum, sum, grad_x
)
layer_norm_act = Operation(
    "layer_norm_act",
    setup=partial(draw_inputs, names=("x", "weight", "bias")),
    definition=lambda x, weight, bias: reference.layer_norm_act(x, weight, bias, EPS),
    cost=make_cost(NORM + GELU, 2, 3),
)
bias_gelu = Operation(  # as wide as in a feed-forward
    "bias_gelu",
    setup=partial(draw_inputs, names=("x", "bias"), width=4),
    definition=reference.bias_gelu,
    cost=make_cost(GELU, 2, 3, width=4),
)
OPERATIONS = (layer_norm, add_layer_norm, layer_norm_act, bias_gelu)


@layer_norm.provider("fastvit", kernel="layer_norm")
def our_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(x, weight, bias, EPS)


@layer_norm.provider("PyTorch")
def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


@layer_norm.provider("Liger-Kernel", needs=("liger_kernel",), devices=("cuda",))
def liger_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS)


@add_layer_norm.provider("fastvit", kernel="add_layer_norm")
def our_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(x, residual, weight, bias, EPS)


@add_layer_norm.provider("PyTorch")
def torch_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return summed, torch_norm(summed, weight, bias)


@add_layer_norm.provider("Liger-Kernel", needs=("liger_kernel",), devices=("cuda",))
def liger_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return summed, liger_norm(summed, weight, bias)


@layer_norm_act.provider("fastvit", kernel="layer_norm_act")
def our_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm_act(x, weight, bias, EPS, "gelu")


@layer_norm_act.provider("PyTorch")
def torch_norm_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(torch_norm(x, weight, bias))


@bias_gelu.provider("fastvit", kernel="bias_gelu")
def our_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return ops.bias_gelu(x, bias)


@bias_gelu.provider("PyTorch")
def torch_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


for operation in OPERATIONS:
    operation.targets = TARGETS
    operation.add_compiled("PyTorch")
