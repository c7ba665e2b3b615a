"""Validation of the config.json of a Vision Transformer.

A checkpoint may come from an untrusted source. Before transformers reads its config, and before a model is built from
it, these checks ensure that every size is a number within bounds, and that no key refers to another file, to code, or
to an attribute of the config's class.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig

from fastvit.errors import InputError

# Upper bounds of the sizes in a config.json, several times those of any published Vision Transformer (ViT-22B: hidden
# size 6,144, feed-forward 24,576, 48 blocks). `inspection` also compares the sizes with the weights; these bounds apply
# before any file of weights is read, and to new parameters.
SIZE_LIMITS = {
    "hidden_size": 2**16,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "intermediate_size": 2**18,
    "image_size": 2**16,
    "patch_size": 2**12,
    "num_channels": 2**12,
    "encoder_stride": 2**8,
    "pooler_output_size": 2**16,
    "num_labels": 2**18,
    "num_register_tokens": 2**12,
    "mlp_ratio": 2**8,
}
PAIR_KEYS = ("image_size", "patch_size")  # one number, or (height, width)
NULLABLE_KEYS = ("pooler_output_size", "num_labels")  # may be null

# Least and greatest value of each number.
NUMBER_RANGES = {
    "layer_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "hidden_dropout_prob": (0.0, 1.0),
    "attention_probs_dropout_prob": (0.0, 1.0),
}

# Keys that make transformers load another file, replace modules or download kernels from the hub.
REFUSED_KEYS = ("transformers_weights", "per_layer_config", "fusion_config", "kernel_config", "distributed_config")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
ATTENTION_IMPLEMENTATIONS = (None, "eager", "sdpa", "fastvit")
QUANTIZERS = ("bitsandbytes", "torchao")

# Keys of a config.json that are settable properties of ViTConfig rather than fields.
SETTABLE_PROPERTIES = (
    "model_type",
    "num_labels",
    "output_attentions",
    "name_or_path",
    "torch_dtype",
    "_attn_implementation",
    "out_features",  # of DINOv2, BEiT and others that are also backbones of detectors
    "out_indices",
)

MAX_JSON_BYTES = 100 * 2**20  # ten times the names of the largest number of labels


def make_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns a size of a config, one number or (height, width), as (height, width)."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        InputError: If the file is too large, is not valid JSON, is nested too deeply, or holds no object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{path}: expected a JSON file of at most {MAX_JSON_BYTES:,} bytes, found {size:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def format_value(value: Any) -> str:
    """Formats a value for an error message; long and deeply nested values are shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python converts to text
        return "a number of thousands of digits"


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Whether `value` is a number that a finite float can hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def parse_config(stored: Mapping[str, Any], where: str | Path) -> ViTConfig:
    """Validates the content of a config.json and builds the config.

    Args:
        stored: The content of the file.
        where: The file, for error messages.

    Returns:
        The config. Nothing of the sizes in it has been allocated.

    Raises:
        InputError: If a key is not allowed, or a value is of the wrong type or out of bounds.
    """
    check_stored(stored, where)
    try:
        config = ViTConfig.from_dict(dict(stored))
    except Exception as error:  # the config's own validation has no common error class
        raise InputError(f"{where}: not a valid ViT config: {format_error(error)}") from error
    check_consistency(config, where)
    return config


def check_stored(stored: Mapping[str, Any], where: str | Path, config_class: type = ViTConfig) -> None:
    """Raises InputError unless every key of a config.json is a setting of `config_class`, within its bounds."""
    check_keys(stored, where, config_class)
    for name, limit in SIZE_LIMITS.items():
        if name in stored:
            check_size(name, stored[name], limit, where)
    for name, (least, greatest) in NUMBER_RANGES.items():
        value = stored.get(name, least)
        if not is_finite_number(value) or not least <= value <= greatest:
            raise InputError(
                f"{where}: {name}: expected a number from {least:g} to {greatest:g}, got {format_value(value)}"
            )
    check_labels(stored, where)


