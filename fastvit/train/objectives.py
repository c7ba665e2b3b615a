"""Losses of tasks other than one class per image, and the classifier of a regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.errors import InputError
from fastvit.report.tasks import Task
from fastvit.train.recipes import TargetLoss


class LabelLoss(TargetLoss):
    """Binary cross-entropy, mean over the labels of an image."""

    def compute_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1)


class NumberLoss(TargetLoss):
    """Squared error in units of the targets' deviation, mean over the targets of an image.

    Args:
        deviation: standard deviation of each target over the training images, float `[targets]`.
    """

    def __init__(self, deviation: np.ndarray):
        super().__init__()
        self.deviation = torch.tensor(deviation, dtype=torch.float32)

    def compute_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (((logits.float() - labels) / self.deviation.to(logits.device)) ** 2).mean(-1)


class NumberHead(nn.Linear):
    """A linear layer that is trained on standardised targets and returns numbers in their own units.

    W x + b = scale * (w x + c): w and c are trained, and W and b are what a state dict holds, so that every checkpoint
    is that of a plain linear layer. The scale is the power of two next to the deviation: multiplying and dividing by it
    changes no bit. c begins at mean / scale. Computed in float32: bfloat16 holds 2 to 3 digits.

    Args:
        linear: the layer to replace.
        mean: mean of each target over the training images, float `[targets]`.
        deviation: their standard deviation.
    """

    def __init__(self, linear: nn.Linear, mean: np.ndarray, deviation: np.ndarray):
        super().__init__(linear.in_features, linear.out_features)
        self.scale: Tensor
        scale = 2.0 ** np.round(np.log2(deviation))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        with torch.no_grad():
            nn.init.trunc_normal_(self.weight, std=0.02)  # that of a checkpoint may have other units
            self.bias.copy_(torch.tensor(mean / scale))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight, self.bias) * self.scale

    def expand_scale(self, parameter: Tensor) -> Tensor:
        scale = self.scale.to(parameter)
        return scale[:, None] if parameter.dim() == 2 else scale

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (f"{prefix}weight", f"{prefix}bias"):
            destination[name] = destination[name] * self.expand_scale(destination[name])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in (f"{prefix}weight", f"{prefix}bias"):
            if name in state_dict:
                state_dict[name] = state_dict[name] / self.expand_scale(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)


def compute_spread(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation of each target, float64 `[targets]`.

    Raises:
        InputError: the numbers of a target are all the same, or too close together for float32.
    """
    deviation = labels.std(axis=0, dtype=np.float64)
    for column, spread in zip(labels.T, deviation, strict=True):
        if not spread > 1e-5 * np.abs(column).max():
            raise InputError(
                f"--task regression: expected numbers that differ, found {column.min()} to {column.max()} in the"
                " training images; where only small differences matter, subtract a constant"
            )
    return labels.mean(axis=0, dtype=np.float64), deviation


def build_metrics(task: Task, loss: TargetLoss | None) -> Callable[[Any], dict[str, float]]:
    """Build Trainer's function of the metrics: the task's, and the mean loss, of classes without weights and smoothing.

    Trainer's own loss counts the images twice that pad the last batches.
    """
    plain = TargetLoss() if loss is None or task.kind == "single-label" else loss

    def measure(prediction: Any) -> dict[str, float]:
        logits, labels = torch.as_tensor(prediction.predictions).float(), torch.as_tensor(prediction.label_ids)
        mean_loss = float(plain.compute_losses(logits, labels).mean())
        return {**task.measure(labels.numpy(), logits.numpy()), "loss": mean_loss}

    return measure
