"""The one seam between the model and what computes it: each operation once.

The model calls these names and nothing else. Today each is the plain PyTorch of `fastvit.reference`, on every device;
a fused kernel is plugged in here, and only here.
"""

from fastvit.reference import (
    ACTIVATIONS,
    add_layer_norm,
    attention,
    attention_probabilities,
    feed_forward,
    join_tokens,
    layer_norm,
    normalize_pixels,
    patch_embed,
)

__all__ = [
    "ACTIVATIONS",
    "add_layer_norm",
    "attention",
    "attention_probabilities",
    "feed_forward",
    "join_tokens",
    "layer_norm",
    "normalize_pixels",
    "patch_embed",
]
