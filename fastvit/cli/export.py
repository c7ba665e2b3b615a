"""`fastvit export`: write a model for other runtimes."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastvit.cli.evaluate import load_split, predict_split
from fastvit.cli.parsers import add_split_arguments, build_parser, check_counts
from fastvit.errors import InputError

if TYPE_CHECKING:
    from fastvit.serve.preprocessing import Preprocessor

EPILOG = """
The file accepts uint8 images [batch, height, width, channels], resized outside, and returns logits. `fastvit predict`,
`evaluate` and `Predictor` accept it as a model. With an evaluation set (--data-dir or --dataset) its accuracy
(mAP of several labels, MAE of a regression) is printed beside the model's.
"""


def main(argv: list[str]) -> None:
    parser = build_parser("export", epilog=EPILOG)
    parser.add_argument("model", metavar="MODEL", help="fine-tuned model: folder or hub id")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="ending in .onnx, .xml, .pt2 or .engine"
    )
    parser.add_argument(
        "--format",
        choices=("onnx", "openvino", "torch-export", "tensorrt"),
        help="format of FILE [from its ending, in this order]",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16", "int8"), default="fp32", help="of weights and computation"
    )
    parser.add_argument("--calibrate", nargs="+", metavar="IMAGE", help="images for int8: files, folders and patterns")
    parser.add_argument(
        "--calibration-images", type=int, default=128, metavar="N", help="use at most N of them, evenly spaced"
    )
    parser.add_argument(
        "--max-loss", type=float, metavar="POINTS", help="write no file that loses more percentage points of accuracy"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    add_split_arguments(parser)
    options = parser.parse_args(argv)
    check_options(options)

    from fastvit.serve.export import export_model, resolve_format

    file_format = resolve_format(options.output, options.format, options.dtype)
    has_images = bool(options.data_dir or options.dataset or options.labels)
    difference, scale = export_model(
        options.model,
        options.output,
        file_format,
        options.dtype,
        calibrate=partial(load_calibration, options),
        accept=(lambda path: compare_accuracy(options, path)) if has_images else lambda path: None,
    )
    print(f"largest difference of a logit from PyTorch in float32: {difference:.2g} of {scale:.3g}")
    print(f"written: {options.output} ({file_format}, {options.dtype})")


def check_options(options: argparse.Namespace) -> None:
    check_counts(options, "calibration_images")
    if (options.dtype == "int8") != bool(options.calibrate):
        raise InputError(f"--calibrate: expected images with --dtype int8, and only there, got {options.dtype}")
    if options.max_loss is not None:
        if not options.max_loss >= 0:
            raise InputError(f"--max-loss: expected 0 or more percentage points, got {options.max_loss}")
        if not (options.data_dir or options.dataset or options.labels):
            raise InputError("--max-loss: expected an evaluation set (--data-dir or --dataset)")
    if options.output.exists() and not options.overwrite:
        raise InputError(f"--output: {options.output} exists already: choose another name, or replace it (--overwrite)")


def load_calibration(options: argparse.Namespace, preprocessor: Preprocessor) -> list[np.ndarray]:
    """Load and preprocess the images of --calibrate, if any.

    Raises:
        InputError: one of them cannot be read.
    """
    from fastvit.serve.predictor import preprocess
    from fastvit.serve.sources import list_sources

    if options.dtype != "int8":
        return []
    sources = list_sources(options.calibrate)
    count = min(len(sources), options.calibration_images)
    images = []
    for index in np.linspace(0, len(sources) - 1, count).round().astype(int):
        image = preprocess(preprocessor, sources[index].image, sources[index].name)
        if isinstance(image, InputError):
            raise image
        images.append(image)
    return images


def compare_accuracy(options: argparse.Namespace, path: Path) -> None:
    """Print the accuracy of the model and of the exported file, or the metric of their task.

    Raises:
        InputError: the file loses more than --max-loss.
    """
    from fastvit.serve.predictor import Predictor

    split, values = None, []
    for model, runtime in ((options.model, "torch"), (path, "auto")):
        with Predictor(model, "cpu" if path.suffix != ".engine" else None, runtime=runtime) as predictor:
            task = predictor.task
            if options.max_loss is not None and task.kind == "regression":
                raise InputError(f"--max-loss: expected a classifier, got a regression in {options.model}")
            images, name, labels = split = split or load_split(options, predictor)
            _, probabilities = predict_split(predictor, images.splits[name])
        values.append(task.measure(labels, probabilities)[task.metric])
    written = f"{task.metric_name} {task.format_metric(values[1])}, of the model {task.format_metric(values[0])}"
    print(f"{images.name}, {name}: {written} ({len(labels)} images)")
    loss = 100 * (values[0] - values[1])
    if options.max_loss is not None and loss > options.max_loss:
        raise InputError(
            f"--max-loss: expected at most {options.max_loss:g} points, lost {loss:.2f}; nothing was written"
        )
