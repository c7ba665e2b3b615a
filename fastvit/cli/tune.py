"""`fastvit tune`: measure the operations of a model on this GPU, and print the fastest implementations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastvit.cli import parsers
from fastvit.errors import InputError

if TYPE_CHECKING:
    import torch

    from fastvit.ops.records import Record


def main(argv: list[str]) -> None:
    options = build_parser().parse_args(argv)
    if min(options.batch) < 1:
        raise InputError(f"--batch: expected at least 1, got {min(options.batch)}")

    import torch

    from fastvit.ops import records
    from fastvit.tuning.tuner import tune

    if not torch.cuda.is_available():
        raise InputError("tune: expected a GPU that this PyTorch supports, found none; kernels are timed on GPUs only")
    model = load_model(options.model, options.image_size).cuda()
    dtype = getattr(torch, options.dtype)
    if not options.training:
        model.to(dtype)
    autocast = dtype if options.training and dtype != torch.float32 else None
    made: list[Record] = []
    for batch_size in options.batch:
        made += tune(
            model,
            batch_size=batch_size,
            image_size=options.image_size,
            training=options.training,
            dtype=autocast,
            time_limit=options.time_limit,
        )
    print(format_table(made))
    print(f"stored in {records.get_cache_path()}")
    if options.export is not None:
        records.export(options.export, made)
        print(f"written: {options.export}")


def build_parser() -> argparse.ArgumentParser:
    parser = parsers.build_parser("tune")
    parser.add_argument(
        "model", nargs="?", default="base", metavar="MODEL", help="folder, hub id, or tiny, small, base or large"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[32],
        metavar="N",
        help="images per batch; several sizes are measured one after the other",
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width in pixels [the model's]")
    parser.add_argument("--training", action="store_true", help="measure forward and backward [forward only]")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="dtype of the model, with --training of autocast",
    )
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="seconds per batch size")
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="write the records to a file that can be contributed"
    )
    return parser


def load_model(name: str, image_size: int | None) -> torch.nn.Module:
    """Load a pretrained model, or build one of a named size with random weights."""
    from transformers import ViTConfig

    from fastvit.adapters.backbones import load_classifier
    from fastvit.models.heads import ViTForImageClassification
    from fastvit.train.options import SIZES

    if name not in SIZES or Path(name).exists():
        return load_classifier(name)
    hidden_size, num_layers, num_heads = SIZES[name]
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * hidden_size,
            image_size=image_size or 224,
        )
    )


def format_table(made: Sequence[Record]) -> str:
    """Format one line per operation: its sizes, the best milliseconds of PyTorch and of our kernels, and the winner."""
    from fastvit.ops.records import OURS, PYTORCH

    rows: list[tuple[str, ...]] = [("operation", "sizes", "rows", "tokens", "PyTorch ms", "ours ms", "winner")]
    for record in made:
        times = [record.best_ms(source) for source in (PYTORCH, OURS)]
        rows.append((
            record.operation, format_sizes(record), f"<= {record.rows}", f"<= {record.tokens}" if record.tokens else "",
            *("-" if ms is None else f"{ms:.3f}" for ms in times), record.winner,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def format_sizes(record: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.sizes)
