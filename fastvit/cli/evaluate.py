"""`fastvit evaluate`: measure a model on labelled images."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fastvit.cli.parsers import add_prediction_arguments, build_model_parser, check_counts
from fastvit.errors import InputError, escape_unprintable

if TYPE_CHECKING:
    from fastvit.data.datasets import Split
    from fastvit.serve.predictor import Predictor


def build_parser() -> argparse.ArgumentParser:
    parser = build_model_parser("evaluate")
    parser.add_argument("--dataset", metavar="ID", help="hub dataset, 'beans', or 'generated' (leaves)")
    parser.add_argument("--data-dir", metavar="FOLDER", help="or a folder of images: [SPLIT/] CLASS/")
    parser.add_argument(
        "--labels", metavar="FILE", help="or a table (csv, tsv, jsonl, parquet) of file names and labels"
    )
    parser.add_argument("--split", metavar="NAME", help="train, validation or test [validation, else test, else train]")
    parser.add_argument("--image-column", metavar="NAME", help="column of the images [found by name]")
    parser.add_argument("--label-column", metavar="NAME", help="column of the classes [found by name]")
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="skip images that cannot be decoded, and count them"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    add_prediction_arguments(parser)
    return parser


def main(argv: list[str]) -> None:
    options = build_parser().parse_args(argv)
    check_counts(options, "batch_size")

    from fastvit.checkpoints.hub import skip_unreachable_hub
    from fastvit.data.datasets import load_images
    from fastvit.models.calibration import compute_reliability
    from fastvit.models.loading import explain_load_errors, read_config
    from fastvit.report import classification
    from fastvit.serve.predictor import Predictor

    if options.dataset not in (None, "generated"):
        load_images = skip_unreachable_hub()(load_images)
    images = load_images(
        options.dataset,
        options.data_dir,
        labels_file=options.labels,
        image_column=options.image_column,
        label_column=options.label_column,
        validation_fraction=0,
        need_train=False,
        channels=explain_load_errors(options.model, lambda: read_config(options.model)).get("num_channels", 3),
    )
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    split_name = options.split or next(name for name in ("validation", "test", "train") if name in images.splits)
    if split_name not in images.splits:
        raise InputError(f"--split: expected one of {', '.join(images.splits)}, got {split_name!r}")
    split = images.splits[split_name]
    with Predictor(options.model, options.device, max_batch=options.batch_size, flip=options.flip) as predictor:
        names = predictor.class_names
        unknown = sorted(set(images.class_names) - set(names))
        if unknown:
            raise InputError(f"{images.name}: the model does not know the class(es) {', '.join(unknown[:10])}")
        indices, probabilities = predict_split(predictor, split, options.skip_bad_images)
    if not indices:
        raise InputError(f"{images.name}: no image left in split {split_name!r}")
    labels = np.array([names.index(images.class_names[label]) for label in split.labels])[indices]
    confusion = classification.confusion_matrix(labels, probabilities.argmax(-1), len(names))
    error = compute_reliability(probabilities, labels).expected_calibration_error
    metrics = {**classification.classification_metrics(confusion), "calibration_error": error}
    skipped = len(split) - len(indices)
    if options.json:
        found = {"split": split_name, "class_names": names, "skipped": skipped, **metrics}
        print(json.dumps({**found, "confusion": confusion.tolist()}))
        return
    note = f", {skipped} skipped" if skipped else ""
    print(f"{images.name}, {split_name}: accuracy {metrics['accuracy']:.2%} on {len(indices)} images{note}")
    print(f"expected calibration error of the probabilities: {error:.2%}\n")
    print(classification.format_metrics(confusion, names))


def predict_split(predictor: Predictor, split: Split, skip_bad: bool) -> tuple[list[int], np.ndarray]:
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
