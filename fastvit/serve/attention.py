"""Attention maps of one image beside its class probabilities, for figures."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastvit.models.calibration import get_temperature
from fastvit.serve.predictor import Predictor


class AttentionResult(NamedTuple):
    """What a model makes of one picture: probabilities [C], attention maps [layers, heads, tokens, tokens], float32,
    and the patches down and across."""

    probabilities: np.ndarray
    maps: np.ndarray
    grid: tuple[int, int]


@torch.inference_mode()
def classify_with_attention(model: Any, pixels: torch.Tensor) -> AttentionResult:
    """pixels: one picture, uint8 [1, height, width, 3]."""
    output = model(pixels.to(model.device), output_attentions=True)
    return AttentionResult(
        (output.logits[0].float() / get_temperature(model.config)).softmax(dim=-1).cpu().numpy(),
        torch.cat(output.attentions).float().cpu().numpy(),
        model.vit.embeddings.get_grid(pixels),
    )


def preprocess_image(predictor: Predictor, image: Image.Image) -> torch.Tensor:
    """A picture as the predictor's model takes it, uint8 [1, height, width, 3]."""
    return torch.from_numpy(predictor.preprocessor(image).copy())[None]
