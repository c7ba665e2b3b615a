"""The forward pass of the patch embedding: one matmul whose epilogue writes the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
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
from fastvit.kernels.tuning import cdiv

ENOUGH_PROGRAMS = 100  # large tiles fill a device


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
    total_rows, tokens, columns, hidden,           # B * N, N, patches in a row of the image, D
    PREFIX: tl.constexpr,                          # T
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr,      # C floats each, or None
    BLOCK_ROWS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    # Programs that follow each other read the same pixels: all but the first find them in L2.
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

    # Half a tile at a time: the sums of a whole one fill the registers, and what is added to them would spill.
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


def tile_class(rows: int, columns: int) -> str:
    """The tuning table's word for a product of [rows, columns]: whether large tiles fill a device."""
    return "many tiles" if cdiv(rows, 128) * cdiv(columns, 128) >= ENOUGH_PROGRAMS else "few tiles"


def output_dtype(weight: Tensor, cls_token: Tensor | None, pos_embed: Tensor | None) -> torch.dtype:
    """What concatenation and addition promote to: float32 tokens where bfloat16 meets a float32 position embedding."""
    dtype = weight.dtype
    for other in (cls_token, pos_embed):
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def _weight_matrix(weight: Tensor, channels_last: bool) -> Tensor:
    """Weight as [D, K] with K in the order in which the pixels lie; a view wherever it already has that order."""
    if channels_last:
        weight = weight.permute(0, 2, 3, 1)
    return weight.contiguous().view(weight.shape[0], -1)


def launch_forward(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cls_token: Tensor | None,
    pos_embed: Tensor | None,
    mask_token: Tensor | None,
    mask: Tensor | None,
    mean: list[float] | None,
    std: list[float] | None,
    candidate: int,
) -> Tensor:
    pixels = channels_first(pixels, weight.shape[1])
    rows, columns = patch_grid(pixels, weight)
    batch, hidden = pixels.shape[0], weight.shape[0]
    prefix = 0 if cls_token is None else cls_token.shape[1]
    tokens = prefix + rows * columns
    out = torch.empty(
        batch, tokens, hidden, dtype=output_dtype(weight, cls_token, pos_embed), device=pixels.device
    )  # [B, N, D]
    if out.numel() == 0:
        return out
    vectors = (bias, cls_token if prefix else None, pos_embed, None if mask is None else mask_token)
    shape = tile_class(batch * tokens, hidden)
    tile = tuning.candidate("patch_embed_forward", shape, weight.dtype, pixels.device, candidate)
    grid = (cdiv(batch * tokens, tile["rows"]) * cdiv(hidden, tile["columns"]),)
    _patch_embed_fwd[grid](
        pixels, _weight_matrix(weight, is_channels_last(pixels)),
        *(None if vector is None else vector.contiguous() for vector in vectors), mask_bytes(mask), out,
        *pixels.stride(), batch * tokens, tokens, columns, hidden,
        PREFIX=prefix, **constants(pixels, weight, mean, std),
        BLOCK_ROWS=tile["rows"], BLOCK_HIDDEN=tile["columns"], BLOCK_K=tile["depth"],
        num_warps=tile["num_warps"], num_stages=tile["num_stages"],
    )  # fmt: skip
    return out


def forward_fallback(pixels, weight, bias, cls_token, pos_embed, mask_token, mask, mean, std, candidate):
    """`launch_forward` in plain PyTorch."""
    dtype = output_dtype(weight, cls_token, pos_embed)
    tokens = F.linear(gather_patches(pixels, weight, mask, mean, std), weight.flatten(1), bias).to(dtype)
    if mask is not None:
        tokens = torch.where(mask.unsqueeze(-1), mask_token.to(dtype), tokens)
    if cls_token is not None:
        tokens = torch.cat([cls_token.to(dtype).expand(len(tokens), -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed
