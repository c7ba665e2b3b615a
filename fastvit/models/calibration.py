"""Whether 90 % sure means right nine times in ten: measure it, correct it, draw it.

A model is calibrated if, of all pictures that it answers with probability p, the part p is answered rightly. Trained
networks are mostly too sure. Dividing the logits by one number, the temperature, changes no answer, only how sure it
is (Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599). The temperature stands in
config.json as `calibration_temperature`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

BINS = 15  # as in the paper
TEMPERATURES = (0.01, 100.0)  # where a fit ends that finds no minimum, as when every answer is right


def get_temperature(config: Any) -> float:
    """What the logits of a model with this config are divided by; 1 where it was not calibrated."""
    return getattr(config, "calibration_temperature", None) or 1.0


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T with the smallest cross-entropy of softmax(logits / T), from 0.01 to 100.

    logits: [N, classes], of pictures that the model was not trained on; labels: integers [N].
    """
    scores, targets = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(labels).long()
    # In 1 / T the loss is convex: the minimum is where its slope changes sign, and bisection finds it.
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(80):
        middle = torch.tensor((low * high) ** 0.5, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(F.cross_entropy(scores * middle, targets), middle)
        low, high = (low, middle.item()) if slope > 0 else (middle.item(), high)
    return 1 / (low * high) ** 0.5


@dataclass
class Reliability:
    """How sure and how right a model was: the pictures sorted by confidence into bins of equal width.

    counts: pictures in each bin [bins]; confidence, accuracy: their means in each bin [bins], 0 where there is none.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """The mean over the pictures of |accuracy - confidence| of their bin (Naeini et al. 2015)."""
        return float((self.counts * np.abs(self.accuracy - self.confidence)).sum() / max(self.counts.sum(), 1))


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[N, classes] -> probabilities float64 [N, classes]."""
    return torch.as_tensor(logits, dtype=torch.float64).div(temperature).softmax(-1).numpy()


def compute_reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """probabilities: [N, classes]; labels: integers [N]."""
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
    """Accuracy over confidence, one diagram beside the other: a bar as high as the accuracy in its bin, and in orange
    what lies between it and the confidence. Bars of a calibrated model end on the diagonal. The darker the strip under
    a bar, the more pictures are in the bin.
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
            inset = (x[1] - x[0]) // 4  # narrower, so that the accuracy shows where it is the higher
            draw.rectangle((x[0] + inset, min(heights), x[1] - inset, max(heights)), fill=_GAP_COLOUR)
            grey = 235 - round(200 * count / diagram.counts.max())
            draw.rectangle((x[0], bottom + 4, x[1], bottom + 10), fill=(grey, grey, grey))
        draw.line((left, bottom, left + _SIDE, top), fill=_FAINT)
        draw.rectangle((left, top, left + _SIDE, bottom), outline=_INK)
        for tick in (0.0, 0.5, 1.0):
            draw.text((left - 30, bottom - tick * _SIDE - 8), f"{tick:.1f}", font=font, fill=_INK)
            draw.text((left + tick * _SIDE - 8, bottom + 14), f"{tick:.1f}", font=font, fill=_INK)
        draw.text((left + _SIDE // 2, bottom + 42), "confidence", font=font, fill=_INK, anchor="mm")
        axis = "accuracy (blue), gap to the confidence (orange)" if number == 0 else "darker strip: more pictures"
        draw.text((left + _SIDE // 2, bottom + 62), axis, font=font, fill=_INK, anchor="mm")
    return sheet
