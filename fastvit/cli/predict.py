"""`fastvit predict`: classify images."""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit.cli.parsers import (
    add_prediction_arguments,
    add_source_arguments,
    build_model_parser,
    check_counts,
    choose_runtime,
    find_sources,
)
from fastvit.errors import InputError, escape_unprintable

if TYPE_CHECKING:
    import torch

    from fastvit.serve.predictor import Predictor
    from fastvit.serve.sources import Source


def main(argv: list[str]) -> int:
    """Print or write the most probable classes of each image; returns exit code 2 if an image could not be read."""
    parser = build_model_parser("predict")
    add_source_arguments(parser)
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of classes to print")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image and line")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write a .csv, .jsonl or .parquet file instead; the same command continues where it was interrupted",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, and do not continue")
    parser.add_argument(
        "--fast-jpeg", action="store_true", help="decode large JPEG files at a reduced size; pixels differ a little"
    )
    add_prediction_arguments(parser)
    options = parser.parse_args(argv)
    check_counts(options, "top", "batch_size")
    if options.output is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--output: expected one process; several would classify the same images")
    sources = find_sources(options)

    from fastvit.serve.predictor import Predictor

    settings = {"max_batch": options.batch_size, "top_k": options.top, "flip": options.flip}
    settings |= {"runtime": choose_runtime(options, len(sources)), "fast_jpeg": options.fast_jpeg}
    with Predictor(options.model, options.device, **settings) as predictor:
        if options.output is not None:
            return write_predictions(predictor, sources, options)
        return print_predictions(predictor, sources, options.json)


def print_predictions(predictor: Predictor, sources: Sequence[Source], as_json: bool) -> int:
    from fastvit.serve.output import build_record

    code = 0
    results = predictor.stream(source.image for source in sources)
    for (name, _), result in zip(sources, results, strict=True):
        if isinstance(result, InputError):
            print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
            code = 2
        elif as_json:
            print(json.dumps(build_record(name, list(result.top)), ensure_ascii=not name.isprintable()))
        else:
            print(escape_unprintable(name))
            for label, score in result.top:
                print(f"  {score:7.2%}  {escape_unprintable(label)}")
    return code


def write_predictions(predictor: Predictor, sources: Sequence[Source], options: argparse.Namespace) -> int:
    """Write the predictions that the output file does not have yet, with a progress bar on a terminal."""
    from tqdm import tqdm

    from fastvit.serve.output import PredictionFile

    top = min(options.top, len(predictor.class_names))
    settings = {name: getattr(options, name) for name in ("model", "dataset", "split", "flip", "fast_jpeg")}
    settings |= {"top": top, "weights": compute_fingerprint(predictor.model)}
    unique = {source.name: source for source in sources}
    failed = 0
    with PredictionFile(options.output, settings, options.overwrite) as output:
        waiting = [source for name, source in unique.items() if name not in output.done]
        if output.done:
            print(f"{len(unique) - len(waiting)} of {len(unique)} images were classified before", file=sys.stderr)
        results = predictor.stream(source.image for source in waiting)
        for (name, _), result in zip(tqdm(waiting, unit="image", disable=None), results, strict=True):
            if isinstance(result, InputError):
                failed += 1
                output.add(name, [], str(result))
            else:
                output.add(name, [(label, round(score, 6)) for label, score in result.top])
        output.finish()
    note = f"; {failed} could not be read: see `error` in the file" if failed else ""
    print(f"written: {options.output} ({len(unique)} images{note})")
    return 2 if failed else 0


def compute_fingerprint(model: torch.nn.Module) -> int:
    """Compute a checksum of the first values of each parameter, which tells a model that was trained again."""
    checksum = getattr(model, "checksum", 0)  # of an exported file, which has no parameters
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes(), checksum)
    return checksum
