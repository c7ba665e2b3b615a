"""What an image processor of transformers does to a picture, as Pillow's resize and a crop that stay uint8.

    picture -> resize -> crop -> uint8 [height, width, 3]        here, in a thread of the host
            -> (pixels / 255 - mean) / std                       in the model, on its device

Rescaling and normalising are one multiply and add, whatever the factor; `mean` and `std` hold both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import ImageProcessingMixin

from fastvit.errors import InputError

# Image processors that resize, crop, rescale and normalise, in this order, and do nothing else to a picture.
KNOWN = ("ViT", "DeiT", "Beit", "Bit", "CLIP", "Siglip")
SIDES = ("height", "width")


@dataclass(frozen=True)
class Preprocessor:
    """resize: (height, width), or one number, the shorter side; None: not resized. crop: (height, width), or None.

    mean, std: of a channel, for pixels in 0..1.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> Preprocessor:
        """The same as a transformers image processor; raises InputError for what this cannot do."""
        settings = processor.to_dict()
        kind_of(settings["image_processor_type"])
        if settings.get("do_pad"):
            raise InputError("image processor: do_pad: expected none, got padding")
        resize = crop = None
        if settings.get("do_resize"):
            resize = size_of(settings, "size")
        if settings.get("do_center_crop"):
            crop = size_of(settings, "crop_size")
        if isinstance(crop, int) or (crop is None and not isinstance(resize, tuple)):
            raise InputError(
                "image processor: expected all pictures to come out with one height and width,"
                f" got size {resize} and crop_size {crop}"
            )
        rescale = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255.0
        rescale = 1.0 if np.isclose(rescale, 1.0) else rescale
        normalizes = settings.get("do_normalize")
        mean, std = (settings["image_mean"], settings["image_std"]) if normalizes else (0.0, 1.0)
        mean, std = ([value] * 3 if isinstance(value, (int, float)) else list(value) for value in (mean, std))
        if len(mean) != 3 or len(std) != 3:
            raise InputError(f"image processor: expected image_mean and image_std of 3 channels, got {mean} and {std}")
        resample = settings.get("resample")
        return cls(
            resize,
            crop,
            Image.Resampling.BILINEAR if resample is None else int(resample),
            tuple(value / rescale for value in mean),
            tuple(value / rescale for value in std),
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        size = self.crop or self.resize
        assert isinstance(size, tuple)
        return size

    def __call__(self, image: Image.Image, name: str = "image") -> np.ndarray:
        """An RGB picture as uint8 [height, width, 3]; raises InputError naming it where it cannot be resized."""
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
        if self.crop is not None:  # black where the picture is smaller
            left, top = (width - self.crop[1]) // 2, (height - self.crop[0]) // 2
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return np.asarray(image)


def size_of(settings: dict[str, Any], option: str) -> tuple[int, int] | int:
    """(height, width) or the shorter side."""
    size = {name: value for name, value in dict(settings[option]).items() if value is not None}
    if set(size) == set(SIDES):
        return size["height"], size["width"]
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"]
    raise InputError(f"image processor: {option}: expected height and width, or shortest_edge, got {size}")


def load_preprocessor(model: str) -> Preprocessor:
    """Of a hub id or folder, from its preprocessor_config.json; raises InputError where there is none."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"{model}: expected an image processor (preprocessor_config.json) ({first_line})") from None
    # The oldest files name no type; they are ViT's. What a file leaves out is as the type has it.
    kind = kind_of(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViT")
    return Preprocessor.of(getattr(transformers, f"{kind}ImageProcessorPil").from_dict(settings))


def kind_of(processor_type: str) -> str:
    """The family of an image processor, by the name of its class; raises InputError for one that is not known."""
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", processor_type)
    if kind not in KNOWN:
        raise InputError(f"image processor: expected one for {', '.join(KNOWN)}, got {processor_type}")
    return kind
