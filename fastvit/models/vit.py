"""The Vision Transformer, module by module in the order of the paper.

    image -> patches -> patch embedding, class token, position embedding        ViTEmbeddings
          -> blocks of  x + attention(layer_norm(x)),  x + mlp(layer_norm(x))   ViTEncoder of ViTLayer
          -> layer norm -> class token -> pooler or classification head         fastvit.models.heads

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929. This is the plain model, to be read and to
be compared with. `fastvit.models.fused` attaches fused operations to embeddings, blocks and encoder, which compute the
same from the same parameters; `fastvit.restore(model)` takes them off again.

Modules and parameters have the names of the checkpoints on the Hugging Face hub
(`vit.encoder.layer.0.attention.attention.query.weight`), so weights need no renaming in either direction.

Shapes: B images, C channels, H x W pixels, P patches, N = P + 1 tokens, D hidden size. Images of different sizes run as
one sequence, [1, tokens of all, D], with a `Packing` in place of an attention mask (`fastvit.ops.varlen`).
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
    """LayerNorm over the hidden size."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


# ---------------------------------------------------------------------------------------------------------------------
# From pixels to tokens
# ---------------------------------------------------------------------------------------------------------------------


class ViTPatchEmbeddings(nn.Module):
    """Patches, each projected to the hidden size: a convolution whose stride is its kernel."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_size = make_pair(config.patch_size)
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size)

    def compute_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size` (height, width)."""
        return image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]"""
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class ViTEmbeddings(nn.Module):
    """Patch embeddings, the class token before them, and position embeddings added to both (the paper's eq. 1)."""

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
        """[B, C, H, W] or [B, H, W, C], floating or uint8 -> [B, N, D]. bool_masked_pos: [B, P] (SimMIM)."""
        position_embeddings = self.get_position_embeddings(pixel_values, interpolate_pos_encoding)
        mask, mask_token = self.check_mask(bool_masked_pos), self.mask_token
        dtype = self.patch_embeddings.projection.weight.dtype
        patches = self.patch_embeddings(to_float_channels_first(pixel_values, self.config, dtype))
        if mask is not None and mask_token is not None:
            patches = torch.where(mask.unsqueeze(-1), mask_token.to(patches.dtype), patches)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.dropout(tokens + position_embeddings)

    def get_position_embeddings(self, pixel_values: Tensor, interpolate: bool) -> Tensor:
        """The position embeddings [1, N, D] of images of this size."""
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
        """The mask as bool [B, P]."""
        if bool_masked_pos is None:
            return None
        if self.mask_token is None:
            raise InputError("bool_masked_pos: this model has no mask token (build it with use_mask_token=True)")
        return bool_masked_pos.flatten(1).bool()

    def get_grid(self, pixel_values: Tensor | Sequence[Tensor]) -> Any:
        """(rows, columns) of patches in the images of a batch; of a list, a list of them."""
        if isinstance(pixel_values, Tensor):
            return self.patch_embeddings.compute_grid(self.read_image_size(pixel_values))
        return [
            self.patch_embeddings.compute_grid(self.read_image_size(image, index))
            for index, image in enumerate(pixel_values)
        ]

    def read_image_size(self, pixel_values: Tensor, index: int | None = None) -> tuple[int, int]:
        """(height, width) of the images in a batch, or of image `index` in a list, after checking what they are."""
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
    """The mean that normalises uint8 pixels; 0.5, as in Google's ViT checkpoints, where the config has none."""
    return tuple(getattr(config, "image_mean", None) or [0.5] * config.num_channels)


def get_image_std(config: ViTConfig) -> tuple[float, ...]:
    """As `get_image_mean`, the standard deviation."""
    return tuple(getattr(config, "image_std", None) or [0.5] * config.num_channels)


def to_float_channels_first(pixel_values: Tensor, config: ViTConfig, dtype: torch.dtype) -> Tensor:
    """Pixels in any form that the model accepts, as a normalised [B, C, H, W] of `dtype`."""
    if pixel_values.shape[1] != config.num_channels:
        pixel_values = pixel_values.permute(0, 3, 1, 2)
    if pixel_values.dtype == torch.uint8:
        return ops.normalize_pixels(pixel_values, get_image_mean(config), get_image_std(config), dtype)
    return pixel_values.to(dtype)


def resample_position_embeddings(
    position_embeddings: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Position embeddings for another image size: the class token's is kept, the grid is resampled bicubically.

    position_embeddings: [1, 1 + rows * columns, D] for old_grid = (rows, columns). Returns [1, 1 + new patches, D].
    Dosovitskiy et al. 2021, section 3.2.
    """
    if old_grid == new_grid:
        return position_embeddings
    class_token, patches = position_embeddings[:, :1], position_embeddings[:, 1:]
    patches = patches.transpose(1, 2).unflatten(2, old_grid).float()  # [1, D, rows, columns]
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([class_token, patches.flatten(2).transpose(1, 2).to(class_token.dtype)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The block: attention, feed-forward
# ---------------------------------------------------------------------------------------------------------------------


class ViTSelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2) without its output projection."""

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
        """[B, N, D] -> context [B, N, D] and, if asked for, probabilities [B, heads, N, N].

        Packed images: [1, N, D] -> [1, N, D], and for each image [heads, its tokens, its tokens].
        """
        projections = (self.query(hidden_states), self.key(hidden_states), self.value(hidden_states))
        query, key, value = (states.unflatten(-1, (self.num_heads, -1)) for states in projections)
        if self.config._attn_implementation == "eager":
            return varlen.attend_with_maps(self.attend, query, key, value, attention_mask, output_attentions)
        dropout_p = self.dropout_prob if self.training else 0.0
        context = varlen.attend(ops.attention, query, key, value, mask=attention_mask, dropout_p=dropout_p)
        probabilities = varlen.attention_probabilities(query, key, attention_mask) if output_attentions else None
        return context, probabilities

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """softmax(query key^T / sqrt(head_dim) + mask) value, step by step, and the probabilities before dropout."""
        probabilities = ops.attention_probabilities(query, key, mask=mask)
        dropped = F.dropout(probabilities, self.dropout_prob, self.training)
        return torch.einsum("bhqk,bkhd->bqhd", dropped, value).flatten(2), dropped


class ViTSelfOutput(nn.Module):
    """The output projection of attention."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class ViTAttention(nn.Module):
    """Self-attention and its output projection."""

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
    name = getattr(config, option)
    if name not in ops.ACTIVATIONS:
        raise InputError(
            f"config.{option}: expected one of {', '.join(sorted(ops.ACTIVATIONS))}, got {format_value(name)}"
        )
    return name


class ViTIntermediate(nn.Module):
    """First half of the feed-forward: D -> intermediate size, then GELU."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = read_activation_name(config, "hidden_act")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.ACTIVATIONS[self.activation](self.dense(hidden_states))


class ViTOutput(nn.Module):
    """Second half of the feed-forward: intermediate size -> D."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class DropPath(nn.Module):
    """Stochastic depth: while training, drops the branch of some images and scales the others up.

    Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor, attention_mask: Mask = None) -> Tensor:
        """[B, ...] -> [B, ...]; packed images [1, N, D] -> [1, N, D]."""
        if not (self.training and self.rate):
            return branch
        packing = attention_mask if isinstance(attention_mask, Packing) else None
        is_packed = packing is not None and branch.shape[1] == sum(packing.lengths)  # not the class tokens alone
        count = len(packing.lengths) if packing is not None and is_packed else len(branch)
        shape = [count] + [1] * (branch.ndim - 1)
        mask = torch.empty(shape, dtype=branch.dtype, device=branch.device).bernoulli_(1 - self.rate)
        if packing is not None and is_packed:
            mask = mask.repeat_interleave(packing.cu_seqlens.diff(), 0, output_size=branch.shape[1]).view(1, -1, 1)
        return branch * mask / (1 - self.rate)  # the quotient alone, rounded to bfloat16, would be wrong for all


def compute_drop_path_rates(config: ViTConfig) -> list[float]:
    """The drop path rate of each block, from 0 in the first to config.drop_path_rate (0 if it has none) in the last."""
    last, count = getattr(config, "drop_path_rate", None) or 0.0, config.num_hidden_layers
    if not 0 <= last < 1:
        raise InputError(f"config.drop_path_rate: expected 0 or more and below 1, got {last}")
    return [last * index / (count - 1) if count > 1 else last for index in range(count)]


class ViTLayer(GradientCheckpointingLayer):
    """One pre-LayerNorm block:  h = x + attention(norm(x));  y = h + mlp(norm(h))  (the paper's eq. 2 and 3)."""

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
        """[B, N, D] -> [B, N, D], with the attention maps when asked for. Packed images: [1, N, D] -> [1, N, D]."""
        branch, probabilities = self.attention(self.layernorm_before(hidden_states), attention_mask, output_attentions)
        hidden_states = hidden_states + self.drop_path(branch, attention_mask)
        branch = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        hidden_states = hidden_states + self.drop_path(branch, attention_mask)
        return (hidden_states, probabilities) if output_attentions else hidden_states


class ViTEncoder(nn.Module):
    """The blocks, one after the other."""

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
        """[B, N, D] -> [B, N, D], or [B, 1, D] with class_token_only; see `ViTModel.forward` for the options."""
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
    """Which of `count` hidden states are asked for: all, none, or those named; negative ones count from the end."""
    if isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    requested = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {index % count for index in requested if -count <= index < count}


class ViTPooler(nn.Module):
    """tanh(W x) of the class token: the `pre_logits` layer of the in21k checkpoints."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = read_activation_name(config, "pooler_act")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, D] -> [B, pooler_output_size]"""
        return ops.ACTIVATIONS[self.activation](self.dense(hidden_states[:, 0]))
