"""`fastvit evaluate`: measure a model on labelled images."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fastvit.cli.parsers import (
    add_prediction_arguments,
    add_split_arguments,
    build_model_parser,
    check_counts,
    choose_runtime,
)
from fastvit.errors import InputError, escape_unprintable

if TYPE_CHECKING:
    from fastvit.data.datasets import ImageDataset, Split
    from fastvit.report.tasks import Task
    from fastvit.serve.predictor import Predictor


def build_parser() -> argparse.ArgumentParser:
    parser = build_model_parser("evaluate")
    add_split_arguments(parser)
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="skip images that cannot be decoded, and count them"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    add_prediction_arguments(parser)
    return parser


def main(argv: list[str]) -> None:
    options = build_parser().parse_args(argv)
    check_counts(options, "batch_size")

    from fastvit.models.calibration import compute_reliability
    from fastvit.serve.predictor import Predictor

    # A checkpoint is not converted unless --runtime says so: the number of images is known after the model is loaded.
    settings = {"max_batch": options.batch_size, "flip": options.flip, "runtime": choose_runtime(options, 0)}
    with Predictor(options.model, options.device, **settings) as predictor:
        task, names = predictor.task, predictor.class_names
        images, split_name, labels = load_split(options, predictor)
        split = images.splits[split_name]
        indices, probabilities = predict_split(predictor, split, options.skip_bad_images)
    if not indices:
        raise InputError(f"{images.name}: no image left in split {split_name!r}")
    evaluation = task.evaluate(labels[indices], probabilities, names, predictor.thresholds)
    metrics, skipped = evaluation.metrics, len(split) - len(indices)
    if evaluation.confusion is not None:
        error = compute_reliability(probabilities, labels[indices]).expected_calibration_error
        metrics |= {"calibration_error": error, "confusion": evaluation.confusion.tolist()}
    if options.json:
        print(json.dumps({"split": split_name, "class_names": names, "skipped": skipped, **metrics}))
        return
    note = f", {skipped} skipped" if skipped else ""
    value = task.format_metric(metrics[task.metric])
    print(f"{images.name}, {split_name}: {task.metric_name} {value} on {len(indices)} images{note}")
    if evaluation.confusion is not None:
        print(f"expected calibration error of the probabilities: {error:.2%}")
    print(f"\n{evaluation.format_text()}")


def load_split(options: argparse.Namespace, predictor: Predictor) -> tuple[ImageDataset, str, np.ndarray]:
    """Load the images that the options of `add_split_arguments` name.

    Returns:
        The images, the name of the chosen split, and its labels, arranged for the predictor's model.

    Raises:
        InputError: they cannot be read, do not fit the model, or there is no such split.
    """
    from fastvit.checkpoints.hub import skip_unreachable_hub
    from fastvit.data.datasets import load_images

    if options.dataset not in (None, "generated"):
        load_images = skip_unreachable_hub()(load_images)
    task = predictor.task
    is_trained_so = predictor.model.config.problem_type == task.problem_type  # else one logit for one class
    images = load_images(
        options.dataset,
        options.data_dir,
        labels_file=options.labels,
        image_column=options.image_column,
        label_column=options.label_column,
        task=task.kind if is_trained_so else "single-label",
        validation_fraction=0,
        need_train=False,
        channels=predictor.preprocessor.channels,
    )
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    name = options.split or next(name for name in ("validation", "test", "train") if name in images.splits)
    if name not in images.splits:
        raise InputError(f"--split: expected one of {', '.join(images.splits)}, got {name!r}")
    return images, name, align_labels(images, images.splits[name].labels, predictor.class_names, task)


def align_labels(images: ImageDataset, labels: np.ndarray, names: list[str], task: Task) -> np.ndarray:
    """Arrange labels of a dataset for a model with the classes `names`.

    Args:
        images: the dataset.
        labels: its classes int64 `[N]`, or its labels or numbers float32 `[N, names]`.
        names: If a model has one label, images of all other classes are without it.
        task: that of the model.

    Raises:
        InputError: the model does not know a class, or the images lack a number that it predicts.
    """
    given, is_multi_label = images.class_names, task.kind == "multi-label"
    if task.kind == "regression" and len(names) == len(given) == 1:
        return labels
    missing = [name for name in names if name not in given] if task.kind != "single-label" else []
    if missing and not (is_multi_label and len(missing) < len(names)):
        found = f"expected the {task.noun} of the model ({', '.join(names[:10])}), found {', '.join(given[:10])}"
        raise InputError(f"{images.name}: {found}")
    unknown = sorted(set(given) - set(names))
    if unknown and (task.kind == "single-label" or (is_multi_label and len(names) > 1)):
        raise InputError(f"{images.name}: the model does not know the {task.noun} {', '.join(unknown[:10])}")
    if missing:
        print(f"note: {images.name}: no images with the labels {', '.join(missing[:10])}", file=sys.stderr)
    if task.kind == "single-label":
        return np.array([names.index(given[label]) for label in labels])
    table = np.eye(len(given), dtype=np.float32)[labels] if labels.ndim == 1 else labels
    table = np.append(table, np.zeros((len(table), 1), dtype=np.float32), axis=1)  # for the labels without images
    return table[:, [given.index(name) if name in given else -1 for name in names]]


def predict_split(predictor: Predictor, split: Split, skip_bad: bool = False) -> tuple[list[int], np.ndarray]:
    """The indices of the images that could be decoded, and their probabilities, float `[images, classes]`."""
    images = (partial(split.load, index) for index in range(len(split)))
    indices, rows = [], []
    for index, result in enumerate(predictor.stream(images, raise_errors=not skip_bad)):
        if isinstance(result, InputError):
            print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
        else:
            indices.append(index)
            rows.append(result.probabilities)
    return indices, np.array(rows)
