"""Patch embedding: from pixels, read in place, to the tokens that the encoder reads.

    tokens = [prefix tokens ; patches @ weight^T + bias] + pos_embed              Dosovitskiy et al. 2021, eq. 1

    pixels [B, C, H, W] or [B, H, W, C]  ->  tokens [B, N, D],   N = T prefix tokens + P patches

One matmul over B * N rows, whose left operand is never materialised: row (b, t) gathers the K = C * ph * pw pixels of
patch t - T from the image, and uint8 pixels are normalised in registers. A prefix row (class token, registers) gathers
nothing, and the epilogue adds the token instead of the bias, so that the output is written in whole tiles. Pixels are
read once from memory (and again from L2 for each tile of hidden units), tokens are written once. PyTorch makes 4 to 6
passes: cast and normalisation, the convolution's layout change, convolution, concatenation and addition.

Backward: the weight gradient is the transposed matmul, again over pixels read in place; its rows are split between
programs and summed in a second stage. The gradients of bias, prefix, position embedding and mask token are sums of the
output gradient over images, then over patches. There are no atomics: two runs are bitwise equal. The gradient of float
pixels, rarely needed, is plain PyTorch.

The K values of a patch are visited in memory order, so that one row of a patch is a run of wide loads: (channel, row,
column) for channels-first memory, (row, column, channel) for channels-last.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.operators import is_fake, register
from fastvit.kernels.tuning import cdiv, next_power_of_2

MIN_LARGE_TILES = 100  # large tiles fill a device
MULTIPROCESSORS = 132  # an H100's; the same on every GPU, so that sums have the same order


@triton.jit
def patch_origin(
    image, patch, columns, stride_batch, stride_row, stride_column,
    PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr,
):  # fmt: skip
    """Offset of a patch's first pixel, [rows]. 64 bit: a large batch has more than 2**31 pixels."""
    row = patch // columns * PATCH_HEIGHT
    column = patch % columns * PATCH_WIDTH
    return image.to(tl.int64) * stride_batch + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column


