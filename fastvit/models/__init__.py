"""The Vision Transformer: `vit` is the plain model, `fused` attaches the fused operations to it."""
