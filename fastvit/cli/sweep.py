"""`fastvit sweep`: search for good training options."""

import argparse
import shutil
from pathlib import Path

from fastvit.cli import parsers
from fastvit.errors import InputError
from fastvit.train.arguments import get_flag
from fastvit.train.options import parse_options
from fastvit.train.search_space import DEFAULT_SEARCH, SPACE, parse_range


def build_parser() -> argparse.ArgumentParser:
    parser = parsers.build_parser(
        "sweep",
        description="Search for good options of `fastvit finetune`. Accepts all of its options as well.",
        epilog="Example: fastvit sweep --data-dir my-images --trials 30 --search learning-rate drop-path=0:0.2",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=20,
        metavar="N",
        help="number of trials, including those of an earlier start",
    )
    parser.add_argument(
        "--search",
        nargs="+",
        default=list(DEFAULT_SEARCH),
        metavar="OPTION[=LOW:HIGH]",
        help=f"options to vary, of {', '.join(SPACE).replace('_', '-')}",
    )
    parser.add_argument(
        "--output-dir",
        default="runs/sweep",
        metavar="FOLDER",
        help="folder of the study, the table of trials and the best options",
    )
    return parser


def main(argv: list[str]) -> None:
    own, rest = build_parser().parse_known_args(argv)
    parsers.check_counts(own, "trials")
    space = dict(parse_range(text) for text in own.search)
    folder = Path(own.output_dir)
    options = parse_options([*rest, "--output-dir", str(folder / "trial")])
    for name in ("folds", "early_stopping", "streaming"):
        if getattr(options, name):
            raise InputError(f"{get_flag(name)}: cannot be used in a sweep")
    from fastvit.train import sweep
    from fastvit.train.lock import FolderLock

    with FolderLock(folder):
        try:
            sweep.run(options, space, own.trials, folder)
        finally:
            shutil.rmtree(folder / "trial", ignore_errors=True)  # Trainer creates it and leaves it empty
