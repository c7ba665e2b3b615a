"""The Vision Transformer, module by module in the order of the paper.

    z_0   = [x_class; x_1 E; ...; x_P E] + E_pos         ViTEmbeddings          (eq. 1)
    z'_l  = MSA(LN(z_{l-1})) + z_{l-1}                   ViTLayer               (eq. 2)
    z_l   = MLP(LN(z'_l)) + z'_l                         ViTLayer               (eq. 3)
    y     = LN(z_L)[class token]                         fastvit.models.heads   (eq. 4)

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale", arXiv:2010.11929.
The equation numbers are those of the paper. `ViTEncoder` runs the L blocks.

This is the plain model: the one to read, and the baseline that the fused one is tested against. `fastvit.models.fused`
attaches fused operations to the embeddings, blocks and encoder; they compute the same from the same parameters.
`fastvit.restore(model)` detaches them.

Modules and parameters have the names of the checkpoints on the Hugging Face hub
(`vit.encoder.layer.0.attention.attention.query.weight`), so no weight is renamed on loading or saving.

Shapes: B images, C channels, H x W pixels, P patches, N = P + 1 tokens, D hidden size. A batch of images of different
sizes is packed into one sequence [1, sum of all N, D], with a `Packing` in place of the attention mask
(`fastvit.ops.varlen`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from fastvit import ops
from fastvit.checkpoints.configuration import format_value, make_pair
from fastvit.errors import InputError
from fastvit.ops import varlen
from fastvit.ops.varlen import Mask, Packing


class LayerNorm(nn.LayerNorm):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias, over the hidden size.

    Ba et al. 2016, "Layer Normalization", arXiv:1607.06450.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


# ---------------------------------------------------------------------------------------------------------------------
# From pixels to tokens
# ---------------------------------------------------------------------------------------------------------------------


class ViTPatchEmbeddings(nn.Module):
    """x_p E: splits an image into patches and projects each one to the hidden size.

    A convolution whose stride equals its kernel size is that linear projection of non-overlapping patches. Pixels at
    the right and bottom edge that do not fill a patch are dropped. Dosovitskiy et al. 2021, section 3.1.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_size = make_pair(config.patch_size)
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size)

    def compute_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of patches in an image of `image_size` (height, width)."""
        return image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]"""
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class ViTEmbeddings(nn.Module):
    """z_0 = [x_class; x_1 E; ...; x_P E] + E_pos: class token, patch embeddings, position embeddings (eq. 1)."""

    def __init__(self, config: ViTConfig, use_mask_token: bool = False):
        super().__init__()
        self.config = config
        self.patch_embeddings = ViTPatchEmbeddings(config)
        rows, columns = self.patch_embeddings.compute_grid(make_pair(config.image_size))
        if rows * columns == 0:
            raise InputError(
                f"config.image_size: expected room for one patch of {config.patch_size}, got {config.image_size}"
            )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, rows * columns + 1, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """Embed a batch of images.

        Args:
            pixel_values: [B, C, H, W] or [B, H, W, C], floating-point (normalised) or uint8.
            bool_masked_pos: [B, P], true where the mask token replaces a patch (SimMIM, arXiv:2111.09886).
            interpolate_pos_encoding: resample the position embeddings, so that H and W may differ from
                config.image_size.

        Returns:
            Tokens [B, N, D] in the dtype of the parameters.
        """
        position_embeddings = self.get_position_embeddings(pixel_values, interpolate_pos_encoding)
        mask, mask_token = self.check_mask(bool_masked_pos), self.mask_token
        dtype = self.patch_embeddings.projection.weight.dtype
        patches = self.patch_embeddings(to_float_channels_first(pixel_values, self.config, dtype))  # [B, P, D]
        if mask is not None and mask_token is not None:
            patches = torch.where(mask.unsqueeze(-1), mask_token.to(patches.dtype), patches)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)  # [B, N, D]
        return self.dropout(tokens + position_embeddings)

    def get_position_embeddings(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        """Return the position embeddings [1, N, D] for the size of these images."""
        image_size, own_size = self.read_image_size(pixel_values), make_pair(self.config.image_size)
        if interpolate:
            grid = self.patch_embeddings.compute_grid
            return resample_position_embeddings(self.position_embeddings, grid(own_size), grid(image_size))
        if image_size != own_size:
            raise InputError(
                f"pixel_values: expected images of {own_size} (height, width), got {image_size};"
                " pass interpolate_pos_encoding=True for another size"
            )
        return self.position_embeddings

    def check_mask(self, bool_masked_pos: Tensor | None) -> Tensor | None:
        """Return the mask as bool [B, P]; raise InputError if the model has no mask token."""
        if bool_masked_pos is None:
            return None
        if self.mask_token is None:
            raise InputError("bool_masked_pos: this model has no mask token (build it with use_mask_token=True)")
        return bool_masked_pos.flatten(1).bool()

    def get_grid(self, pixel_values: Tensor | Sequence[Tensor]) -> Any:
        """Return (rows, columns) of patches for a batch of images, or a list of them for a list of images."""
        if isinstance(pixel_values, Tensor):
            return self.patch_embeddings.compute_grid(self.read_image_size(pixel_values))
        return [
            self.patch_embeddings.compute_grid(self.read_image_size(image, index))
            for index, image in enumerate(pixel_values)
        ]

    def read_image_size(self, pixel_values: Tensor, index: int | None = None) -> tuple[int, int]:
        """Return (height, width) of a batch, or of image `index` of a list; raise InputError for malformed pixels."""
        name, batch, rank = ("pixel_values", "batch, ", 4) if index is None else (f"pixel_values[{index}]", "", 3)
        channels, patch_size = self.patch_embeddings.num_channels, self.patch_embeddings.patch_size
        if not isinstance(pixel_values, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(pixel_values).__name__}")
        if pixel_values.dim() != rank or channels not in (pixel_values.shape[-3], pixel_values.shape[-1]):
            raise InputError(
                f"{name}: expected [{batch}{channels}, height, width] or [{batch}height, width, {channels}]"
                f" (config.num_channels is {channels}), got {list(pixel_values.shape)}"
            )
        if not (pixel_values.is_floating_point() or pixel_values.dtype == torch.uint8):
            raise InputError(f"{name}: expected floating or uint8 pixels, got {pixel_values.dtype}")
        image_size = make_pair(
            pixel_values.shape[-2:] if pixel_values.shape[-3] == channels else pixel_values.shape[-3:-1]
        )
        if image_size[0] < patch_size[0] or image_size[1] < patch_size[1]:
            raise InputError(f"{name}: expected room for one patch of {patch_size}, got {image_size} (height, width)")
        return image_size


def get_image_mean(config: ViTConfig) -> tuple[float, ...]:
    """Return the per-channel mean that normalises uint8 pixels; by default 0.5, as in Google's ViT checkpoints."""
    return tuple(getattr(config, "image_mean", None) or [0.5] * config.num_channels)


def get_image_std(config: ViTConfig) -> tuple[float, ...]:
    """Return the per-channel standard deviation that normalises uint8 pixels; by default 0.5."""
    return tuple(getattr(config, "image_std", None) or [0.5] * config.num_channels)


def to_float_channels_first(pixel_values: Tensor, config: ViTConfig, dtype: torch.dtype) -> Tensor:
    """Convert [B, C, H, W] or [B, H, W, C] pixels to [B, C, H, W] of `dtype`; uint8 pixels are normalised."""
    if pixel_values.shape[1] != config.num_channels:
        pixel_values = pixel_values.permute(0, 3, 1, 2)
    if pixel_values.dtype == torch.uint8:
        return ops.normalize_pixels(pixel_values, get_image_mean(config), get_image_std(config), dtype)
    return pixel_values.to(dtype)


def resample_position_embeddings(
    position_embeddings: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Resample position embeddings to another grid of patches, by bicubic interpolation.

    The class token's embedding is unchanged. Dosovitskiy et al. 2021, section 3.2.

    Args:
        position_embeddings: [1, 1 + old rows * old columns, D].
        old_grid: (rows, columns) that `position_embeddings` was made for.
        new_grid: (rows, columns) to resample it to.

    Returns:
        [1, 1 + new rows * new columns, D] of the same dtype, interpolated in float32.
    """
    if old_grid == new_grid:
        return position_embeddings
    class_token, patches = position_embeddings[:, :1], position_embeddings[:, 1:]
    patches = patches.transpose(1, 2).unflatten(2, old_grid).float()  # [1, D, rows, columns]
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([class_token, patches.flatten(2).transpose(1, 2).to(class_token.dtype)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The block: attention (eq. 2) and feed-forward (eq. 3)
# ---------------------------------------------------------------------------------------------------------------------


class ViTSelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim)) V in every head, with Q, K, V = x W_q, x W_k, x W_v.

    The output projection of multi-head attention is in `ViTSelfOutput`. Vaswani et al. 2017, "Attention Is All You
    Need", arXiv:1706.03762, section 3.2; Dosovitskiy et al. 2021, appendix A.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise InputError(
                f"config.hidden_size: expected a multiple of num_attention_heads ({config.num_attention_heads}),"
                f" got {config.hidden_size}"
            )
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def forward(
        self, hidden_states: Tensor, attention_mask: Mask = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """Attend from every token to every token of the same image.

        Args:
            hidden_states: [B, N, D], or [1, sum of all N, D] for packed images.
            attention_mask: boolean, or added to the scores; broadcastable to [B, heads, N, N]. A `Packing` for packed
                images.
            output_attentions: also return the probabilities.

        Returns:
            The context, of the shape of `hidden_states`, and the probabilities [B, heads, N, N] (for packed images, a
            list of [heads, N, N]) or None.
        """
        projections = (self.query(hidden_states), self.key(hidden_states), self.value(hidden_states))  # [B, N, D] each
        heads = (self.num_heads, -1)
        query, key, value = (states.unflatten(-1, heads) for states in projections)  # [B, N, heads, head_dim] each
        dropout_p = self.dropout_prob if self.training else 0.0
        # Maps that are not used for the output would have no gradients.
        if self.config._attn_implementation == "eager" or (output_attentions and torch.is_grad_enabled()):
            context, maps = varlen.attend_with_maps(query, key, value, attention_mask, dropout_p=dropout_p)
            return context, maps if output_attentions else None
        context = varlen.attend(ops.attention, query, key, value, mask=attention_mask, dropout_p=dropout_p)
        probabilities = varlen.attention_probabilities(query, key, attention_mask) if output_attentions else None
        return context, probabilities


class ViTSelfOutput(nn.Module):
    """dropout(x W_o + b): the output projection of multi-head attention, [B, N, D] -> [B, N, D]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class ViTAttention(nn.Module):
    """MSA(x) = [head_1; ...; head_h] W_o: self-attention, then its output projection; shapes as `ViTSelfAttention`."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention = ViTSelfAttention(config)
        self.output = ViTSelfOutput(config)

    def forward(
        self, hidden_states: Tensor, attention_mask: Mask = None, output_attentions: bool = False
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        context, probabilities = self.attention(hidden_states, attention_mask, output_attentions)
        return self.output(context), probabilities


def read_activation_name(config: ViTConfig, option: str) -> str:
    """Return the activation that a config option names; raise InputError for an unknown one."""
    name = getattr(config, option)
    if name not in ops.ACTIVATIONS:
        raise InputError(
            f"config.{option}: expected one of {', '.join(sorted(ops.ACTIVATIONS))}, got {format_value(name)}"
        )
    return name


class ViTIntermediate(nn.Module):
    """GELU(x W_1 + b_1): first half of the feed-forward, [B, N, D] -> [B, N, intermediate size].

    Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", arXiv:1606.08415. config.hidden_act may name another
    activation.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = read_activation_name(config, "hidden_act")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.ACTIVATIONS[self.activation](self.dense(hidden_states))


class ViTOutput(nn.Module):
    """dropout(x W_2 + b_2): second half of the feed-forward, [B, N, intermediate size] -> [B, N, D]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class DropPath(nn.Module):
    """branch * bernoulli(1 - rate) / (1 - rate), one draw per image, in training; the identity in evaluation.

    Stochastic depth: Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor, attention_mask: Mask = None) -> Tensor:
        """[B, ...] -> [B, ...]; packed images [1, sum of all N, D] -> the same shape."""
        if not (self.training and self.rate):
            return branch
        packing = attention_mask if isinstance(attention_mask, Packing) else None
        is_packed = packing is not None and branch.shape[1] == sum(packing.lengths)  # else only the class tokens
        count = len(packing.lengths) if packing is not None and is_packed else len(branch)
        shape = [count] + [1] * (branch.ndim - 1)
        mask = torch.empty(shape, dtype=branch.dtype, device=branch.device).bernoulli_(1 - self.rate)
        if packing is not None and is_packed:
            mask = mask.repeat_interleave(packing.cu_seqlens.diff(), 0, output_size=branch.shape[1]).view(1, -1, 1)
        return branch * mask / (1 - self.rate)  # mask / (1 - rate) first would round that factor to bfloat16


def compute_drop_path_rates(config: ViTConfig) -> list[float]:
    """Return the drop path rate of each block: it rises linearly from 0 to config.drop_path_rate (default 0)."""
    last, count = getattr(config, "drop_path_rate", None) or 0.0, config.num_hidden_layers
    if not 0 <= last < 1:
        raise InputError(f"config.drop_path_rate: expected 0 or more and below 1, got {last}")
    return [last * index / (count - 1) if count > 1 else last for index in range(count)]


class ViTLayer(GradientCheckpointingLayer):
    """One pre-LayerNorm Transformer block.

    h = x + MSA(LN(x))     (eq. 2)
    y = h + MLP(LN(h))     (eq. 3)
    """

    def __init__(self, config: ViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.config = config
        self.attention = ViTAttention(config)
        self.intermediate = ViTIntermediate(config)
        self.output = ViTOutput(config)
        self.layernorm_before = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor, attention_mask: Mask = None, output_attentions: bool = False) -> Any:
        """[B, N, D] -> [B, N, D]; with output_attentions, also the attention maps of `ViTSelfAttention`."""
        branch, probabilities = self.attention(self.layernorm_before(hidden_states), attention_mask, output_attentions)
        hidden_states = hidden_states + self.drop_path(branch, attention_mask)
        branch = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        hidden_states = hidden_states + self.drop_path(branch, attention_mask)
        return (hidden_states, probabilities) if output_attentions else hidden_states


class ViTEncoder(nn.Module):
    """z_L = block_L(... block_1(z_0)): the stack of blocks."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layer = nn.ModuleList([ViTLayer(config, rate) for rate in compute_drop_path_rates(config)])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        output_attentions: bool = False,
        output_hidden_states: bool | int | Sequence[int] = False,
        class_token_only: bool = False,
        num_blocks: int | None = None,
    ) -> BaseModelOutput:
        """[B, N, D] -> [B, N, D], or [B, 1, D] with class_token_only. `ViTModel.forward` describes the options."""
        layers = self.get_first_blocks(num_blocks)
        requested = resolve_hidden_state_indices(output_hidden_states, len(layers) + 1)
        all_hidden_states, all_attentions = [hidden_states if 0 in requested else None], []
        for index, layer in enumerate(layers, start=1):
            hidden_states = layer(hidden_states, attention_mask, output_attentions)
            if output_attentions:
                hidden_states, attentions = hidden_states
                all_attentions.append(attentions)
            all_hidden_states.append(hidden_states if index in requested else None)
        return BaseModelOutput(
            last_hidden_state=varlen.select_class_tokens(hidden_states, attention_mask)
            if class_token_only
            else hidden_states,
            hidden_states=None if output_hidden_states is False else tuple(all_hidden_states),
            attentions=tuple(all_attentions) if output_attentions else None,
        )

    def get_first_blocks(self, num_blocks: int | None) -> list[nn.Module]:
        if num_blocks is not None and not 0 <= num_blocks <= len(self.layer):
            raise InputError(f"num_blocks: expected 0 to {len(self.layer)}, got {num_blocks}")
        return list(self.layer)[:num_blocks]


def resolve_hidden_state_indices(output_hidden_states: bool | int | Sequence[int], count: int) -> set[int]:
    """Return which of `count` hidden states are requested: all, none, or the listed ones (negative: from the end)."""
    if isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    requested = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {index % count for index in requested if -count <= index < count}


class ViTPooler(nn.Module):
    """tanh(z_class W + b): the `pre_logits` layer of the in21k checkpoints (hidden layer of the pre-training head)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = read_activation_name(config, "pooler_act")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, D] -> [B, pooler_output_size]"""
        return ops.ACTIVATIONS[self.activation](self.dense(hidden_states[:, 0]))
