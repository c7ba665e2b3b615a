"""The list of commands, and the dispatch of a command line to one of them."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from fastvit.errors import report_errors

COMMANDS = {
    "finetune": "train a ViT to classify your images",
    "sweep": "search for good training options",
    "watch": "show a run of finetune while it trains",
    "predict": "classify images",
    "evaluate": "measure a model on labelled images",
    "embed": "compute features of images: search, cluster, nearest neighbours",
    "attention": "draw the attention of the class token",
    "serve": "serve a model over HTTP: classes, embeddings, attention, metrics",
    "demo": "serve a page on this machine: drop an image, see classes and attention",
    "convert": "convert checkpoints between the formats of timm, Google (.npz) and Hugging Face",
    "export": "write a model for ONNX Runtime, OpenVINO, TensorRT or torch.export",
    "tune": "measure on this GPU whether our kernels or PyTorch are faster, and record it",
    "benchmark": "time fastvit and its alternatives on this machine",
    "info": "list the devices, the versions, and the backend of each operation",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command, and return its exit code: 0, or 2 where an argument cannot be used.

    A command's module is imported when the command is used, so that help and short commands do not wait for PyTorch.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: fastvit COMMAND ...   (fastvit COMMAND --help lists its options)\n")
        for name, summary in COMMANDS.items():
            print(f"  {name:<12}{summary}")
        return 0
    name, *rest = argv
    if name == "--version":
        from fastvit import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        closest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {closest[0]!r}?" if closest else ""
        print(f"error: expected one of {', '.join(COMMANDS)}, got {name!r}{hint}", file=sys.stderr)
        return 2
    return report_errors(lambda: import_module(f"fastvit.cli.{name}").main(rest))
