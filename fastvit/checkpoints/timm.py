"""VisionTransformers of the timm library: a file of tensors, or a folder as on the hub."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ViTConfig

from fastvit.checkpoints.checkpoint import Checkpoint, check_tensors, list_checkpoint_parameters
from fastvit.checkpoints.config_inference import (
    check_writable_config,
    detect_optional_parts,
    infer_config,
    reject_unsupported_parts,
)
from fastvit.checkpoints.configuration import format_value, is_integer
from fastvit.checkpoints.images import ImageSettings, check_image_settings
from fastvit.checkpoints.names import EMBEDDINGS, count_layers, group_by_name, list_parameters
from fastvit.checkpoints.tensors import save_tensors
from fastvit.errors import InputError

# Number of heads by architecture, else by hidden size: of the models with a class token in timm 1.0. The head dim is 64
# up to hidden size 1024, but not in so400m (1152), huge, giant and gigantic.
TIMM_HEADS_BY_ARCHITECTURE = {"test_vit": 2}
TIMM_HEADS_BY_HIDDEN_SIZE = {
    **{size: size // 64 for size in (192, 256, 320, 384, 512, 640, 768, 832, 896, 1024, 1536)},
    **dict.fromkeys((1152, 1280, 1408, 1664), 16),
}

# Unsupported features, by a pattern of the tensor's name.
UNSUPPORTED = {
    r"\bls[12]\.gamma|\bgamma_[12]$": "LayerScale",
    r"\b[qk]_norm\.": "query and key normalisation",
    r"^fc_norm\.": "global pooling (fc_norm)",
    r"^attn_pool\.": "attention pooling",
    r"^reg_token$": "register tokens",
    r"^(dist_token$|head_dist\.)": "a distillation token",
    r"^norm_pre\.": "a norm before the blocks (pre-norm)",
    r"\bmlp\.(fc1_[gx]|w12|w[123])\.": "a SwiGLU feed-forward",
    r"^patch_embed\.backbone\.": "a convolutional stem",
}
# Options of a timm config.json that change the outputs but not the tensors, and their supported values.
TIMM_DEFAULTS = {
    "act_layer": ("gelu",), "norm_layer": ("layernorm",), "pos_embed": ("learn",), "global_pool": ("", "token"),
    "no_embed_class": (False,), "final_norm": (True,),
}  # fmt: skip


def read_timm(source: Path, tensors: dict[str, Tensor], config_json: dict, num_heads: int | None) -> Checkpoint:
    """Builds a checkpoint from the tensors of a timm model and its config.json, or whatever options are known of it."""
    if any(name.removeprefix("vit.") == EMBEDDINGS[0].hf for name in tensors):
        raise InputError(
            f"{source}: expected timm names, found Hugging Face names: pass the folder with their config.json"
        )
    reject_unsupported_parts(tensors, "timm", UNSUPPORTED, source)
    options = merge_timm_options(config_json, source)
    parts, tensors = detect_optional_parts(tensors, "timm", source)
    reject_gated_mlp(tensors, source)
    depth = count_layers(tensors, "timm")
    rows = list_parameters(depth, **parts, prefix="vit." if parts["classifier"] else "")
    known = {"L": options["num_classes"]} if parts["classifier"] and options.get("num_classes") else {}
    sizes = check_tensors(tensors, rows, "timm", known, source)
    sizes["H"] = options.get("num_heads") or num_heads or infer_timm_heads(sizes["D"], options, source)
    if sizes["H"] < 1 or sizes["D"] % sizes["H"]:
        raise InputError(f"num_heads: expected a divisor of the hidden size {sizes['D']}, got {sizes['H']}")

    state_dict: dict[str, Tensor] = {}
    for name, group in group_by_name(rows, "timm").items():
        state_dict.update(zip((row.hf for row in group), tensors[name].chunk(len(group)), strict=True))
    labels = read_timm_labels(options, sizes.get("L"), source)
    config = infer_config(sizes, "timm", depth, parts["qkv_bias"], labels, source)
    settings = read_timm_image_settings(options, config, parts["classifier"], source)
    return Checkpoint(config, state_dict, *settings, source_format="timm")


def reject_gated_mlp(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raises InputError for a packed SwiGLU, where fc1 has twice the features that fc2 expects."""
    first, second = tensors.get("blocks.0.mlp.fc1.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    if first is not None and second is not None and first.shape[:1] == (2 * second.shape[-1],):
        raise InputError(
            f"{source}: blocks.0.mlp.fc1.weight {list(first.shape)} with fc2 {list(second.shape)}: "
            "a SwiGLU feed-forward is not supported by this model"
        )


def merge_timm_options(config_json: dict[str, Any], source: Path) -> dict[str, Any]:
    """Merges the three levels of a timm config.json; raises InputError for unsupported options."""
    levels = [config_json, *(config_json.get(level) or {} for level in ("pretrained_cfg", "model_args"))]
    if not all(isinstance(level, dict) for level in levels):
        raise InputError(f"{source / 'config.json'}: expected pretrained_cfg and model_args to be JSON objects")
    options = {key: value for level in levels for key, value in level.items()}
    for key in ("num_classes", "label_names", "global_pool"):  # timm prefers the top level for these
        options.update({key: config_json[key]} if key in config_json else {})
    for key, accepted in TIMM_DEFAULTS.items():
        if options.get(key) not in (None, *accepted):
            raise InputError(
                f"{source / 'config.json'}: {key}: expected {accepted[-1]!r}, got {format_value(options[key])}"
            )
    for key in ("num_classes", "num_heads"):
        if options.get(key) is not None and not (is_integer(options[key]) and options[key] >= 0):
            raise InputError(
                f"{source / 'config.json'}: {key}: expected a whole number, got {format_value(options[key])}"
            )
    return options


def infer_timm_heads(hidden_size: int, options: dict[str, Any], source: Path) -> int:
    """Returns the number of heads of timm's models of this architecture, else of this hidden size."""
    heads = TIMM_HEADS_BY_ARCHITECTURE.get(str(options.get("architecture"))) or TIMM_HEADS_BY_HIDDEN_SIZE.get(
        hidden_size
    )
    if heads is None:
        usual = f", or {hidden_size // 64} if the head dim is the usual 64" if hidden_size % 64 == 0 else ""
        raise InputError(
            f"num_heads: expected the number of heads (--heads) that the model was trained with{usual}: {source} does"
            f" not record it, and timm has no model of hidden size {hidden_size}"
        )
    return heads


def read_timm_labels(options: dict[str, Any], num_labels: int | None, source: Path) -> list[str] | None:
    """Returns the names of the labels; None, with a warning, if their number differs from `num_labels`."""
    names = options.get("label_names")
    if not names or num_labels is None:
        return None
    if isinstance(names, dict):
        names = [names.get(str(index)) for index in range(len(names))]
    if not isinstance(names, list):
        raise InputError(f"{source / 'config.json'}: label_names: expected a list of names, got {format_value(names)}")
    if len(names) != num_labels or not all(isinstance(name, str) for name in names):
        warnings.warn(f"{source}: label_names ignored: expected {num_labels} names, got {len(names)}", stacklevel=2)
        return None
    return list(names)


def read_timm_image_settings(options: dict, config: ViTConfig, is_classifier: bool, source: Path) -> ImageSettings:
    """Returns mean, std, size and filter; warns about what is not recorded, or is lost."""
    mean, std = options.get("mean"), options.get("std")
    unknown = {}
    if mean is None or std is None:
        unknown["mean and std of its images"] = "0.5"
        mean = std = [0.5] * config.num_channels
    if is_classifier and not {"architecture", "global_pool"} & options.keys():
        unknown["how it pools its tokens"] = "the class token"
    if unknown:
        names, values = " and ".join(unknown), " and ".join(unknown.values())
        warnings.warn(f"{source} does not record {names}; assumed: {values}", stacklevel=2)
    if (crop := options.get("crop_pct")) not in (None, 1):
        warnings.warn(
            f"{source}: crop_pct {format_value(crop)} cannot be recorded: whole images are resized, of which timm"
            " evaluates the middle",
            stacklevel=2,
        )
    name = options.get("interpolation") or "bicubic"
    resample = Image.Resampling.__members__.get(str(name).upper())
    if resample is None:
        raise InputError(f"{source}: interpolation: expected a Pillow filter, got {format_value(name)}")
    return check_image_settings(mean, std, config.image_size, resample, config.num_channels, source)


def write_timm(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a checkpoint as a .safetensors file with the names of timm, and its number of heads in the header.

    timm does not read the header: a warning is issued if its models of this hidden size have another number of heads.
    """
    check_writable_config(checkpoint.config, "timm")
    heads, hidden_size = checkpoint.config.num_attention_heads, checkpoint.config.hidden_size
    if TIMM_HEADS_BY_HIDDEN_SIZE.get(hidden_size) != heads:
        warnings.warn(
            f"timm does not read the number of heads from a file: build its model of hidden size {hidden_size} with"
            f" num_heads={heads}",
            stacklevel=2,
        )
    groups = group_by_name(list_checkpoint_parameters(checkpoint), "timm")
    state_dict = checkpoint.state_dict
    tensors = {name: torch.cat([state_dict[row.hf] for row in group]) for name, group in groups.items()}
    save_tensors(tensors, path, num_heads=str(heads))
