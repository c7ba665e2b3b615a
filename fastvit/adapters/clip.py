"""The vision towers of transformers' CLIP and SigLIP. The text towers, of the same block classes, are not replaced."""

from typing import Any

from fastvit.ops.block import Adapter, Block, Branch, FeedForward


def read_block(layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        norm1=layer.layer_norm1,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        num_heads=attention.num_heads,
        attention_scale=attention.scale,
        attention_dropout=attention.dropout if attention.training else 0.0,
        projection=attention.out_proj,
        after_attention=Branch(),
        norm2=layer.layer_norm2,
        feed_forward=FeedForward((mlp.fc1,), mlp.fc2, mlp.activation_fn),
        after_feed_forward=Branch(),
        bypassed=(attention, mlp),
        attention_implementation=attention.config._attn_implementation,
    )


def find_refusal(layer: Any) -> str | None:
    kind = layer.self_attn.config.model_type
    return None if kind.endswith("_vision_model") else f"it belongs to a {kind}, which is not a vision tower"


MODELS = "transformers.models"
ADAPTERS = [
    Adapter("CLIP vision", f"{MODELS}.clip.modeling_clip.CLIPEncoderLayer", read_block, find_refusal=find_refusal),
    Adapter(
        "SigLIP vision", f"{MODELS}.siglip.modeling_siglip.SiglipEncoderLayer", read_block, find_refusal=find_refusal
    ),
]
