"""Patch embedding: from pixels, where they lie, to the tokens that the encoder reads.

    tokens = [prefix tokens ; patches @ weight^T + bias] + pos_embed              Dosovitskiy et al. 2021, eq. 1

    pixels [B, C, H, W] or [B, H, W, C]  ->  tokens [B, N, D],   N = T prefix tokens + P patches

One matrix product over B * N rows, whose left operand is never built: row (b, t) gathers the K = C * ph * pw pixels of
patch t - T from the picture; uint8 pixels are normalised in registers. A prefix row (class token, registers) gathers
nothing, so its sum is zero, and the epilogue puts the token there instead of the bias. That wastes T / N of the
product and in exchange the output is written once, in whole tiles.

Op by op PyTorch makes 4 to 6 passes: the pixels converted (and normalised), the convolution's layout change, the
convolution, the concatenation and the addition, each written and read again. Here the pixels are read once from memory
(and again from L2 for each tile of hidden units) and the tokens are written once.

K is walked in the order in which the pixels lie, so that a patch's row is one run of wide loads: (channel, row, column)
for channels-first memory, (row, column, channel) for channels-last, where the weight is first brought into that order.

Backward: the weight gradient is the transposed product, again over pixels read in place, the rows split between
programs and summed in a second stage; the gradients of bias, prefix, position embedding and mask token are sums of the
output gradient over pictures, then over patches. No atomics: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.launch import launch
from fastvit.kernels.operators import operator
from fastvit.kernels.tuning import cdiv, next_power_of_2

# ---------------------------------------------------------------------------------------------------------------------
# Where a pixel lies
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _patch_origin(
    picture, patch, columns, stride_batch, stride_row, stride_column,
    PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr,
):  # fmt: skip
    """Offset of a patch's first pixel, [rows]. 64 bit: a large batch of pictures passes 2**31 pixels."""
    row = patch // columns * PATCH_HEIGHT
    column = patch % columns * PATCH_WIDTH
    return picture.to(tl.int64) * stride_batch + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column


@triton.jit
def _within_patch(
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
def _load_pixels(pointers, mask, channel, dtype: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Pixels [rows, k] in the dtype of the product; with SCALE and SHIFT (a float a channel) normalised in float32."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _store_tokens(
    acc, units, rows, token, is_masked, bias_ptr, cls_token_ptr, pos_embed_ptr, mask_token_ptr, out_ptr,
    total_rows, hidden, PREFIX: tl.constexpr,
):  # fmt: skip
    """acc [rows, units] + bias, the class token or the mask token in its place, + position embedding -> out."""
    unit_mask = units < hidden
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + units, unit_mask, other=0.0).to(tl.float32)[None, :]
    if mask_token_ptr is not None:
        mask_token = tl.load(mask_token_ptr + units, unit_mask, other=0.0).to(tl.float32)
        acc = tl.where(is_masked[:, None], mask_token[None, :], acc)
    token_offset = token[:, None] * hidden + units[None, :]
    out_mask = (rows < total_rows)[:, None] & unit_mask[None, :]
    if cls_token_ptr is not None:
        is_prefix = (token < PREFIX)[:, None]
        prefix = tl.load(cls_token_ptr + token_offset, is_prefix & out_mask, other=0.0).to(tl.float32)
        acc = tl.where(is_prefix, prefix, acc)
    if pos_embed_ptr is not None:
        acc += tl.load(pos_embed_ptr + token_offset, out_mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * hidden + units[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), out_mask)


