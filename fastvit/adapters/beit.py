"""transformers' BEiT: LayerScale, drop path, and a relative position bias that is added to the scores."""

from typing import Any

from torch import Tensor

from fastvit.ops.block import Adapter, Block, Branch, FeedForward, Inputs, find_drop_path


def read_block(layer: Any) -> Block:
    attention, mlp, drop_path = layer.attention, layer.mlp, find_drop_path(layer.drop_path)
    scales = [scale if isinstance(scale, Tensor) else None for scale in (layer.lambda_1, layer.lambda_2)]  # or 1.0
    return Block(
        norm1=layer.layernorm_before,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=attention.num_attention_heads,
        attention_scale=attention.scaling,
        attention_dropout=attention.attention_dropout if attention.training else 0.0,
        projection=attention.o_proj,
        after_attention=Branch((layer.dropout,), scales[0], drop_path),
        norm2=layer.layernorm_after,
        feed_forward=FeedForward((mlp.fc1,), mlp.fc2, mlp.activation_fn),
        after_feed_forward=Branch((layer.dropout,), scales[1], drop_path),
        bypassed=(attention, mlp),
        attention_implementation=attention.config._attn_implementation,
    )


def read_inputs(layer: Any, hidden_states: Tensor, attention_mask=None, *position_options, **options) -> Inputs:
    names = ("interpolate_pos_encoding", "resolution")
    position = {name: options.pop(name, None) for name in names} | dict(zip(names, position_options, strict=False))
    if layer.relative_position_bias is not None:
        window = [length // layer.patch_size for length in position["resolution"]]
        interpolate = position["interpolate_pos_encoding"] or False
        bias = layer.relative_position_bias(tuple(window), interpolate, dim_size=hidden_states.shape[1])
        attention_mask = bias if attention_mask is None else bias + attention_mask
    return Inputs(hidden_states, attention_mask, options)


ADAPTERS = [Adapter("BEiT", "transformers.models.beit.modeling_beit.BeitLayer", read_block, read_inputs)]
