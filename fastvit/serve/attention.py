"""Class probabilities and attention maps of one image, for figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastvit.checkpoints.configuration import make_pair
from fastvit.errors import InputError
from fastvit.models.backbone import BackboneForImageClassification, count_prefix_tokens, get_vision_config
from fastvit.models.calibration import compute_probabilities
from fastvit.models.pretrained import ViTPreTrainedModel
from fastvit.report.tasks import Task
from fastvit.serve.engines import EngineModel
from fastvit.serve.predictor import Predictor


class AttentionResult(NamedTuple):
    """The outputs of a model for one image.

    Attributes:
        probabilities: float32 `[C]`.
        maps: attention maps, float32 `[layers, heads, tokens, tokens]`.
        grid: (rows, columns) of patches.
        num_prefix: number of tokens before the patches: class token, distillation token, registers.
    """

    probabilities: np.ndarray
    maps: np.ndarray
    grid: tuple[int, int]
    num_prefix: int = 1


@torch.inference_mode()
def classify_with_attention(model: Any, pixels: torch.Tensor) -> AttentionResult:
    """Classify one image and return its attention maps.

    Args:
        model: a classifier of any family, as `fastvit.adapters.backbones` loads it.
        pixels: uint8 `[1, height, width, 3]`.
    """
    if isinstance(model, EngineModel):
        raise InputError("model: expected a checkpoint, got an exported file, which returns no attention maps")
    vision = get_vision_config(model.config)
    implementation = vision._attn_implementation
    is_ours = vision.model_type == "vit" and isinstance(model, ViTPreTrainedModel | BackboneForImageClassification)
    try:
        if not is_ours:
            model.set_attn_implementation("eager")  # the only one of transformers' that returns maps
        output = model(pixels.to(model.device), output_attentions=True)
    finally:
        if not is_ours:
            model.set_attn_implementation(implementation)
    rows, columns = (side // patch for side, patch in zip(pixels.shape[1:3], make_pair(vision.patch_size), strict=True))
    return AttentionResult(
        compute_probabilities(output.logits[0], model.config).cpu().numpy(),
        torch.cat(output.attentions).float().cpu().numpy(),
        (rows, columns),
        count_prefix_tokens(model.config),
    )


def preprocess_image(predictor: Predictor, image: Image.Image) -> torch.Tensor:
    """Resize and crop an RGB image for the predictor's model; returns uint8 `[1, height, width, 3]`."""
    return torch.from_numpy(predictor.preprocessor(image).copy())[None]


def describe_prediction(probabilities: np.ndarray, class_names: Sequence[str], task: Task, count: int = 3) -> str:
    """Format the most probable classes and their probabilities, or the first numbers, on one line."""
    order = np.arange(len(probabilities)) if task.kind == "regression" else np.argsort(-probabilities, kind="stable")
    return ", ".join(f"{class_names[index]} {task.format_score(probabilities[index])}" for index in order[:count])
