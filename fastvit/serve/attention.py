"""Class probabilities and attention maps of one image, for figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastvit.models.calibration import compute_probabilities
from fastvit.serve.predictor import Predictor


class AttentionResult(NamedTuple):
    """The outputs of a model for one image.

    Attributes:
        probabilities: float32 `[C]`.
        maps: attention maps, float32 `[layers, heads, tokens, tokens]`.
        grid: (rows, columns) of patches.
    """

    probabilities: np.ndarray
    maps: np.ndarray
    grid: tuple[int, int]


@torch.inference_mode()
def classify_with_attention(model: Any, pixels: torch.Tensor) -> AttentionResult:
    """Classify one image and return its attention maps.

    Args:
        model: a ViT classifier of this package.
        pixels: uint8 `[1, height, width, 3]`.
    """
    output = model(pixels.to(model.device), output_attentions=True)
    return AttentionResult(
        compute_probabilities(output.logits[0], model.config).cpu().numpy(),
        torch.cat(output.attentions).float().cpu().numpy(),
        model.vit.embeddings.get_grid(pixels),
    )


def preprocess_image(predictor: Predictor, image: Image.Image) -> torch.Tensor:
    """Resize and crop an RGB image for the predictor's model; returns uint8 `[1, height, width, 3]`."""
    return torch.from_numpy(predictor.preprocessor(image).copy())[None]


def describe_prediction(probabilities: np.ndarray, class_names: Sequence[str], count: int = 3) -> str:
    """Format the most probable classes and their probabilities on one line."""
    best = np.argsort(-probabilities, kind="stable")[:count]
    return ", ".join(f"{class_names[index]} {probabilities[index]:.2%}" for index in best)
