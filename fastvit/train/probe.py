"""A linear classifier on a frozen backbone, fitted to features that are computed once (a linear probe).

    features = what the classifier reads, [images, features], standardised
    loss     = mean(class weight x cross-entropy(features W + b)) + strength / 2 x |W|^2

The loss is convex, so that L-BFGS finds its minimum without a learning rate. The strength is the one with the smallest
loss on training images that were held out. The standardisation is folded into W and b.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput, speed_metrics

from fastvit.data.images import ImageSet
from fastvit.errors import InputError
from fastvit.models.features import compute_pooled
from fastvit.train.training import FineTuner

STRENGTHS = [10 ** (exponent / 2) for exponent in range(2, -11, -1)]  # of the L2 penalty, strong to weak
DEFAULT_STRENGTH = 0.1  # where every class has a single image
PATIENCE = 2  # weaker penalties to try after the best one so far
HELD_OUT_FOLDS = 5
MAX_FOLDED_IMAGES = 20_000  # with more, one fold is held out: its loss has little noise


class Head(NamedTuple):
    """A fitted linear classifier.

    Attributes:
        weight: float32 `[classes, features]`.
        bias: float32 `[classes]`.
        strength: of the L2 penalty.
        loss: mean loss over the training images, without the penalty.
        held_out_loss: mean loss over held-out training images, of classifiers fitted without them.
        held_out_accuracy: their accuracy; both are NaN where every class has a single image.
    """

    weight: Tensor
    bias: Tensor
    strength: float
    loss: float
    held_out_loss: float
    held_out_accuracy: float


@torch.no_grad()
def compute_features(
    model: Any, batches: Iterable[Mapping[str, Tensor]], *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what the classifier of a model reads, in eval mode.

    Args:
        model: with its last linear layer as `classifier`.
        batches: with "pixel_values" and "labels", such as a DataLoader of images without augmentation.
        dtype: of autocast; None: off.

    Returns:
        Features, float32 `[images, features]`, and labels, int64 `[images]`, on the CPU.

    Raises:
        InputError: a feature is NaN or infinite.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    was_training = model.training
    autocast = torch.autocast(model.device.type, dtype) if dtype is not None else contextlib.nullcontext()
    model.eval()
    try:
        with autocast:
            for batch in batches:
                features.append(compute_pooled(model, batch["pixel_values"]).cpu())
                labels.append(batch["labels"].cpu())
    finally:
        model.train(was_training)
    found = torch.cat(features)
    if not found.isfinite().all():
        raise InputError("features: expected finite numbers, the model computed NaN or infinity; try --precision fp32")
    return found, torch.cat(labels)


class Problem(NamedTuple):
    """Features `[images, features]` and labels `[images]`; a solution is `[classes, features + 1]`, the bias last."""

    features: Tensor
    labels: Tensor
    class_weights: Tensor | None
    label_smoothing: float

    def select(self, mask: Tensor) -> Problem:
        return self._replace(features=self.features[mask], labels=self.labels[mask])

    def compute_logits(self, solution: Tensor) -> Tensor:
        return torch.addmm(solution[:, -1], self.features, solution[:, :-1].T)

    def compute_loss(self, solution: Tensor) -> Tensor:
        losses = F.cross_entropy(
            self.compute_logits(solution),
            self.labels,
            self.class_weights,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return losses.mean()

    def solve(self, strength: float, start: Tensor) -> Tensor:
        solution = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [solution], max_iter=200, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def compute_gradient() -> Tensor:
            optimizer.zero_grad()
            loss = self.compute_loss(solution) + strength / 2 * solution[:, :-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(compute_gradient)
        return solution.detach()


def fit_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> Head:
    """Fit a linear classifier, with the strength of its L2 penalty chosen on held-out images.

    Args:
        features: `[images, features]`.
        labels: int64 `[images]`.
        num_classes: number of classes; some may have no images.
        class_weights: `[classes]`.
        label_smoothing: share of the target spread over all classes.
        seed: of the choice of the images that are held out.
    """
    features = features.double()
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)  # a feature that is constant
    class_weights = None if class_weights is None else class_weights.double()
    problem = Problem((features - mean) / std, labels, class_weights, label_smoothing)
    zeros = features.new_zeros(num_classes, features.shape[1] + 1)

    fold_of = assign_folds(labels, HELD_OUT_FOLDS, seed)
    fold_of[torch.bincount(labels)[labels] == 1] = -1  # the only image of a class is always trained on
    numbers = range(HELD_OUT_FOLDS if len(labels) <= MAX_FOLDED_IMAGES else 1)
    masks = [mask for fold in numbers if (mask := fold_of == fold).any()]
    folds = [(problem.select(~mask), problem.select(mask)) for mask in masks]
    solutions = [zeros] * len(folds)
    found: list[tuple[float, float, float]] = []  # loss, accuracy, strength
    for strength in STRENGTHS if folds else ():
        losses, is_right = [], []
        for index, (kept, held_out) in enumerate(folds):
            solutions[index] = kept.solve(strength, solutions[index])
            losses += [float(held_out.compute_loss(solutions[index]))] * len(held_out.labels)
            is_right.append(held_out.compute_logits(solutions[index]).argmax(-1) == held_out.labels)
        found.append((float(np.mean(losses)), float(torch.cat(is_right).double().mean()), strength))
        if len(found) - found.index(min(found)) > PATIENCE:
            break
    loss, accuracy, strength = min(found, default=(math.nan, math.nan, DEFAULT_STRENGTH))
    solution = problem.solve(strength, zeros)
    weight = solution[:, :-1] / std
    bias = solution[:, -1] - weight @ mean
    return Head(weight.float(), bias.float(), strength, float(problem.compute_loss(solution)), loss, accuracy)


def assign_folds(labels: Tensor, count: int, seed: int) -> Tensor:
    """Assign images to `count` folds of equal shares of every class: labels `[images]` -> int64 `[images]`."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels.numpy()[order], kind="stable")]
    folds = np.empty(len(order), dtype=np.int64)
    folds[order] = np.arange(len(order)) % count
    return torch.from_numpy(folds)


