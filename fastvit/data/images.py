"""Converts images of any form to uint8 arrays: decoding, resizing, caching and augmentation.

Images are decoded and resized once and stored as uint8; the model normalises them on its device. Pillow resizes, as in
transformers' PIL image processors, so that a model sees the same pixels in training and in a pipeline.
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

# Above this many bytes of pixels a split is cached in a memory-mapped file instead of memory.
MEMORY_CACHE_BYTES = 4 * 2**30


# Formats that are decoded. Pillow supports more; some start other programs (EPS: Ghostscript), others are rarely tested
# against malicious files. MPO, the format of phones, is decoded as the JPEG that it starts with.
# HEIF requires the extra `heif`.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
SAMPLES_PER_PIXEL = 277  # a tag of TIFF
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
HEIF_HINT = "HEIC needs pillow-heif: pip install 'fastvit[heif]'"
AVIF_HINT = "AVIF needs Pillow 11.3 or newer"
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # bytes 8 to 12 of a file

# EXIF orientation -> the transpose that turns the image upright.
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
    """Lists the `FORMATS` that the installed Pillow supports, with HEIF if pillow-heif is installed."""
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        if "AVIF" not in Image.OPEN and hasattr(pillow_heif, "register_avif_opener"):  # Pillow before 11.3
            pillow_heif.register_avif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def list_image_suffixes() -> frozenset[str]:
    """Returns the suffixes of image files in lower case."""
    formats = list_readable_formats()
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in (*formats, "MPO")}
    return frozenset({*suffixes, ".npy"})


class Bands:
    """An image of any number of channels, with the methods of a PIL image that resize, crop and flip it.

    Args:
        bands: The channels, PIL images of mode "L".
    """

    def __init__(self, bands: Sequence[Image.Image]):
        self.bands, (self.width, self.height) = bands, bands[0].size
        self.size = bands[0].size

    def resize(self, *args: Any, **kwargs: Any) -> Bands:
        return Bands([band.resize(*args, **kwargs) for band in self.bands])

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        return Bands([band.crop(box) for band in self.bands])

    def transpose(self, method: Image.Transpose) -> Bands:
        return Bands([band.transpose(method) for band in self.bands])

    def convert(self, mode: str) -> Image.Image:
        """Returns the first three channels, or the only one, as an RGB image, for people to look at."""
        return Image.merge("RGB", (self.bands[:3] if len(self.bands) > 2 else [self.bands[0]] * 3)).convert(mode)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(band) for band in self.bands], axis=-1)  # uint8 [height, width, channels]


def to_bands(pixels: np.ndarray) -> Image.Image | Bands:
    """Returns the image of pixels, uint8 [height, width, channels]: a PIL image if there are three channels."""
    if pixels.shape[2] == 3:
        return Image.fromarray(pixels)
    return Bands([Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, 2, 0)])


@contextlib.contextmanager
def explain_decode_errors(name: str, source: Any = None) -> Iterator[None]:
    """Turns errors of decoders into an InputError that names the image; `source` is its file or bytes."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    except FileNotFoundError:
        raise InputError(f"{name}: no such file") from None
    except UnidentifiedImageError:
        formats = ", ".join((*list_readable_formats(), "NPY"))
        if source is not None and (hint := find_missing_decoder(source)) is not None:
            formats = f"{formats}; {hint}"
        raise InputError(f"{name}: expected an image, found a file in none of these formats: {formats}") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(f"{name}: expected an image of at most {limit:,} pixels, to fit into memory") from None
    except Exception as error:  # decoders have no common class: struct.error, EOFError, MemoryError, ...
        raise InputError(f"{name}: cannot be decoded ({format_error(error)})") from None


