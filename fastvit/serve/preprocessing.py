"""The image processors of transformers, as a resize and a crop by Pillow that keep uint8.

    image -> resize -> crop -> uint8 [height, width, 3]        here, in a host thread
          -> (pixels / 255 - mean) / std                       in the model, on its device

Rescaling and normalisation are combined into one multiply-add: `mean` and `std` include the rescale factor.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from PIL import Image

from fastvit.checkpoints.configuration import (
    SIZE_LIMITS,
    check_channels,
    check_size,
    format_error,
    format_value,
    is_finite_number,
    is_integer,
)
from fastvit.errors import InputError
from fastvit.models.loading import read_image_settings

# Image processors that resize, crop, rescale and normalise, in this order, and do nothing else.
SUPPORTED_FAMILIES = ("ViT", "DeiT", "Beit", "Bit", "CLIP", "Siglip", "DINOv3ViT")
DRAFT_FACTOR = 3  # a JPEG that is decoded at a reduced size has at least so many pixels per pixel of the result
# The defaults of DINOv3's, which transformers only has with torchvision. It differs from ViT's in nothing else.
DINOV3_DEFAULTS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIDES = ("height", "width")


@dataclass(frozen=True)
class Preprocessor:
    """Resizes and crops images.

    Attributes:
        resize: (height, width), or the length of the shorter side, or None for no resize.
        crop: (height, width) of a centre crop, or None.
        resample: the filter, a value of `PIL.Image.Resampling`.
        mean: per channel, for pixels from 0 to 1.
        std: per channel, for pixels from 0 to 1.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, processor: Any, where: str = "image processor", channels: int = 3) -> Preprocessor:
        """Convert an image processor of transformers.

        Args:
            processor: the image processor.
            where: names the image processor in error messages.
            channels: the number of channels of the images.

        Raises:
            InputError: the image processor has settings that are not supported.
        """
        settings = processor.to_dict()
        get_processor_family(settings["image_processor_type"], where)
        if settings.get("do_pad"):
            raise InputError(f"{where}: do_pad: expected false, got {format_value(settings['do_pad'])}")
        resize = crop = None
        if settings.get("do_resize"):
            resize = read_size(settings, "size", where)
        if settings.get("do_center_crop"):
            crop = read_size(settings, "crop_size", where)
        if isinstance(crop, int) or (crop is None and not isinstance(resize, tuple)):
            raise InputError(
                f"{where}: size: expected settings that give all images one height and width,"
                f" got size {resize} and crop_size {crop}"
            )
        factor = settings["rescale_factor"] if settings.get("do_rescale") else 1.0
        if not is_finite_number(factor) or not 0 < factor <= 1:
            raise InputError(
                f"{where}: rescale_factor: expected a number above 0 and up to 1, got {format_value(factor)}"
            )
        normalizes = settings.get("do_normalize")
        mean = read_channels(settings, "image_mean", channels, where) if normalizes else (0.0,) * channels
        std = read_channels(settings, "image_std", channels, where) if normalizes else (1.0,) * channels
        resample = settings.get("resample")
        resample = Image.Resampling.BILINEAR if resample is None else resample
        if not is_integer(resample) or resample not in list(Image.Resampling):
            raise InputError(
                f"{where}: resample: expected a value of PIL.Image.Resampling, got {format_value(resample)}"
            )
        rescale = 1.0 if math.isclose(255 * factor, 1.0, rel_tol=1e-5) else 255 * factor
        return cls(
            resize,
            crop,
            int(resample),
            tuple(value / rescale for value in mean),
            tuple(value / rescale for value in std),
        )

    @property
    def channels(self) -> int:
        """Number of channels of the results."""
        return len(self.mean)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the results."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)
        return size

    @property
    def draft_side(self) -> int | None:
        """The least side of an image that may be decoded at a reduced size, or None if images are not resized."""
        if self.resize is None:
            return None
        return DRAFT_FACTOR * (self.resize if isinstance(self.resize, int) else max(self.resize))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the results."""
        return (*self.image_size, self.channels)

    def __call__(self, image: Image.Image, name: str = "image") -> np.ndarray:
        """Preprocess an image.

        Args:
            image: an RGB image, or `fastvit.data.images.Bands` of other channels.
            name: names the image in error messages.

        Returns:
            uint8 `[height, width, channels]`.

        Raises:
            InputError: the resized image would have too many pixels.
        """
        width, height = image.size
        if self.resize is not None:
            if isinstance(self.resize, tuple):
                height, width = self.resize
            else:  # the longer side is rounded down, as in transformers
                shorter = min(width, height)
                width, height = (int(self.resize * side / shorter) for side in (width, height))
            if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                raise InputError(f"{name}: {image.width}x{image.height} pixels would be resized to {width}x{height}")
            image = image.resize((width, height), self.resample)
        if self.crop is not None:  # areas outside of the image become black
            left, top = (width - self.crop[1]) // 2, (height - self.crop[0]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return np.asarray(image)


def read_size(settings: dict[str, Any], option: str, where: str) -> tuple[int, int] | int:
    """Read a size: (height, width), or the length of the shorter side."""
    size = {name: value for name, value in dict(settings[option]).items() if value is not None}
    for value in size.values():
        check_size(option, value, SIZE_LIMITS["image_size"], where)
    if set(size) == set(SIDES):
        return size["height"], size["width"]
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    raise InputError(f"{where}: {option}: expected height and width, or shortest_edge, got {format_value(size)}")


def read_channels(settings: dict[str, Any], option: str, channels: int, where: str) -> tuple[float, ...]:
    """Read the mean or standard deviation of the channels. A single number applies to all channels."""
    values = settings[option]
    return check_channels(option, [values] * channels if is_finite_number(values) else values, channels, where)


def load_preprocessor(model: str, channels: int = 3) -> Preprocessor:
    """Load the preprocessor of a model from its preprocessor_config.json.

    Args:
        model: a folder or hub id.
        channels: the number of channels of the images.

    Raises:
        InputError: the file does not exist or its settings are not supported.
    """
    found = read_image_settings(model)
    if found is None:
        raise InputError(f"{model}: expected an image processor (preprocessor_config.json), found none")
    path, settings = found
    # The oldest files have no type: they are ViT's. Missing settings have the defaults of the type.
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViT"
    family = get_processor_family(named, str(path))
    if family == "DINOv3ViT":
        family, settings = "ViT", {**DINOV3_DEFAULTS, **settings, "image_processor_type": "ViTImageProcessor"}
    try:
        processor = getattr(transformers, f"{family}ImageProcessorPil").from_dict(settings)
        return Preprocessor.from_processor(processor, str(path), channels)
    except InputError:
        raise
    except Exception as error:  # transformers does not validate types, and a setting may shadow a method
        raise InputError(f"{path}: invalid settings of an image processor: {format_error(error)}") from error


def get_processor_family(processor_type: Any, where: str) -> str:
    """The family of an image processor by its class name. Raises InputError for unsupported families."""
    family = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(processor_type))
    if family not in SUPPORTED_FAMILIES:
        raise InputError(
            f"{where}: image_processor_type: expected one for {', '.join(SUPPORTED_FAMILIES)},"
            f" got {format_value(processor_type)}"
        )
    return family
