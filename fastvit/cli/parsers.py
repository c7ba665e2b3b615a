"""Parsers that the commands share."""

from __future__ import annotations

import argparse
from typing import Any

from fastvit.cli.commands import COMMANDS
from fastvit.errors import InputError
from fastvit.train.arguments import HelpFormatter, Parser, get_flag


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


def check_counts(options: argparse.Namespace, *names: str) -> None:
    """Check that options are positive.

    Raises:
        InputError: option, expected and given value.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{get_flag(name)}: expected at least 1, got {value}")
