"""From pictures in any form to uint8 arrays: decode, resize, cache, augment.

Pictures are decoded and resized once and kept as uint8; the model normalises them on its device. Resizing is Pillow's,
as in transformers' PIL image processors, so that a model sees the same pixels in training and in a pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm

from fastvit.checkpoints.configuration import format_error
from fastvit.errors import InputError, escape_unprintable

# Above this many bytes of pixels a split is kept in a file that the system pages in, not in memory.
MEMORY_CACHE_BYTES = 4 * 2**30


# What is read. Pillow knows more formats, some of which start other programs (EPS: Ghostscript) or are seldom attacked
# and seldom mended. Phones' MPO is read as the JPEG that it begins with.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# The EXIF orientation -> what makes the picture upright.
UPRIGHT_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@functools.cache
def list_readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def list_image_suffixes() -> frozenset[str]:
    """The endings of picture files, in lower case."""
    formats = list_readable_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*formats, "MPO"))


def decode_image(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """An upright RGB picture from a file or its bytes; raises InputError naming the file (or `name`).

    The format is told from the content. Of an animation it is the first frame; what is transparent is laid on white; of
    16 bits a channel the upper 8 are kept. A picture of more than twice `PIL.Image.MAX_IMAGE_PIXELS` (179 million
    pixels in all, unless it was changed) is refused before memory is taken for its pixels.
    """
    name = escape_unprintable(name or (str(source) if not isinstance(source, bytes) else "image"))
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=list_readable_formats()
        ) as image:
            image.load()
            return convert_to_upright_rgb(image)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        formats = ", ".join(list_readable_formats())
        raise InputError(f"{name}: expected an image, found a file that is none (of {formats})") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{name}: expected a picture of at most {limit:,} pixels, to fit into memory") from None
    except Exception as error:  # decoders have no common class: struct.error, EOFError, MemoryError, ...
        raise InputError(f"{name}: cannot be decoded ({format_error(error)})") from None


def convert_to_upright_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as its EXIF orientation says, in RGB; raises InputError for 32 bits a channel."""
    method = UPRIGHT_TRANSPOSES.get(read_orientation(image))
    rgb = convert_to_rgb(image)
    return rgb if method is None else rgb.transpose(method)


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where none can be read: broken metadata leaves the pixels whole."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # parsers of EXIF and XMP, no common class
        return 1
    return orientation if isinstance(orientation, int) else 1


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode as RGB of 8 bits a channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # The upper byte, as Pillow reads 16-bit colour. Its own conversion of grey cuts off what is above 255.
        grey = np.asarray(image).clip(0, 2**16 - 1) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError("expected 8 or 16 bits a channel, found 32, which leave open what is black and what is white")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


# Pillow decodes a file when its pixels are first asked for; two threads must not do that to one picture, nor read one
# file object.
_read_lock = threading.Lock()


def _renew_lock() -> None:
    global _read_lock
    _read_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # where a thread held it, the fork has no such thread to release it
    os.register_at_fork(after_in_child=_renew_lock)


