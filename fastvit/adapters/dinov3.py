"""transformers' DINOv3 ViT: rotary position embedding of the patches' queries and keys, by the model's own code."""

from functools import partial
from typing import Any

from torch import Tensor

from fastvit.ops.block import Adapter, Block, Branch, FeedForward, Inputs, find_drop_path


def read_block(layer: Any) -> Block:
    attention, mlp, drop_path = layer.attention, layer.mlp, find_drop_path(layer.drop_path)
    gated = hasattr(mlp, "gate_proj")
    first = (mlp.gate_proj, mlp.up_proj) if gated else (mlp.up_proj,)
    return Block(
        norm1=layer.norm1,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=attention.num_heads,
        attention_scale=attention.scaling,
        attention_dropout=attention.dropout if attention.training else 0.0,
        projection=attention.o_proj,
        after_attention=Branch(scale=layer.layer_scale1.lambda1, drop_path=drop_path),
        norm2=layer.norm2,
        feed_forward=FeedForward(first, mlp.down_proj, mlp.act_fn, gated),
        after_feed_forward=Branch(scale=layer.layer_scale2.lambda1, drop_path=drop_path),
        bypassed=(attention, mlp, layer.layer_scale1, layer.layer_scale2),
        attention_implementation=attention.config._attn_implementation,
    )


def read_inputs(layer: Any, hidden_states: Tensor, attention_mask=None, position_embeddings=None, **options) -> Inputs:
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    cos, sin = position_embeddings
    return Inputs(hidden_states, attention_mask, options, partial(apply_rotary_pos_emb, cos=cos, sin=sin))


ADAPTERS = [
    Adapter("DINOv3 ViT", "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer", read_block, read_inputs)
]