@triton.jit
def within_patch(
    k, stride_channel, stride_row, stride_column,
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Offset of a patch's k-th value from its first, and the value's channel, both [k]."""
    if CHANNELS_LAST:  # the pw * C values of a patch's row are contiguous
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
    """Pixels [rows, k] in the matmul's dtype; normalised in float32 if SCALE and SHIFT (C floats each) are given."""
    pixels = tl.load(pointers, mask, other=0)
    if SCALE is not None:
        scale = tl.zeros(channel.shape, tl.float32)
        shift = tl.zeros(channel.shape, tl.float32)
        for c in tl.static_range(len(SCALE)):
            scale = tl.where(channel == c, SCALE[c], scale)
            shift = tl.where(channel == c, SHIFT[c], shift)
        # Masked lanes become `shift`: finite, and multiplied by zeros or not stored.
        pixels = pixels.to(tl.float32) * scale[None, :] + shift[None, :]
    return pixels.to(dtype)


@triton.jit
def _store_tokens(
    acc, units, rows, token, is_masked, bias_ptr, cls_token_ptr, pos_embed_ptr, mask_token_ptr, out_ptr,
    total_rows, hidden, PREFIX: tl.constexpr,
):  # fmt: skip
    """Store acc [rows, units] + bias, replaced by class or mask token where they apply, + position embedding."""
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
    total_rows, tokens, columns, hidden,           # B * N, N, patches in a row of the image, D
    PREFIX: tl.constexpr,                          # T
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr,      # C floats each, or None
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    # Consecutive programs read the same pixels: all but the first find them in L2.
    hidden_blocks = tl.cdiv(hidden, BLOCK_HIDDEN)
    rows = tl.program_id(0) // hidden_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_unit = tl.program_id(0) % hidden_blocks * BLOCK_HIDDEN
    units = first_unit + tl.arange(0, BLOCK_HIDDEN)
    unit_mask = units < hidden
    image = rows // tokens
    token = rows % tokens
    is_patch = (token >= PREFIX) & (rows < total_rows)
    is_masked = rows < 0
    if mask_ptr is not None:
        masked_at = image.to(tl.int64) * (tokens - PREFIX) + token - PREFIX
        is_masked = tl.load(mask_ptr + masked_at, is_patch, other=0) != 0
    reads = is_patch & (is_masked == 0)

    origin = patch_origin(
        image, token - PREFIX, columns, stride_batch, stride_row, stride_column, PATCH_HEIGHT, PATCH_WIDTH
    )
    patch_ptrs = pixels_ptr + origin[:, None]
    weight_ptrs = weight_ptr + units.to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_ROWS, BLOCK_HIDDEN), tl.float32)
    for k_start in range(0, K, BLOCK_K):
        k = k_start + tl.arange(0, BLOCK_K)
        offset, channel = within_patch(
            k, stride_channel, stride_row, stride_column, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST
        )
        if K % BLOCK_K == 0:
            pixel_mask = reads[:, None]
            weight_mask = unit_mask[None, :]
        else:
            pixel_mask = reads[:, None] & (k < K)[None, :]
            weight_mask = (k < K)[:, None] & unit_mask[None, :]
        pixels = load_pixels(
            patch_ptrs + offset[None, :], pixel_mask, channel, weight_ptr.dtype.element_ty, SCALE, SHIFT
        )
        weight = tl.load(weight_ptrs + k[:, None], weight_mask, other=0.0)
        acc = tl.dot(pixels, weight, acc, input_precision="ieee")

    # Half a tile at a time: the sums of a whole tile fill the registers, and the epilogue would spill.
    HALF: tl.constexpr = BLOCK_HIDDEN // 2
    left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_ROWS, 2, HALF)), (0, 2, 1)))
    units = first_unit + tl.arange(0, HALF)
    _store_tokens(
        left, units, rows, token, is_masked, bias_ptr, cls_token_ptr, pos_embed_ptr, mask_token_ptr, out_ptr,
        total_rows, hidden, PREFIX,
    )  # fmt: skip
    _store_tokens(
        right, units + HALF, rows, token, is_masked, bias_ptr, cls_token_ptr, pos_embed_ptr, mask_token_ptr, out_ptr,
        total_rows, hidden, PREFIX,
    )  # fmt: skip


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
    # Consecutive programs read the same patches and gradients.
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    units = tl.program_id(0) // k_blocks % hidden_blocks * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    split = tl.program_id(0) // k_blocks // hidden_blocks
    unit_mask = units < hidden
    offset, channel = within_patch(
        k, stride_channel, stride_row, stride_column, CHANNELS, PATCH_HEIGHT, PATCH_WIDTH, CHANNELS_LAST
    )
    acc = tl.zeros((BLOCK_HIDDEN, BLOCK_K), tl.float32)
    for start in range(0, split_patches, BLOCK_ROWS):
        rows = split * split_patches + start + tl.arange(0, BLOCK_ROWS)
        reads = rows < total_patches
        image = rows // patches
        patch = rows % patches
        if mask_ptr is not None:
            reads = reads & (tl.load(mask_ptr + rows, reads, other=1) == 0)
        grad_rows = image.to(tl.int64) * stride_grad_batch + (patch + PREFIX).to(tl.int64) * stride_grad_token
        grad_out = tl.load(
            grad_out_ptr + grad_rows[:, None] + units[None, :], reads[:, None] & unit_mask[None, :], other=0.0
        )
        origin = patch_origin(image, patch, columns, stride_batch, stride_row, stride_column, PATCH_HEIGHT, PATCH_WIDTH)
        pixel_mask = reads[:, None] if K % BLOCK_K == 0 else reads[:, None] & (k < K)[None, :]
        pixels = load_pixels(
            pixels_ptr + origin[:, None] + offset[None, :], pixel_mask, channel, grad_out.dtype, SCALE, SHIFT
        )
        acc = tl.dot(tl.trans(grad_out), pixels, acc, input_precision="ieee")
    partial_ptrs = partial_ptr + (split.to(tl.int64) * hidden + units[:, None]) * K + k[None, :]
    tl.store(partial_ptrs, acc, unit_mask[:, None] & (k < K)[None, :])