@torch.no_grad()
def set_head(model: Any, head: Head) -> None:
    """Copy a fitted classifier into a model."""
    model.classifier.weight.copy_(head.weight)
    model.classifier.bias.copy_(head.bias)


def fit_classifier(trainer: FineTuner, images: ImageSet, label_smoothing: float = 0.0) -> TrainOutput:
    """Fit the classifier of a trainer's model to the features of images, in place of `trainer.train`.

    Each batch of images is a step for the callbacks: the progress bar, the log, the lock. Class weights are those of
    the trainer's loss.
    """
    args, state, control, handler = trainer.args, trainer.state, trainer.control, trainer.callback_handler
    batches = DataLoader(images, args.per_device_train_batch_size, num_workers=args.dataloader_num_workers)
    state.max_steps, state.num_train_epochs = len(batches), 1
    handler.on_train_begin(args, state, control)

    def count_steps() -> Iterator[Mapping[str, Tensor]]:
        for batch in batches:
            yield batch
            state.global_step += 1
            state.epoch = state.global_step / state.max_steps
            handler.on_step_end(args, state, control)

    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    class_weights = getattr(trainer.compute_loss_func, "class_weights", None)
    start = time.time()
    features, labels = compute_features(trainer.model, count_steps(), dtype=dtype)
    head = fit_head(
        features,
        labels,
        trainer.model.config.num_labels,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        seed=args.seed,
    )
    set_head(trainer.model, head)
    trainer.log({"loss": head.loss, "l2_strength": head.strength})
    handler.on_train_end(args, state, control)
    found = f"accuracy {head.held_out_accuracy:.2%} on held-out training images"
    print(
        f"classifier fitted to {features.shape[1]} features of {len(images):,} images, L2 strength {head.strength:.2g}:"
        f" {'no image could be held out' if math.isnan(head.held_out_loss) else found}"
    )
    return TrainOutput(state.global_step, head.loss, speed_metrics("train", start, len(images), len(batches)))