def decode_image(
    source: str | Path | bytes, name: str | None = None, channels: int = 3, min_side: int | None = None
) -> Any:
    """Decodes an image file to an upright image.

    The content determines the format. An animation becomes its first frame, transparent pixels are composited on white,
    and 16-bit channels are reduced to their upper 8 bits.

    Args:
        source: A path, or the bytes of a file.
        name: The name of the image in error messages [the path, or "image"].
        channels: The number of channels: 3 for RGB, 1 for grey, others for TIFF and .npy files that have them.
        min_side: Decode a JPEG at 1/2, 1/4 or 1/8 of its size if both sides remain at least this long.

    Returns:
        An RGB image, or `Bands`, of 8 bits per channel.

    Raises:
        InputError: If the file does not exist or cannot be decoded, has other channels, or if it has more than twice
            `PIL.Image.MAX_IMAGE_PIXELS` pixels (179 million by default). The latter is raised before memory is
            allocated for the pixels.
    """
    name = escape_unprintable(name or (str(source) if not isinstance(source, bytes) else "image"))
    with (
        explain_decode_errors(name, source),
        contextlib.closing(io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")) as file,
    ):
        start = file.read(8)
        file.seek(0)
        if start.startswith(b"\x93NUMPY"):
            return array_to_image(read_npy(file), channels=channels)
        if start[:4] in TIFF_STARTS and channels not in (1, 3):
            return array_to_image(read_tiff(file), channels=channels)
        with Image.open(file, formats=list_readable_formats()) as image:
            if min_side is not None:
                image.draft(None, (min_side, min_side))
            image.load()
            return convert_to_upright(image, channels)


def read_npy(file: Any) -> np.ndarray:
    """Reads an array; raises InputError before memory is allocated for too many pixels."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    if Image.MAX_IMAGE_PIXELS and math.prod(read_header(file)[0]) > 8 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    file.seek(0)
    return np.load(file, allow_pickle=False)


def read_tiff(file: Any) -> np.ndarray:
    """Reads the channels of a TIFF file, of which Pillow reads four at most."""
    try:
        import tifffile
    except ImportError:
        raise InputError("channels: a TIFF of other channels needs tifffile: pip install 'fastvit[tiff]'") from None
    with tifffile.TiffFile(file) as tiff:
        if Image.MAX_IMAGE_PIXELS and math.prod(tiff.series[0].shape) > 8 * Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        return tiff.series[0].asarray()


def find_missing_decoder(source: str | Path | bytes) -> str | None:
    """Returns how to decode a file that begins as a HEIC, AVIF or TIFF image does, if Pillow cannot."""
    if not isinstance(source, bytes):
        with Path(source).open("rb") as file:
            source = file.read(12)
    if source[:4] in TIFF_STARTS:
        return "a TIFF of several bands needs --channels N"
    if source[4:8] != b"ftyp":
        return None
    if source[8:12] in (b"avif", b"avis"):
        return AVIF_HINT if "AVIF" not in list_readable_formats() else None
    return HEIF_HINT if source[8:12] in HEIF_BRANDS and "HEIF" not in list_readable_formats() else None


def convert_to_upright(image: Image.Image, channels: int = 3) -> Any:
    """Converts an image to RGB, to grey or to its channels as they are, and applies its EXIF orientation."""
    method = UPRIGHT_TRANSPOSES.get(read_orientation(image))
    stored = image.tag_v2.get(SAMPLES_PER_PIXEL, 1) if hasattr(image, "tag_v2") else 1
    if stored > len(image.getbands()):  # Pillow leaves out channels whose meaning the file does not tell
        raise InputError(f"expected {channels} channels, found {stored}, of which none is alpha (--channels {stored})")
    if channels in (1, 3):
        rgb = convert_to_rgb(image)
        converted: Any = rgb if channels == 3 else Bands([rgb.convert("L")])
    elif len(image.getbands()) == channels and image.mode not in ("P", "PA"):
        converted = Bands(image.split())
    else:
        raise InputError(f"expected {channels} channels, found {len(image.getbands())} ({image.mode})")
    return converted if method is None else converted.transpose(method)


def read_orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 (upright) if there is none or the metadata is broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the parsers of EXIF and XMP have no common class
        return 1
    return orientation if isinstance(orientation, int) else 1


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB of 8 bits per channel, with transparent pixels composited on white.

    Raises:
        InputError: If the image has 32 bits per channel.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # The upper byte, as Pillow decodes 16-bit colour. Its own conversion of grey clips values above 255.
        grey = np.asarray(image).clip(0, 2**16 - 1) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError("expected 8 or 16 bits per channel, found 32, whose values of black and white are unknown")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


# Pillow decodes a file when its pixels are first accessed. Two threads must not do that with the same image, nor read
# the same file object.
_read_lock = threading.Lock()


def _renew_lock() -> None:
    global _read_lock
    _read_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # a forked child has no thread that would release the lock
    os.register_at_fork(after_in_child=_renew_lock)


def to_image(source: Any, name: str | None = None, channels: int = 3, min_side: int | None = None) -> Any:
    """Converts any representation of an image to an upright image.

    Args:
        source: A path, the bytes of a file, a file object, a PIL image, an array or tensor as in `array_to_image`, or a
            function without arguments that returns one of these. A PIL image is converted like a decoded file.
        name: The name of the image in error messages [the path, or "image"].
        channels: The number of channels, as for `decode_image`.
        min_side: As for `decode_image`, for files and their bytes.

    Returns:
        An RGB image, or `Bands`, of 8 bits per channel.

    Raises:
        InputError: If `source` is of another type, has other channels or cannot be decoded.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "image")
    if isinstance(source, (str, Path)):
        return decode_image(source, name, channels, min_side)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source), name, channels, min_side)
    if isinstance(source, Bands):
        if len(source.bands) != channels:
            raise InputError(f"{name}: expected {channels} channels, found {len(source.bands)}")
        return source
    if isinstance(source, Image.Image):
        with explain_decode_errors(name), _read_lock:
            source.load()
            return convert_to_upright(source, channels)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        return array_to_image(source, name, channels)
    if hasattr(source, "read"):
        with _read_lock:
            content = source.read()
        if not isinstance(content, bytes):
            raise InputError(f"{name}: expected a file opened for reading bytes, read {type(content).__name__}")
        return decode_image(content, name, channels, min_side)
    if callable(source):
        return to_image(source(), name, channels, min_side)
    raise InputError(
        f"{name}: expected a path, bytes, a file, a PIL image, an array or a tensor, got {type(source).__name__}"
    )


