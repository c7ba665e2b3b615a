"""A checkpoint in memory, independent of its format, and validation of the names, shapes and dtypes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTConfig

from fastvit.checkpoints.configuration import make_pair
from fastvit.checkpoints.names import CLASSIFIER, POOLER, Format, Parameter, Sizes, group_by_name, list_parameters
from fastvit.errors import InputError, escape_unprintable

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A Vision Transformer read from any format.

    Attributes:
        config: The config as transformers would read it.
        state_dict: Tensors under the names of ViTForImageClassification if there is a classifier, else of ViTModel.
        image_mean: Mean of each channel, for pixels in [0, 1].
        image_std: Standard deviation of each channel.
        image_size: (height, width) to which images are resized.
        resample: The filter, a PIL.Image.Resampling number.
        source_format: The format that the checkpoint was read from.
    """

    config: ViTConfig
    state_dict: dict[str, Tensor]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    image_size: tuple[int, int]
    resample: int
    source_format: Format


def list_checkpoint_parameters(checkpoint: Checkpoint) -> list[Parameter]:
    """Lists the parameters of a checkpoint with their names in every format."""
    classifier = CLASSIFIER[0].hf in checkpoint.state_dict
    return list_parameters(
        checkpoint.config.num_hidden_layers,
        qkv_bias=checkpoint.config.qkv_bias,
        pooler=POOLER[0].hf in checkpoint.state_dict,
        classifier=classifier,
        prefix="vit." if classifier else "",
    )


def compute_sizes(config: ViTConfig) -> Sizes:
    """Returns the size of each shape symbol (see `names`) according to a config."""
    patch_height, patch_width = make_pair(config.patch_size)
    height, width = make_pair(config.image_size)
    sizes: Sizes = {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "C": config.num_channels,
        "h": patch_height,
        "w": patch_width,
        "O": config.pooler_output_size or config.hidden_size,
    }
    tokens = (height // patch_height) * (width // patch_width) + 1
    return {**sizes, "L": config.num_labels or 0, "K": sizes["D"] // sizes["H"], "N": tokens}


def check_tensors(
    tensors: Mapping[str, Tensor], rows: Sequence[Parameter], fmt: Format, sizes: Sizes, source: Path
) -> Sizes:
    """Checks that a checkpoint holds exactly the expected tensors, with matching shapes and floating point dtypes.

    Args:
        tensors: The tensors by their names in `fmt`.
        rows: The parameters of the model.
        fmt: The format of the names.
        sizes: Known sizes of shape symbols. Other symbols get their size from the first tensor that has them.
        source: The file or folder, for error messages.

    Returns:
        The size of each symbol of the shapes.

    Raises:
        InputError: If a tensor is missing, unexpected, or of another shape or dtype.
    """
    groups = group_by_name(rows, fmt)
    sizes = {"1": 1, **sizes}
    for name, group in groups.items():
        symbols = (group[0].npz_shape if fmt == "npz" else group[0].shape).split()
        if name in tensors and tensors[name].ndim == len(symbols):
            for symbol, size in zip(symbols, tensors[name].shape, strict=True):
                sizes.setdefault(symbol, size)
        expected = [sizes.get(symbol, symbol) for symbol in symbols]
        if len(group) > 1:
            expected[0] = len(group) * sizes["D"]
        shape = "[" + ", ".join(map(str, expected)) + "]"
        if name not in tensors:
            others = [escape_unprintable(found) for found in tensors if found.endswith(f".{name}")]
            hint = (
                f", found {', '.join(others[:3])}; save the weights of one model, without its prefix" if others else ""
            )
            raise InputError(f"{source}: tensor {name} is missing: expected shape {shape}{hint}")
        found = list(tensors[name].shape)
        if found != expected or 0 in found:
            raise InputError(f"{source}: tensor {name}: expected shape {shape}, found {found}")
        if tensors[name].dtype not in DTYPES:
            raise InputError(f"{source}: tensor {name}: expected floating point weights, found {tensors[name].dtype}")
    for name in tensors:
        if name not in groups:
            found = list(tensors[name].shape)
            raise InputError(
                f"{source}: tensor {name} of shape {found} is unexpected: this model has no such parameter"
            )
    return sizes
