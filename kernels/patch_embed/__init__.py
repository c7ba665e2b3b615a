"""Patch embedding: from pixels, where they lie, to the tokens that the encoder reads.

    tokens = [prefix tokens ; patches @ weight^T + bias] + pos_embed              Dosovitskiy et al. 2021, eq. 1

    pixels [B, C, H, W] or [B, H, W, C]  ->  tokens [B, N, D],   N = T prefix tokens + P patches

One matmul over B * N rows, whose left operand is never built: row (b, t) gathers the K = C * ph * pw pixels of patch
t - T from the image; uint8 pixels are normalised in registers. A prefix row (class token, registers) gathers nothing,
so its sum is zero, and the epilogue puts the token there instead of the bias. That wastes T / N of the product, and in
exchange the output is written once, in whole tiles.

Op by op PyTorch makes 4 to 6 passes: the pixels cast (and normalised), the convolution's layout change, the
convolution, the concatenation and the addition, each written and read again. Here the pixels are read once from memory
(and again from L2 for each tile of hidden units) and the tokens are written once.

Backward: the weight gradient is the transposed product, again over pixels read in place, the rows split between
programs and summed in a second stage; the gradients of bias, prefix, position embedding and mask token are sums of the
output gradient over images, then over patches. No atomics: the same bits every time. The gradient of float pixels,
rarely asked for, is plain PyTorch.

`pixels.py` says where a pixel lies, `forward.py` and `backward.py` hold the kernels, their launchers and what replaces
a launch that fails; here are the operators and the public function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.operators import operator
from fastvit.kernels.patch_embed.backward import (
    launch_tokens_backward,
    launch_weight_backward,
    pixels_backward,
    tokens_fallback,
    weight_fallback,
)
from fastvit.kernels.patch_embed.forward import forward_fallback, launch_forward, output_dtype
from fastvit.kernels.patch_embed.pixels import channels_first, patch_grid

_patch_embed = operator("patch_embed", fallback=forward_fallback)(launch_forward)
_weight_backward = operator("patch_embed_weight_backward", fallback=weight_fallback)(launch_weight_backward)
_tokens_backward = operator("patch_embed_tokens_backward", fallback=tokens_fallback)(launch_tokens_backward)


@_patch_embed.register_fake
def _(pixels, weight, bias, cls_token, pos_embed, mask_token, mask, mean, std, candidate):
    rows, columns = patch_grid(channels_first(pixels, weight.shape[1]), weight)
    tokens = rows * columns + (0 if cls_token is None else cls_token.shape[1])
    dtype = output_dtype(weight, cls_token, pos_embed)
    return pixels.new_empty(pixels.shape[0], tokens, weight.shape[0], dtype=dtype)


@_weight_backward.register_fake
def _(grad_out, pixels, weight, mask, mean, std, candidate):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@_tokens_backward.register_fake
def _(grad_out, mask, prefix):
    return grad_out.new_empty(1 if mask is None else 2, *grad_out.shape[1:], dtype=torch.float32)


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
        sums = _tokens_backward(grad_out, mask, ctx.prefix)  # [1 or 2, N, D], where shown and where masked
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
    candidate: int = 0,
) -> Tensor:
    """Cut images into patches, project each to the hidden size, prepend the class token, add the position embedding.

    Sums are in float32 throughout. Under autocast weight and bias are cast like a convolution's. Differentiable once in
    everything but uint8 pixels and mask. Dosovitskiy et al. 2021, arXiv:2010.11929.

    Args:
        pixels: [B, C, H, W] or [B, H, W, C], any strides; float32, bfloat16, float16, or uint8, which is normalised. B
            may be 0. What is left over at the right and bottom edge when H or W is no multiple of the patch size is not
            read.
        weight: [D, C, ph, pw], float32, bfloat16 or float16; pixels are cast to its dtype.
        bias: [D], of weight's dtype.
        cls_token: [1, T, D], the tokens before the patches, in any of these float dtypes, as the next two.
        pos_embed: [1, T + P, D].
        patch_size: (ph, pw).
        mean, std: one float per channel, for values in 0..1, to normalise uint8 pixels by.
        mask_token: [1, 1, D], what stands in the place of masked patches, which are not read.
        mask: bool [B, P].
        candidate: which of the tuning table's tiles.

    Returns:
        Tokens [B, T + P, D] in the dtype that weight, cls_token and pos_embed promote to.

    Raises:
        ValueError: for anything else, before any launch.
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
    mask_token = None if mask is None else mask_token
    return _patch_embed(pixels, weight, bias, cls_token, pos_embed, mask_token, mask, mean, std, candidate)


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
    view = channels_first(pixels, channels)
    batch, _, height, width = view.shape
    rows, columns = patch_grid(view, weight)
    if rows * columns == 0:
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
        ("pos_embed", pos_embed, (1, prefix + rows * columns, hidden)),
        ("mask_token", mask_token, (1, 1, hidden)),
        ("mask", mask, (batch, rows * columns)),
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
                raise ValueError(f"{name}: expected {channels} floats, one per channel, for uint8 pixels, got {values}")
    elif pixels.dtype not in DTYPES:
        raise ValueError(f"pixels: expected uint8, float32, bfloat16 or float16, got {pixels.dtype}")