def to_image(source: Any, name: str | None = None) -> Image.Image:
    """An upright RGB picture from anything that holds one; raises InputError naming it (`name`, or the file).

    source: a path; the bytes of a file, or an open one; a PIL image, for which the same holds as for a file; an array
    or tensor, as `array_to_image` takes it; or a function without arguments that returns one of these.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "image")
    if isinstance(source, (str, Path)):
        return decode_image(source, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source), name)
    if isinstance(source, Image.Image):
        try:
            with _read_lock:
                source.load()
                return convert_to_upright_rgb(source)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        except Exception as error:  # see `decode_image`
            raise InputError(f"{name}: cannot be decoded ({format_error(error)})") from None
    if isinstance(source, torch.Tensor):
        return array_to_image(source.detach().cpu().numpy(), name)
    if isinstance(source, np.ndarray):
        return array_to_image(source, name)
    if hasattr(source, "read"):
        with _read_lock:
            content = source.read()
        if not isinstance(content, bytes):
            raise InputError(f"{name}: expected a file opened for reading bytes, read {type(content).__name__}")
        return decode_image(content, name)
    if callable(source):
        return to_image(source(), name)
    raise InputError(
        f"{name}: expected a path, bytes, a file, a PIL image, an array or a tensor, got {type(source).__name__}"
    )


def array_to_image(array: np.ndarray, name: str = "image") -> Image.Image:
    """An RGB picture from [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels; the fourth is laid on white.

    uint8, or floating between 0 and 1. Raises InputError for any other, and where either end may be the channels.
    """
    channels_first, channels_last = (array.ndim == 3 and array.shape[end] in (1, 3, 4) for end in (0, 2))
    if not (array.ndim == 2 or channels_first != channels_last) or 0 in array.shape:
        raise InputError(
            f"{name}: expected [height, width], or with 1, 3 or 4 channels at one end, got {list(array.shape)}"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN too
            raise InputError(f"{name}: expected floating pixels between 0 and 1, got {array.min()} to {array.max()}")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}: expected uint8 or floating pixels, got {array.dtype}")
    if channels_first:
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return convert_to_rgb(Image.fromarray(np.ascontiguousarray(array)))


@dataclass
class ImageCache:
    """Decoded pictures of one split.

    images: uint8 [count, height, width, 3]; skipped: for the index of each picture that could not be decoded, why.
    """

    images: np.ndarray
    skipped: dict[int, str]


def cache_images(
    load: Callable[[int], Image.Image],
    count: int,
    image_size: tuple[int, int],
    *,
    resample: int = Image.Resampling.BILINEAR,
    skip_bad: bool = False,
    key: str = "",
    cache_dir: Path | None = None,
    memory_limit: int = MEMORY_CACHE_BYTES,
    description: str = "decoding",
) -> ImageCache:
    """Decode and resize `count` pictures, `load(0)` to `load(count - 1)`, with as many threads as there are cores.

    image_size: (height, width). Up to `memory_limit` bytes they are held in memory, above it in a file in `cache_dir`
    that later runs with the same `key` use again. A picture that cannot be decoded raises InputError, or with
    `skip_bad` is left out and listed.
    """
    shape = (count, *image_size, 3)
    if cache_dir is None or np.prod(shape) <= memory_limit:
        images = np.empty(shape, dtype=np.uint8)
        return ImageCache(images, _decode_all(load, images, resample, skip_bad, description))

    digest = hashlib.sha256(repr((key, shape, int(resample), skip_bad)).encode()).hexdigest()[:24]
    finished = cache_dir / digest
    if not finished.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        needed, free = int(np.prod(shape)), shutil.disk_usage(cache_dir).free
        if needed > free:  # writing to a mapped file on a full disk is no exception but the end of the process
            raise InputError(
                f"{description}: the pictures need {needed / 2**30:.1f} GiB in {cache_dir}, {free / 2**30:.1f} GiB are"
                " free; FASTVIT_CACHE_DIR names another folder"
            )
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".decoding-", ignore_cleanup_errors=True) as partial:
            images = np.lib.format.open_memmap(f"{partial}/images.npy", mode="w+", dtype=np.uint8, shape=shape)
            skipped = _decode_all(load, images, resample, skip_bad, description)
            images.flush()
            Path(partial, "skipped.json").write_text(json.dumps(skipped))
            # Another run may have finished first: then its folder stays and this one's is removed.
            with contextlib.suppress(OSError):
                Path(partial).rename(finished)
    skipped = {int(index): reason for index, reason in json.loads((finished / "skipped.json").read_text()).items()}
    return ImageCache(np.load(finished / "images.npy", mmap_mode="r"), skipped)


def _decode_all(
    load: Callable[[int], Image.Image], images: np.ndarray, resample: int, skip_bad: bool, description: str
) -> dict[int, str]:
    """Fill `images`; returns what was skipped and why."""
    height, width = images.shape[1:3]

    def decode(index: int) -> str | None:
        try:
            image = load(index)
        except InputError as error:
            if not skip_bad:
                raise
            return str(error)
        images[index] = np.asarray(image.resize((width, height), resample))
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            bar = tqdm(
                pool.map(decode, range(len(images))), total=len(images), desc=description, unit="img", leave=False
            )
            return {index: reason for index, reason in enumerate(bar) if reason is not None}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class Augment:
    """Random resized crop and horizontal flip (Szegedy et al. 2015, arXiv:1409.4842), drawn from torch's generator.

    min_area: the smallest part of the picture that a crop may show.
    """

    def __init__(self, image_size: tuple[int, int], min_area: float = 0.5):
        self.image_size = image_size
        self.min_area = min_area

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [h, w, 3] -> uint8 [height, width, 3]."""
        height, width = image.shape[:2]
        area, log_ratio, top, left, flip = torch.rand(5).tolist()
        area = self.min_area + area * (1 - self.min_area)
        ratio = math.exp((2 * log_ratio - 1) * math.log(4 / 3))
        crop_width = min(1.0, math.sqrt(area * ratio)) * width
        crop_height = min(1.0, math.sqrt(area / ratio)) * height
        left, top = left * (width - crop_width), top * (height - crop_height)
        crop = Image.fromarray(image).resize(
            self.image_size[::-1], Image.Resampling.BILINEAR, box=(left, top, left + crop_width, top + crop_height)
        )
        if flip < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop)


@contextlib.contextmanager
def seed_rng(seed: int) -> Iterator[None]:
    """Inside, torch's generator on the CPU draws what `seed` says; afterwards it goes on as if nothing had happened."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also set the generators of GPUs
        yield
    finally:
        torch.set_rng_state(state)


class ImageSet(torch.utils.data.Dataset):
    """Cached pictures with labels, as a Trainer reads them: {"pixel_values": uint8 [H, W, 3], "labels": int}.

    augment: changes a picture, uint8 [h, w, 3] -> uint8 [H, W, 3], with random numbers of torch's generator. They are
        those of (seed, epoch, picture), whoever asks for the picture and whatever was asked for before, so that a run
        that goes on from a checkpoint sees what it would have seen.
    with_seeds: each picture brings its seed ("seed": int), for what is drawn for a batch.
    """

    def __init__(
        self,
        cache: ImageCache,
        labels: Sequence[int] | np.ndarray,
        augment: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        seed: int = 0,
        with_seeds: bool = False,
    ):
        self.seed, self.epoch, self.with_seeds = seed, 0, with_seeds
        self.images = cache.images
        self.indices = [index for index in range(len(labels)) if index not in cache.skipped]
        self.labels = [int(labels[index]) for index in self.indices]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def compute_seed(self, item: int) -> int:
        return int(np.random.SeedSequence([self.seed, self.epoch, item]).generate_state(1)[0])

    def __getitem__(self, item: int) -> dict[str, torch.Tensor | int]:
        entry: dict[str, torch.Tensor | int] = {
            "pixel_values": torch.from_numpy(self.get_pixels(item)),
            "labels": self.labels[item],
        }
        if self.with_seeds:
            entry["seed"] = self.compute_seed(item)
        return entry

    def get_pixels(self, item: int) -> np.ndarray:
        """uint8 [H, W, 3], augmented if the set augments; its memory is nobody else's."""
        image = self.images[self.indices[item]]
        if self.augment is not None:
            with seed_rng(self.compute_seed(item)):
                image = self.augment(image)
        return np.array(image)