def format_error(error: Exception) -> str:
    """Formats the message of an error as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def check_keys(stored: Mapping[str, Any], where: str | Path, config_class: type = ViTConfig) -> None:
    """Raises InputError for keys that refer to other files, to code, or to attributes of the config's class."""
    for key in REFUSED_KEYS:
        if stored.get(key) is not None:
            raise InputError(f"{where}: {key}: expected none in a checkpoint, got {format_value(stored[key])}")
    for key in ATTENTION_KEYS:
        if stored.get(key) not in ATTENTION_IMPLEMENTATIONS:
            expected = ", ".join(str(name) for name in ATTENTION_IMPLEMENTATIONS[1:])
            raise InputError(f"{where}: {key}: expected one of {expected}, got {format_value(stored[key])}")
    quantization = stored.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        if method not in QUANTIZERS:
            expected = " or ".join(QUANTIZERS)
            raise InputError(
                f"{where}: quantization_config: expected quant_method {expected}, got {format_value(method)}"
            )
    fields: Any = dataclasses.fields(config_class)  # type: ignore[arg-type]
    allowed = {field.name for field in fields} | set(SETTABLE_PROPERTIES)
    for key in stored:
        # Setting it on the config would replace a method or an attribute of the class.
        if key not in allowed and (hasattr(config_class, key) or key.startswith("__")):
            raise InputError(
                f"{where}: {format_value(key)}: expected a setting of a ViT, found an attribute of the config's class"
            )
    for key in ("dtype", "torch_dtype"):
        dtype = stored.get(key)
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if dtype is not None and not (isinstance(named, torch.dtype) and named.is_floating_point):
            raise InputError(f"{where}: {key}: expected a floating type such as float32, got {format_value(dtype)}")


def check_size(name: str, value: Any, limit: int, where: str | Path) -> None:
    if value is None and name in NULLABLE_KEYS:
        return
    least = 0 if name in ("num_labels", "num_register_tokens") else 1
    values = value if name in PAIR_KEYS and isinstance(value, (list, tuple)) else [value]
    is_pair_or_one = values is not value or len(values) == 2
    if not is_pair_or_one or not all(is_integer(side) and least <= side <= limit for side in values):
        kind = "a whole number, or a pair of them," if name in PAIR_KEYS else "a whole number"
        raise InputError(f"{where}: {name}: expected {kind} from {least} to {limit:,}, got {format_value(value)}")


def check_labels(stored: Mapping[str, Any], where: str | Path) -> None:
    names, limit = stored.get("id2label"), SIZE_LIMITS["num_labels"]
    if names is not None:
        if not isinstance(names, Mapping) or len(names) > limit:
            raise InputError(
                f"{where}: id2label: expected an object of at most {limit:,} names, got {format_value(names)}"
            )
        for key, name in names.items():
            if not str(key).isdecimal() or len(str(key)) > 9 or not isinstance(name, (str, int)):
                raise InputError(
                    f"{where}: id2label: expected numbers and names, got {format_value(key)}: {format_value(name)}"
                )
    if not isinstance(stored.get("label2id"), Mapping | None):
        raise InputError(f"{where}: label2id: expected an object, got {format_value(stored['label2id'])}")


def check_consistency(config: ViTConfig, where: str | Path) -> None:
    """Checks settings that depend on each other."""
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{where}: hidden_size: expected a multiple of num_attention_heads ({config.num_attention_heads}),"
            f" got {config.hidden_size}"
        )
    image_size, patch_size = make_pair(config.image_size), make_pair(config.patch_size)
    if any(side < patch for side, patch in zip(image_size, patch_size, strict=True)):
        raise InputError(f"{where}: image_size: expected room for one patch of {patch_size}, got {image_size}")
    for name in ("image_mean", "image_std"):
        if getattr(config, name, None) is not None:
            check_channels(name, getattr(config, name), config.num_channels, where)


def check_channels(name: str, values: Any, channels: int, where: str | Path) -> tuple[float, ...]:
    """Checks and returns the mean or standard deviation of each channel; images are divided by the latter."""
    if not isinstance(values, (list, tuple)) or len(values) != channels or not all(map(is_finite_number, values)):
        raise InputError(f"{where}: {name}: expected {channels} finite numbers, got {format_value(values)}")
    if name.endswith("std") and min(values) <= 0:
        raise InputError(f"{where}: {name}: expected numbers above 0, got {format_value(values)}")
    return tuple(map(float, values))