def array_to_image(array: np.ndarray, name: str | None = None, channels: int = 3) -> Any:
    """Converts an array to an image.

    Args:
        array: [height, width], [height, width, channels] or [channels, height, width]; uint8, uint16, of which the
            upper 8 bits are used, or floating point in [0, 1]. For RGB, 1, 3 or 4 channels: pixels with a fourth
            channel, alpha, are composited on white. For other images their number.
        name: The name of the image in error messages [none].
        channels: The number of channels, as for `decode_image`.

    Returns:
        An RGB image, or `Bands`, of 8 bits per channel.

    Raises:
        InputError: For other shapes, dtypes and values, and if both the first and the last dimension may be channels.
    """
    name = f"{name}: " if name else ""
    accepted = (1, 3, 4) if channels == 3 else (channels,)
    channels_first, channels_last = (array.ndim == 3 and array.shape[end] in accepted for end in (0, 2))
    is_grey = array.ndim == 2 and 1 in accepted
    if not (is_grey or channels_first != channels_last) or 0 in array.shape:
        counts = "1, 3 or 4 channels" if channels == 3 else f"{channels} channels"
        raise InputError(f"{name}expected [height, width], or with {counts} at one end, got {list(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # NaN too
            raise InputError(f"{name}expected floating pixels between 0 and 1, got {array.min()} to {array.max()}")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise InputError(f"{name}expected uint8, uint16 or floating pixels, got {array.dtype}")
    array = np.moveaxis(array, 0, 2) if channels_first else array[..., None] if is_grey else array
    if channels != 3:
        return to_bands(array)
    return convert_to_rgb(Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)))


@dataclass
class ImageCache:
    """Decoded images of one split.

    Attributes:
        images: uint8 [count, height, width, channels].
        skipped: Index of each image that could not be decoded -> the error message.
    """

    images: np.ndarray
    skipped: dict[int, str]


def cache_images(
    load: Callable[[int], Image.Image],
    count: int,
    image_size: tuple[int, int],
    *,
    channels: int = 3,
    resample: int = Image.Resampling.BILINEAR,
    skip_bad: bool = False,
    key: str = "",
    cache_dir: Path | None = None,
    memory_limit: int = MEMORY_CACHE_BYTES,
    description: str = "decoding",
) -> ImageCache:
    """Decodes and resizes images with one thread per core.

    Args:
        load: Index -> image.
        count: The number of images; `load` is called with 0 to `count - 1`.
        image_size: (height, width).
        channels: The number of channels.
        resample: The filter.
        skip_bad: Whether to skip and list images that cannot be decoded.
        key: Identifies the images: later runs with the same key reuse the cached file.
        cache_dir: The folder of cached files.
        memory_limit: Above this many bytes, the pixels are cached in a file in `cache_dir` instead of memory.
        description: Label of the progress bar.

    Returns:
        The pixels, and the images that were skipped.

    Raises:
        InputError: If an image cannot be decoded and `skip_bad` is false, or `cache_dir` has too little space.
    """
    shape = (count, *image_size, channels)
    if cache_dir is None or np.prod(shape) <= memory_limit:
        images = np.empty(shape, dtype=np.uint8)
        return ImageCache(images, _decode_all(load, images, resample, skip_bad, description))

    digest = hashlib.sha256(repr((key, shape, int(resample), skip_bad)).encode()).hexdigest()[:24]
    finished = cache_dir / digest
    if not finished.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        needed, free = int(np.prod(shape)), shutil.disk_usage(cache_dir).free
        if needed > free:  # writing to a memory-mapped file on a full disk kills the process
            raise InputError(
                f"{description}: the images need {needed / 2**30:.1f} GiB in {cache_dir}, {free / 2**30:.1f} GiB are"
                " free; FASTVIT_CACHE_DIR names another folder"
            )
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".decoding-", ignore_cleanup_errors=True) as partial:
            images = np.lib.format.open_memmap(f"{partial}/images.npy", mode="w+", dtype=np.uint8, shape=shape)
            skipped = _decode_all(load, images, resample, skip_bad, description)
            images.flush()
            Path(partial, "skipped.json").write_text(json.dumps(skipped))
            # If another run finished first, its folder remains and this one is removed.
            with contextlib.suppress(OSError):
                Path(partial).rename(finished)
    skipped = {int(index): reason for index, reason in json.loads((finished / "skipped.json").read_text()).items()}
    return ImageCache(np.load(finished / "images.npy", mmap_mode="r"), skipped)


