"""`fastvit tune`: measure the operations of a model on this GPU, and print who is fastest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastvit.errors import InputError
from fastvit.ops import records
from fastvit.ops.records import OURS, PYTORCH, Record
from fastvit.tuning.tuner import tune

DESCRIPTION = "Measure on this GPU who computes each operation of a model faster, our kernels or PyTorch."


def main(argv: list[str]) -> None:
    options = parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise InputError("tune: there is no GPU that this PyTorch can use, and only there are kernels timed")
    if min(options.batch) < 1:
        raise InputError(f"--batch: expected at least 1, got {min(options.batch)}")
    model = load(options.model, options.image_size).cuda()
    dtype = getattr(torch, options.dtype)
    if not options.training:
        model.to(dtype)
    autocast = dtype if options.training and dtype != torch.float32 else None
    made = []
    for batch_size in options.batch:
        made += tune(
            model,
            batch_size=batch_size,
            image_size=options.image_size,
            training=options.training,
            dtype=autocast,
            time_limit=options.time_limit,
        )
    print(table(made))
    print(f"kept in {records.get_cache_path()}")
    if options.export is not None:
        records.export(options.export, made)
        print(f"written: {options.export}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="fastvit tune", description=DESCRIPTION, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("model", nargs="?", default="base", help="folder, hub id, or tiny, small, base or large")
    found.add_argument("--batch", type=int, nargs="+", default=[32], metavar="N", help="images in a batch")
    found.add_argument("--image-size", type=int, metavar="N", help="height and width in pixels [the model's]")
    found.add_argument("--training", action="store_true", help="forward and backward; else forward alone")
    found.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the model; with --training of autocast",
    )
    found.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="seconds, for each batch size")
    found.add_argument("--export", type=Path, metavar="FILE", help="write the records to a file that can be sent in")
    return found


def load(name: str, image_size: int | None) -> torch.nn.Module:
    """A pretrained model, or one of a named size with random weights."""
    from transformers import ViTConfig

    from fastvit.models.heads import ViTForImageClassification
    from fastvit.models.loading import load_pretrained
    from fastvit.train.options import SIZES

    if name not in SIZES or Path(name).exists():
        return load_pretrained(name)
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


def table(made: Sequence[Record]) -> str:
    """A line for each operation: sizes, milliseconds of PyTorch's best and of ours, and the winner."""
    rows: list[tuple[str, ...]] = [("operation", "sizes", "rows", "tokens", "PyTorch ms", "ours ms", "winner")]
    for record in made:
        times = [record.best_ms(who) for who in (PYTORCH, OURS)]
        rows.append((
            record.operation, sizes_of(record), f"<= {record.rows}", f"<= {record.tokens}" if record.tokens else "",
            *("-" if ms is None else f"{ms:.3f}" for ms in times), record.winner,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def sizes_of(record: Record) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.sizes)
