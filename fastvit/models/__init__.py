"""The Vision Transformer: `vit` is the plain model, `heads` adds the heads, `fused` attaches the fused operations."""
