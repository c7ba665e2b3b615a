"""Cross-validation: every image is used for validation once, so that the metrics have a standard deviation.

The folds are scikit-learn's; those of classes are stratified: each has its share of every class.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from fastvit.data.datasets import TRAIN, VALIDATION, ImageDataset, Split
from fastvit.data.targets import SINGLE_LABEL
from fastvit.errors import InputError
from fastvit.train.recipes import require

METRICS = ("accuracy", "macro_f1", "map", "micro_f1", "mae", "rmse", "r2")
SUMMARIZED = [f"{prefix}_{name}" for prefix in ("eval", "test") for name in METRICS]


def select_fold(images: ImageDataset, folds: int, fold: int, seed: int) -> ImageDataset:
    """Split the images again for training and validation: one fold for validation, the others for training.

    Args:
        images: its training and validation splits are joined first; its test split stays.
        folds: number of folds.
        fold: number of the fold for validation, from 1.
        seed: of the assignment to folds.

    Raises:
        InputError: a class has fewer images than there are folds.
    """
    model_selection = require("sklearn.model_selection", "folds", "--folds")
    joined = join_splits([images.splits[name] for name in (TRAIN, VALIDATION) if name in images.splits])
    strata = joined.labels if images.task == SINGLE_LABEL else np.zeros(len(joined), dtype=np.int64)
    counts = np.bincount(strata, minlength=len(images.class_names))
    present = np.flatnonzero(counts)  # a declared class may have no images
    rarest = int(present[counts[present].argmin()])
    if counts[rarest] < folds:
        raise InputError(
            f"--folds: expected at least {folds} images of every class, one for each fold, found {counts[rarest]} of"
            f" {images.class_names[rarest]!r}"
        )
    splitter = model_selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    training, validation = list(splitter.split(strata, strata))[fold - 1]
    selected = {TRAIN: joined.select(training), VALIDATION: joined.select(validation)}
    return dataclasses.replace(images, splits={**images.splits, **selected})


def join_splits(splits: Sequence[Split]) -> Split:
    """Concatenate splits."""
    starts = np.cumsum([0, *(len(split) for split in splits)])

    def load(index: int):
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return splits[part].load(index - int(starts[part]))

    def get_name(index: int) -> str:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return splits[part].get_name(index - int(starts[part]))

    labels, key = np.concatenate([split.labels for split in splits]), "+".join(split.key for split in splits)
    return Split(labels, load, key, get_name)


def summarize_folds(runs: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Metric -> its values in the folds, their mean, and their sample standard deviation."""
    return {
        name: {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values),
            "folds": values,
        }
        for name in SUMMARIZED
        if (values := [run[name] for run in runs if name in run])
    }
