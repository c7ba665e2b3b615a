"""The definition of every operation of a Vision Transformer in plain PyTorch, used where Triton cannot run.

A fused kernel of the same name must reproduce outputs and gradients of each function. The functions run on any device
and in any floating dtype; tests call them in float64.

Shapes: B images, C channels, H x W pixels, N tokens (P patches and the class token), D = heads x head_dim hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


def normalize_pixels(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(pixels / 255 - mean) / std per channel, as image processors compute it.

    Args:
        pixels: uint8 [B, C, H, W].
        mean, std: one float per channel, for values in 0..1.
        dtype: of the result.

    Returns:
        [B, C, H, W] in `dtype`.
    """
    offset, scale = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).view(-1, 1, 1) for values in (mean, std)
    )
    # One multiply-add per pixel, in float32: in bfloat16 it would lose three of a pixel's eight bits.
    return (pixels * (1 / (255 * scale)) - offset / scale).to(dtype)


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
    """Cut images into patches, project each to the hidden size, prepend the class token, add the position embedding.

        tokens = [cls_token ; patches @ weight^T + bias] + pos_embed            (Dosovitskiy et al. 2021, eq. 1)

    Args:
        pixels: [B, C, H, W] or [B, H, W, C]; floating, or uint8 with `mean` and `std`. If H or W is not a multiple of
            the patch size, the remainder at the right and bottom edge is not read, as in a convolution.
        weight: [D, C, ph, pw].
        bias: [D] or None.
        cls_token: [1, T, D] or None: the class token, and any distillation or register tokens.
        pos_embed: [1, T + P, D] or None.
        patch_size: (ph, pw).
        mean, std: one float per channel, for values in 0..1.
        mask_token: [1, 1, D], replaces masked patches (SimMIM).
        mask: bool [B, P].

    Returns:
        [B, T + P, D] in weight's dtype.

    Raises:
        ValueError: if pixels are uint8 without mean and std, or there is a mask without mask_token.
    """
    patches = cut_into_patches(pixels, weight, patch_size, mean, std)
    tokens = F.linear(patches, weight.flatten(1), bias)  # [B, P, D]
    return join_tokens(tokens, cls_token, pos_embed, mask_token=mask_token, mask=mask)


def cut_into_patches(
    pixels: Tensor,
    weight: Tensor,
    patch_size: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """The first half of `patch_embed`: pixels in weight's dtype, one row per patch, [B, P, C * ph * pw].

    A convolution whose stride equals its kernel size is one matmul over these rows.
    """
    (patch_height, patch_width), channels = patch_size, weight.shape[1]
    if pixels.shape[1] != channels:  # [B, H, W, C]
        pixels = pixels.permute(0, 3, 1, 2)
    if pixels.dtype == torch.uint8:
        if mean is None or std is None:
            raise ValueError("mean, std: expected one number per channel to normalise uint8 pixels, got None")
        pixels = normalize_pixels(pixels, mean, std, weight.dtype)
    batch, _, height, width = pixels.shape
    rows, columns = height // patch_height, width // patch_width
    pixels = pixels[:, :, : rows * patch_height, : columns * patch_width].to(weight.dtype)
    patches = pixels.reshape(batch, channels, rows, patch_height, columns, patch_width)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_height * patch_width)