@triton.jit
def _patch_embed_fwd(
    pixels_ptr, weight_ptr,                        # in: [B, C, H, W] by strides, [D, K]
    bias_ptr, cls_token_ptr, pos_embed_ptr,        # in: [D], [T, D], [N, D]; each may be None
    mask_token_ptr, mask_ptr,                      # in: [D], [B, P] uint8; both or neither
    out_ptr,                                       # out: [B * N, D]
    stride_batch, stride_channel, stride_row, stride_column,  # of pixels
    total_rows, tokens, columns, hidden,           # B * N, N, patches in a row of the picture, D
    PREFIX: tl.constexpr,                          # T
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr,      # C floats each, or None
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    # Programs that follow each other read the same pixels: all but the first find them in L2.
    hidden_blocks = tl.cdiv(hidden, BLOCK_HIDDEN)
    rows = tl.program_id(0) // hidden_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    units = tl.program_id(0) % hidden_blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    unit_mask = units < hidden
    picture = rows // tokens
    token = rows % tokens
    is_patch = (token >= PREFIX) & (rows < total_rows)
    is_masked = rows < 0
    if mask_ptr is not None:
        masked_at = picture.to(tl.int64) * (tokens - PREFIX) + token - PREFIX
        is_masked = tl.load(mask_ptr + masked_at, is_patch, other=0) != 0
    reads = is_patch & (is_masked == 0)

    origin = _patch_origin(
        picture, token - PREFIX, columns, stride_batch, stride_row, stride_column, PATCH_HEIGHT, PATCH_WIDTH
    )
    patch_ptrs = pixels_ptr + origin[:, None]
    weight_ptrs = weight_ptr + units.to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        offset, channel = _within_patch(
            k, stride_channel, stride_row, stride_column, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST
        )
        if K % BLOCK_K == 0:
            pixel_mask = reads[:, None]
            weight_mask = unit_mask[None, :]
        else:
            pixel_mask = reads[:, None] & (k < K)[None, :]
            weight_mask = (k < K)[:, None] & unit_mask[None, :]
        pixels = _load_pixels(
            patch_ptrs + offset[None, :], pixel_mask, channel, weight_ptr.dtype.element_ty, SCALE, SHIFT
        )
        weight = tl.load(weight_ptrs + k[:, None], weight_mask, other=0.0)
        acc = tl.dot(pixels, weight, acc, input_precision="ieee")

    # Half a tile at a time: the sums of a whole one fill the registers, and what is added to them would spill.
    HALF: tl.constexpr = BLOCK_HIDDEN // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_ROWS, 2, HALF)), (0, 2, 1)))
    first_unit = tl.program_id(0) % hidden_blocks * BLOCK_HIDDEN
    _store_tokens(
        left, first_unit + tl.arange(0, HALF), rows, token, is_masked, bias_ptr, cls_token_ptr, pos_embed_ptr,
        mask_token_ptr, out_ptr, total_rows, hidden, PREFIX,
    )  # fmt: skip
    _store_tokens(
        right, first_unit + HALF + tl.arange(0, HALF), rows, token, is_masked, bias_ptr, cls_token_ptr, pos_embed_ptr,
        mask_token_ptr, out_ptr, total_rows, hidden, PREFIX,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _patch_embed_weight_bwd(
    grad_out_ptr, pixels_ptr, mask_ptr,            # in: [B, N, D] and [B, C, H, W] by strides, [B, P] or None
    partial_ptr,                                   # out: [splits, D, K] float32
    stride_grad_batch, stride_grad_token,
    stride_batch, stride_channel, stride_row, stride_column,  # of pixels
    total_patches, patches, columns, hidden, split_patches,   # B * P, P, .., D, patches that one program sums over
    PREFIX: tl.constexpr,
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """partial[split, d, k] = sum over the split's patches of grad_out[patch, d] * pixels[patch, k]."""
    K: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    k_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    hidden_blocks = tl.cdiv(hidden, BLOCK_HIDDEN)
    # Programs that follow each other read the same patches and gradients.
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    units = tl.program_id(0) // k_blocks % hidden_blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    split = tl.program_id(0) // k_blocks // hidden_blocks
    unit_mask = units < hidden
    offset, channel = _within_patch(
        k, stride_channel, stride_row, stride_column, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST
    )
    acc = tl.zeros((BLOCK_HIDDEN, BLOCK_K), tl.float32)
    for start in range(0, split_patches, BLOCK_ROWS):
        rows = split * split_patches + start + tl.arange(0, BLOCK_ROWS)
        reads = rows < total_patches
        picture = rows // patches
        patch = rows % patches
        if mask_ptr is not None:
            reads = reads & (tl.load(mask_ptr + rows, reads, other=1) == 0)
        grad_rows = picture.to(tl.int64) * stride_grad_batch + (patch + PREFIX).to(tl.int64) * stride_grad_token
        grad_out = tl.load(
            grad_out_ptr + grad_rows[:, None] + units[None, :], reads[:, None] & unit_mask[None, :], other=0.0
        )
        origin = _patch_origin(
            picture, patch, columns, stride_batch, stride_row, stride_column, PATCH_HEIGHT, PATCH_WIDTH
        )
        pixel_mask = reads[:, None] if K % BLOCK_K == 0 else reads[:, None] & (k < K)[None, :]
        pixels = _load_pixels(
            pixels_ptr + origin[:, None] + offset[None, :], pixel_mask, channel, grad_out.dtype, SCALE, SHIFT
        )
        acc = tl.dot(tl.trans(grad_out), pixels, acc, input_precision="ieee")
    partial_ptrs = partial_ptr + (split.to(tl.int64) * hidden + units[:, None]) * K + k[None, :]
    tl.store(partial_ptrs, acc, unit_mask[:, None] & (k < K)[None, :])


@triton.jit
def _sum_weight_splits(
    partial_ptr, grad_weight_ptr, splits, size,    # [splits, D, K] float32 -> [D, C, ph, pw]; size = D * K
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The second stage, always in the same order; brings channels-last K back into the weight's order."""
    AREA: tl.constexpr = PATCH_HEIGHT * PATCH_WIDTH
    K: tl.constexpr = CHANNELS * AREA
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        acc += tl.load(partial_ptr + tl.cast(split, tl.int64) * size + index, mask, other=0.0)
    if CHANNELS_LAST:
        k = index % K
        index = index // K * K + k % CHANNELS * AREA + k // CHANNELS
    tl.store(grad_weight_ptr + index, acc.to(grad_weight_ptr.dtype.element_ty), mask)


@triton.jit
def _patch_embed_pixels_bwd(
    grad_out_ptr, weight_ptr, mask_ptr,            # in: [B, N, D] by strides, [D, K], [B, P] or None
    grad_pixels_ptr,                               # out: [B, C, H, W] by strides
    stride_grad_batch, stride_grad_token,
    stride_batch, stride_channel, stride_row, stride_column,  # of grad_pixels
    total_patches, patches, columns, hidden,
    PREFIX: tl.constexpr,
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """grad_pixels[patch, k] = sum over d of grad_out[patch, d] * weight[d, k], written to where the patch lies."""
    K: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    k_blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    rows = tl.program_id(0) // k_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    in_range = rows < total_patches
    reads = in_range
    picture = rows // patches
    patch = rows % patches
    if mask_ptr is not None:
        reads = in_range & (tl.load(mask_ptr + rows, in_range, other=1) == 0)
    grad_rows = picture.to(tl.int64) * stride_grad_batch + (patch + PREFIX).to(tl.int64) * stride_grad_token
    acc = tl.zeros((BLOCK_ROWS, BLOCK_K), tl.float32)
    for start in range(0, hidden, BLOCK_HIDDEN):
        units = start + tl.arange(0, BLOCK_HIDDEN)
        unit_mask = units < hidden
        grad_out = tl.load(
            grad_out_ptr + grad_rows[:, None] + units[None, :], reads[:, None] & unit_mask[None, :], other=0.0
        )
        weight_mask = unit_mask[:, None] if K % BLOCK_K == 0 else unit_mask[:, None] & (k < K)[None, :]
        weight = tl.load(weight_ptr + units[:, None].to(tl.int64) * K + k[None, :], weight_mask, other=0.0)
        acc = tl.dot(grad_out.to(weight.dtype), weight, acc, input_precision="ieee")
    origin = _patch_origin(picture, patch, columns, stride_batch, stride_row, stride_column, PATCH_HEIGHT, PATCH_WIDTH)
    offset, _ = _within_patch(
        k, stride_channel, stride_row, stride_column, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST
    )
    tl.store(
        grad_pixels_ptr + origin[:, None] + offset[None, :],
        acc.to(grad_pixels_ptr.dtype.element_ty),
        in_range[:, None] & (k < K)[None, :],
    )


@triton.jit
def _patch_embed_tokens_bwd(
    grad_out_ptr, mask_ptr,                        # in: [B, N, D] by strides, [B, P] or None
    grad_pos_ptr, grad_cls_ptr,                    # out: [N, D], [T, D]; each may be None
    projected_ptr, masked_ptr,                     # out: [N, D] float32, sums where unmasked, where masked (or None)
    stride_grad_batch, stride_grad_token, batch, tokens, hidden,
    PREFIX: tl.constexpr,
    BLOCK_PICTURES: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Sums over the pictures, one token and BLOCK_HIDDEN hidden units a program."""
    token = tl.program_id(0)
    units = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    unit_mask = units < hidden
    grad_out_ptr += token.to(tl.int64) * stride_grad_token
    maskable = tl.where(token < PREFIX, 0, batch)  # a prefix token is masked in no picture
    projected = tl.zeros((BLOCK_PICTURES, BLOCK_HIDDEN), tl.float32)
    masked = tl.zeros((BLOCK_PICTURES, BLOCK_HIDDEN), tl.float32)
    for start in range(0, batch, BLOCK_PICTURES):
        pictures = start + tl.arange(0, BLOCK_PICTURES)
        in_range = pictures < batch
        offset = pictures.to(tl.int64)[:, None] * stride_grad_batch + units[None, :]
        grad_out = tl.load(grad_out_ptr + offset, in_range[:, None] & unit_mask[None, :], other=0.0).to(tl.float32)
        if mask_ptr is not None:
            at = pictures.to(tl.int64) * (tokens - PREFIX) + token - PREFIX
            is_masked = tl.load(mask_ptr + at, pictures < maskable, other=0) != 0
            projected += tl.where(is_masked[:, None], 0.0, grad_out)
            masked += tl.where(is_masked[:, None], grad_out, 0.0)
        else:
            projected += grad_out
    projected_sum = tl.sum(projected, 0)
    masked_sum = tl.sum(masked, 0)
    at = token * hidden + units
    tl.store(projected_ptr + at, projected_sum, unit_mask)
    if mask_ptr is not None:
        tl.store(masked_ptr + at, masked_sum, unit_mask)
    if grad_pos_ptr is not None:
        tl.store(grad_pos_ptr + at, (projected_sum + masked_sum).to(grad_pos_ptr.dtype.element_ty), unit_mask)
    if grad_cls_ptr is not None:  # noqa: SIM102 (known at compile time, and the next is not)
        if token < PREFIX:
            tl.store(grad_cls_ptr + at, projected_sum.to(grad_cls_ptr.dtype.element_ty), unit_mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------

SUM_BLOCK = 1024


ENOUGH_PROGRAMS = 100
FULL_DEVICE = 132  # multiprocessors of an H100; the same number everywhere: the same sums everywhere


def _shape(rows: int, columns: int, weight: Tensor) -> str:
    """The tuning table's word for a product of [rows, columns]: whether large tiles fill a device, and the weight."""
    tiles = cdiv(rows, 128) * cdiv(columns, 128)
    return f"{'many' if tiles >= ENOUGH_PROGRAMS else 'few'} tiles, {'x'.join(map(str, weight.shape))}"


def _matrix_options(tile: tuning.Choice, rows: str, columns: str, depth: str) -> dict[str, int]:
    """A matrix tile of the tuning table as a kernel's arguments; the kernel's names for its three sides differ."""
    blocks = {f"BLOCK_{name}": tile[side] for name, side in ((rows, "rows"), (columns, "columns"), (depth, "depth"))}
    return blocks | {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}


def _split_patches(total_patches: int, tiles: int, block_rows: int) -> int:
    """Patches that one program of the weight gradient sums over, so that the programs fill the device once."""
    splits = max(1, FULL_DEVICE // tiles)
    return cdiv(cdiv(total_patches, splits), block_rows) * block_rows


def _channels_first(pixels: Tensor, channels: int) -> Tensor:
    """Pixels, given in either layout, as a [B, C, H, W] view."""
    return pixels if pixels.shape[1] == channels else pixels.permute(0, 3, 1, 2)


def _geometry(pixels: Tensor, weight: Tensor) -> dict[str, object]:
    """What every kernel is told about [B, C, H, W] pixels and [D, C, ph, pw] weight."""
    _, channels, patch_height, patch_width = weight.shape
    stride_batch, stride_channel, stride_row, stride_column = pixels.stride()
    return {
        "stride_batch": stride_batch,
        "stride_channel": stride_channel,
        "stride_row": stride_row,
        "stride_column": stride_column,
        "columns": pixels.shape[3] // patch_width,
        "hidden": weight.shape[0],
        "CHANNELS": channels,
        "PATCH_HEIGHT": patch_height,
        "PATCH_WIDTH": patch_width,
        "CHANNELS_LAST": channels > 1 and stride_channel == 1 and stride_column == channels,
    }


def _patches(pixels: Tensor, weight: Tensor) -> int:
    return (pixels.shape[2] // weight.shape[2]) * (pixels.shape[3] // weight.shape[3])


def _weight_matrix(weight: Tensor, channels_last: bool) -> Tensor:
    """Weight as [D, K] with K in the order in which the pixels lie; a view wherever it already has that order."""
    if channels_last:
        weight = weight.permute(0, 2, 3, 1)
    return weight.contiguous().view(weight.shape[0], -1)


def _normalization(pixels: Tensor, mean: list[float] | None, std: list[float] | None) -> dict[str, object]:
    """uint8 pixels times SCALE plus SHIFT, a float a channel, are (pixels / 255 - mean) / std.

    They are compile-time constants: no table to copy to the device at each call, and a data set has one mean and std.
    """
    if pixels.dtype != torch.uint8:
        return {"SCALE": None, "SHIFT": None}
    return {
        "SCALE": tuple(1 / (255 * s) for s in std),
        "SHIFT": tuple(-m / s for m, s in zip(mean, std, strict=True)),
    }


def _output_dtype(weight: Tensor, cls_token: Tensor | None, pos_embed: Tensor | None) -> torch.dtype:
    """What concatenation and addition promote to: float32 tokens where bfloat16 meets a float32 position embedding."""
    dtype = weight.dtype
    for other in (cls_token, pos_embed):
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _mask_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _row_major(grad_out: Tensor) -> Tensor:
    """grad_out with its hidden units side by side: the gradient of a plain sum, say, is one number expanded."""
    return grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()


def _launch_forward(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    pos_embed: Tensor | None,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    hidden, channels = weight.shape[:2]
    pixels = _channels_first(pixels, channels)
    geometry = _geometry(pixels, weight)
    prefix = 0 if cls_token is None else cls_token.shape[1]
    tokens = prefix + _patches(pixels, weight)
    out = torch.empty(
        pixels.shape[0], tokens, hidden, dtype=_output_dtype(weight, cls_token, pos_embed), device=pixels.device
    )
    if out.numel() == 0:
        return out
    total_rows = pixels.shape[0] * tokens
    operands = (
        pixels,
        _weight_matrix(weight, geometry["CHANNELS_LAST"]),
        *_contiguous(bias, cls_token if prefix else None, pos_embed, None if mask is None else mask_token),
        _mask_bytes(mask),
        out,
    )
    normalization = _normalization(pixels, mean, std)

    def run(tile: tuning.Choice) -> None:
        grid = (cdiv(total_rows, tile["rows"]) * cdiv(hidden, tile["columns"]),)
        named = {
            "total_rows": total_rows,
            "tokens": tokens,
            "PREFIX": prefix,
            **geometry,
            **normalization,
            **_matrix_options(tile, "ROWS", "HIDDEN", "K"),
        }
        launch(_patch_embed_fwd, grid, operands, named=named)

    shape = _shape(total_rows, hidden, weight)
    run(tuning.choose("patch_embed_forward", shape, weight.dtype, pixels.device, run))
    return out


def _launch_weight_backward(
    grad_out: Tensor,
    pixels: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    pixels = _channels_first(pixels, weight.shape[1])
    if pixels.shape[0] == 0:
        return grad_weight.zero_()
    geometry = _geometry(pixels, weight)
    # Every program of a split reads these rows; float32 ones (autocast) would be transposed 4 bytes at a time.
    grad_out = _row_major(grad_out).to(weight.dtype)
    patches = _patches(pixels, weight)
    total_patches = pixels.shape[0] * patches
    hidden, size_k = weight.shape[0], weight[0].numel()
    normalization, mask_bytes = _normalization(pixels, mean, std), _mask_bytes(mask)

    def run(tile: tuning.Choice) -> None:
        tiles = cdiv(hidden, tile["rows"]) * cdiv(size_k, tile["columns"])
        split_patches = _split_patches(total_patches, tiles, tile["depth"])
        splits = cdiv(total_patches, split_patches)
        partial = torch.empty(splits, hidden, size_k, dtype=torch.float32, device=pixels.device)
        named = {
            "stride_grad_batch": grad_out.stride(0),
            "stride_grad_token": grad_out.stride(1),
            "total_patches": total_patches,
            "patches": patches,
            "split_patches": split_patches,
            "PREFIX": grad_out.shape[1] - patches,
            **geometry,
            **normalization,
            **_matrix_options(tile, "HIDDEN", "K", "ROWS"),
        }
        launch(_patch_embed_weight_bwd, (splits * tiles,), (grad_out, pixels, mask_bytes, partial), named=named)
        order = {name: geometry[name] for name in ("CHANNELS", "PATCH_HEIGHT", "PATCH_WIDTH", "CHANNELS_LAST")}
        grid = (cdiv(hidden * size_k, SUM_BLOCK),)
        numbers = (splits, hidden * size_k)
        launch(_sum_weight_splits, grid, (partial, grad_weight), numbers, {**order, "BLOCK": SUM_BLOCK})

    shape = _shape(hidden * cdiv(total_patches, 4096), size_k, weight)  # splits sum over 4096 patches or more
    run(tuning.choose("patch_embed_weight", shape, weight.dtype, pixels.device, run))
    return grad_weight


def _launch_pixels_backward(grad_out: Tensor, pixels: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    grad_pixels = torch.empty_like(pixels)
    view = _channels_first(grad_pixels, weight.shape[1])
    patch_height, patch_width = weight.shape[2:]
    view[:, :, view.shape[2] // patch_height * patch_height :].zero_()  # what is left at the edges was not read
    view[:, :, :, view.shape[3] // patch_width * patch_width :].zero_()
    if pixels.shape[0] == 0:
        return grad_pixels
    geometry = _geometry(view, weight)
    grad_out = _row_major(grad_out)
    patches = _patches(view, weight)
    total_patches = view.shape[0] * patches
    size_k = weight[0].numel()
    weight_matrix, mask_bytes = _weight_matrix(weight, geometry["CHANNELS_LAST"]), _mask_bytes(mask)

    def run(tile: tuning.Choice) -> None:
        grid = (cdiv(total_patches, tile["rows"]) * cdiv(size_k, tile["columns"]),)
        named = {
            "stride_grad_batch": grad_out.stride(0),
            "stride_grad_token": grad_out.stride(1),
            "total_patches": total_patches,
            "patches": patches,
            "PREFIX": grad_out.shape[1] - patches,
            **geometry,
            **_matrix_options(tile, "ROWS", "K", "HIDDEN"),
        }
        launch(_patch_embed_pixels_bwd, grid, (grad_out, weight_matrix, mask_bytes, view), named=named)

    shape = _shape(total_patches, size_k, weight)
    run(tuning.choose("patch_embed_pixels", shape, weight.dtype, pixels.device, run))
    return grad_pixels


def _launch_tokens_backward(
    grad_out: Tensor,
    mask: Tensor | None,
    prefix: int,
    bias_dtype: torch.dtype | None,
    cls_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
    mask_token_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _empty_token_gradients(grad_out, prefix, bias_dtype, cls_dtype, pos_dtype, mask_token_dtype)
    batch, tokens, hidden = grad_out.shape
    if batch == 0:
        return tuple(grad.zero_() for grad in grads)
    grad_bias, grad_cls, grad_pos, grad_mask_token = grads
    grad_out = _row_major(grad_out)
    mask = _mask_bytes(mask)
    projected = torch.empty(tokens, hidden, dtype=torch.float32, device=grad_out.device)
    masked = None if mask is None else torch.empty_like(projected)
    block_hidden = min(256, next_power_of_2(hidden))
    outputs = (grad_pos if grad_pos.numel() else None, grad_cls if grad_cls.numel() else None, projected, masked)
    named = {"PREFIX": prefix, "BLOCK_PICTURES": 16, "BLOCK_HIDDEN": block_hidden}
    numbers = (grad_out.stride(0), grad_out.stride(1), batch, tokens, hidden)
    grid = (tokens, cdiv(hidden, block_hidden))
    launch(_patch_embed_tokens_bwd, grid, (grad_out, mask, *outputs), numbers, named)
    if bias_dtype is not None:
        grad_bias = projected[prefix:].sum(0).to(bias_dtype)
    if masked is not None and mask_token_dtype is not None:
        grad_mask_token = masked[prefix:].sum(0).to(mask_token_dtype).view(grad_mask_token.shape)
    return grad_bias, grad_cls, grad_pos, grad_mask_token


def _empty_token_gradients(
    grad_out: Tensor,
    prefix: int,
    bias_dtype: torch.dtype | None,
    cls_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
    mask_token_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the gradients of bias, class token, position embedding, mask token; of no elements where not wanted."""
    _, tokens, hidden = grad_out.shape
    shapes = ((hidden,), (1, prefix, hidden), (1, tokens, hidden), (1, 1, hidden))
    dtypes = (bias_dtype, cls_dtype, pos_dtype, mask_token_dtype)
    return tuple(
        grad_out.new_empty(0) if dtype is None else grad_out.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The operator
# ---------------------------------------------------------------------------------------------------------------------


@operator("patch_embed")
def _patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    pos_embed: Tensor | None,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    return _launch_forward(pixels, weight, bias, cls_token, pos_embed, mask_token, mask, mean, std)


@_patch_embed.register_fake
def _(pixels, weight, bias, cls_token, pos_embed, mask_token, mask, mean, std):
    view = _channels_first(pixels, weight.shape[1])
    tokens = _patches(view, weight) + (0 if cls_token is None else cls_token.shape[1])
    dtype = _output_dtype(weight, cls_token, pos_embed)
    return pixels.new_empty(pixels.shape[0], tokens, weight.shape[0], dtype=dtype)


@operator("patch_embed_weight_backward")
def _patch_embed_weight_backward(
    grad_out: Tensor,
    pixels: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
) -> Tensor:
    return _launch_weight_backward(grad_out, pixels, weight, mask, mean, std)


@_patch_embed_weight_backward.register_fake
def _(grad_out, pixels, weight, mask, mean, std):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@operator("patch_embed_pixels_backward")
def _patch_embed_pixels_backward(grad_out: Tensor, pixels: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    return _launch_pixels_backward(grad_out, pixels, weight, mask)


@_patch_embed_pixels_backward.register_fake
def _(grad_out, pixels, weight, mask):
    return torch.empty_like(pixels)


@operator("patch_embed_tokens_backward")
def _patch_embed_tokens_backward(
    grad_out: Tensor,
    mask: Tensor | None,
    prefix: int,
    bias_dtype: torch.dtype | None,
    cls_dtype: torch.dtype | None,
    pos_dtype: torch.dtype | None,
    mask_token_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch_tokens_backward(grad_out, mask, prefix, bias_dtype, cls_dtype, pos_dtype, mask_token_dtype)


@_patch_embed_tokens_backward.register_fake
def _(grad_out, mask, prefix, bias_dtype, cls_dtype, pos_dtype, mask_token_dtype):
    return _empty_token_gradients(grad_out, prefix, bias_dtype, cls_dtype, pos_dtype, mask_token_dtype)


def _setup_context(ctx, inputs, output) -> None:
    pixels, weight, bias, cls_token, pos_embed, mask_token, mask, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(pixels, weight, mask)
    ctx.prefix = 0 if cls_token is None else cls_token.shape[1]
    ctx.token_dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, cls_token, pos_embed, mask_token)]


def _backward(ctx, grad_out: Tensor):
    pixels, weight, mask = ctx.saved_tensors
    needs_pixels, needs_weight, *needs_tokens = ctx.needs_input_grad[:6]
    if mask is None:
        needs_tokens[3] = False
    grad_pixels = grad_weight = None
    grad_tokens = [None] * 4
    if needs_pixels:
        grad_pixels = _patch_embed_pixels_backward(grad_out, pixels, weight, mask)
    if needs_weight:
        grad_weight = _patch_embed_weight_backward(grad_out, pixels, weight, mask, ctx.mean, ctx.std)
    if any(needs_tokens):
        dtypes = [dtype if needed else None for dtype, needed in zip(ctx.token_dtypes, needs_tokens, strict=True)]
        sums = _patch_embed_tokens_backward(grad_out, mask, ctx.prefix, *dtypes)
        grad_tokens = [grad if needed else None for grad, needed in zip(sums, needs_tokens, strict=True)]
    return grad_pixels, grad_weight, *grad_tokens, None, None, None


_patch_embed.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------------------------
# The public function
# ---------------------------------------------------------------------------------------------------------------------


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    pos_embed: Tensor | None,
    *,
    patch_size: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Cut a picture into patches, project each to the hidden size, prepend the class token, add the position embedding.

    pixels: [B, C, H, W] or [B, H, W, C], any strides; float32, bfloat16, float16, or uint8 with `mean` and `std` (one
        float a channel, for values in 0..1) to normalise by. What is left over at the right and bottom edge when H or W
        is no multiple of the patch size is not read. B may be 0.
    weight: [D, C, ph, pw], float32, bfloat16 or float16; pixels are converted to its dtype. bias: [D], its dtype.
    cls_token: [1, T, D], the tokens before the patches; pos_embed: [1, T + P, D]; either may be in another float dtype.
    mask: bool [B, P] with mask_token [1, 1, D]: masked patches are not read, the mask token stands in their place.
    Returns [B, T + P, D] in the dtype that weight, cls_token and pos_embed promote to. Sums are in float32 throughout.
    Differentiable once in everything but uint8 pixels and mask. Under autocast weight and bias are cast like a
    convolution's. Raises ValueError for anything else, before any launch. Dosovitskiy et al. 2021, arXiv:2010.11929.
    """
    _check(pixels, weight, bias, cls_token, pos_embed, tuple(patch_size), mean, std, mask_token, mask)
    if torch.is_autocast_enabled(pixels.device.type):
        dtype = torch.get_autocast_dtype(pixels.device.type)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if pixels.dtype == torch.uint8:
        mean, std = [float(value) for value in mean], [float(value) for value in std]
    else:
        mean = std = None
    return _patch_embed(
        pixels, weight, bias, cls_token, pos_embed, mask_token if mask is not None else None, mask, mean, std
    )


def _check(pixels, weight, bias, cls_token, pos_embed, patch_size, mean, std, mask_token, mask) -> None:
    if weight.dim() != 4 or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight: expected [D, C, ph, pw] in float32, bfloat16 or float16, got {list(weight.shape)} {weight.dtype}"
        )
    hidden, channels, *kernel_size = weight.shape
    if tuple(kernel_size) != patch_size:
        raise ValueError(f"patch_size: expected weight's {tuple(kernel_size)}, got {patch_size}")
    if pixels.dim() != 4 or channels not in (pixels.shape[1], pixels.shape[3]):
        raise ValueError(
            f"pixels: expected [B, {channels}, H, W] or [B, H, W, {channels}] (weight has {channels} channels),"
            f" got {list(pixels.shape)}"
        )
    view = _channels_first(pixels, channels)
    batch, _, height, width = view.shape
    patches = _patches(view, weight)
    if patches == 0:
        raise ValueError(f"pixels: expected room for one patch of {patch_size}, got {(height, width)} (height, width)")
    _check_pixel_values(pixels, channels, mean, std)
    if mask is not None and mask_token is None:
        raise ValueError("mask_token: expected [1, 1, D] with a mask, got None")
    if cls_token is not None and cls_token.dim() != 3:
        raise ValueError(f"cls_token: expected [1, T, {hidden}], got {list(cls_token.shape)}")
    prefix = 0 if cls_token is None else cls_token.shape[1]
    for name, tensor, shape in (
        ("bias", bias, (hidden,)),
        ("cls_token", cls_token, (1, prefix, hidden)),
        ("pos_embed", pos_embed, (1, prefix + patches, hidden)),
        ("mask_token", mask_token, (1, 1, hidden)),
        ("mask", mask, (batch, patches)),
    ):
        if tensor is None:
            continue
        allowed = (torch.bool,) if name == "mask" else (weight.dtype,) if name == "bias" else DTYPES
        check_tensor(name, tensor, shape, allowed, weight.device)
    if pixels.device != weight.device:
        raise ValueError(f"pixels: expected device {weight.device}, weight's, got {pixels.device}")


def _check_pixel_values(
    pixels: Tensor, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> None:
    if pixels.dtype == torch.uint8:
        for name, values in (("mean", mean), ("std", std)):
            if values is None or len(values) != channels:
                raise ValueError(f"{name}: expected {channels} floats, one a channel, for uint8 pixels, got {values}")
    elif pixels.dtype not in DTYPES:
        raise ValueError(f"pixels: expected uint8, float32, bfloat16 or float16, got {pixels.dtype}")