def _decode_all(
    load: Callable[[int], Image.Image], images: np.ndarray, resample: int, skip_bad: bool, description: str
) -> dict[int, str]:
    """Decodes all images into `images`; returns the index and error of each image that was skipped."""
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

    Args:
        image_size: (height, width) of the output.
        min_area: The smallest share of the image's area in a crop.
    """

    def __init__(self, image_size: tuple[int, int], min_area: float = 0.5):
        self.image_size = image_size
        self.min_area = min_area

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Augments an image, uint8 [h, w, channels] -> uint8 [height, width, channels]."""
        height, width = image.shape[:2]
        area, log_ratio, top, left, flip = torch.rand(5).tolist()
        area = self.min_area + area * (1 - self.min_area)
        ratio = math.exp((2 * log_ratio - 1) * math.log(4 / 3))
        crop_width = min(1.0, math.sqrt(area * ratio)) * width
        crop_height = min(1.0, math.sqrt(area / ratio)) * height
        left, top = left * (width - crop_width), top * (height - crop_height)
        crop = to_bands(image).resize(
            self.image_size[::-1], Image.Resampling.BILINEAR, box=(left, top, left + crop_width, top + crop_height)
        )
        if flip < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(crop)


@contextlib.contextmanager
def seed_rng(seed: int) -> Iterator[None]:
    """Context manager that seeds torch's generator of the CPU and restores its state afterwards."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also set the generators of GPUs
        yield
    finally:
        torch.set_rng_state(state)


class ImageSet(torch.utils.data.Dataset):
    """Cached images with labels, for a Trainer: {"pixel_values": uint8 [height, width, 3], "labels": int}.

    Labels of several per image, or numbers, are float32 [names] instead of int.

    Args:
        cache: The images; skipped ones are left out.
        labels: The label of each image in `cache`, skipped ones included.
        augment: uint8 [h, w, 3] -> uint8 [height, width, 3], with random numbers of torch's generator. It is seeded
            with (seed, epoch, index), so that a resumed run, or another order of access, produces the same images.
        seed: Seed of the augmentation.
        with_seeds: Whether each item also has its seed ("seed": int), for augmentations of a whole batch.
        get_name: Index in `cache` -> the image's path or row.
    """

    def __init__(
        self,
        cache: ImageCache,
        labels: Sequence[int] | np.ndarray,
        augment: Callable[[np.ndarray], np.ndarray] | None = None,
        *,
        seed: int = 0,
        with_seeds: bool = False,
        get_name: Callable[[int], str] = "row {}".format,
    ):
        self.find_name = get_name
        self.seed, self.epoch, self.with_seeds = seed, 0, with_seeds
        self.images = cache.images
        self.indices = [index for index in range(len(labels)) if index not in cache.skipped]
        self.labels = np.asarray(labels)[self.indices]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.indices)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the augmentation is seeded with."""
        self.epoch = epoch

    def compute_seed(self, item: int) -> int:
        """Computes the seed of an item in the current epoch."""
        return int(np.random.SeedSequence([self.seed, self.epoch, item]).generate_state(1)[0])

    def __getitem__(self, item: int) -> dict[str, torch.Tensor | int]:
        entry: dict[str, torch.Tensor | int] = {
            "pixel_values": torch.from_numpy(self.get_pixels(item)),
            "labels": torch.from_numpy(label) if (label := self.labels[item]).ndim else int(label),
        }
        if self.with_seeds:
            entry["seed"] = self.compute_seed(item)
        return entry

    def get_name(self, item: int) -> str:
        """Returns the path of an image, or its row in the dataset."""
        return self.find_name(self.indices[item])

    def get_pixels(self, item: int) -> np.ndarray:
        """Returns a copy of an image, augmented if `augment` is set: uint8 [height, width, 3]."""
        image = self.images[self.indices[item]]
        if self.augment is not None:
            with seed_rng(self.compute_seed(item)):
                image = self.augment(image)
        return np.array(image)
