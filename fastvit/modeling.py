"""The Vision Transformer, from the picture to the loss, in the order of the paper.

    picture -> patches -> patch embedding, class token, position embedding       ViTEmbeddings
            -> blocks of  x + attention(layer_norm(x)),  x + mlp(layer_norm(x))  ViTEncoder of ViTLayer
            -> layer norm -> class token -> pooler or classification head        ViTModel, ViTFor...

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929. The mathematics stands in `fastvit.ops`; the
modules here hold the parameters and say in which order they meet.

Modules and parameters carry the names that the checkpoints on the Hugging Face hub carry
(`vit.encoder.layer.0.attention.attention.query.weight`), so weights need no renaming in either direction.

Shapes: B pictures, C channels, H x W pixels, P patches, N = P + 1 tokens, D hidden size. A list of pictures that differ
in size runs as one sequence, [1, tokens of all, D], with a `Packing` in place of an attention mask (`fastvit.packing`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel, ViTConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.utils.generic import can_return_tuple

from fastvit import ops
from fastvit.attention_interface import register_attention
from fastvit.configuration import as_pair, shown
from fastvit.errors import InputError
from fastvit.features import Features, blocks_to_take
from fastvit.inspection import check_checkpoint, read_config
from fastvit.packing import Mask, Packing, attend, class_tokens_of, pack, pictures_of
from fastvit.reference import Affine, BlockWeights

register_attention()  # transformers checks the names that `attn_implementation` may have


def activation_name(config: ViTConfig, option: str) -> str:
    name = getattr(config, option)
    if name not in ops.ACTIVATIONS:
        raise InputError(f"config.{option}: expected one of {', '.join(sorted(ops.ACTIVATIONS))}, got {shown(name)}")
    return name


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its forward: hooks, or a forward replaced by a device map."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of `kind` and nothing else."""
    return type(module) is kind and not is_hooked(module)


PLAIN_WEIGHTS = (nn.Parameter, Tensor, FakeTensor)  # the last is what an export shows the model instead


