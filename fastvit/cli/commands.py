"""The `fastvit` command: a thin face over the functions of the package."""

from __future__ import annotations

import argparse
import sys

from fastvit.errors import report_errors

COMMANDS = {
    "finetune": "train a ViT to tell your pictures apart",
    "sweep": "look for good options to train with",
    "watch": "show a run of finetune while it goes on",
    "predict": "name what is in pictures",
    "evaluate": "measure a model on labelled pictures",
    "attention": "draw where the class token looks",
    "demo": "serve a page on this machine: drop a picture, see classes and attention",
    "convert": "turn timm, Google .npz and Hugging Face checkpoints into each other",
    "tune": "measure on this GPU whether our kernels or PyTorch's are faster, and go by it",
    "benchmark": "time fastvit beside its rivals on this machine",
    "info": "say which devices and versions are here, and which backend computes each operation",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastvit COMMAND ...   (fastvit COMMAND --help says more)\n")
        for name, what in COMMANDS.items():
            print(f"  {name:<12}{what}")
        return 0
    if argv[0] == "--version":
        from fastvit import __version__

        print(__version__)
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        print(f"error: expected one of {', '.join(COMMANDS)}, got {name!r}", file=sys.stderr)
        return 2
    if name == "finetune":
        return report_errors(lambda: finetune(rest))
    if name == "sweep":
        return report_errors(lambda: sweep(rest))
    if name == "convert":
        return report_errors(lambda: convert(rest))
    if name == "watch":
        return report_errors(lambda: watch(rest))
    if name == "demo":
        return report_errors(lambda: demo(rest))
    if name == "benchmark":
        return report_errors(lambda: benchmark(rest))
    if name == "tune":
        return report_errors(lambda: tune(rest))
    if name == "info":
        return report_errors(lambda: info(rest))
    return report_errors(lambda: use_model(name, rest))


def finetune(argv: list[str]) -> None:
    from fastvit.train.finetune import run
    from fastvit.train.options import parse_options

    run(parse_options(argv))


def sweep(argv: list[str]) -> None:
    from fastvit.train.sweep import main

    main(argv)


def use_model(name: str, argv: list[str]) -> int | None:
    from fastvit.cli import predict

    return getattr(predict, name)(argv)


def watch(argv: list[str]) -> int:
    from fastvit.cli.watch import main

    return main(argv)


def demo(argv: list[str]) -> None:
    from fastvit.serve.demo import main

    main(argv)


def benchmark(argv: list[str]) -> int:
    from fastvit.benchmarks.command import main

    return main(argv)


def tune(argv: list[str]) -> None:
    from fastvit.cli.tune import main

    main(argv)


def info(argv: list[str]) -> None:
    argparse.ArgumentParser(prog="fastvit info", description=f"{COMMANDS['info'].capitalize()}.").parse_args(argv)
    from fastvit.report.info import build_report

    print(build_report())


def convert(argv: list[str]) -> None:
    from fastvit.checkpoints.convert import convert

    parser = argparse.ArgumentParser(prog="fastvit convert", description=f"{COMMANDS['convert'].capitalize()}.")
    parser.add_argument("source", help="folder or file to read (the format is found out)")
    parser.add_argument("dest", help="folder (Hugging Face), .safetensors (timm) or .npz (Google) to write")
    parser.add_argument("--to", choices=("hf", "timm", "npz"), help="format to write [from DEST's ending]")
    parser.add_argument("--heads", type=int, help="attention heads, where the source does not say [head dim 64]")
    parser.add_argument("--overwrite", action="store_true", help="replace DEST")
    options = parser.parse_args(argv)
    written = convert(options.source, options.dest, to=options.to, num_heads=options.heads, overwrite=options.overwrite)
    print(f"written: {written}")