def join_tokens(
    tokens: Tensor,
    cls_token: Tensor | None,
    pos_embed: Tensor | None,
    *,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The second half of `patch_embed`: adds mask token, class token, position embedding to patch tokens [B, P, D]."""
    if mask is not None:
        if mask_token is None:
            raise ValueError("mask_token: expected the token that replaces masked patches, got None")
        tokens = torch.where(mask.unsqueeze(-1), mask_token.to(tokens.dtype), tokens)
    if cls_token is not None:
        tokens = torch.cat([cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if pos_embed is None else tokens + pos_embed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: [..., D].
        weight, bias: [D].
        eps: added to the variance.

    Returns:
        [..., D].
    """
    return torch.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + row_scale * scale * x, and the LayerNorm of the sum; the next residual add needs the sum as well.

    Args:
        x: the branch, [..., D].
        residual: [..., D].
        weight, bias, eps: as in `layer_norm`.
        scale: [D], LayerScale's factor (Touvron et al. 2021, arXiv:2103.17239).
        row_scale: [B], drop path's factor for each sample (Huang et al. 2016, arXiv:1603.09382).

    Returns:
        (sum, its LayerNorm), each [..., D].
    """
    if scale is not None:
        x = x * scale
    if row_scale is not None:
        x = x * row_scale.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    residual = x + residual
    return residual, layer_norm(residual, weight, bias, eps)


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> Tensor:
    """activation(x @ weight1^T + bias1) @ weight2^T + bias2, applied to each token (Vaswani et al. 2017, eq. 2).

    Args:
        x: [..., D].
        weight1, bias1, weight2, bias2: [F, D], [F] or None, [E, F], [E] or None.
        activation: a key of `ACTIVATIONS`.

    Returns:
        [..., E].
    """
    return F.linear(ACTIVATIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)


def bias_gelu(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> Tensor:
    """activation(x + bias). x: [..., F]; bias: [F] or None; activation: a key of `ACTIVATIONS`. Returns [..., F]."""
    return ACTIVATIONS[activation](x if bias is None else x + bias)


def swiglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(x1 + b1) * (x2 + b2), for the halves of the last dimension (Shazeer 2020, arXiv:2002.05202).

    Args:
        x: [..., 2 F], the gate's half first.
        bias: [2 F] or None.

    Returns:
        [..., F].
    """
    gate, value = (x if bias is None else x + bias).chunk(2, dim=-1)
    return F.silu(gate) * value


def layer_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "gelu") -> Tensor:
    """activation(layer_norm(x)), elementwise. x: [..., D]; weight, bias: [D]. Returns [..., D]."""
    return ACTIVATIONS[activation](layer_norm(x, weight, bias, eps))


def layer_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """layer_norm(x) @ weight^T + bias.

    Args:
        x, norm_weight, norm_bias, eps: as in `layer_norm`.
        weight: [F, D].
        bias: [F] or None.

    Returns:
        [..., F].
    """
    return F.linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def add_layer_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x + residual, layer_norm_linear of the sum). x, residual: [..., D]. Returns [..., D] and [..., F]."""
    residual, normed = add_layer_norm(x, residual, norm_weight, norm_bias, eps)
    return residual, F.linear(normed, weight, bias)


def layer_norm_gelu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """activation(layer_norm(x) @ weight^T + bias), half of a feed-forward. Shapes as in `layer_norm_linear`."""
    return ACTIVATIONS[activation](layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias))


def add_layer_norm_feed_forward(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor]:
    """(x + residual, feed_forward of its LayerNorm): a block from its attention's output to its last residual add.

    Arguments as in `add_layer_norm` and `feed_forward`. Returns [..., D] and [..., E].
    """
    residual, normed = add_layer_norm(x, residual, norm_weight, norm_bias, eps)
    return residual, feed_forward(normed, weight1, bias1, weight2, bias2, activation)


# Inference in 8 bits: rows of e4m3 numbers (a sign, 4 bits of exponent, 3 of mantissa: +-448, rounded within 6 %), each
# with a float32 scale (Micikevicius et al. 2022, arXiv:2209.05433). Between two matmuls everything is computed in
# float32 and rounded once, to e4m3.
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number, whose reciprocal is still finite


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as values * scale, rounded to the nearest e4m3 numbers; each row's largest magnitude becomes 448.

    Args:
        x: [..., D].

    Returns:
        values [..., D] float8_e4m3fn and scale [..., 1] float32. Rows of zeros and numbers below 2^-126 become zeros. A
        row that contains NaN or an infinity has such a scale, and becomes NaN when dequantised.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST_SCALE)
    return (x * (1 / scale)).to(torch.float8_e4m3fn), scale


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """quantize_rows(layer_norm(x)). Arguments as in `layer_norm`, results as in `quantize_rows`."""
    return quantize_rows(layer_norm(x.float(), weight.float(), bias.float(), eps))


def add_layer_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + residual, and the two results of layer_norm_fp8 of the sum). Arguments as in `add_layer_norm`."""
    residual = x + residual
    return residual, *layer_norm_fp8(residual, weight, bias, eps)