def plain_tensors(module: nn.Module, kind: type[nn.Module]) -> Affine | None:
    """Weight and bias of `module` where a fused operation may stand in for it, or None: it must be an unhooked `kind`
    with an ordinary weight.

    A projection that was wrapped (LoRA, quantisation, parametrisation) is not plain; it is called as the module it is.
    """
    if not is_own(module, kind):
        return None
    tensors: Any = module._parameters  # nn.Module's own look-up of an attribute takes ten times as long
    if tensors.get("weight") is None:
        tensors = {"weight": module.weight, "bias": module.bias}
    return (tensors["weight"], tensors["bias"]) if type(tensors["weight"]) in PLAIN_WEIGHTS else None


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` has `plain_tensors`."""
    return plain_tensors(module, kind) is not None


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), by our linear operation where `layer` is a plain nn.Linear. [..., D] -> [..., units]."""
    tensors = plain_tensors(layer, nn.Linear)
    return layer(x) if tensors is None else ops.linear(x, *tensors)


def drops_nothing(layer: nn.Module) -> bool:
    """Whether `layer` is an unhooked nn.Dropout that gives what it is given: no call for it."""
    return is_own(layer, nn.Dropout) and not (layer.training and layer.p)


def apply_dropout(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x)."""
    return x if drops_nothing(layer) else layer(x)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the hidden size."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


def add_and_norm(x: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """(x + residual, the norm of that), in one pass where nothing watches or replaces the norm."""
    if is_plain(norm, LayerNorm):
        return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps)
    residual = x + residual
    return residual, norm(residual)


# ---------------------------------------------------------------------------------------------------------------------
# From pixels to tokens
# ---------------------------------------------------------------------------------------------------------------------


class ViTPatchEmbeddings(nn.Module):
    """The projection of a patch to the hidden size; kept as the convolution that checkpoints store it as."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.patch_size = as_pair(config.patch_size)
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, stride=self.patch_size)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in a picture of `image_size` (height, width)."""
        return image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, P, D]: the patch embedding alone."""
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class ViTEmbeddings(nn.Module):
    """Patches, class token, position embedding: from a picture to the tokens that the encoder reads."""

    def __init__(self, config: ViTConfig, use_mask_token: bool = False):
        super().__init__()
        self.config = config
        self.patch_embeddings = ViTPatchEmbeddings(config)
        rows, columns = self.patch_embeddings.grid(as_pair(config.image_size))
        if rows * columns == 0:
            raise InputError(
                f"config.image_size: expected room for one patch of {config.patch_size}, got {config.image_size}"
            )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if use_mask_token else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, rows * columns + 1, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, pixel_values: Tensor | list[Tensor], bool_masked_pos: Any = None, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """[B, C, H, W] or [B, H, W, C], floating or uint8 -> [B, N, D]; a list of pictures -> [1, tokens of all, D].

        bool_masked_pos: [B, P].
        """
        if isinstance(pixel_values, Tensor):
            return self.dropout(self.embed(pixel_values, bool_masked_pos, interpolate_pos_encoding))
        return self.dropout(self.embed_each(pixel_values))

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None, interpolate_pos_encoding: bool) -> Tensor:
        """A batch of pictures of one size -> [B, N, D], before dropout."""
        image_size = self.image_size_of(pixel_values)
        pos_embed: Tensor = self.position_embeddings
        if interpolate_pos_encoding:
            grid = self.patch_embeddings.grid(as_pair(self.config.image_size))
            pos_embed = resample_position_embeddings(pos_embed, grid, self.patch_embeddings.grid(image_size))
        elif image_size != as_pair(self.config.image_size):
            raise InputError(
                f"pixel_values: expected pictures of {as_pair(self.config.image_size)} (height, width),"
                f" got {image_size}; pass interpolate_pos_encoding=True for another size"
            )
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise InputError("bool_masked_pos: this model has no mask token (build it with use_mask_token=True)")
            bool_masked_pos = bool_masked_pos.flatten(1).bool()

        projection = self.patch_embeddings.projection
        if is_plain(projection, nn.Conv2d) and not is_hooked(self.patch_embeddings):
            return ops.patch_embed(
                pixel_values,
                projection.weight,
                projection.bias,
                self.cls_token,
                pos_embed,
                patch_size=self.patch_embeddings.patch_size,
                mean=image_mean_of(self.config),
                std=image_std_of(self.config),
                mask_token=self.mask_token,
                mask=bool_masked_pos,
            )
        patches = self.patch_embeddings(as_float_channels_first(pixel_values, self.config, projection.weight.dtype))
        return ops.join_tokens(patches, self.cls_token, pos_embed, mask_token=self.mask_token, mask=bool_masked_pos)

    def embed_each(self, images: list[Tensor]) -> Tensor:
        """Images of any sizes -> [1, tokens of all, D], in their order; those of one size are embedded together."""
        same: dict[Any, list[int]] = {}
        for index, image in enumerate(images):
            same.setdefault((image.shape, image.dtype), []).append(index)
        tokens: dict[int, Tensor] = {}
        for indices in same.values():
            batch = torch.stack([images[index] for index in indices])
            embeddings = self.embed(batch, None, interpolate_pos_encoding=True)
            tokens.update(zip(indices, embeddings.unbind(), strict=True))
        return torch.cat([tokens[index] for index in range(len(images))]).unsqueeze(0)

    def collate(self, images: Any) -> tuple[Any, Packing | None]:
        """A list of images as `forward` accepts them, and their packing.

        Images of one size are stacked: they are a batch like any other and need no packing. Raises InputError for
        anything but a list of images.
        """
        if not isinstance(images, list | tuple):
            raise InputError(f"pixel_values: expected a tensor or a list of tensors, got {type(images).__name__}")
        if not images:
            raise InputError("pixel_values: expected images, got an empty list")
        patches = [rows * columns for rows, columns in self.grid_of(images)]
        if len({(image.shape, image.dtype) for image in images}) == 1:
            return torch.stack(list(images)), None
        return list(images), pack([1 + count for count in patches], images[0].device)

    def grid_of(self, pixel_values: Tensor | Sequence[Tensor]) -> Any:
        """(rows, columns) of patches in the pictures of a batch; of a list, a list of them."""
        if isinstance(pixel_values, Tensor):
            return self.patch_embeddings.grid(self.image_size_of(pixel_values))
        return [
            self.patch_embeddings.grid(self.image_size_of(picture, index)) for index, picture in enumerate(pixel_values)
        ]

    def image_size_of(self, pixel_values: Tensor, index: int | None = None) -> tuple[int, int]:
        """(height, width) of the pictures in a batch, or of picture `index` in a list, after checking what they are."""
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
        image_size = as_pair(
            pixel_values.shape[-2:] if pixel_values.shape[-3] == channels else pixel_values.shape[-3:-1]
        )
        if image_size[0] < patch_size[0] or image_size[1] < patch_size[1]:
            raise InputError(f"{name}: expected room for one patch of {patch_size}, got {image_size} (height, width)")
        return image_size


def image_mean_of(config: ViTConfig) -> tuple[float, ...]:
    """What uint8 pixels are normalised by; 0.5, as in Google's ViT checkpoints, where the config does not say."""
    return tuple(getattr(config, "image_mean", None) or [0.5] * config.num_channels)


def image_std_of(config: ViTConfig) -> tuple[float, ...]:
    """As `image_mean_of`, the standard deviation."""
    return tuple(getattr(config, "image_std", None) or [0.5] * config.num_channels)


def as_float_channels_first(pixel_values: Tensor, config: ViTConfig, dtype: torch.dtype) -> Tensor:
    """Pixels in any form that the model takes, as a normalised [B, C, H, W] of `dtype`."""
    if pixel_values.shape[1] != config.num_channels:
        pixel_values = pixel_values.permute(0, 3, 1, 2)
    if pixel_values.dtype == torch.uint8:
        return ops.normalize_pixels(pixel_values, image_mean_of(config), image_std_of(config), dtype)
    return pixel_values.to(dtype)


def resample_position_embeddings(
    position_embeddings: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> Tensor:
    """Position embeddings for another picture size: the class token's is kept, the grid is resampled bicubically.

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
    """Multi-head self-attention up to the output projection; query, key and value run as one matrix product."""

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
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        output_attentions: bool = False,
        class_token_only: bool = False,
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        """[B, N, D] -> context [B, Nq, D] and, when asked for, probabilities [B, heads, Nq, N]; Nq is N, or 1.

        Packed pictures: [1, N, D] -> [1, N, D], or [B, 1, D], and for each picture [heads, its tokens, its tokens].
        """
        if isinstance(attention_mask, Packing):
            query, key, value = self.project(hidden_states, self.query, self.key, self.value)
            context, probabilities = self.context_of_packed(query, key, value, attention_mask, output_attentions)
            return class_tokens_of(context, attention_mask) if class_token_only else context, probabilities
        if class_token_only:
            (query,) = self.project(hidden_states[:, :1], self.query)
            key, value = self.project(hidden_states, self.key, self.value)
            attention_mask = None if attention_mask is None else attention_mask[:, :, :1]
        else:
            query, key, value = self.project(hidden_states, self.query, self.key, self.value)
        return self.context_of(query, key, value, attention_mask, output_attentions)

    def context_of(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[B, Nq, heads, head_dim], twice [B, N, heads, head_dim] -> context and probabilities as in `forward`."""
        dropout_p = self.dropout_prob if self.training else 0.0
        if self.config._attn_implementation == "eager":
            probabilities = ops.attention_probabilities(query, key, mask=attention_mask)
            probabilities = F.dropout(probabilities, dropout_p)
            context = torch.einsum("bhqk,bkhd->bqhd", probabilities, value).flatten(2)
            return context, probabilities if output_attentions else None

        context = ops.attention(query, key, value, dropout_p=dropout_p, mask=attention_mask)
        if not output_attentions:
            return context, None
        return context, ops.attention_probabilities(query, key, mask=attention_mask)

    def context_of_packed(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, output_attentions: bool
    ) -> tuple[Tensor, list[Tensor] | None]:
        """`context_of` packed pictures [1, N, heads, head_dim]: one by one only where probabilities are needed."""
        if not output_attentions and self.config._attn_implementation != "eager":
            dropout_p = self.dropout_prob if self.training else 0.0
            return attend(ops.attention, query, key, value, mask=packing, dropout_p=dropout_p), None
        parts = zip(*(pictures_of(tensor, packing) for tensor in (query, key, value)), strict=True)
        results = [self.context_of(q[None], k[None], v[None], None, output_attentions) for q, k, v in parts]
        contexts, probabilities = zip(*results, strict=True)
        return torch.cat(contexts, dim=1), [maps[0] for maps in probabilities] if output_attentions else None

    def project(self, hidden_states: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Each projection of [B, N, D] as [B, N, heads, head_dim]."""
        tensors = [plain_tensors(layer, nn.Linear) for layer in layers]
        projections = [pair for pair in tensors if pair is not None]
        if len(projections) < len(layers):
            return by_heads([apply_linear(layer, hidden_states) for layer in layers], self.num_heads)
        return by_heads(project(hidden_states, projections), self.num_heads)


def by_heads(tensors: Sequence[Tensor], num_heads: int) -> tuple[Tensor, ...]:
    """Each [B, N, D] as [B, N, heads, head_dim]."""
    return tuple([tensor.unflatten(-1, (num_heads, -1)) for tensor in tensors])


def joined(projections: Sequence[Affine]) -> Affine:
    """Weight and bias of one linear layer that computes all of these.

    Concatenated at each use: checkpoints, optimizers and LoRA see three parameters. It costs a copy of the weights for
    each call, 3.5 MB read and written in a block of ViT-B in half precision.
    """
    weights, biases = zip(*projections, strict=True)
    return torch.cat(weights), None if biases[0] is None else torch.cat(biases)


def project(x: Tensor, projections: Sequence[Affine]) -> Sequence[Tensor]:
    """Each of these linear layers of x [..., D]: one matmul on a GPU; on a CPU the copy of the weights costs more."""
    if x.is_cpu:
        return [ops.linear(x, *projection) for projection in projections]
    return ops.linear(x, *joined(projections)).chunk(len(projections), dim=-1)


class ViTSelfOutput(nn.Module):
    """The output projection of attention."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return apply_dropout(self.dropout, apply_linear(self.dense, hidden_states))


class ViTAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.attention = ViTSelfAttention(config)
        self.output = ViTSelfOutput(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask = None,
        output_attentions: bool = False,
        class_token_only: bool = False,
    ) -> tuple[Tensor, Tensor | list[Tensor] | None]:
        context, probabilities = self.attention(hidden_states, attention_mask, output_attentions, class_token_only)
        return self.output(context), probabilities


class ViTIntermediate(nn.Module):
    """First half of the feed-forward: D -> intermediate size, then GELU."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = activation_name(config, "hidden_act")

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


def drop_path_rates(config: ViTConfig) -> list[float]:
    """Each block's chance to lose a branch while training, from 0 in the first to config.drop_path_rate in the last.

    Huang et al. 2016, "Deep Networks with Stochastic Depth", arXiv:1603.09382. Without config.drop_path_rate, 0.
    """
    last, count = getattr(config, "drop_path_rate", None) or 0.0, config.num_hidden_layers
    if not 0 <= last < 1:
        raise InputError(f"config.drop_path_rate: expected 0 or more and below 1, got {last}")
    return [last * index / (count - 1) if count > 1 else last for index in range(count)]


class PlainParts(NamedTuple):
    """A block whose parts nothing watches or replaces: what `ViTLayer.fused` computes it from."""

    weights: BlockWeights
    num_heads: int
    activation: str
    attention_dropout_prob: float
    attention_dropout: nn.Module
    dropout: nn.Module


class ViTLayer(GradientCheckpointingLayer):
    """One pre-LayerNorm block:  h = x + attention(norm(x));  y = h + mlp(norm(h))  (the paper's eq. 2 and 3).

    drop_path_rate: the chance that a picture goes without attention(...), and without mlp(...), while training.
    """

    def __init__(self, config: ViTConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.config = config
        self.drop_path_rate = drop_path_rate
        self.attention = ViTAttention(config)
        self.intermediate = ViTIntermediate(config)
        self.output = ViTOutput(config)
        self.layernorm_before = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        attention_mask: Mask = None,
        output_attentions: bool = False,
        class_token_only: bool = False,
        carry: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, N, D] -> [B, N, D], or [B, 1, D] for the class token alone; with the attention maps when asked for.
        Packed pictures go through as [1, N, D], and become [B, 1, D] likewise.

        A block ends with a residual add and the next begins with a LayerNorm, which are one operation. With `carry` the
        block leaves that add to the next one: it returns its branch and its residual, and takes such a pair.
        """
        parts = None if class_token_only or output_attentions else self.plain_parts()
        if parts is not None:
            branch, residual = self.fused(parts, hidden_states, residual, attention_mask)
            return (branch, residual) if carry else branch + residual

        if residual is None:
            residual, normed = hidden_states, self.layernorm_before(hidden_states)
        else:
            residual, normed = add_and_norm(hidden_states, residual, self.layernorm_before)
        branch, probabilities = self.attention(normed, attention_mask, output_attentions, class_token_only)
        if class_token_only:
            residual = class_tokens_of(residual, attention_mask)
        residual, normed = add_and_norm(self.drop_path(branch, attention_mask), residual, self.layernorm_after)
        branch = self.drop_path(self.feed_forward(normed), attention_mask)
        if carry:
            return branch, residual
        hidden_states = branch + residual
        return hidden_states if probabilities is None else (hidden_states, probabilities)

    def fused(
        self, parts: PlainParts, hidden_states: Tensor, residual: Tensor | None, attention_mask: Mask
    ) -> tuple[Tensor, Tensor]:
        """The same block as few operations, each with the LayerNorm before it: returns the branch and the residual."""
        weights, heads = parts.weights, parts.num_heads
        norm, projections = weights.norm_before, weights[1:4]
        dropout_p = parts.attention_dropout_prob if self.training else 0.0
        if ops.has_kernels(hidden_states):
            projection = joined(projections)
            if residual is None:
                residual, qkv = hidden_states, ops.layer_norm_linear(hidden_states, *norm, *projection)
            else:
                residual, qkv = ops.add_layer_norm_linear(hidden_states, residual, *norm, *projection)
            context = attend(ops.attention_packed, qkv, mask=attention_mask, num_heads=heads, dropout_p=dropout_p)
        else:
            if residual is None:
                residual, normed = hidden_states, ops.layer_norm(hidden_states, *norm)
            else:
                residual, normed = ops.add_layer_norm(hidden_states, residual, *norm)
            query, key, value = by_heads(project(normed, projections), heads)
            context = attend(ops.attention, query, key, value, mask=attention_mask, dropout_p=dropout_p)
        branch = apply_dropout(parts.attention_dropout, ops.linear(context, *weights.output))
        branch = self.drop_path(branch, attention_mask)
        linears = (*weights.first, *weights.second)
        residual, branch = ops.add_layer_norm_feed_forward(
            branch, residual, *weights.norm_after, *linears, parts.activation
        )
        return self.drop_path(apply_dropout(parts.dropout, branch), attention_mask), residual

    def drop_path(self, branch: Tensor, attention_mask: Mask) -> Tensor:
        """[B, N, D] or packed [1, N, D]: zero for some pictures, larger by as much for the others; only in training."""
        if not (self.training and self.drop_path_rate):
            return branch
        kept = 1 - self.drop_path_rate
        # The last block may have computed the class tokens alone; then there is one token a picture.
        packing = attention_mask if isinstance(attention_mask, Packing) else None
        is_packed = packing is not None and branch.shape[1] == sum(packing.lengths)
        count = len(packing.lengths) if packing is not None and is_packed else len(branch)
        mask = torch.empty(count, 1, 1, dtype=branch.dtype, device=branch.device).bernoulli_(kept)
        if packing is not None and is_packed:
            mask = mask.repeat_interleave(packing.cu_seqlens.diff(), 0, output_size=branch.shape[1]).view(1, -1, 1)
        return branch * mask / kept  # 1 / kept is never rounded to bfloat16, which would scale every branch wrongly

    def plain_parts(self) -> PlainParts | None:
        """What `fused` needs; None where something watches or replaces a part of the block."""
        if self.config._attn_implementation == "eager":
            return None
        own: Any = self._modules  # nn.Module's own look-up of an attribute takes ten times as long
        both, intermediate, last = own["attention"], own["intermediate"], own["output"]
        if not (is_own(both, ViTAttention) and is_own(intermediate, ViTIntermediate) and is_own(last, ViTOutput)):
            return None
        attention, output = both._modules["attention"], both._modules["output"]
        if not (is_own(attention, ViTSelfAttention) and is_own(output, ViTSelfOutput)):
            return None
        projections = attention._modules
        query = plain_tensors(projections["query"], nn.Linear)
        key = plain_tensors(projections["key"], nn.Linear)
        value = plain_tensors(projections["value"], nn.Linear)
        projection = plain_tensors(output._modules["dense"], nn.Linear)
        first = plain_tensors(intermediate._modules["dense"], nn.Linear)
        second = plain_tensors(last._modules["dense"], nn.Linear)
        before: Any = plain_tensors(own["layernorm_before"], LayerNorm)
        after: Any = plain_tensors(own["layernorm_after"], LayerNorm)
        if not (query and key and value and projection and first and second and before and after):
            return None
        norms = (*before, own["layernorm_before"].eps), (*after, own["layernorm_after"].eps)
        weights = BlockWeights(norms[0], query, key, value, projection, norms[1], first, second)
        dropouts = attention.dropout_prob, output._modules["dropout"], last._modules["dropout"]
        return PlainParts(weights, attention.num_heads, intermediate.activation, *dropouts)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]: one operation where nothing watches or replaces its parts."""
        first, second = self.intermediate.dense, self.output.dense
        if (
            is_plain(first, nn.Linear)
            and is_plain(second, nn.Linear)
            and not (is_hooked(self.intermediate) or is_hooked(self.output))
        ):
            branch = ops.feed_forward(
                hidden_states, first.weight, first.bias, second.weight, second.bias, self.intermediate.activation
            )
            return apply_dropout(self.output.dropout, branch)
        return self.output(self.intermediate(hidden_states))


def indices_asked_for(output_hidden_states: bool | int | Sequence[int], count: int) -> set[int]:
    """Which of `count` hidden states are asked for: all, none, or those named; negative ones count from the end."""
    if isinstance(output_hidden_states, bool):
        return set(range(count)) if output_hidden_states else set()
    asked = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {index % count for index in asked if -count <= index < count}


class ViTEncoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.layer = nn.ModuleList([ViTLayer(config, rate) for rate in drop_path_rates(config)])
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
        if num_blocks is not None and not 0 <= num_blocks <= len(self.layer):
            raise InputError(f"num_blocks: expected 0 to {len(self.layer)}, got {num_blocks}")
        layers = list(self.layer)[:num_blocks]
        asked = indices_asked_for(output_hidden_states, len(layers) + 1)
        all_hidden_states, all_attentions = [hidden_states if 0 in asked else None], []
        shorten = class_token_only and not (output_attentions or asked)
        residual = None
        # Who watches the blocks, by a hook or by asking for what they compute, sees sums. With checkpointing, what goes
        # from block to block is kept for backward: one tensor is less than two.
        watched = output_attentions or any(is_hooked(layer) or layer.gradient_checkpointing for layer in layers)
        for index, layer in enumerate(layers):
            is_last = index == len(layers) - 1
            carry = not (watched or is_last or index + 1 in asked)
            output = layer(hidden_states, residual, attention_mask, output_attentions, shorten and is_last, carry)
            if carry:
                hidden_states, residual = output
                all_hidden_states.append(None)
                continue
            residual = None
            if output_attentions:
                hidden_states, attentions = output
                all_attentions.append(attentions)
            else:
                hidden_states = output
            all_hidden_states.append(hidden_states if index + 1 in asked else None)
        if class_token_only and not (shorten and layers):
            hidden_states = class_tokens_of(hidden_states, attention_mask)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=None if output_hidden_states is False else tuple(all_hidden_states),
            attentions=tuple(all_attentions) if output_attentions else None,
        )


class ViTPooler(nn.Module):
    """tanh(W x) of the class token: the `pre_logits` layer of the in21k checkpoints."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_output_size)
        self.activation = activation_name(config, "pooler_act")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return ops.ACTIVATIONS[self.activation](self.dense(hidden_states[:, 0]))


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------

# The names of a block's tensors in transformers 5, in memory -> those on the hub, which are ours. What it saves has the
# hub's; its state dicts, and folders saved with save_original_format=False, have its own.
TRANSFORMERS_NAMES = {
    r"\blayers\.(\d+)\.layernorm_": r"encoder.layer.\1.layernorm_",
    r"\blayers\.(\d+)\.attention\.q_proj\.": r"encoder.layer.\1.attention.attention.query.",
    r"\blayers\.(\d+)\.attention\.k_proj\.": r"encoder.layer.\1.attention.attention.key.",
    r"\blayers\.(\d+)\.attention\.v_proj\.": r"encoder.layer.\1.attention.attention.value.",
    r"\blayers\.(\d+)\.attention\.o_proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"\blayers\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"\blayers\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}

# What belongs to a head and not to the backbone: a checkpoint of one head may be loaded into a model with another.
HEADS = ("classifier.", "pooler.", "decoder.", "embeddings.mask_token")


class ViTPreTrainedModel(PreTrainedModel):
    """What the models share: initialisation, loading, saving."""

    config_class = ViTConfig
    config: ViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTEmbeddings", "ViTLayer"]  # noqa: RUF012 (what transformers expects)
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": ViTLayer, "attentions": ViTAttention}  # noqa: RUF012

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # "eager" and "sdpa" are read at every call; transformers would guess from this file's text

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)
            init.trunc_normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a checkpoint: a hub id or a folder. Arguments are those of `transformers.PreTrainedModel`.

        Position embeddings are resampled when `image_size` (as an argument or in `config`) is not the checkpoint's.
        Every tensor is accounted for: raises InputError if the checkpoint is not a ViT, lacks a tensor of the backbone
        or holds one that the model does not know. Heads may differ; transformers reports which were not loaded.
        A config.json that does not describe its weights, or leads to other files or to code, and a file of weights that
        is damaged or would run code, raise InputError before memory is taken (`fastvit.inspection`).
        """
        return_info = kwargs.pop("output_loading_info", False)
        image_size = None
        if pretrained_model_name_or_path is not None:
            hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            stored = read_config(pretrained_model_name_or_path, **hub)
            if stored.get("model_type") != "vit":
                raise InputError(
                    f"{pretrained_model_name_or_path}: expected a checkpoint of model type 'vit',"
                    f" found {shown(stored.get('model_type'))}"
                )
            if kwargs.get("weights_only", True):  # who sets it to False trusts the checkpoint
                files = {name: kwargs[name] for name in ("use_safetensors", "variant") if name in kwargs}
                renames = {**TRANSFORMERS_NAMES, **(kwargs.get("key_mapping") or {})}
                check_checkpoint(pretrained_model_name_or_path, stored, renames, **files, **hub)
            stored_size = stored.get("image_size", ViTConfig().image_size)
            if isinstance(config, ViTConfig):
                image_size, config = config.image_size, copy.deepcopy(config)
                config.image_size = stored_size
            else:
                image_size = kwargs.pop("image_size", stored_size)

        kwargs["key_mapping"] = {**TRANSFORMERS_NAMES, **(kwargs.get("key_mapping") or {})}
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        # transformers would turn the renames that it applied back on saving: ours stay, we save the hub's names.
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not TRANSFORMERS_NAMES.keys() & set(conversion.source_patterns)
        ]
        for kind in ("missing_keys", "unexpected_keys"):
            backbone = sorted(key for key in info[kind] if not key.removeprefix("vit.").startswith(HEADS))
            if backbone:
                names = ", ".join(backbone[:8])
                raise InputError(f"{pretrained_model_name_or_path}: {len(backbone)} {kind.replace('_', ' ')}: {names}")
        if image_size is not None:
            model.resize_position_embeddings(image_size)
        return (model, info) if return_info else model

    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:
        """Make the model take pictures of `image_size` from now on; its position embeddings are resampled in place."""
        embeddings = self.base_model.embeddings
        old_grid, new_grid = (
            embeddings.patch_embeddings.grid(as_pair(size)) for size in (self.config.image_size, image_size)
        )
        self.config.image_size = image_size
        if old_grid != new_grid:
            resampled = resample_position_embeddings(embeddings.position_embeddings.detach(), old_grid, new_grid)
            embeddings.position_embeddings = nn.Parameter(resampled.contiguous())

    def forward_features(
        self, pixel_values: Tensor | Sequence[Tensor], *, class_token_only: bool = False, **kwargs: Any
    ) -> Features:
        """The tokens after the final LayerNorm: `Features` with cls_token, patch_tokens, patch_map and mean.

        pixel_values: as `ViTModel` takes them, in any size: position embeddings are interpolated. class_token_only: for
        the cls_token alone, a block's work less. kwargs: other arguments of `ViTModel`.
        """
        outputs = self.base_model(
            pixel_values, interpolate_pos_encoding=True, class_token_only=class_token_only, return_dict=True, **kwargs
        )
        return Features(outputs.last_hidden_state, self.base_model.embeddings.grid_of(pixel_values))

    def get_intermediate_layers(
        self,
        pixel_values: Tensor | Sequence[Tensor],
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """What some blocks give, as DINOv2's method of this name: patch tokens [B, P, D] for each block asked for.

        n: so many blocks, the last ones, or the rising indices of blocks; blocks after the last asked for are not
        computed. reshape: maps [B, D, rows, columns] instead. return_class_token: pairs of these and the class token
        [B, D]. norm: after the final LayerNorm. pixel_values: as in `forward_features`; of a list, lists of [P, D] or
        [D, rows, columns], and class tokens [B, D].
        """
        model = self.base_model
        blocks = blocks_to_take(n, len(model.encoder.layer))
        depths = [index + 1 for index in blocks]
        outputs = model(
            pixel_values,
            interpolate_pos_encoding=True,
            output_hidden_states=depths,
            num_blocks=depths[-1],
            return_dict=True,
        )
        grid = model.embeddings.grid_of(pixel_values)
        layers = []
        for depth in depths:
            tokens = outputs.hidden_states[depth]
            if norm and depth == depths[-1]:
                tokens = outputs.last_hidden_state
            elif norm:
                tokens = model.layernorm(tokens) if isinstance(tokens, Tensor) else [*map(model.layernorm, tokens)]
            features = Features(tokens, grid)
            patches = features.patch_map if reshape else features.patch_tokens
            layers.append((patches, features.cls_token) if return_class_token else patches)
        return tuple(layers)


# The arguments of `from_pretrained` that say where a checkpoint lies.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ViTModel(ViTPreTrainedModel):
    """The backbone: tokens after the final LayerNorm, and the pooled class token.

    add_pooling_layer: with the pooler of the in21k checkpoints. use_mask_token: for masked image modelling.
    """

    def __init__(self, config: ViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.encoder = ViTEncoder(config)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> ViTPatchEmbeddings:
        return self.embeddings.patch_embeddings

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Part of `load_state_dict`: takes a state dict of transformers 5 too."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}layers.")]:
            renamed = name
            for pattern, replacement in TRANSFORMERS_NAMES.items():
                renamed = re.sub(pattern, replacement, renamed)
            state_dict[renamed] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        class_token_only: bool = False,
        num_blocks: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        pixel_values: [B, C, H, W] or [B, H, W, C]; floating and normalised, or uint8 as decoded: the model then
            normalises by config.image_mean and config.image_std. Or a list of such pictures without B, of any sizes:
            what is [B, ..] here and below is then a list of tensors without B (but pooler_output is [B, D] all the
            same), position embeddings are interpolated, and each picture's numbers are those it has alone.
        bool_masked_pos: [B, P], true where a patch is replaced by the mask token.
        interpolate_pos_encoding: take pictures of another size than config.image_size.
        attention_mask: [B, N], true (1) for tokens that may be attended to, or broadcastable to [B, heads, N, N].
        output_attentions, output_hidden_states: return the maps of every block [B, heads, N, N], and the tokens before
            and after every block [B, N, D], the last of them before the final LayerNorm. Hidden states may be asked for
            by index, one or a list; the others are then None.
        class_token_only: return the class token alone, [B, 1, D], of a list too. The last block is then computed for it
            alone: exact, and a block's work less; not so when attentions or hidden states are asked for.
        num_blocks: stop after so many blocks; the final LayerNorm and the pooler follow.
        """
        if pixel_values is None:
            raise InputError("pixel_values: expected pictures, got None")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        mask: Mask = attention_mask
        is_list = not isinstance(pixel_values, Tensor)
        if is_list:
            if attention_mask is not None:
                raise InputError("attention_mask: expected None with a list of pictures, which are not padded")
            if bool_masked_pos is not None:
                raise InputError("bool_masked_pos: expected None with a list of images; stack those of one size")
            pixel_values, mask = self.embeddings.collate(pixel_values)
        elif attention_mask is not None:
            mask = attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask
            mask = mask if mask.is_floating_point() else mask.bool()

        embeddings = self.embeddings(pixel_values, bool_masked_pos, is_list or bool(interpolate_pos_encoding))
        encoded = self.encoder(embeddings, mask, output_attentions, output_hidden_states, class_token_only, num_blocks)
        hidden_states = self.layernorm(encoded.last_hidden_state)
        pooler_output = None
        if self.pooler is not None:
            is_packed = isinstance(mask, Packing) and not class_token_only
            pooler_output = self.pooler(class_tokens_of(hidden_states, mask) if is_packed else hidden_states)
        outputs = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=pooler_output,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return outputs_of_list(outputs, mask, class_token_only) if is_list else outputs


def outputs_of_list(
    outputs: BaseModelOutputWithPooling, mask: Mask, class_token_only: bool
) -> BaseModelOutputWithPooling:
    """What a list of pictures, stacked or packed, gave: a list of [N, D] or [heads, N, N] in place of each tensor."""

    def listed(states: Any) -> Any:
        return pictures_of(states, mask) if isinstance(states, Tensor) else states

    if not class_token_only:
        outputs.last_hidden_state = listed(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(listed(states) for states in outputs.hidden_states)
    if outputs.attentions is not None:
        outputs.attentions = tuple(listed(maps) for maps in outputs.attentions)
    return outputs


class ViTForImageClassification(ViTPreTrainedModel):
    """ViT with a linear classifier on the class token."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """
        labels: class indices int [B] (cross-entropy), targets float [B, num_labels] (multi-label: binary cross-entropy;
            or, with config.problem_type "regression" or one label, the mean squared error).
        The other arguments are those of `ViTModel`. Returns logits [B, num_labels], and the loss if labels are given.
        """
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            class_token_only=True,
            return_dict=True,
        )
        logits = self.classifier(outputs.last_hidden_state[:, 0])
        loss = None
        if labels is not None:
            check_labels(labels, logits, self.config.problem_type, kwargs.get("ignore_index", -100))
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def check_labels(labels: Any, logits: Tensor, problem_type: str | None, ignore_index: int) -> None:
    """Raise InputError unless the loss of `problem_type` accepts these labels for logits [B, num_labels].

    The range of class indices is checked on a CPU only: on a GPU it would wait for the device.
    """
    batch, num_labels = logits.shape
    if not isinstance(labels, Tensor):
        raise InputError(f"labels: expected a tensor, got {type(labels).__name__}")
    if problem_type is None:
        is_index = labels.dtype in (torch.long, torch.int)
        problem_type = "regression" if num_labels == 1 else "single_label_classification" if is_index else "multi_label"
    if problem_type != "single_label_classification":
        expected = [batch] if num_labels == 1 else [batch, num_labels]
        if labels.numel() != logits.numel() or (num_labels > 1 and labels.shape != logits.shape):
            raise InputError(f"labels: expected {expected} for {problem_type}, got {list(labels.shape)} {labels.dtype}")
        return
    if labels.numel() != batch or labels.dtype != torch.long:
        raise InputError(
            f"labels: expected int64 class indices [{batch}], got {list(labels.shape)} {labels.dtype};"
            " for several labels an image, set config.problem_type = 'multi_label_classification'"
        )
    if labels.is_cpu and not torch.compiler.is_compiling() and not isinstance(labels, FakeTensor):
        wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)]
        if wrong.numel():
            raise InputError(f"labels: expected class indices from 0 to {num_labels - 1}, got {wrong[0].item()}")


class ViTForMaskedImageModeling(ViTPreTrainedModel):
    """SimMIM (Xie et al. 2021, arXiv:2111.09886): predict the pixels of masked patches with a linear decoder."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> MaskedImageModelingOutput:
        """
        bool_masked_pos: [B, P]; with it the loss is the mean absolute error over the masked pixels of all images.
        The other arguments are those of `ViTModel`, but for lists of images. Returns the reconstruction [B, C, H, W].
        """
        if not isinstance(pixel_values, Tensor):
            raise InputError(f"pixel_values: expected a tensor, got {type(pixel_values).__name__}")
        patch_size = as_pair(self.config.patch_size)
        if bool_masked_pos is not None and patch_size != as_pair(self.config.encoder_stride):
            raise InputError(
                "config.encoder_stride: expected the patch size, so that the reconstruction has the image's size;"
                f" got encoder_stride {self.config.encoder_stride} and patch_size {self.config.patch_size}"
            )
        outputs = self.vit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        rows, columns = self.vit.embeddings.grid_of(pixel_values)
        patches = outputs.last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (rows, columns))
        reconstruction = self.decoder(patches)  # [B, C, H, W], without the pixels left over beside whole patches
        loss = None
        if bool_masked_pos is not None:
            mask = bool_masked_pos.reshape(-1, 1, rows, columns).to(reconstruction.dtype)
            mask = mask.repeat_interleave(patch_size[0], 2).repeat_interleave(patch_size[1], 3)  # [B, 1, H, W]
            target = as_float_channels_first(pixel_values, self.config, reconstruction.dtype)
            target = target[:, :, : mask.shape[2], : mask.shape[3]]
            error = F.l1_loss(target, reconstruction, reduction="none") * mask
            loss = error.sum() / (mask.sum() + 1e-5) / self.config.num_channels
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
