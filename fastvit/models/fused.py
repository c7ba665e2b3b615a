"""Fused forwards for the modules of `fastvit.models.vit`.

Each one computes the same as the module's own forward, from the same parameters. If a part of the module is hooked,
wrapped or replaced, the module's own forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fastvit import ops
from fastvit.models import vit
from fastvit.ops import block as fused
from fastvit.ops import varlen
from fastvit.ops.block import (
    Adapter,
    Block,
    Branch,
    FeedForward,
    FusedModule,
    Inputs,
    Stream,
    compute_block,
    is_hooked,
    is_plain,
    sum_stream,
)
from fastvit.ops.varlen import Mask


def read_block(layer: Any) -> Block:
    """Describe a `ViTLayer` as a `Block`."""
    attention, output = layer.attention.attention, layer.attention.output
    own: list[tuple[nn.Module, type]] = [
        (layer.attention, vit.ViTAttention),
        (attention, vit.ViTSelfAttention),
        (output, vit.ViTSelfOutput),
        (layer.intermediate, vit.ViTIntermediate),
        (layer.output, vit.ViTOutput),
    ]
    unsupported_reason = "a part of it was replaced" if any(type(module) is not kind for module, kind in own) else None
    if attention.config._attn_implementation == "eager":
        unsupported_reason = "its attention is 'eager'"
    drop_path = layer.drop_path if layer.drop_path.rate or is_hooked(layer.drop_path) else None
    return Block(
        norm1=layer.layernorm_before,
        qkv=(attention.query, attention.key, attention.value),
        num_heads=attention.num_heads,
        attention_scale=attention.head_dim**-0.5,
        attention_dropout=attention.dropout_prob if attention.training else 0.0,
        projection=output.dense,
        after_attention=Branch((output.dropout,), drop_path=drop_path),
        norm2=layer.layernorm_after,
        feed_forward=FeedForward((layer.intermediate.dense,), layer.output.dense, layer.intermediate.activation),
        after_feed_forward=Branch((layer.output.dropout,), drop_path=drop_path),
        bypassed=tuple(module for module, _ in own),
        attention_implementation=attention.config._attn_implementation,
        unsupported_reason=unsupported_reason,
    )


def read_inputs(
    layer: Any, hidden_states: Tensor, attention_mask: Mask = None, output_attentions: bool = False
) -> Inputs:
    return Inputs(hidden_states, attention_mask, output_attentions=output_attentions)


ADAPTERS = [Adapter("fastvit's ViT", "fastvit.models.vit.ViTLayer", read_block, read_inputs)]


def embed(
    self: Any, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool = False
) -> Tensor:
    """`ViTEmbeddings.forward` with normalisation, patch projection, class token and position embeddings in one pass."""
    patches = self.patch_embeddings
    if type(patches) is not vit.ViTPatchEmbeddings or is_hooked(patches) or not is_plain(patches.projection, nn.Conv2d):
        return vit.ViTEmbeddings.forward(self, pixel_values, bool_masked_pos, interpolate_pos_encoding)
    position_embeddings = self.get_position_embeddings(pixel_values, interpolate_pos_encoding)
    tokens = ops.patch_embed(
        pixel_values,
        patches.projection.weight,
        patches.projection.bias,
        self.cls_token,
        position_embeddings,
        patch_size=patches.patch_size,
        mean=vit.get_image_mean(self.config),
        std=vit.get_image_std(self.config),
        mask_token=self.mask_token,
        mask=self.check_mask(bool_masked_pos),
    )
    return self.dropout(tokens)


def encode(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Mask = None,
    output_attentions: bool = False,
    output_hidden_states: bool | int | Sequence[int] = False,
    class_token_only: bool = False,
    num_blocks: int | None = None,
) -> BaseModelOutput:
    """`ViTEncoder.forward` with fused blocks.

    The residual add at the end of a block is fused with the LayerNorm of the next block. If only the class token is
    requested, the last block computes only that token; its value and gradients are the same.
    """
    layers = self.get_first_blocks(num_blocks)
    requested = vit.resolve_hidden_state_indices(output_hidden_states, len(layers) + 1)
    all_hidden_states, all_attentions = [hidden_states if 0 in requested else None], []
    stream, is_reduced = Stream(hidden_states), False
    for index, layer in enumerate(layers, start=1):
        block = find_fusible_block(layer)
        if block is None:
            output = layer(sum_stream(stream), attention_mask, output_attentions)
            stream, attentions = (Stream(output[0]), output[1]) if output_attentions else (Stream(output), None)
        else:
            is_reduced = class_token_only and index == len(layers) and not (output_attentions or requested)
            inputs = Inputs(hidden_states, attention_mask, output_attentions=output_attentions)
            stream, attentions = compute_block(block, stream, inputs, is_reduced)
        if index in requested:
            stream = Stream(sum_stream(stream))
        all_hidden_states.append(stream.branch if index in requested else None)
        all_attentions.append(attentions)
    last = sum_stream(stream)
    if class_token_only and not is_reduced:
        last = varlen.select_class_tokens(last, attention_mask)
    return BaseModelOutput(
        last_hidden_state=last,
        hidden_states=None if output_hidden_states is False else tuple(all_hidden_states),
        attentions=tuple(all_attentions) if output_attentions else None,
    )


def find_fusible_block(layer: Any) -> Block | None:
    """Return the parts of a layer that may run fused with its neighbours, else None.

    The layer must be a fused `ViTLayer` that is not hooked, compiled or checkpointed. Gradient checkpointing saves a
    layer's inputs for backward, and an unfused layer has one input tensor (the sum) instead of two (residual, branch).
    """
    is_ours = isinstance(layer, FusedModule) and layer._fastvit_original is vit.ViTLayer
    if not is_ours or is_hooked(layer) or layer.gradient_checkpointing or layer._compiled_call_impl is not None:
        return None
    return fused.examine(ADAPTERS[0], layer)[0]


FORWARDS: dict[Any, Any] = {
    vit.ViTEmbeddings: embed,
    vit.ViTLayer: fused.make_block_forward(ADAPTERS[0], vit.ViTLayer),
    vit.ViTEncoder: encode,
}


@functools.cache
def get_fused_class(original: Any) -> Any:
    return fused.make_fused_class(original, FORWARDS[original], rebuild)


def rebuild(original: Any) -> nn.Module:
    """An empty module of the fused class, for copies and pickles."""
    kind = get_fused_class(original)
    return kind.__new__(kind)


def attach(model: nn.Module) -> None:
    """Replace the forward of embeddings, blocks and encoder in `model` by the fused one, in place."""
    for module in model.modules():
        kind: Any = type(module)
        if kind in FORWARDS:
            module.__class__ = get_fused_class(kind)
