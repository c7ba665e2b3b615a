"""Image settings of a checkpoint: mean, standard deviation, size and resampling filter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import ViTConfig

from fastvit.checkpoints.configuration import (
    SIZE_LIMITS,
    check_channels,
    check_size,
    format_value,
    is_finite_number,
    is_integer,
    make_pair,
)
from fastvit.errors import InputError

ImageSettings = tuple[tuple[float, ...], tuple[float, ...], tuple[int, int], int]  # mean, std, size, filter


def parse_image_settings(settings: Mapping[str, Any], config: ViTConfig, path: Path) -> ImageSettings:
    """Validates the content of a preprocessor_config.json and returns mean, std, size and filter.

    A missing mean or std is that of the config, by which the model normalises uint8 pixels.
    """
    if not settings.get("do_rescale", True):
        raise InputError(f"{path}: do_rescale: expected true, got {format_value(settings['do_rescale'])}")
    factor = settings.get("rescale_factor", 1 / 255)
    if not is_finite_number(factor) or not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise InputError(f"{path}: rescale_factor: expected 1/255, got {format_value(factor)}")
    if settings.get("do_normalize", True):
        half = [0.5] * config.num_channels
        names = ("image_mean", "image_std")
        mean, std = (settings.get(name, getattr(config, name, None) or half) for name in names)
    else:
        mean, std = [0.0] * config.num_channels, [1.0] * config.num_channels
    size = settings.get("size") or config.image_size
    if isinstance(size, dict):  # otherwise the shortest edge, after which the image is cropped to the model's size
        size = [size["height"], size["width"]] if {"height", "width"} <= size.keys() else config.image_size
    resample = settings.get("resample", Image.Resampling.BILINEAR)
    return check_image_settings(mean, std, size, resample, config.num_channels, path)


def check_image_settings(mean: Any, std: Any, size: Any, resample: Any, channels: int, path: Path) -> ImageSettings:
    """Validates image settings; `size` is one number or (height, width)."""
    mean, std = check_channels("image_mean", mean, channels, path), check_channels("image_std", std, channels, path)
    check_size("image_size", size, SIZE_LIMITS["image_size"], path)
    if not is_integer(resample) or resample not in list(Image.Resampling):
        raise InputError(f"{path}: resample: expected the number of a Pillow filter, got {format_value(resample)}")
    return mean, std, make_pair(size), int(resample)
