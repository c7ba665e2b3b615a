"""Where the pixels of a patch lie, for kernels that read them in place and for the plain PyTorch beside them.

K = C * ph * pw values of a patch are walked in the order of memory, so that a patch's row is one run of wide loads:
(channel, row, column) for channels-first memory, (row, column, channel) for channels-last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def patch_origin(
    image, patch, columns, stride_batch, stride_row, stride_column,
    PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr,
):  # fmt: skip
    """Offset of a patch's first pixel, [rows]. 64 bit: a large batch of images passes 2**31 pixels."""
    row = patch // columns * PATCH_HEIGHT
    column = patch % columns * PATCH_WIDTH
    return image.to(tl.int64) * stride_batch + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column


@triton.jit
def within_patch(
    k, stride_channel, stride_row, stride_column,
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Offset of a patch's k-th value from its first, and that value's channel, both [k]."""
    if CHANNELS_LAST:  # the pw * C values of a patch's row lie side by side
        channel = k % CHANNELS
        offset = (k // (PATCH_WIDTH * CHANNELS)).to(tl.int64) * stride_row + k % (PATCH_WIDTH * CHANNELS)
    else:
        channel = k // (PATCH_HEIGHT * PATCH_WIDTH)
        offset = channel.to(tl.int64) * stride_channel
        offset += (k // PATCH_WIDTH % PATCH_HEIGHT).to(tl.int64) * stride_row
        offset += (k % PATCH_WIDTH).to(tl.int64) * stride_column
    return offset, channel


@triton.jit
def load_pixels(pointers, mask, channel, dtype: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Pixels [rows, k] in the dtype of the product; normalised with SCALE and SHIFT (C floats each) in float32."""
    pixels = tl.load(pointers, mask, other=0)
    if SCALE is not None:
        scale = tl.zeros(channel.shape, tl.float32)
        shift = tl.zeros(channel.shape, tl.float32)
        for c in tl.static_range(len(SCALE)):
            scale = tl.where(channel == c, SCALE[c], scale)
            shift = tl.where(channel == c, SHIFT[c], shift)
        # Lanes that were not loaded become `shift`: finite, and multiplied by zeros or not stored.
        pixels = pixels.to(tl.float32) * scale[None, :] + shift[None, :]
    return pixels.to(dtype)


def channels_first(pixels: Tensor, channels: int) -> Tensor:
    """Pixels, given in either layout, as a [B, C, H, W] view."""
    return pixels if pixels.shape[1] == channels else pixels.permute(0, 3, 1, 2)


def patch_grid(pixels: Tensor, weight: Tensor) -> tuple[int, int]:
    """Patches in a column and in a row of [B, C, H, W] images."""
    return pixels.shape[2] // weight.shape[2], pixels.shape[3] // weight.shape[3]


def is_channels_last(pixels: Tensor) -> bool:
    """Whether all values of a row of a [B, C, H, W] image lie side by side, channel by channel."""
    channels = pixels.shape[1]
    return channels > 1 and pixels.stride(1) == 1 and pixels.stride(3) == channels


def constants(pixels: Tensor, weight: Tensor, mean: list[float] | None, std: list[float] | None) -> dict[str, object]:
    """What the kernels are compiled for: the patch, the layout of [B, C, H, W] pixels and their normalisation.

    (pixels / 255 - mean) / std of uint8 pixels is pixels * SCALE + SHIFT. These are compile-time constants: there is no
    table to copy to the device at each call, and a data set has one mean and std.
    """
    is_uint8 = pixels.dtype == torch.uint8
    return {
        "CHANNELS": weight.shape[1],
        "PATCH_HEIGHT": weight.shape[2],
        "PATCH_WIDTH": weight.shape[3],
        "CHANNELS_LAST": is_channels_last(pixels),
        "SCALE": tuple(1 / (255 * s) for s in std) if is_uint8 else None,
        "SHIFT": tuple(-m / s for m, s in zip(mean, std, strict=True)) if is_uint8 else None,
    }


def mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def gather_patches(
    pixels: Tensor, weight: Tensor, mask: Tensor | None, mean: list[float] | None, std: list[float] | None
) -> Tensor:
    """The matrix that the kernels never build: patches [B, P, C * ph * pw] in weight's dtype, zero where masked."""
    _, channels, height, width = weight.shape
    pixels = channels_first(pixels, channels)
    rows, columns = patch_grid(pixels, weight)
    if pixels.dtype == torch.uint8:
        offset, scale = (pixels.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        pixels = (pixels / 255 - offset) / scale
    patches = pixels[:, :, : rows * height, : columns * width].to(weight.dtype)
    patches = patches.unflatten(3, (columns, width)).unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(pixels.shape[0], rows * columns, channels * height * width)
    return patches if mask is None else patches.masked_fill(mask.unsqueeze(-1), 0)
