"""`fastvit predict`: classify images."""

from __future__ import annotations

import argparse
import contextlib
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
    """Print or write what the model predicts for each image; returns exit code 2 if an image could not be read."""
    parser = build_model_parser("predict")
    add_source_arguments(parser)
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of classes to print, of a model of classes"
    )
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
    is_shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_shared and options.output is None:
        raise InputError("--output: expected a file for several processes, whose lines would mix, got none")
    sources = find_sources(options)

    from fastvit.serve.predictor import Predictor

    settings = {"max_batch": options.batch_size, "top_k": options.top, "flip": options.flip}
    settings |= {"runtime": choose_runtime(options, len(sources)), "fast_jpeg": options.fast_jpeg}
    with contextlib.ExitStack() as stack:
        if is_shared:
            from fastvit.train.distributed import explain_lost_process, join_processes

            stack.enter_context(explain_lost_process(lambda: f"the same command continues {options.output}"))
            processes = stack.enter_context(join_processes(options.device not in (None, "cuda")))
            options.device = str(processes.device)
        predictor = stack.enter_context(Predictor(options.model, options.device, **settings))
        if options.output is not None:
            return write_predictions(predictor, sources, options)
        return print_predictions(predictor, sources, options.json)


def print_predictions(predictor: Predictor, sources: Sequence[Source], as_json: bool) -> int:
    from fastvit.serve.output import build_record, list_results

    code = 0
    predicted = predictor.stream(source.image for source in sources)
    for (name, _), result in zip(sources, predicted, strict=True):
        if isinstance(result, InputError):
            print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
            code = 2
        elif as_json:
            record = build_record(name, list_results(result, predictor.task.kind), kind=predictor.task.kind)
            print(json.dumps(record, ensure_ascii=not name.isprintable()))
        else:
            print(escape_unprintable(name))
            results = list_results(result, predictor.task.kind)
            for label, score in results:
                print(f"  {predictor.task.format_score(score):>7}  {escape_unprintable(label)}")
            if not results:
                print("  no label reaches its threshold")
    return code


def write_predictions(predictor: Predictor, sources: Sequence[Source], options: argparse.Namespace) -> int:
    """Write the predictions that the output file does not have yet, with a progress bar on a terminal.

    Of several processes each classifies a share of the images, and the first one writes the file.
    """
    from tqdm import tqdm

    from fastvit.serve.output import PredictionFile, list_results
    from fastvit.train.distributed import broadcast_result, is_set_on_any_process

    rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    kind = predictor.task.kind
    settings = {
        name: getattr(options, name) for name in ("model", "dataset", "split", "image_column", "flip", "fast_jpeg")
    }
    settings |= {
        "top": min(options.top, len(predictor.class_names)) if kind == "single-label" else 1,
        "weights": compute_fingerprint(predictor.model),
        "task": kind,
        "names": predictor.class_names if kind == "regression" else [],
    }
    output = broadcast_result(lambda: PredictionFile(options.output, settings, options.overwrite))
    unique = {source.name: source for source in sources}
    waiting = [source for name, source in unique.items() if name not in output.done]
    if output.done and rank == 0:
        print(f"{len(unique) - len(waiting)} of {len(unique)} images were classified before", file=sys.stderr)
    share = waiting[rank::processes]
    with output.open_journal(rank) as journal:
        results = predictor.stream(source.image for source in share)
        bar = tqdm(share, unit="image", disable=None if rank == 0 else True)
        for (name, _), result in zip(bar, results, strict=True):
            if isinstance(result, InputError):
                output.add(journal, name, [], str(result))
            else:
                output.add(journal, name, list_results(result, kind))
    is_set_on_any_process(False)  # waits for the others
    failed = broadcast_result(lambda: output.merge(unique))
    note = f"; {failed} could not be read: see `error` in the file" if failed else ""
    print(f"written: {options.output} ({len(unique)} images{note})")
    return 2 if failed and rank == 0 else 0


def compute_fingerprint(model: torch.nn.Module) -> int:
    """Compute a checksum of the first values of each parameter, which tells a model that was trained again."""
    checksum = getattr(model, "checksum", 0)  # of an exported file, which has no parameters
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes(), checksum)
    return checksum