def bias_gelu_fp8(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> tuple[Tensor, Tensor]:
    """quantize_rows(bias_gelu(x, bias)). Arguments as in `bias_gelu`, results as in `quantize_rows`."""
    return quantize_rows(bias_gelu(x.float(), None if bias is None else bias.float(), activation))


def linear_fp8(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """(values * scale) @ (weight * weight_scale)^T + bias: a linear layer of quantised rows.

    Args:
        values, scale: [..., K] e4m3 and [..., 1] float32.
        weight, weight_scale: [F, K] e4m3 and [F, 1] float32.
        bias: [F] bfloat16 or None.

    Returns:
        [..., F], rounded to bfloat16.
    """
    with torch.autocast(values.device.type, enabled=False):  # products of e4m3 numbers are exact in float32
        x, weight = values.float() * scale, weight.float() * weight_scale
        return F.linear(x, weight, None if bias is None else bias.float()).to(torch.bfloat16)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """softmax(query key^T * scale + mask) value for each head, heads concatenated (Vaswani et al. 2017, eq. 1).

    Args:
        query: [B, Nq, heads, head_dim], any strides.
        key, value: [B, Nk, heads, head_dim], any strides.
        scale: 1 / sqrt(head_dim) if None.
        dropout_p: the probability that an attention probability is dropped.
        mask: broadcastable to [B, heads, Nq, Nk]; boolean (True: may be attended to), or added to the scores. A row in
            which every key is masked returns zeros.
        cu_seqlens: int32 [B + 1], for images of different sizes in one sequence: query, key and value are [tokens,
            heads, head_dim], and image i attends to its own tokens, from cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: with cu_seqlens, the tokens of the largest image; mask is then broadcastable to [B, heads,
            max_seqlen, max_seqlen].

    Returns:
        [B, Nq, heads * head_dim], or [tokens, heads * head_dim] with cu_seqlens.

    Raises:
        ValueError: if cu_seqlens comes without max_seqlen.
    """
    if cu_seqlens is not None:
        if max_seqlen is None:
            raise ValueError("max_seqlen: expected the tokens of the largest image, got None")
        bounds = cu_seqlens.tolist()
        contexts = []
        for index, (first, end) in enumerate(pairwise(bounds)):
            own_mask = None
            if mask is not None:
                full = mask.expand(len(bounds) - 1, query.shape[1], max_seqlen, max_seqlen)
                own_mask = full[index : index + 1, :, : end - first, : end - first]
            parts = (tensor[None, first:end] for tensor in (query, key, value))
            contexts.append(attention(*parts, scale=scale, dropout_p=dropout_p, mask=own_mask)[0])
        contexts.append(query.new_zeros(len(query) - bounds[-1], query[0:1].flatten(1).shape[1]))  # tokens of no image
        return torch.cat(contexts)
    context = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, dropout_p, scale=scale
    )
    return context.transpose(1, 2).flatten(2)


def attention_packed(
    qkv: Tensor,
    *,
    num_heads: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`attention` of the three parts of one tensor.

    Args:
        qkv: [B, N, 3, heads, head_dim], or [B, N, 3 * heads * head_dim] with num_heads; with cu_seqlens without B.
        num_heads: required if qkv's last dimension is flat.
        scale, dropout_p, mask, cu_seqlens, max_seqlen: as in `attention`.

    Returns:
        As `attention`.

    Raises:
        ValueError: as in `attention`, or if num_heads is missing.
    """
    if qkv.ndim == (3 if cu_seqlens is None else 2):
        if num_heads is None:
            raise ValueError("num_heads: expected the number of heads in qkv's last dimension, got None")
        qkv = qkv.unflatten(-1, (3, num_heads, -1))
    query, key, value = qkv.unbind(-3)
    return attention(
        query, key, value, scale=scale, dropout_p=dropout_p, mask=mask, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
    )


def attention_probabilities(
    query: Tensor, key: Tensor, *, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(query key^T * scale + mask) from float32 scores: the maps that `attention` does not return.

    Arguments as in `attention`. Returns [B, heads, Nq, Nk] in query's dtype, without dropout.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # autocast would round the scores to half precision
        scores = torch.einsum("bqhd,bkhd->bhqk", query.to(exact), key.to(exact)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    probabilities = scores.softmax(dim=-1)
    if mask is not None:  # a row in which every key is masked: zeros, as in `attention`, not NaN
        probabilities = probabilities.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    return probabilities.to(query.dtype)
