"""Parsers that the commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastvit.cli.commands import COMMANDS
from fastvit.errors import InputError
from fastvit.train.arguments import HelpFormatter, Parser, get_flag

if TYPE_CHECKING:
    from fastvit.serve.sources import Source


def build_parser(name: str, **settings: Any) -> argparse.ArgumentParser:
    """Build the parser of a command, described by its line in `COMMANDS` unless `settings` say otherwise."""
    summary = COMMANDS[name]
    settings.setdefault("description", f"{summary[0].upper()}{summary[1:]}.")
    return Parser(prog=f"fastvit {name}", formatter_class=HelpFormatter, **settings)


def build_model_parser(name: str, **settings: Any) -> argparse.ArgumentParser:
    """Build the parser of a command that uses a fine-tuned model."""
    parser = build_parser(name, **settings)
    parser.add_argument("model", metavar="MODEL", help="fine-tuned model: folder or hub id")
    parser.add_argument("--device", metavar="NAME", help="device that computes [a GPU if there is one]")
    return parser


def add_prediction_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per batch")
    parser.add_argument("--flip", action="store_true", help="predict the mean over each image and its mirror image")


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
    from fastvit.checkpoints.locations import check_location

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
