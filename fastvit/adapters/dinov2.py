"""transformers' DINOv2, with and without registers: LayerScale, drop path, and SwiGLU in the giant model."""

from typing import Any

from torch import nn

from fastvit.ops.block import Adapter, Block, Branch, FeedForward, find_drop_path


def read_block(layer: Any) -> Block:
    drop_path = find_drop_path(layer.drop_path)
    attention: Any = layer.attention
    bypassed: tuple[Any, ...] = (attention,)
    dropouts: tuple[Any, ...] = ()
    if hasattr(attention, "o_proj"):
        qkv, projection = (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj
        dropout_p = attention.attention_dropout
    else:  # before transformers 5.2x, the modules are nested as in BERT
        output, attention = attention.output, attention.attention
        bypassed, dropouts = (*bypassed, output, attention), (output.dropout,)
        qkv, projection = (attention.query, attention.key, attention.value), output.dense
        dropout_p = attention.dropout_prob
    return Block(
        norm1=layer.norm1,
        qkv=qkv,
        num_heads=attention.num_attention_heads,
        attention_scale=attention.scaling,
        attention_dropout=dropout_p if attention.training else 0.0,
        projection=projection,
        after_attention=Branch(dropouts, scale=layer.layer_scale1.lambda1, drop_path=drop_path),
        norm2=layer.norm2,
        feed_forward=read_feed_forward(layer.mlp),
        after_feed_forward=Branch(scale=layer.layer_scale2.lambda1, drop_path=drop_path),
        bypassed=(*bypassed, layer.mlp, layer.layer_scale1, layer.layer_scale2),
        attention_implementation=attention.config._attn_implementation,
    )


def read_feed_forward(mlp: Any) -> FeedForward:
    if hasattr(mlp, "gate_proj"):
        return FeedForward((mlp.gate_proj, mlp.up_proj), mlp.down_proj, mlp.act_fn, gated=True)
    if hasattr(mlp, "weights_in"):
        return FeedForward((mlp.weights_in,), mlp.weights_out, nn.SiLU(), gated=True)
    return FeedForward((mlp.fc1,), mlp.fc2, mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.activation)


REGISTERS = "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
ADAPTERS = [
    Adapter("DINOv2", "transformers.models.dinov2.modeling_dinov2.Dinov2Layer", read_block),
    Adapter("DINOv2 with registers", f"{REGISTERS}.Dinov2WithRegistersLayer", read_block),
]
