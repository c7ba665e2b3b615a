"""The backward pass of the patch embedding: gradients of the weight, of what is added to the patches, and of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.patch_embed.forward import tile_class
from fastvit.kernels.patch_embed.pixels import (
    channels_first,
    constants,
    gather_patches,
    is_channels_last,
    load_pixels,
    mask_bytes,
    patch_grid,
    patch_origin,
    within_patch,
)
from fastvit.kernels.tuning import cdiv, next_power_of_2

FULL_DEVICE = 132  # multiprocessors of an H100; the same number everywhere: the same sums everywhere


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
    """Sums of grad_out over the images where a token is shown, and over those where it is masked.

    One token and BLOCK_HIDDEN hidden units a program.
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


def _split_patches(total_patches: int, tiles: int, block_rows: int) -> int:
    """Patches that one program of the weight gradient sums over.

    Of the numbers of splits that fill a device once, or of up to four, the one that leaves it idle least: 72 tiles are
    half a device, and 144 take as long as two, but 216 (three splits) or 528 (four splits of 132) fill it.
    """
    most = max(4, FULL_DEVICE // tiles)
    splits = min(range(1, most + 1), key=lambda splits: cdiv(tiles * splits, FULL_DEVICE) / splits)
    return cdiv(cdiv(total_patches, splits), block_rows) * block_rows


def _row_major(grad_out: Tensor) -> Tensor:
    """grad_out with its hidden units side by side: the gradient of a plain sum, say, is one number expanded."""
    return grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()


def launch_weight_backward(
    grad_out: Tensor,
    pixels: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    candidate: int,
) -> Tensor:
    pixels = channels_first(pixels, weight.shape[1])
    batch, hidden, size_k = pixels.shape[0], weight.shape[0], weight[0].numel()
    if batch == 0:
        return torch.zeros_like(weight, memory_format=torch.contiguous_format)
    rows, columns = patch_grid(pixels, weight)
    patches, total_patches = rows * columns, batch * rows * columns
    # Every program of a split reads these rows; float32 ones (autocast) would be transposed 4 bytes at a time.
    grad_out = _row_major(grad_out).to(weight.dtype)
    shape = tile_class(hidden * cdiv(total_patches, 4096), size_k)  # splits sum over 4096 patches or more
    tile = tuning.candidate("patch_embed_weight", shape, weight.dtype, pixels.device, candidate)
    tiles = cdiv(hidden, tile["rows"]) * cdiv(size_k, tile["columns"])
    split_patches = _split_patches(total_patches, tiles, tile["depth"])
    splits = cdiv(total_patches, split_patches)
    partial = torch.empty(splits, hidden, size_k, dtype=torch.float32, device=pixels.device)
    _patch_embed_weight_bwd[(splits * tiles,)](
        grad_out, pixels, mask_bytes(mask), partial, grad_out.stride(0), grad_out.stride(1), *pixels.stride(),
        total_patches, patches, columns, hidden, split_patches,
        PREFIX=grad_out.shape[1] - patches, **constants(pixels, weight, mean, std),
        BLOCK_HIDDEN=tile["rows"], BLOCK_K=tile["columns"], BLOCK_ROWS=tile["depth"],
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip
    total = partial.sum(0) if splits > 1 else partial[0]
    _, channels, height, width = weight.shape
    if is_channels_last(pixels):
        total = total.view(hidden, height, width, channels).permute(0, 3, 1, 2)
    return total.reshape(weight.shape).to(weight.dtype, memory_format=torch.contiguous_format)


def weight_fallback(grad_out, pixels, weight, mask, mean, std, candidate):
    """`launch_weight_backward` in plain PyTorch."""
    patches = gather_patches(pixels, weight, mask, mean, std)  # [B, P, K]; a masked one is zero, and so is its gradient
    grad = grad_out[:, grad_out.shape[1] - patches.shape[1] :].to(weight.dtype)
    if mask is not None:
        grad = grad.masked_fill(mask.unsqueeze(-1), 0)
    return (grad.flatten(0, 1).T @ patches.flatten(0, 1)).view(weight.shape)


def launch_tokens_backward(grad_out: Tensor, mask: Tensor | None, prefix: int) -> Tensor:
    batch, tokens, hidden = grad_out.shape
    sums = torch.empty(1 if mask is None else 2, tokens, hidden, dtype=torch.float32, device=grad_out.device)
    if batch == 0:
        return sums.zero_()
    grad_out = _row_major(grad_out)
    block_hidden = min(256, next_power_of_2(hidden))
    _patch_embed_tokens_bwd[(tokens, cdiv(hidden, block_hidden))](
        grad_out, mask_bytes(mask), sums, grad_out.stride(0), grad_out.stride(1), batch, tokens, hidden,
        PREFIX=prefix, BLOCK_IMAGES=16, BLOCK_HIDDEN=block_hidden,
    )  # fmt: skip
    return sums


def tokens_fallback(grad_out: Tensor, mask: Tensor | None, prefix: int) -> Tensor:
    """`launch_tokens_backward` in plain PyTorch."""
    grad = grad_out.float()
    if mask is None:
        return grad.sum(0, keepdim=True)
    is_masked = F.pad(mask, (prefix, 0)).unsqueeze(-1)
    return torch.stack([grad.masked_fill(is_masked, 0).sum(0), grad.masked_fill(~is_masked, 0).sum(0)])


def pixels_backward(grad_out: Tensor, pixels: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Gradient of float pixels, in their shape and dtype: rarely asked for, so plain PyTorch.

    A transposed convolution whose stride is its kernel, which is a matmul: written as one because cuDNN would round
    float32 to TF32.
    """
    grad_pixels = torch.zeros_like(pixels)  # what is left over at the edges was not read
    _, channels, height, width = weight.shape
    view = channels_first(grad_pixels, channels)
    rows, columns = patch_grid(view, weight)
    grad = grad_out[:, grad_out.shape[1] - rows * columns :].to(weight.dtype)
    if mask is not None:
        grad = grad.masked_fill(mask.unsqueeze(-1), 0)
    patches = (grad @ weight.flatten(1)).unflatten(2, (channels, height, width)).unflatten(1, (rows, columns))
    view = view[:, :, : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
    view.copy_(patches.permute(0, 3, 1, 4, 2, 5))  # both [B, C, rows, ph, columns, pw]
    return grad_pixels
