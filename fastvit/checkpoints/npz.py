"""The JAX files of the paper's authors (github.com/google-research/vision_transformer)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastvit.checkpoints.checkpoint import Checkpoint, check_tensors, compute_sizes, list_checkpoint_parameters
from fastvit.checkpoints.config_inference import (
    check_writable_config,
    detect_optional_parts,
    infer_config,
    reject_unsupported_parts,
)
from fastvit.checkpoints.configuration import make_pair
from fastvit.checkpoints.names import JAX_ORDER, count_layers, list_parameters
from fastvit.checkpoints.tensors import read_arrays
from fastvit.errors import InputError

# Unsupported features, by a pattern of the array's name.
UNSUPPORTED = {
    r"^(conv_root|gn_root|block\d)/": "a convolutional stem",
    r"^MAPHead_0/": "attention pooling",
    r"^pos_embedding$|/MultiHeadDotProductAttention_0/": "big_vision's later layout",
}


def read_npz(source: Path) -> Checkpoint:
    """Reads an .npz file and infers its config."""
    tensors = read_arrays(source)
    reject_unsupported_parts(tensors, "npz", UNSUPPORTED, source)
    parts, tensors = detect_optional_parts(tensors, "npz", source)
    depth = count_layers(tensors, "npz")
    rows = list_parameters(depth, **parts, prefix="vit." if parts["classifier"] else "")
    sizes = check_tensors(tensors, rows, "npz", {}, source)
    if sizes["H"] * sizes["K"] != sizes["D"]:
        raise InputError(
            f"{source}: expected heads x head dim = hidden size, found {sizes['H']} x {sizes['K']} and {sizes['D']}"
        )

    state_dict = {}
    for row in rows:
        symbols = row.shape.split()
        order = JAX_ORDER[len(symbols)]
        jax_order_shape = [sizes[symbols[dim]] for dim in order]
        state_dict[row.hf] = tensors[row.npz].reshape(jax_order_shape).permute(*np.argsort(order).tolist())
    config = infer_config(sizes, "npz", depth, parts["qkv_bias"], None, source)
    # The authors' input pipeline resizes bilinearly and scales pixels to [-1, 1].
    half = (0.5,) * config.num_channels
    size = make_pair(config.image_size)
    return Checkpoint(config, state_dict, half, half, size, int(Image.Resampling.BILINEAR), source_format="npz")


def write_npz(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a checkpoint as an .npz file; bfloat16 becomes float32."""
    check_writable_config(checkpoint.config, "npz")
    sizes = {"1": 1, **compute_sizes(checkpoint.config)}
    arrays = {}
    for row in list_checkpoint_parameters(checkpoint):
        tensor = checkpoint.state_dict[row.hf]
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        tensor = tensor.permute(JAX_ORDER[tensor.ndim])
        arrays[row.npz] = tensor.reshape([sizes[symbol] for symbol in row.npz_shape.split()]).numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]  # no name equals an option of savez
