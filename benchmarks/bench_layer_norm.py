"""How close do LayerNorm, residual add + LayerNorm, LayerNorm + GELU and bias + GELU come to the speed of a copy?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.benchmarks.cases import Cost, Operation, Shape
from fastvit.ops import reference

EPS = 1e-6
ARITHMETIC = 8  # FLOPs per element, roughly: two sums, center, square, scale, shift. Memory bandwidth decides
GELU = 20  # the same for the activation


def draw_parameters(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    weight = 1 + 0.1 * torch.randn(shape.hidden, dtype=dtype, device=device)
    bias = 0.1 * torch.randn(shape.hidden, dtype=dtype, device=device)
    return {"weight": weight.requires_grad_(), "bias": bias.requires_grad_()}


def draw_tokens(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape.batch, shape.tokens, shape.hidden, dtype=dtype, device=device).requires_grad_()


def setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"x": draw_tokens(shape, dtype, device), **draw_parameters(shape, dtype, device)}


def cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    row_set = shape.rows * shape.hidden
    return {
        "forward": Cost(ARITHMETIC * row_set, 2 * row_set * itemsize),  # x, y
        "backward": Cost(2 * ARITHMETIC * row_set, 3 * row_set * itemsize),  # grad_y, x, grad_x
    }


layer_norm = Operation(
    "layer_norm",
    setup=setup,
    definition=lambda x, weight, bias: reference.layer_norm(x, weight, bias, EPS),
    cost=cost,
)
layer_norm.targets = {"forward": {"of_floor": 0.9}, "backward": {"of_floor": 0.8}}


@layer_norm.provider("fastvit", kernel="layer_norm")
def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm(x, weight, bias, EPS)


@layer_norm.provider("PyTorch")
def pytorch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


@layer_norm.provider("Liger-Kernel", needs=("liger_kernel",), devices=("cuda",))
def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS)


layer_norm.add_compiled("PyTorch")


def add_setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {"residual": draw_tokens(shape, dtype, device), **setup(shape, dtype, device)}


def add_cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    row_set = shape.rows * shape.hidden
    return {
        "forward": Cost((ARITHMETIC + 1) * row_set, 4 * row_set * itemsize),  # x, residual, their sum, y
        "backward": Cost(2 * ARITHMETIC * row_set, 4 * row_set * itemsize),  # grad_y, grad_sum, sum, grad_x
    }


add_layer_norm = Operation(
    "add_layer_norm",
    setup=add_setup,
    definition=lambda x, residual, weight, bias: reference.add_layer_norm(x, residual, weight, bias, EPS),
    cost=add_cost,
)
add_layer_norm.targets = layer_norm.targets


@add_layer_norm.provider("fastvit", kernel="add_layer_norm")
def our_sum(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(x, residual, weight, bias, EPS)


@add_layer_norm.provider("PyTorch")
def pytorch_sum(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return summed, F.layer_norm(summed, weight.shape, weight, bias, EPS)


@add_layer_norm.provider("Liger-Kernel", needs=("liger_kernel",), devices=("cuda",))
def liger_sum(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    summed = x + residual
    return summed, LigerLayerNormFunction.apply(summed, weight, bias, EPS)


add_layer_norm.add_compiled("PyTorch")

layer_norm_act = Operation(
    "layer_norm_act",
    setup=setup,
    definition=lambda x, weight, bias: reference.layer_norm_act(x, weight, bias, EPS),
    cost=lambda shape, itemsize: {
        name: part._replace(flops=part.flops + GELU * shape.rows * shape.hidden)
        for name, part in cost(shape, itemsize).items()
    },
)
layer_norm_act.targets = layer_norm.targets


@layer_norm_act.provider("fastvit", kernel="layer_norm_act")
def our_activation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm_act(x, weight, bias, EPS, "gelu")


@layer_norm_act.provider("PyTorch")
def pytorch_activation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x, weight.shape, weight, bias, EPS))


layer_norm_act.add_compiled("PyTorch")


def wide_setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    wide = 4 * shape.hidden  # as in a feed-forward
    x = torch.randn(shape.batch, shape.tokens, wide, dtype=dtype, device=device)
    return {"x": x.requires_grad_(), "bias": (0.1 * torch.randn(wide, dtype=dtype, device=device)).requires_grad_()}


def wide_cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    row_set = 4 * shape.rows * shape.hidden
    return {
        "forward": Cost(GELU * row_set, 2 * row_set * itemsize),  # x, y
        "backward": Cost(2 * GELU * row_set, 3 * row_set * itemsize),  # grad_y, x, grad_x
    }


bias_gelu = Operation("bias_gelu", setup=wide_setup, definition=reference.bias_gelu, cost=wide_cost)
bias_gelu.targets = layer_norm.targets


@bias_gelu.provider("fastvit", kernel="bias_gelu")
def our_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return ops.bias_gelu(x, bias)


@bias_gelu.provider("PyTorch")
def pytorch_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


bias_gelu.add_compiled("PyTorch")

OPERATIONS = (layer_norm, add_layer_norm, layer_norm_act, bias_gelu)
