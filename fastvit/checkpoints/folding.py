"""Reads checkpoints of other families that compute a plain Vision Transformer: DINOv2, DeiT, ViTMAE, ViTMSN.

Their blocks are those of a ViT under other names. DINOv2 also multiplies each branch by a factor per channel
(LayerScale, Touvron et al. 2021, arXiv:2103.17239). It is folded into the linear layer before it, which is exact:

    scale * (W x + b) = (scale * W) x + scale * b
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, ViTConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fastvit.checkpoints.checkpoint import Checkpoint, check_tensors, compute_sizes
from fastvit.checkpoints.configuration import check_consistency, check_stored, format_error, format_value
from fastvit.checkpoints.hugging_face import read_image_processor
from fastvit.checkpoints.images import parse_image_settings
from fastvit.checkpoints.names import CLASSIFIER, list_parameters
from fastvit.checkpoints.tensors import read_weights
from fastvit.errors import InputError

FOLDABLE = ("dinov2", "deit", "vit_mae", "vit_msn")
NO_CLASS_TOKEN = "it has no class token"
# model type -> why its weights cannot become those of a ViT.
REFUSALS = {
    "beit": "its blocks have position biases in attention, or its class token is not what classifies",
    "clip": "it has a LayerNorm before the blocks, and QuickGELU",
    "clip_vision_model": "it has a LayerNorm before the blocks, and QuickGELU",
    "dinov2_with_registers": "it has register tokens",
    "dinov3_vit": "it rotates queries and keys by position (RoPE), and has register tokens",
    "ijepa": NO_CLASS_TOKEN,
    "siglip": NO_CLASS_TOKEN,
    "siglip2": NO_CLASS_TOKEN,
    "siglip_vision_model": NO_CLASS_TOKEN,
    "yolos": "it has detection tokens",
}

# Names on the hub, and those in memory of transformers 5 -> names of a ViT on the hub. Applied in this order.
RENAMES = (
    (r"^(dinov2|deit|vit)\.", ""),
    (r"^layers\.", "encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
# Settings that have the same name in the configs of all families.
SHARED_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "initializer_range"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "id2label", "label2id"),
)
SCALED = {"layer_scale1.lambda1": "attention.output.dense", "layer_scale2.lambda1": "output.dense"}
DROPPED = r"(embeddings\.mask_token$|decoder\.|pooler\.)"  # of pre-training


def read_foldable(source: Path, config_json: Mapping[str, Any]) -> Checkpoint:
    """Reads a Hugging Face folder whose model type is in `FOLDABLE`, as a ViT.

    Raises:
        InputError: If a part of the model has no place in a ViT.
    """
    config, state_dict = fold_tensors(source, config_json, read_weights(source))
    path = source / "preprocessor_config.json"
    if path.is_file() or config.num_channels != len(IMAGENET_DEFAULT_MEAN):
        settings = read_image_processor(source, config)
    else:
        warnings.warn(
            f"{source}: no preprocessor_config.json; using ImageNet's mean and standard deviation, those of published"
            " models of its family",
            stacklevel=2,
        )
        imagenet = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
        settings = parse_image_settings(imagenet, config, path)
    return Checkpoint(config, state_dict, *settings, source_format="hf")


def fold_tensors(
    source: Path, config_json: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ViTConfig, dict[str, Tensor]]:
    """Converts the config and the tensors of a checkpoint to those of a ViT under the names of the hub.

    The classifier of a ViTMSN reads the class token, as a ViT's does, and is kept. Other classifiers are dropped with a
    warning.
    """
    config = build_vit_config(source, config_json)
    if len(tensors) < config.num_hidden_layers:
        raise InputError(
            f"{source}: num_hidden_layers: expected at most {len(tensors)}, the number of tensors, got"
            f" {config.num_hidden_layers}"
        )
    found, scales = {}, {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        block, _, part = name.partition(".layer_scale")
        if name == "embeddings.distillation_token":
            raise InputError(f"{source}: cannot be folded into a ViT: it has a distillation token")
        if part:
            scales[block, f"layer_scale{part}"] = tensor
        elif not re.match(DROPPED, name):
            found[name] = tensor
    has_classifier = CLASSIFIER[0].hf in found
    if has_classifier and config_json["model_type"] != "vit_msn":
        for row in CLASSIFIER:
            found.pop(row.hf, None)
        has_classifier = False
        warnings.warn(f"{source}: the classifier was dropped: it does not read the class token alone", stacklevel=2)
    rows = list_parameters(
        config.num_hidden_layers, qkv_bias=config.qkv_bias, pooler=False, classifier=has_classifier, prefix=""
    )
    check_tensors(found, rows, "hf", compute_sizes(config), source)
    for (block, part), scale in scales.items():
        fold_scale(source, found, f"{block}.{SCALED[part]}", scale)
    prefix = "vit." if has_classifier else ""
    names = {row.hf for row in CLASSIFIER}
    return config, {name if name in names else prefix + name: tensor for name, tensor in found.items()}


def fold_scale(source: Path, tensors: dict[str, Tensor], layer: str, scale: Tensor) -> None:
    """Multiplies the rows of a linear layer `[D, K]`, and its bias `[D]`, by `scale` `[D]`, in place of the two."""
    weight, bias = tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
    if scale.shape != bias.shape:
        raise InputError(f"{source}: LayerScale: expected shape {list(bias.shape)}, found {list(scale.shape)}")
    factors = scale.float()
    tensors[f"{layer}.weight"] = (factors[:, None] * weight.float()).to(weight.dtype)
    tensors[f"{layer}.bias"] = (factors * bias.float()).to(bias.dtype)


def build_vit_config(source: Path, config_json: Mapping[str, Any]) -> ViTConfig:
    """Builds the config of the ViT that a checkpoint of another family computes."""
    where = source / "config.json"
    model_type = config_json["model_type"]
    config_class: Any = type(AutoConfig.for_model(model_type))
    check_stored(config_json, where, config_class)
    try:
        config = config_class.from_dict(dict(config_json))
        if getattr(config, "use_swiglu_ffn", False):
            raise InputError(f"{source}: cannot be folded into a ViT: its feed-forward is gated (SwiGLU)")
        settings = {name: getattr(config, name) for name in SHARED_SETTINGS}
        has_ratio = hasattr(config, "mlp_ratio")  # DINOv2
        intermediate_size = int(config.hidden_size * config.mlp_ratio) if has_ratio else config.intermediate_size
        vit = ViTConfig(**settings, intermediate_size=intermediate_size)
    except InputError:
        raise
    except Exception as error:  # the configs' own validation has no common error class
        raise InputError(f"{where}: not a valid {model_type} config: {format_error(error)}") from error
    check_consistency(vit, where)
    return vit


def check_foldable(source: Path, config_json: Mapping[str, Any]) -> None:
    """Raises InputError, with the reason, for a family whose weights cannot become those of a ViT."""
    model_type = config_json.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSALS:
        raise InputError(f"{source}: cannot be folded into a ViT: {format_value(model_type)}: {REFUSALS[model_type]}")
