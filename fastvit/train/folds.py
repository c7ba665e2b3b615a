"""Cross-validation: every picture is used for validation once, and the models' metrics get a spread.

The folds are scikit-learn's stratified ones: each has its share of every class.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from fastvit.data.datasets import TRAIN, VALIDATION, ImageDataset, Split
from fastvit.errors import InputError
from fastvit.train.recipes import require

SUMMARIZED = ("eval_accuracy", "eval_macro_f1", "test_accuracy", "test_macro_f1")


def take_fold(images: ImageDataset, folds: int, fold: int, seed: int) -> ImageDataset:
    """The same pictures with the fold-th of `folds` parts, from 1, for validation and the others to train on.

    What was for training and for validation is thrown together first; the test split stays.
    """
    model_selection = require("sklearn.model_selection", "folds", "--folds")
    parts = [images.splits[name] for name in (TRAIN, VALIDATION) if name in images.splits]
    together = join(parts)
    counts = np.bincount(together.labels, minlength=len(images.class_names))
    if counts.min() < folds:
        rarest = int(counts.argmin())
        raise InputError(
            f"--folds: expected at least {folds} pictures of every class, one for each fold, found {counts[rarest]} of"
            f" {images.class_names[rarest]!r}"
        )
    split = model_selection.StratifiedKFold(folds, shuffle=True, random_state=seed)
    kept, held_out = list(split.split(together.labels, together.labels))[fold - 1]
    chosen = {TRAIN: together.select(kept), VALIDATION: together.select(held_out)}
    return ImageDataset(images.name, images.class_names, {**images.splits, **chosen})


def join(splits: Sequence[Split]) -> Split:
    """One split after the other, as one."""
    starts = np.cumsum([0, *(len(split) for split in splits)])

    def load(index: int):
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return splits[part].load(index - int(starts[part]))

    return Split(np.concatenate([split.labels for split in splits]), load, "+".join(split.key for split in splits))


def summarize_folds(runs: Sequence[dict[str, float]]) -> dict[str, dict]:
    """Metric -> its values in the folds, their mean, and their standard deviation (of a sample: over K - 1)."""
    return {
        name: {
            "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values),
            "folds": values,
        }
        for name in SUMMARIZED
        if (values := [run[name] for run in runs if name in run])
    }
