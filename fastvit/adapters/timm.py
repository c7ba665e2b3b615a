"""timm's VisionTransformer: DeiT, AugReg, DINOv2, SigLIP and the other models that use its `Block`."""

from typing import Any

from torch import Tensor, nn

from fastvit.ops.block import Adapter, Block, Branch, FeedForward, Inputs, find_drop_path, get_qualified_name

ATTENTION = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")


def read_block(layer: Any) -> Block:
    attention, mlp, gated = layer.attn, layer.mlp, get_qualified_name(type(layer.mlp)) == "timm.layers.mlp.GluMlp"
    extras: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    extras = [extra for extra in (*extras, mlp.norm) if extra is not None]
    unsupported_reason = None
    if get_qualified_name(type(attention)) not in ATTENTION or not (
        gated or get_qualified_name(type(mlp)) == "timm.layers.mlp.Mlp"
    ):
        unsupported_reason = f"it has {type(attention).__name__} and {type(mlp).__name__}"
    elif any(type(extra) is not nn.Identity for extra in extras) or (gated and mlp.gate_last):
        unsupported_reason = "it has norms or gates inside attention or feed-forward"
    scales = [getattr(scale, "gamma", None) for scale in (layer.ls1, layer.ls2)]
    return Block(
        norm1=layer.norm1,
        qkv=(attention.qkv,),
        num_heads=attention.num_heads,
        attention_scale=attention.scale,
        attention_dropout=attention.attn_drop.p if attention.training else 0.0,
        projection=attention.proj,
        after_attention=Branch((attention.proj_drop,), scales[0], find_drop_path(layer.drop_path1)),
        norm2=layer.norm2,
        feed_forward=FeedForward((mlp.fc1,), mlp.fc2, mlp.act, gated, mlp.drop1.p if mlp.training else 0.0),
        after_feed_forward=Branch((mlp.drop2,), scales[1], find_drop_path(layer.drop_path2)),
        bypassed=(attention, attention.attn_drop, mlp, mlp.drop1, layer.ls1, layer.ls2, *extras),
        # timm's name for eager attention, operation by operation.
        attention_implementation="sdpa" if getattr(attention, "fused_attn", True) else "eager",
        unsupported_reason=unsupported_reason,
    )


def read_inputs(layer: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Inputs:
    return Inputs(x, attn_mask, {"is_causal": is_causal})


ADAPTERS = [Adapter("timm VisionTransformer", "timm.models.vision_transformer.Block", read_block, read_inputs)]
