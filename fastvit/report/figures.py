"""Figures: grids of example images, heat maps and attention rollout.

Attention maps are arrays `[layers, heads, tokens, tokens]` with the class token first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastvit.data.images import convert_to_rgb
from fastvit.errors import InputError
from fastvit.report.classification import replace_unprintable

MAX_GRID_CLASSES = 20

_PAPER, _INK, _FAINT_INK = (255, 255, 255), (32, 32, 32), (110, 110, 110)
_GAP = 8
_FONT_SIZE = 15
_LAYER_TILE, _LAYERS_PER_ROW = 128, 6


@cache
def _load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_text(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    *,
    width: int,
    size: int = _FONT_SIZE,
    colour: tuple[int, int, int] = _INK,
) -> None:
    """Draw one line of text, truncated to `width` pixels."""
    text, font = replace_unprintable(text), _load_font(size)
    if draw.textlength(text, font=font) > width:
        kept = len(text)
        while kept and draw.textlength(text[:kept] + "…", font=font) > width:
            kept -= 1
        text = text[:kept] + "…"
    draw.text(position, text, font=font, fill=colour)


def draw_example_grid(examples: Mapping[str, Sequence[Image.Image]], *, tile: int = 96) -> Image.Image:
    """Draw example images, one row per class below its name.

    Args:
        examples: class name -> images of any size and mode. Only the first 20 classes are drawn; the number of further
            classes is written below them.
        tile: side in pixels of the square that each image is padded to.

    Returns:
        An RGB image.

    Raises:
        ValueError: `examples` is empty.
    """
    if not examples:
        raise ValueError("examples: expected at least one class, got none")
    shown = list(examples.items())[:MAX_GRID_CLASSES]
    heading = _FONT_SIZE + 8
    row_height = heading + tile + _GAP
    num_left_out = len(examples) - len(shown)
    columns = max(1, *(len(images) for _, images in shown))
    width = max(_GAP + columns * (tile + _GAP), 320)
    sheet = Image.new("RGB", (width, _GAP + len(shown) * row_height + (heading if num_left_out else 0)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(shown):
        top = _GAP + row * row_height
        _draw_text(draw, (_GAP, top), name, width=width - 2 * _GAP)
        for column, image in enumerate(images):
            sheet.paste(_pad_to_square(image, tile), (_GAP + column * (tile + _GAP), top + heading))
    if num_left_out:
        position = (_GAP, _GAP + len(shown) * row_height)
        text = f"and {num_left_out:,} more {'class' if num_left_out == 1 else 'classes'}"
        _draw_text(draw, position, text, width=width - 2 * _GAP, colour=_FAINT_INK)
    return sheet


def _pad_to_square(image: Image.Image, side: int) -> Image.Image:
    """Fit the whole image into a square on light grey."""
    return ImageOps.pad(convert_to_rgb(image), (side, side), color=(238, 238, 238))


# ---------------------------------------------------------------------------------------------------------------------
# Attention

# From low to high. Lightness rises evenly, so that the order is visible in greyscale and with any colour vision.
_HEAT_COLOURS = np.array(
    [(12, 10, 40), (62, 22, 102), (122, 32, 112), (184, 50, 92), (232, 92, 56), (250, 156, 40), (252, 240, 150)],
    dtype=np.float32,
)
_HEAT_OPACITY = 0.6


def overlay_heatmap(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Blend a heat map over an image, dark for low values and bright for high values.

    The image is converted to grey, so that all colour in the result comes from the heat map.

    Args:
        image: an image of any mode.
        heat: finite numbers `[rows, columns]`, resized to the image. The minimum becomes dark violet, the maximum pale
            yellow. A constant map is dark violet everywhere.

    Returns:
        An RGB image of the size of `image`.

    Raises:
        ValueError: `heat` is empty, has another rank, or contains NaN or infinity.
    """
    heat = np.asarray(heat, dtype=np.float32)
    if heat.ndim != 2 or heat.size == 0:
        raise ValueError(f"heat: expected [rows, columns], got shape {heat.shape}")
    if not np.isfinite(heat).all():
        raise ValueError("heat: expected finite numbers, got NaN or infinity")
    heat = heat - heat.min()
    heat = heat / (heat.max() or 1)
    enlarged = np.asarray(Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC)).clip(0, 1)
    anchors = np.linspace(0, 1, len(_HEAT_COLOURS))
    colours = np.stack([np.interp(enlarged, anchors, channel) for channel in _HEAT_COLOURS.T], axis=-1)
    overlay = Image.fromarray((colours + 0.5).astype(np.uint8))
    return Image.blend(convert_to_rgb(image).convert("L").convert("RGB"), overlay, _HEAT_OPACITY)


def attention_rollout(attentions: np.ndarray) -> np.ndarray:
    """Compute attention rollout: how much each output token depends on each input token, over all layers.

    Abnar & Zuidema 2020, arXiv:2005.00928. In each layer the attention is averaged over the heads, the identity is
    added for the residual connection, and rows are normalised to sum 1. The matrices of all layers are multiplied, with
    the first layer rightmost.

    Args:
        attentions: probabilities `[layers, heads, tokens, tokens]`, first layer first. Rows are queries.

    Returns:
        `[tokens, tokens]`, whose rows sum to 1. The dtype is float64 for float64 input, otherwise float32.

    Raises:
        ValueError: `attentions` has another shape.
    """
    attentions = _check_attentions(attentions)
    identity = np.eye(attentions.shape[-1], dtype=np.float64 if attentions.dtype == np.float64 else np.float32)
    rollout = identity
    for layer in attentions:
        mixed = layer.mean(axis=0, dtype=identity.dtype) + identity
        rollout = (mixed / mixed.sum(axis=-1, keepdims=True)) @ rollout
    return rollout


