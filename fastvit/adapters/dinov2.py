"""transformers' DINOv2, with and without registers: LayerScale, drop path, and SwiGLU in the giant one."""

from typing import Any

from fastvit.adapters.block import Adapter, Block, Branch, FeedForward, drop_path_of


def block(layer: Any) -> Block:
    attention, mlp, drop_path = layer.attention, layer.mlp, drop_path_of(layer.drop_path)
    if hasattr(mlp, "gate_proj"):
        feed_forward = FeedForward((mlp.gate_proj, mlp.up_proj), mlp.down_proj, mlp.act_fn, gated=True)
    else:
        feed_forward = FeedForward((mlp.fc1,), mlp.fc2, mlp.activation_fn)
    return Block(
        norm1=layer.norm1,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=attention.num_attention_heads,
        attention_scale=attention.scaling,
        attention_dropout=attention.attention_dropout if attention.training else 0.0,
        projection=attention.o_proj,
        after_attention=Branch(scale=layer.layer_scale1.lambda1, drop_path=drop_path),
        norm2=layer.norm2,
        feed_forward=feed_forward,
        after_feed_forward=Branch(scale=layer.layer_scale2.lambda1, drop_path=drop_path),
        bypassed=(attention, mlp, layer.layer_scale1, layer.layer_scale2),
        attention_implementation=attention.config._attn_implementation,
    )


REGISTERS = "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers"
ADAPTERS = [
    Adapter("DINOv2", "transformers.models.dinov2.modeling_dinov2.Dinov2Layer", block),
    Adapter("DINOv2 with registers", f"{REGISTERS}.Dinov2WithRegistersLayer", block),
]
