"""How fast are pixels turned into tokens: normalization, projection, class token, position embedding?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit import ops
from fastvit.benchmarks.cases import Cost, Operation, Shape
from fastvit.ops import reference

PATCH = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BYTES, FLOATS = "uint8 channels last", "float32 channels first"  # from decoders; from image processors


def setup(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    side = shape.image_size
    if shape.variant == BYTES:
        pixels = torch.randint(0, 256, (shape.batch, side, side, 3), dtype=torch.uint8, device=device)
    else:
        pixels = torch.randn(shape.batch, 3, side, side, device=device)
    parameters = {
        "weight": (shape.hidden, 3, PATCH, PATCH),
        "bias": (shape.hidden,),
        "cls_token": (1, 1, shape.hidden),
        "pos_embed": (1, shape.tokens, shape.hidden),
    }
    return {"pixels": pixels} | {
        name: (0.02 * torch.randn(size, dtype=dtype, device=device)).requires_grad_()
        for name, size in parameters.items()
    }


def cost(shape: Shape, itemsize: int) -> dict[str, Cost]:
    values = 3 * PATCH * PATCH
    matmul = 2 * shape.batch * shape.patches * values * shape.hidden
    pixels = shape.batch * shape.patches * values * (1 if shape.variant == BYTES else 4)
    weight, out = values * shape.hidden * itemsize, shape.rows * shape.hidden * itemsize
    both = Cost(matmul, pixels + weight + out)  # backward reads grad_out and writes the weight's gradient
    return {"forward": both, "backward": both}


patch_embed = Operation(
    "patch_embed",
    setup=setup,
    definition=partial(reference.patch_embed, patch_size=(PATCH, PATCH), mean=MEAN, std=STD),
    cost=cost,
    variants=(BYTES, FLOATS),
)
patch_embed.targets = {"forward": {"speed_up": 1.5}}


@patch_embed.provider("fastvit", kernel="patch_embed")
def ours(pixels: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    return ops.patch_embed(pixels, weight, bias, cls_token, pos_embed, patch_size=(PATCH, PATCH), mean=MEAN, std=STD)


@patch_embed.provider("PyTorch")
def pytorch(pixels: Tensor, weight: Tensor, bias: Tensor, cls_token: Tensor, pos_embed: Tensor) -> Tensor:
    """The usual code of ViTs; uint8 pixels are scaled and normalized on the device first."""
    if pixels.dtype == torch.uint8:
        pixels = reference.normalize_pixels(pixels.permute(0, 3, 1, 2), MEAN, STD, torch.float32)
    tokens = F.conv2d(pixels.to(weight.dtype), weight, bias, stride=PATCH).flatten(2).transpose(1, 2)
    return torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + pos_embed


patch_embed.add_compiled("PyTorch")

OPERATIONS = (patch_embed,)