def _check_attentions(attentions: np.ndarray) -> np.ndarray:
    attentions = np.asarray(attentions)
    if attentions.ndim != 4 or attentions.shape[2] != attentions.shape[3] or attentions.size == 0:
        raise ValueError(f"attentions: expected [layers, heads, tokens, tokens], got shape {attentions.shape}")
    return attentions


def overlay_rollout(
    image: Image.Image, attentions: np.ndarray, grid: tuple[int, int], num_prefix: int = 1
) -> Image.Image:
    """Overlay the rollout of the class token on an image. Arguments as for `draw_attention_sheet`."""
    rollout = attention_rollout(_check_grid(attentions, grid, num_prefix))
    return overlay_heatmap(image, _select_patches(rollout, num_prefix).reshape(grid))


def overlay_last_layer(
    image: Image.Image, attentions: np.ndarray, grid: tuple[int, int], num_prefix: int = 1
) -> Image.Image:
    """Overlay the class token's attention in the last layer, averaged over heads. Arguments as for the sheet."""
    return overlay_heatmap(image, compute_last_layer(attentions, grid, num_prefix))


def compute_last_layer(attentions: np.ndarray, grid: tuple[int, int], num_prefix: int = 1) -> np.ndarray:
    """Compute the class token's attention in the last layer, averaged over heads: float32 `[rows, columns]`."""
    last = _check_grid(attentions, grid, num_prefix)[-1].mean(axis=0, dtype=np.float32)
    return _select_patches(last, num_prefix).reshape(grid)


def _select_patches(maps: np.ndarray, num_prefix: int) -> np.ndarray:
    """Attention of the class token to the patches: `[..., tokens, tokens]` -> `[..., patches]`.

    Without a class token it is the mean over the patches.
    """
    return maps[..., 0, num_prefix:] if num_prefix else maps.mean(axis=-2)


def _check_grid(attentions: np.ndarray, grid: tuple[int, int], num_prefix: int) -> np.ndarray:
    attentions = _check_attentions(attentions)
    rows, columns = grid
    patches = attentions.shape[-1] - num_prefix
    if patches != rows * columns:
        without = "tokens without the class token" if num_prefix == 1 else f"tokens without {num_prefix} others"
        raise ValueError(f"grid: expected rows x columns = {patches} ({without}), got {grid}")
    return attentions


def draw_attention_sheet(
    image: Image.Image, attentions: np.ndarray, grid: tuple[int, int], num_prefix: int = 1, *, title: str = ""
) -> Image.Image:
    """Draw the attention of the class token: the last layer, the rollout over all layers, and each layer separately.

    In trained models the first layers may attend mostly to a few patches; the rollout then shows these, and the last
    layer the object.

    Args:
        image: the preprocessed image, of any size and mode.
        attentions: `[layers, heads, tokens, tokens]`, the class token first, then the patches in row-major order.
        grid: (rows, columns) of patches; tokens = num_prefix + rows x columns.
        num_prefix: number of tokens before the patches: the class token, registers. Without any, the mean over the
            patches takes the place of the class token.
        title: a line above everything, such as the predicted class.

    Returns:
        An RGB image. At the top are the image, the last layer and the rollout. Below are all layers, six per row,
        averaged over heads.

    Raises:
        ValueError: `attentions` or `grid` has another shape.
    """
    attentions = _check_grid(attentions, grid, num_prefix)
    of_layers = _select_patches(attentions, num_prefix).mean(axis=1, dtype=np.float32).reshape(-1, *grid)

    num_layers, label, step = len(of_layers), _FONT_SIZE + 8, _LAYER_TILE + _GAP
    large = 2 * _LAYER_TILE + _GAP
    top = _GAP + label if title else _GAP
    top_of_layers = top + label + large + _GAP
    layer_rows = -(-num_layers // _LAYERS_PER_ROW)
    width = _GAP + step * _LAYERS_PER_ROW
    sheet = Image.new("RGB", (width, top_of_layers + layer_rows * (label + step)), _PAPER)

    def place(title: str, content: Image.Image, left: int, top: int, side: int) -> None:
        _draw_text(ImageDraw.Draw(sheet), (left, top), title, width=side)
        sheet.paste(_pad_to_square(content, side), (left, top + label))

    if title:
        _draw_text(ImageDraw.Draw(sheet), (_GAP, _GAP), title, width=width - 2 * _GAP)
    image = ImageOps.contain(convert_to_rgb(image), (large, large))
    place("image", image, _GAP, top, large)
    place("last layer", overlay_last_layer(image, attentions, grid, num_prefix), _GAP + large + _GAP, top, large)
    rollout = overlay_rollout(image, attentions, grid, num_prefix)
    place("rollout over all layers", rollout, _GAP + 2 * (large + _GAP), top, large)
    for index, heat in enumerate(of_layers):
        row, column = divmod(index, _LAYERS_PER_ROW)
        place(
            f"layer {index + 1}",
            overlay_heatmap(image, heat),
            _GAP + column * step,
            top_of_layers + row * (label + step),
            _LAYER_TILE,
        )
    return sheet


# ---------------------------------------------------------------------------------------------------------------------


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write an image atomically, in the format given by the suffix of `path`.

    Raises:
        InputError: Pillow cannot write a format of this suffix, or the folder does not exist.
    """
    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise InputError(f"path: expected a suffix such as .png, .jpg or .webp, got {path}")
    if not path.parent.is_dir():
        raise InputError(f"path: expected an existing folder, got {path.parent}")
    if image_format == "JPEG":
        image = convert_to_rgb(image)  # the format has no transparency
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format=image_format)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
