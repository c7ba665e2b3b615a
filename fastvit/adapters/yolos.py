"""transformers' YOLOS: a ViT with detection tokens, whose blocks have transformers' older module layout."""

from typing import Any

from fastvit.ops.block import Adapter, Block, Branch, FeedForward


def read_block(layer: Any) -> Block:
    attention, output = layer.attention.attention, layer.attention.output
    return Block(
        norm1=layer.layernorm_before,
        qkv=(attention.query, attention.key, attention.value),
        num_heads=attention.num_attention_heads,
        attention_scale=attention.scaling,
        attention_dropout=attention.dropout_prob if attention.training else 0.0,
        projection=output.dense,
        after_attention=Branch(dropouts=(output.dropout,)),
        norm2=layer.layernorm_after,
        feed_forward=FeedForward(
            (layer.intermediate.dense,), layer.output.dense, layer.intermediate.intermediate_act_fn
        ),
        after_feed_forward=Branch(dropouts=(layer.output.dropout,)),
        bypassed=(layer.attention, attention, output, layer.intermediate, layer.output),
        attention_implementation=attention.config._attn_implementation,
    )


ADAPTERS = [Adapter("YOLOS", "transformers.models.yolos.modeling_yolos.YolosLayer", read_block)]
