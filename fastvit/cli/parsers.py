"""Parsers that the commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvit.cli.commands import COMMANDS
from fastvit.errors import InputError
from fastvit.train.arguments import HelpFormatter, Parser, get_flag

if TYPE_CHECKING:
    from fastvit.serve.sources import Source


MIN_CONVERTED = 200  # images for which auto converts a checkpoint for OpenVINO: 7 s of CPU time for a ViT-S


EXPORTED = ("predict", "evaluate", "serve")  # commands that also accept an exported file: they need no features or maps


def build_parser(name: str, **settings: Any) -> argparse.ArgumentParser:
    """Build the parser of a command, described by its line in `COMMANDS` unless `settings` say otherwise."""
    summary = COMMANDS[name]
    settings.setdefault("description", f"{summary[0].upper()}{summary[1:]}.")
    return Parser(prog=f"fastvit {name}", formatter_class=HelpFormatter, **settings)


def build_model_parser(name: str, **settings: Any) -> argparse.ArgumentParser:
    """Build the parser of a command that uses a fine-tuned model."""
    parser = build_parser(name, **settings)
    kinds = "folder, hub id, or file of fastvit export" if name in EXPORTED else "folder or hub id"
    parser.add_argument("model", metavar="MODEL", help=f"model: {kinds}")
    parser.add_argument("--device", metavar="NAME", help="device that computes [a GPU if there is one]")
    return parser


def add_prediction_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per batch")
    parser.add_argument("--flip", action="store_true", help="predict the mean over each image and its mirror image")
    parser.add_argument(
        "--runtime",
        choices=("auto", "torch", "openvino", "onnxruntime"),
        default="auto",
        help="what computes the model; auto: on a CPU OpenVINO, if installed and worth its conversion, else torch",
    )


def choose_runtime(options: argparse.Namespace, count: int) -> str:
    """Resolve --runtime for `count` images: converting a checkpoint takes as long as PyTorch for a few hundred."""
    is_file = Path(options.model).suffix in (".onnx", ".xml", ".pt2", ".engine")
    return "torch" if options.runtime == "auto" and count < MIN_CONVERTED and not is_file else options.runtime


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", metavar="ID", help="hub dataset, 'beans', or 'generated' (leaves)")
    parser.add_argument("--data-dir", metavar="FOLDER", help="or a folder of images: [SPLIT/] CLASS/")
    parser.add_argument(
        "--labels", metavar="FILE", help="or a table (csv, tsv, jsonl, parquet) of file names and labels"
    )
    parser.add_argument("--split", metavar="NAME", help="train, validation or test [validation, else test, else train]")
    parser.add_argument("--image-column", metavar="NAME", help="column of the images [found by name]")
    parser.add_argument("--label-column", metavar="NAME", help="column of the labels, or several: A,B,C")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files, folders, and patterns such as 'photos/**/*.jpg'"
    )
    parser.add_argument("--dataset", metavar="ID", help="or a hub dataset, 'beans', or 'generated' (leaves)")
    parser.add_argument("--split", metavar="NAME", help="split of the dataset [test, else validation, else train]")
    parser.add_argument("--image-column", metavar="NAME", help="column of the images in the dataset [found by name]")


def find_sources(options: argparse.Namespace) -> list[Source]:
    """List the images that the options of `add_source_arguments` name.

    Raises:
        InputError: they name none, or both images and a dataset; or the model cannot exist, which is checked first.
    """
    from fastvit.checkpoints.locations import check_location, find_exported

    if find_exported(options.model) is None:
        check_location(options.model, has_owner=True)
    if bool(options.images) == (options.dataset is not None):
        raise InputError(f"IMAGE: expected images or a --dataset, got {'both' if options.images else 'neither'}")
    for name in ("split", "image_column"):
        if options.images and getattr(options, name) is not None:
            raise InputError(f"{get_flag(name)}: expected with --dataset only")
    from fastvit.serve.sources import list_dataset_sources, list_sources

    if options.dataset is not None:
        return list_dataset_sources(options.dataset, options.split, options.image_column)
    return list_sources(options.images)


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Check that options are positive.

    Raises:
        InputError: option, expected and given value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{get_flag(name)}: expected at least 1, got {value}")
