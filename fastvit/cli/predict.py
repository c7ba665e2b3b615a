"""Use a fine-tuned model from the command line: predict, evaluate, attention."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np

from fastvit.data.images import decode_image
from fastvit.errors import InputError, escape_unprintable
from fastvit.models.calibration import compute_reliability
from fastvit.serve.attention import classify_with_attention, preprocess_image
from fastvit.serve.predictor import Predictor


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fastvit {name}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="a fine-tuned model: folder or hub id")
    parser.add_argument("--device", help="where to compute [a GPU if there is one]")
    return parser


def _add_flip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flip", action="store_true", help="the mean over each picture and its mirror image")


def predict(argv: list[str]) -> int:
    """`fastvit predict MODEL IMAGE...`; returns the exit code: 2 if a picture could not be used."""
    parser = _parser("predict", "Name what is in pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object a picture and line")
    _add_flip(parser)
    options = parser.parse_args(argv)
    for name in ("top", "batch_size"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    code = 0
    given = {"max_batch": options.batch_size, "top_k": options.top, "flip": options.flip}
    with Predictor(options.model, options.device, **given) as predictor:
        for path, result in zip(options.images, predictor.stream(options.images), strict=True):
            if isinstance(result, InputError):
                print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
                code = 2
            elif options.json:
                classes = [{"label": label, "probability": round(score, 6)} for label, score in result.top]
                print(json.dumps({"image": path, "classes": classes}, ensure_ascii=not path.isprintable()))
            else:
                print(escape_unprintable(path))
                for label, score in result.top:
                    print(f"  {score:7.2%}  {escape_unprintable(label)}")
    return code


def evaluate(argv: list[str]) -> None:
    """`fastvit evaluate MODEL --data-dir FOLDER`"""
    from fastvit.data.datasets import load_images
    from fastvit.report import classification

    parser = _parser("evaluate", "Measure a model on labelled pictures.")
    parser.add_argument("--dataset", metavar="ID", help="hub data set, 'beans', or 'generated'")
    parser.add_argument("--data-dir", metavar="FOLDER", help="or a folder of pictures: [SPLIT/] CLASS/")
    parser.add_argument("--split", help="train, validation or test [validation, else test, else train]")
    parser.add_argument("--image-column", help="column with the pictures [found by name]")
    parser.add_argument("--label-column", help="column with the classes [found by name]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out what cannot be decoded, and count it")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    _add_flip(parser)
    options = parser.parse_args(argv)
    images = load_images(
        options.dataset,
        options.data_dir,
        image_column=options.image_column,
        label_column=options.label_column,
        validation_fraction=0,
    )
    split_name = options.split or next(name for name in ("validation", "test", "train") if name in images.splits)
    if split_name not in images.splits:
        raise InputError(f"--split: expected one of {', '.join(images.splits)}, got {split_name!r}")
    with Predictor(options.model, options.device, max_batch=options.batch_size, flip=options.flip) as predictor:
        names = predictor.class_names
        unknown = sorted(set(images.class_names) - set(names))
        if unknown:
            raise InputError(f"{images.name}: the model does not know the class(es) {', '.join(unknown[:10])}")
        split = images.splits[split_name]
        labels = np.array([names.index(images.class_names[label]) for label in split.labels])
        pictures = (partial(split.load, index) for index in range(len(split)))
        measured, rows = [], []
        for index, result in enumerate(predictor.stream(pictures, raise_errors=not options.skip_bad_images)):
            if isinstance(result, InputError):
                print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
            else:
                measured.append(index)
                rows.append(result.probabilities)
    if not measured:
        raise InputError(f"{images.name}: no picture left in split {split_name!r}")
    probabilities = np.stack(rows)
    confusion = classification.confusion_matrix(labels[measured], probabilities.argmax(-1), len(names))
    error = compute_reliability(probabilities, labels[measured]).expected_calibration_error
    metrics = {**classification.classification_metrics(confusion), "calibration_error": error}
    skipped = len(split) - len(measured)
    if options.json:
        found = {"split": split_name, "class_names": names, "skipped": skipped, **metrics}
        print(json.dumps({**found, "confusion": confusion.tolist()}))
    else:
        print(
            f"{images.name}, {split_name}: accuracy {metrics['accuracy']:.2%} on {len(measured)} pictures"
            + (f", {skipped} skipped" if skipped else "")
        )
        print(f"probabilities are off by {error:.2%} (expected calibration error)\n")
        print(classification.format_metrics(confusion, names))


def attention(argv: list[str]) -> None:
    """`fastvit attention MODEL IMAGE -o map.png`"""
    from fastvit.report import figures

    parser = _parser("attention", "Draw where the class token looks: per block, and rolled out through all blocks.")
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("-o", "--output", default="attention.png", metavar="FILE", help="picture to write")
    options = parser.parse_args(argv)
    image = decode_image(options.image)
    with Predictor(options.model, options.device) as predictor:
        attended = classify_with_attention(predictor.model, preprocess_image(predictor, image))
    figures.save_image(figures.draw_attention_sheet(image, attended.maps, attended.grid), Path(options.output))
    print(f"written: {options.output}")
