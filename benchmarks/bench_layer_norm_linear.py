"""What do LayerNorm and GELU cost beside the matmul between them, the first half of the feed-forward?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.benchmarks.cases import Cost, Operation, Shape

EPS = 1e-6


def setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    hidden, wide = shape.hidden, 4 * shape.hidden
    random = {
        "x": torch.randn(shape.batch, shape.tokens, hidden, dtype=dtype, device=device),
        "norm_weight": 1 + 0.1 * torch.randn(hidden, dtype=dtype, device=device),
        "norm_bias": 0.1 * torch.randn(hidden, dtype=dtype, device=device),
        "weight": hidden**-0.5 * torch.randn(wide, hidden, dtype=dtype, device=device),
        "bias": 0.1 * torch.randn(wide, dtype=dtype, device=device),
    }
    return {name: tensor.requires_grad_() for name, tensor in random.items()}


def cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    hidden, wide = shape.hidden, 4 * shape.hidden
    matmul = 2 * shape.rows * hidden * wide
    x, weight, out = (itemsize * count for count in (shape.rows * hidden, hidden * wide, shape.rows * wide))
    return {
        "forward": Cost(matmul, x + weight + out),
        # x, weight, grad_out and GELU's input; gradients of x and weight
        "backward": Cost(2 * matmul, 2 * x + 2 * weight + 2 * out),
    }


def chain(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, EPS), weight, bias))


layer_norm_gelu = Operation("layer_norm_gelu", setup=setup, definition=chain, cost=cost)
layer_norm_gelu.targets = {"forward": {"speed_up": 1.15}, "forward + backward": {"speed_up": 1.1}}


@layer_norm_gelu.provider("fastvit", kernel="layer_norm_gelu")
def ours(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.layer_norm_gelu(x, norm_weight, norm_bias, EPS, weight, bias, "gelu")


def add_candidate(name: str, number: int) -> None:
    """Registers one of the candidates of the tuner."""

    @layer_norm_gelu.provider(f"fastvit {name}", devices=("cuda",), kernel="layer_norm_gelu")
    def candidate(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from fastvit.kernels import layer_norm_linear, tuning

        if number >= len(tuning.find_candidates("linear_forward", "", x.dtype, x.device)):
            raise RuntimeError(f"no {name} matmul for {x.dtype} on this GPU")
        return layer_norm_linear.layer_norm_gelu(x, norm_weight, norm_bias, EPS, weight, bias, candidate=number)


for number, name in enumerate(("cuBLAS", "fused", "persistent")):
    add_candidate(name, number)

layer_norm_gelu.provider("PyTorch")(chain)
layer_norm_gelu.add_compiled("PyTorch")

OPERATIONS = (layer_norm_gelu,)
