"""Hugging Face folders: config.json (model_type "vit"), weights and preprocessor_config.json."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import ViTConfig

from fastvit.checkpoints.checkpoint import Checkpoint, check_tensors, compute_sizes
from fastvit.checkpoints.configuration import format_value, parse_config, read_json
from fastvit.checkpoints.images import ImageSettings, parse_image_settings
from fastvit.checkpoints.names import CLASSIFIER, EMBEDDINGS, POOLER, contains_any, list_parameters
from fastvit.checkpoints.tensors import read_weights, save_tensors
from fastvit.errors import InputError


def read_hf(source: Path, config_json: dict[str, Any]) -> Checkpoint:
    """Reads a Hugging Face folder, whose config.json has been read already."""
    model_type = config_json.get("model_type")
    if model_type != "vit":
        raise InputError(
            f'{source / "config.json"}: expected model_type "vit" or a timm "architecture",'
            f" got {format_value(model_type)}"
        )
    config = parse_config(config_json, source / "config.json")
    sizes = compute_sizes(config)
    tensors = read_weights(source)
    classifier = contains_any(tensors, CLASSIFIER, "hf")
    prefix = "vit." if "vit." + EMBEDDINGS[0].hf in tensors or classifier else ""
    parts = {
        "qkv_bias": config.qkv_bias,
        # transformers has no model with both a classifier and a pooler: the pooler is reported as unexpected.
        "pooler": not classifier and any(prefix + row.hf in tensors for row in POOLER),
        "classifier": classifier,
    }
    depth = config.num_hidden_layers
    if depth > len(tensors):
        raise InputError(
            f"{source}: num_hidden_layers: expected at most {len(tensors)}, the number of tensors, got {depth}"
        )
    rows = list_parameters(depth, **parts, prefix=prefix)
    check_tensors(tensors, rows, "hf", sizes, source)
    # A classification model saved without a classifier becomes a ViTModel, whose names have no prefix.
    target = list_parameters(depth, **parts, prefix="vit." if classifier else "")
    state_dict = {new.hf: tensors[old.hf] for new, old in zip(target, rows, strict=True)}
    return Checkpoint(config, state_dict, *read_image_processor(source, config), source_format="hf")


def read_image_processor(source: Path, config: ViTConfig) -> ImageSettings:
    """Reads mean, std, size and filter from preprocessor_config.json; its defaults are the config's."""
    path = source / "preprocessor_config.json"
    return parse_image_settings(read_json(path) if path.is_file() else {}, config, path)


def write_hf(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a checkpoint as a new Hugging Face folder; warns if it has neither classifier nor pooler."""
    config, state_dict = checkpoint.config, checkpoint.state_dict
    classifier = CLASSIFIER[0].hf in state_dict
    if not classifier and POOLER[0].hf not in state_dict:
        warnings.warn(
            "the checkpoint has neither classifier nor pooler: transformers' ViTModel adds a randomly initialized "
            "pooler unless it is loaded with add_pooling_layer=False",
            stacklevel=2,
        )
    config.architectures = ["ViTForImageClassification" if classifier else "ViTModel"]
    config.dtype = next(iter(state_dict.values())).dtype
    folder.mkdir()
    config.save_pretrained(folder)
    save_tensors(state_dict, folder / "model.safetensors")
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": dict(zip(("height", "width"), checkpoint.image_size, strict=True)),
        "resample": checkpoint.resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(checkpoint.image_mean),
        "image_std": list(checkpoint.image_std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
