"""transformers' ViT and the models that copy its block under another name. DINO's backbone is a ViT."""

from typing import Any

from fastvit.ops.block import Adapter, Block, Branch, FeedForward


def read_block(layer: Any) -> Block:
    attention, mlp, after = layer.attention, layer.mlp, Branch(dropouts=(layer.dropout,))
    return Block(
        norm1=layer.layernorm_before,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=attention.num_attention_heads,
        attention_scale=attention.scaling,
        attention_dropout=attention.attention_dropout if attention.training else 0.0,
        projection=attention.o_proj,
        after_attention=after,
        norm2=layer.layernorm_after,
        feed_forward=FeedForward((mlp.fc1,), mlp.fc2, mlp.activation_fn),
        after_feed_forward=after,
        bypassed=(attention, mlp),
        attention_implementation=attention.config._attn_implementation,
    )


ADAPTERS = [
    Adapter("ViT", "transformers.models.vit.modeling_vit.ViTLayer", read_block),
    Adapter("DeiT", "transformers.models.deit.modeling_deit.DeiTLayer", read_block),
    Adapter("ViTMAE", "transformers.models.vit_mae.modeling_vit_mae.ViTMAELayer", read_block),
    Adapter("ViTMSN", "transformers.models.vit_msn.modeling_vit_msn.ViTMSNLayer", read_block),
    Adapter("I-JEPA", "transformers.models.ijepa.modeling_ijepa.IJepaLayer", read_block),
]