@triton.jit
def _patch_embed_tokens_bwd(
    grad_out_ptr, mask_ptr,                        # in: [B, N, D] by strides, [B, P] or None
    sums_ptr,                                      # out: [1 or, with a mask, 2, N, D] float32
    stride_grad_batch, stride_grad_token, batch, tokens, hidden,
    PREFIX: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Sums of grad_out over the images where a token is not masked, and over those where it is masked.

    Each program handles one token and BLOCK_HIDDEN hidden units.
    """
    token = tl.program_id(0)
    units = tl.program_id(1) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    unit_mask = units < hidden
    grad_out_ptr += token.to(tl.int64) * stride_grad_token
    sums_ptrs = sums_ptr + token.to(tl.int64) * hidden + units
    maskable = tl.where(token < PREFIX, 0, batch)  # a prefix token is masked in no image
    shown = tl.zeros((BLOCK_IMAGES, BLOCK_HIDDEN), tl.float32)
    masked = tl.zeros((BLOCK_IMAGES, BLOCK_HIDDEN), tl.float32)
    for start in range(0, batch, BLOCK_IMAGES):
        images = start + tl.arange(0, BLOCK_IMAGES)
        offset = images.to(tl.int64)[:, None] * stride_grad_batch + units[None, :]
        in_range = (images < batch)[:, None] & unit_mask[None, :]
        grad_out = tl.load(grad_out_ptr + offset, in_range, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            at = images.to(tl.int64) * (tokens - PREFIX) + token - PREFIX
            is_masked = tl.load(mask_ptr + at, images < maskable, other=0) != 0
            shown += tl.where(is_masked[:, None], 0.0, grad_out)
            masked += tl.where(is_masked[:, None], grad_out, 0.0)
        else:
            shown += grad_out
    tl.store(sums_ptrs, tl.sum(shown, 0), unit_mask)
    if mask_ptr is not None:
        tl.store(sums_ptrs + tl.cast(tokens, tl.int64) * hidden, tl.sum(masked, 0), unit_mask)


def view_channels_first(pixels: Tensor, channels: int) -> Tensor:
    return pixels if pixels.shape[1] == channels else pixels.permute(0, 3, 1, 2)


def compute_grid(pixels: Tensor, weight: Tensor) -> tuple[int, int]:
    """Patches in a column and in a row of [B, C, H, W] images."""
    return pixels.shape[2] // weight.shape[2], pixels.shape[3] // weight.shape[3]


def is_channels_last(pixels: Tensor) -> bool:
    """Whether the values of a row of a [B, C, H, W] image are contiguous, channel by channel."""
    channels = pixels.shape[1]
    return channels > 1 and pixels.stride(1) == 1 and pixels.stride(3) == channels


def list_constants(pixels: Tensor, weight: Tensor, mean: list[float] | None, std: list[float] | None) -> dict:
    """The kernels' compile-time constants: the patch, the layout of [B, C, H, W] pixels, and their normalisation.

    (pixels / 255 - mean) / std of uint8 pixels is pixels * SCALE + SHIFT. As constants they need no copy to the device
    per call, and a data set has one mean and std.
    """
    _, channels, height, width = weight.shape
    scale = shift = None
    if pixels.dtype == torch.uint8:
        scale, shift = tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    return {
        "CHANNELS": channels, "PATCH_HEIGHT": height, "PATCH_WIDTH": width, "CHANNELS_LAST": is_channels_last(pixels),
        "SCALE": scale, "SHIFT": shift,
    }  # fmt: skip


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def describe_tiles(rows: int, columns: int) -> str:
    """The tuning table's shape class for an output [rows, columns]: whether large tiles fill a device."""
    return "many tiles" if cdiv(rows, 128) * cdiv(columns, 128) >= MIN_LARGE_TILES else "few tiles"


def promote_dtypes(weight: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that concatenation and addition promote to, such as float32 for a float32 position embedding."""
    dtypes = [other.dtype for other in others if other is not None]
    return functools.reduce(torch.promote_types, dtypes, weight.dtype)


def _choose_split(total_patches: int, tiles: int, block_rows: int) -> int:
    """The number of patches that one program of the weight gradient sums over.

    Chooses the number of splits, up to one full device or up to four, that wastes the least time: 72 tiles fill half a
    device and 144 need two rounds, but 216 (three splits) or 528 (four splits of 132) leave little idle.
    """
    most = max(4, MULTIPROCESSORS // tiles)
    splits = min(range(1, most + 1), key=lambda splits: cdiv(tiles * splits, MULTIPROCESSORS) / splits)
    return cdiv(cdiv(total_patches, splits), block_rows) * block_rows


def _make_row_major(grad_out: Tensor) -> Tensor:
    """grad_out with contiguous hidden units: the gradient of a plain sum is one expanded number."""
    return grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()


def launch_forward(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, cls_token: Tensor | None, pos_embed: Tensor | None,
    mask_token: Tensor | None, mask: Tensor | None, mean: list[float] | None, std: list[float] | None, candidate: int,
) -> Tensor:  # fmt: skip
    pixels = view_channels_first(pixels, weight.shape[1])
    rows, columns = compute_grid(pixels, weight)
    batch, hidden = pixels.shape[0], weight.shape[0]
    prefix = 0 if cls_token is None else cls_token.shape[1]
    tokens = prefix + rows * columns
    out = pixels.new_empty(batch, tokens, hidden, dtype=promote_dtypes(weight, cls_token, pos_embed))  # [B, N, D]
    if is_fake(out) or out.numel() == 0:
        return out
    vectors = (bias, cls_token if prefix else None, pos_embed, None if mask is None else mask_token)
    # [D, K] with K in the pixels' memory order; a view wherever weight already has that order.
    matrix = (weight.permute(0, 2, 3, 1) if is_channels_last(pixels) else weight).contiguous()
    shape = describe_tiles(batch * tokens, hidden)
    tile = tuning.select("patch_embed_forward", shape, weight.dtype, pixels.device, candidate)
    grid = (cdiv(batch * tokens, tile["rows"]) * cdiv(hidden, tile["columns"]),)
    _patch_embed_fwd[grid](
        pixels, matrix, *(None if vector is None else vector.contiguous() for vector in vectors), as_bytes(mask), out,
        *pixels.stride(), batch * tokens, tokens, columns, hidden,
        PREFIX=prefix, **list_constants(pixels, weight, mean, std),
        BLOCK_ROWS=tile["rows"], BLOCK_HIDDEN=tile["columns"], BLOCK_K=tile["depth"],
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip
    return out


def launch_weight_backward(
    grad_out: Tensor, pixels: Tensor, weight: Tensor, mask: Tensor | None, mean: list[float] | None,
    std: list[float] | None, candidate: int,
) -> Tensor:  # fmt: skip
    if is_fake(weight):
        return weight.new_empty(weight.shape)
    pixels = view_channels_first(pixels, weight.shape[1])
    batch, hidden, size_k = pixels.shape[0], weight.shape[0], weight[0].numel()
    if batch == 0:
        return weight.new_zeros(weight.shape)
    rows, columns = compute_grid(pixels, weight)
    patches, total_patches = rows * columns, batch * rows * columns
    # Read by every program of a split; float32 rows (autocast) would be transposed 4 bytes at a time.
    grad_out = _make_row_major(grad_out).to(weight.dtype)
    shape = describe_tiles(hidden * cdiv(total_patches, 4096), size_k)  # splits sum over 4096 patches or more
    tile = tuning.select("patch_embed_weight", shape, weight.dtype, pixels.device, candidate)
    tiles = cdiv(hidden, tile["rows"]) * cdiv(size_k, tile["columns"])
    split_patches = _choose_split(total_patches, tiles, tile["depth"])
    splits = cdiv(total_patches, split_patches)
    partial = torch.empty(splits, hidden, size_k, dtype=torch.float32, device=pixels.device)
    _patch_embed_weight_bwd[(splits * tiles,)](
        grad_out, pixels, as_bytes(mask), partial, grad_out.stride(0), grad_out.stride(1), *pixels.stride(),
        total_patches, patches, columns, hidden, split_patches,
        PREFIX=grad_out.shape[1] - patches, **list_constants(pixels, weight, mean, std),
        BLOCK_HIDDEN=tile["rows"], BLOCK_K=tile["columns"], BLOCK_ROWS=tile["depth"],
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip
    total = partial.sum(0) if splits > 1 else partial[0]
    if is_channels_last(pixels):
        total = total.view(hidden, *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
    return total.reshape(weight.shape).to(weight.dtype, memory_format=torch.contiguous_format)


def launch_tokens_backward(grad_out: Tensor, mask: Tensor | None, prefix: int) -> Tensor:
    batch, tokens, hidden = grad_out.shape
    sums = grad_out.new_empty(1 if mask is None else 2, tokens, hidden, dtype=torch.float32)
    if is_fake(sums):
        return sums
    if batch == 0:
        return sums.zero_()
    grad_out = _make_row_major(grad_out)
    block_hidden = min(256, next_power_of_2(hidden))
    _patch_embed_tokens_bwd[(tokens, cdiv(hidden, block_hidden))](
        grad_out, as_bytes(mask), sums, grad_out.stride(0), grad_out.stride(1), batch, tokens, hidden,
        PREFIX=prefix, BLOCK_IMAGES=16, BLOCK_HIDDEN=block_hidden,
    )  # fmt: skip
    return sums


def _view_patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """Pixels as a view [B, rows, columns, C, ph, pw], without the remainder at the edges."""
    _, channels, height, width = weight.shape
    pixels = view_channels_first(pixels, channels)
    rows, columns = compute_grid(pixels, weight)
    patches = pixels[:, :, : rows * height, : columns * width].unflatten(3, (columns, width))
    return patches.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)


def _zero_masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(mask.unsqueeze(-1), 0)


def _gather_patches(pixels, weight, mask, mean, std) -> Tensor:
    """The matrix that the kernels never store: patches [B, P, C * ph * pw] in weight's dtype, zero where masked."""
    patches = _view_patches(pixels, weight)
    if pixels.dtype == torch.uint8:
        mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        patches = (patches / 255 - mean) / std
    return _zero_masked(patches.to(weight.dtype).flatten(3).flatten(1, 2), mask)


def forward_fallback(pixels, weight, bias, cls_token, pos_embed, mask_token, mask, mean, std, candidate):
    dtype = promote_dtypes(weight, cls_token, pos_embed)
    tokens = F.linear(_gather_patches(pixels, weight, mask, mean, std), weight.flatten(1), bias).to(dtype)
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), mask_token.to(dtype), tokens)
    if cls_token is not None:
        tokens = torch.cat([cls_token.to(dtype).expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed


def weight_fallback(grad_out, pixels, weight, mask, mean, std, candidate):
    patches = _gather_patches(pixels, weight, mask, mean, std)  # [B, P, K]
    grad = _zero_masked(grad_out[:, grad_out.shape[1] - patches.shape[1] :].to(weight.dtype), mask)
    return (grad.flatten(0, 1).T @ patches.flatten(0, 1)).view(weight.shape)


def tokens_fallback(grad_out: Tensor, mask: Tensor | None, prefix: int) -> Tensor:
    grad = grad_out.float()
    if mask is None:
        return grad.sum(0, keepdim=True)
    is_masked = F.pad(mask, (prefix, 0))
    return torch.stack([_zero_masked(grad, is_masked).sum(0), _zero_masked(grad, ~is_masked).sum(0)])


def pixels_backward(grad_out: Tensor, pixels: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of float pixels, in their shape and dtype, in plain PyTorch because it is rarely needed.

    It is a transposed convolution whose stride equals its kernel size, written as a matmul: cuDNN rounds to TF32.
    """
    grad_pixels = torch.zeros_like(pixels)  # the remainder at the edges was not read
    view = _view_patches(grad_pixels, weight)
    grad = grad_out[:, grad_out.shape[1] - view.shape[1] * view.shape[2] :].to(weight.dtype)
    view.copy_((_zero_masked(grad, mask) @ weight.flatten(1)).view(view.shape))
    return grad_pixels


_patch_embed = register("patch_embed", fallback=forward_fallback)(launch_forward)
_weight_backward = register("patch_embed_weight_backward", fallback=weight_fallback)(launch_weight_backward)
_tokens_backward = register("patch_embed_tokens_backward", fallback=tokens_fallback)(launch_tokens_backward)


def _setup_context(ctx, inputs, output) -> None:
    pixels, weight, bias, cls_token, pos_embed, mask_token, mask, ctx.mean, ctx.std, ctx.candidate = inputs
    ctx.save_for_backward(pixels, weight, mask)
    ctx.prefix = 0 if cls_token is None else cls_token.shape[1]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, cls_token, pos_embed, mask_token)]


def _backward(ctx, grad_out: Tensor):
    pixels, weight, mask = ctx.saved_tensors
    needs_pixels, needs_weight, *needs = ctx.needs_input_grad[:6]
    grad_pixels = grad_weight = None
    grads = [None] * 4
    if needs_pixels:
        grad_pixels = pixels_backward(grad_out, pixels, weight, mask)
    if needs_weight:
        grad_weight = _weight_backward(grad_out, pixels, weight, mask, ctx.mean, ctx.std, ctx.candidate)
    if any(needs):
        sums = _tokens_backward(grad_out, mask, ctx.prefix)  # [1 or 2, N, D], where not masked and where masked
        grads = [
            sums[0, ctx.prefix :].sum(0),  # bias [D]
            sums[:1, : ctx.prefix],  # cls_token [1, T, D]
            sums.sum(0, keepdim=True),  # pos_embed [1, N, D]
            sums[-1:, ctx.prefix :].sum(1, keepdim=True),  # mask_token [1, 1, D]
        ]
        grads = [grad.to(dtype) if need else None for grad, dtype, need in zip(grads, ctx.dtypes, needs, strict=True)]
    return grad_pixels, grad_weight, *grads, None, None, None, None


_patch_embed.register_autograd(_backward, setup_context=_setup_context)


def patch_embed(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, cls_token: Tensor | None, pos_embed: Tensor | None, *,
    patch_size: tuple[int, int], mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    mask_token: Tensor | None = None, mask: Tensor | None = None, candidate: int = 0,
) -> Tensor:  # fmt: skip
    """Cut images into patches, project each to the hidden size, prepend the class token, add the position embedding.

    Sums are float32. Autocast casts weight and bias as for a convolution. Not twice differentiable, and not in uint8
    pixels and mask. Dosovitskiy et al. 2021, arXiv:2010.11929.

    Args:
        pixels: [B, C, H, W] or [B, H, W, C], any strides; float32, bfloat16, float16, or uint8, which is normalised. B
            may be 0. If H or W is not a multiple of the patch size, the right and bottom remainder is not read.
        weight: [D, C, ph, pw], float32, bfloat16 or float16; pixels are cast to its dtype.
        bias: [D], of weight's dtype.
        cls_token: [1, T, D], the tokens before the patches; like the next two, in any of these float dtypes.
        pos_embed: [1, T + P, D].
        patch_size: (ph, pw).
        mean, std: one float per channel for values in 0..1, to normalise uint8 pixels; std without zeros.
        mask_token: [1, 1, D], replaces masked patches, which are not read.
        mask: bool [B, P].
        candidate: number of the tile in the tuning table.

    Returns:
        Tokens [B, T + P, D] in the dtype that weight, cls_token and pos_embed promote to.

    Raises:
        ValueError: if shapes, dtypes or devices do not match; before any launch.
    """
    _check_inputs(pixels, weight, bias, cls_token, pos_embed, tuple(patch_size), mean, std, mask_token, mask)
    if torch.is_autocast_enabled(pixels.device.type):
        dtype = torch.get_autocast_dtype(pixels.device.type)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    is_uint8 = pixels.dtype == torch.uint8
    mean, std = ([float(value) for value in values] if is_uint8 else None for values in (mean, std))
    mask_token = None if mask is None else mask_token
    return _patch_embed(pixels, weight, bias, cls_token, pos_embed, mask_token, mask, mean, std, candidate)


def _check_inputs(pixels, weight, bias, cls_token, pos_embed, patch_size, mean, std, mask_token, mask) -> None:
    if weight.dim() != 4 or weight.dtype not in DTYPES:
        expected = "[D, C, ph, pw] in float32, bfloat16 or float16"
        raise ValueError(f"weight: expected {expected}, got {list(weight.shape)} {weight.dtype}")
    hidden, channels, *kernel_size = weight.shape
    if tuple(kernel_size) != patch_size:
        raise ValueError(f"patch_size: expected weight's {tuple(kernel_size)}, got {patch_size}")
    if pixels.dim() != 4 or channels not in (pixels.shape[1], pixels.shape[3]):
        expected = f"[B, {channels}, H, W] or [B, H, W, {channels}] (weight has {channels} channels)"
        raise ValueError(f"pixels: expected {expected}, got {list(pixels.shape)}")
    view = view_channels_first(pixels, channels)
    batch, _, height, width = view.shape
    rows, columns = compute_grid(view, weight)
    if rows * columns == 0:
        raise ValueError(f"pixels: expected room for one patch of {patch_size}, got {(height, width)} (height, width)")
    if pixels.dtype not in (torch.uint8, *DTYPES):
        raise ValueError(f"pixels: expected uint8, float32, bfloat16 or float16, got {pixels.dtype}")
    for name, values in (("mean", mean), ("std", std)) if pixels.dtype == torch.uint8 else ():
        if values is None or len(values) != channels:
            raise ValueError(f"{name}: expected {channels} floats, one per channel, for uint8 pixels, got {values}")
        if name == "std" and 0 in values:
            raise ValueError(f"std: expected floats other than 0, by which uint8 pixels are divided, got {values}")
    if mask is not None and mask_token is None:
        raise ValueError("mask_token: expected [1, 1, D] with a mask, got None")
    if cls_token is not None and cls_token.dim() != 3:
        raise ValueError(f"cls_token: expected [1, T, {hidden}], got {list(cls_token.shape)}")
    prefix = 0 if cls_token is None else cls_token.shape[1]
    for name, tensor, shape, dtypes in (
        ("bias", bias, (hidden,), (weight.dtype,)),
        ("cls_token", cls_token, (1, prefix, hidden), DTYPES),
        ("pos_embed", pos_embed, (1, prefix + rows * columns, hidden), DTYPES),
        ("mask_token", mask_token, (1, 1, hidden), DTYPES),
        ("mask", mask, (batch, rows * columns), (torch.bool,)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape, dtypes, weight.device)
    if pixels.device != weight.device:
        raise ValueError(f"pixels: expected device {weight.device}, weight's, got {pixels.device}")
