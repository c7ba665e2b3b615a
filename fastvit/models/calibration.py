"""Calibration of a classifier's probabilities: measure it, correct it, plot it.

A model is calibrated if a fraction p of the images that it classifies with probability p is classified correctly.
Trained networks are usually overconfident. Temperature scaling divides the logits by one number, which changes the
probabilities but no prediction (Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599). The
temperature is saved in config.json as `calibration_temperature`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from fastvit.checkpoints.configuration import format_value, is_finite_number
from fastvit.errors import InputError

BINS = 15  # as in the paper
TEMPERATURES = (0.01, 100.0)  # bounds of a fit; without them it would diverge if every prediction were correct


def get_temperature(config: Any) -> float:
    """Return the temperature that divides the logits of a model with this config; 1 if it was not calibrated."""
    return getattr(config, "calibration_temperature", None) or 1.0


def has_independent_labels(config: Any) -> bool:
    """Whether each label of a model has its own probability: one logit, or several labels per image."""
    if config.problem_type == "regression":
        return False
    return config.num_labels == 1 or config.problem_type == "multi_label_classification"


def get_thresholds(config: Any) -> np.ndarray:
    """Return the probability from which each label is predicted, float `[num_labels]`; 0.5 where none was chosen.

    Raises:
        InputError: config.label_thresholds is not a list of one number per label.
    """
    stored = getattr(config, "label_thresholds", None)
    if stored is None:
        return np.full(config.num_labels, 0.5)
    is_valid = isinstance(stored, list) and len(stored) == config.num_labels and all(map(is_finite_number, stored))
    if not is_valid:
        raise InputError(
            f"config.label_thresholds: expected {config.num_labels} numbers, one per label, got {format_value(stored)}"
        )
    return np.array(stored, dtype=np.float64)


def compute_probabilities(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Compute the probabilities of a model with this config, as it was trained and calibrated.

    sigmoid(logits) if its labels are independent, as in the pipelines of transformers, otherwise
    softmax(logits / temperature). The numbers of a regression are returned unchanged.

    Args:
        logits: [..., num_labels].
        config: of the model; read for `num_labels`, `problem_type` and `calibration_temperature`.

    Returns:
        Probabilities, float32 [..., num_labels].
    """
    logits = logits.float()
    if config.problem_type == "regression":
        return logits
    return logits.sigmoid() if has_independent_labels(config) else (logits / get_temperature(config)).softmax(-1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Find the temperature T between 0.01 and 100 that minimises the cross-entropy of softmax(logits / T).

    Args:
        logits: [N, classes], for images that the model was not trained on.
        labels: class indices, integers [N].
    """
    scores, targets = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(labels).long()
    # The loss is convex in 1 / T: bisection finds the minimum, where the slope changes sign.
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(80):
        middle = torch.tensor((low * high) ** 0.5, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(F.cross_entropy(scores * middle, targets), middle)
        low, high = (low, middle.item()) if slope > 0 else (middle.item(), high)
    return 1 / (low * high) ** 0.5


@dataclass
class Reliability:
    """Confidence and accuracy of a model, over images sorted by confidence into bins of equal width.

    Attributes:
        counts: number of images per bin [bins].
        confidence: mean confidence per bin [bins], 0 for an empty bin.
        accuracy: mean accuracy per bin [bins], 0 for an empty bin.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean over the images of |accuracy - confidence| of their bin (Naeini et al. 2015)."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(self.counts.sum(), 1))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature): [N, classes] -> probabilities float64 [N, classes]."""
    return torch.as_tensor(logits, dtype=torch.float64).div(temperature).softmax(-1).numpy()


def compute_reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Sort predictions into `bins` by confidence, from probabilities [N, classes] and integer labels [N]."""
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == np.asarray(labels)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(index, minlength=bins)
    divisors = np.maximum(counts, 1)
    return Reliability(
        counts,
        np.bincount(index, confidence, minlength=bins) / divisors,
        np.bincount(index, right, minlength=bins) / divisors,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The plot
# ---------------------------------------------------------------------------------------------------------------------

_SIDE, _MARGIN, _FONT = 300, 56, 14
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 32, 32), (170, 170, 170)
_BAR, _GAP_COLOUR = (70, 110, 170), (226, 140, 90)


def plot_reliability(diagrams: dict[str, Reliability]) -> Image.Image:
    """Plot accuracy over confidence, one diagram per title, side by side.

    The height of a bar is the accuracy of its bin; the gap to the confidence is orange. The bars of a calibrated model
    end on the diagonal. The strip under a bar is darker the more images the bin holds.
    """
    width = _MARGIN + len(diagrams) * (_SIDE + _MARGIN)
    sheet = Image.new("RGB", (width, _SIDE + 2 * _MARGIN + 24), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_FONT)
    top, bottom = _MARGIN, _MARGIN + _SIDE
    for number, (title, diagram) in enumerate(diagrams.items()):
        left = _MARGIN + number * (_SIDE + _MARGIN)
        error = f"{title}: calibration error {diagram.expected_calibration_error:.1%}"
        draw.text((left, top - 30), error, font=font, fill=_INK)
        step = _SIDE / len(diagram.counts)
        for index, count in enumerate(diagram.counts):
            if count == 0:
                continue
            x = (left + round(index * step) + 1, left + round((index + 1) * step) - 1)
            heights = [bottom - round(part * _SIDE) for part in (diagram.accuracy[index], diagram.confidence[index])]
            draw.rectangle((x[0], heights[0], x[1], bottom), fill=_BAR)
            inset = (x[1] - x[0]) // 4  # narrower, so that the bar stays visible where accuracy exceeds confidence
            draw.rectangle((x[0] + inset, min(heights), x[1] - inset, max(heights)), fill=_GAP_COLOUR)
            grey = 235 - round(200 * count / diagram.counts.max())
            draw.rectangle((x[0], bottom + 4, x[1], bottom + 10), fill=(grey, grey, grey))
        draw.line((left, bottom, left + _SIDE, top), fill=_FAINT)
        draw.rectangle((left, top, left + _SIDE, bottom), outline=_INK)
        for tick in (0.0, 0.5, 1.0):
            draw.text((left - 30, bottom - tick * _SIDE - 8), f"{tick:.1f}", font=font, fill=_INK)
            draw.text((left + tick * _SIDE - 8, bottom + 14), f"{tick:.1f}", font=font, fill=_INK)
        draw.text((left + _SIDE // 2, bottom + 42), "confidence", font=font, fill=_INK, anchor="mm")
        axis = "accuracy (blue), gap to the confidence (orange)" if number == 0 else "darker strip: more images"
        draw.text((left + _SIDE // 2, bottom + 62), axis, font=font, fill=_INK, anchor="mm")
    return sheet
