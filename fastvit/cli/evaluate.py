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
    from fastvit.report import classification
    from fastvit.serve.predictor import Predictor

    images, split_name = load_split(options)
    split = images.splits[split_name]
    settings = {"max_batch": options.batch_size, "flip": options.flip, "runtime": choose_runtime(options, len(split))}
    with Predictor(options.model, options.device, **settings) as predictor:
        names = predictor.class_names
        labels, probabilities = predict_split(predictor, images, split, options.skip_bad_images)
    if not len(labels):
        raise InputError(f"{images.name}: no image left in split {split_name!r}")
    confusion = classification.confusion_matrix(labels, probabilities.argmax(-1), len(names))
    error = compute_reliability(probabilities, labels).expected_calibration_error
    metrics = {**classification.classification_metrics(confusion), "calibration_error": error}
    skipped = len(split) - len(labels)
    if options.json:
        found = {"split": split_name, "class_names": names, "skipped": skipped, **metrics}
        print(json.dumps({**found, "confusion": confusion.tolist()}))
        return
    note = f", {skipped} skipped" if skipped else ""
    print(f"{images.name}, {split_name}: accuracy {metrics['accuracy']:.2%} on {len(labels)} images{note}")
    print(f"expected calibration error of the probabilities: {error:.2%}\n")
    print(classification.format_metrics(confusion, names))


def load_split(options: argparse.Namespace) -> tuple[ImageDataset, str]:
    """Load the images that the options of `add_split_arguments` name, and the name of the chosen split.

    Raises:
        InputError: they cannot be read, or there is no such split.
    """
    from fastvit.checkpoints.hub import skip_unreachable_hub
    from fastvit.data.datasets import load_images

    if options.dataset not in (None, "generated"):
        load_images = skip_unreachable_hub()(load_images)
    images = load_images(
        options.dataset,
        options.data_dir,
        labels_file=options.labels,
        image_column=options.image_column,
        label_column=options.label_column,
        validation_fraction=0,
    )
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    name = options.split or next(name for name in ("validation", "test", "train") if name in images.splits)
    if name not in images.splits:
        raise InputError(f"--split: expected one of {', '.join(images.splits)}, got {name!r}")
    return images, name


def predict_split(
    predictor: Predictor, images: ImageDataset, split: Split, skip_bad: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the images that could be decoded, and their probabilities, float `[images, classes]`.

    Raises:
        InputError: the model does not know a class.
    """
    names = predictor.class_names
    unknown = sorted(set(images.class_names) - set(names))
    if unknown:
        raise InputError(f"{images.name}: the model does not know the class(es) {', '.join(unknown[:10])}")
    sources = (partial(split.load, index) for index in range(len(split)))
    labels, rows = [], []
    for label, result in zip(split.labels, predictor.stream(sources, raise_errors=not skip_bad), strict=True):
        if isinstance(result, InputError):
            print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
        else:
            labels.append(names.index(images.class_names[label]))
            rows.append(result.probabilities)
    return np.array(labels), np.array(rows)
