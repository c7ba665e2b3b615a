"""Broken and malicious files, and a child process of limited memory and time to open them in."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil

import fastvit
from fastvit.data import leaves
from fastvit.errors import InputError
from fastvit.serve.predictor import check_compatibility
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor

MARKS = [
    pytest.mark.skipif(sys.platform != "linux", reason="the child's memory is read from /proc"),
    pytest.mark.usefixtures("own_folder"),
]
SHORT = ["--precision", "fp32", "--cpu", "--max-steps", "2", "--eval-steps", "2", "--batch-size", "4"]
TOKEN = "vit.embeddings.cls_token"
CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 16,
    "patch_size": 8, "num_labels": 3, "layer_norm_eps": 1e-6,
}  # fmt: skip


def run_limited(actions: list[Callable[[], object]], memory: int = 2**30) -> list[str]:
    """Runs `actions` in a forked child that may allocate `memory` bytes beyond those it starts with, for 20 s each.

    Returns:
        For each action "done", "refused: " with the message of its InputError, or how it failed. No action runs after
        one that killed the child.
    """
    context, reports = multiprocessing.get_context("fork"), []
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(actions, memory, writer))
    child.start()
    writer.close()
    with contextlib.suppress(EOFError):
        while True:
            reports.append(reader.recv())
    child.join()
    return [*reports, f"the child's exit code was {child.exitcode}"] if child.exitcode else reports


def _run(actions, memory, writer) -> None:
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for action in actions:
        signal.alarm(20)
        try:
            action()
            report = "done"
        except InputError as error:
            report = f"refused: {error}"
        except BaseException:
            report = traceback.format_exc()
        writer.send(report[-60_000:])


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encode_leaf(format: str) -> bytes:
    return encode(leaves.draw_leaf("healthy", seed=1, size=64), format)


def repair_checksums(data: bytes) -> bytes:
    """A PNG whose checksums match its chunks again, so that the chunks are parsed."""
    at, out = 8, data[:8]
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        content = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + content + struct.pack(">I", zlib.crc32(content))
        at += 12 + length
    return out + data[at:]


def encode_hollow_png(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header declares that size."""
    data = encode(Image.new("RGB", (1, 1)), "PNG")
    return repair_checksums(data[:16] + struct.pack(">II", width, height) + data[24:])


def make_image_folder(root: Path, per_class: int = 4) -> Path:
    for label in leaves.CLASSES:
        (root / label).mkdir(parents=True)
        for seed in range(per_class):
            leaves.draw_leaf(label, seed=seed, size=24).save(root / label / f"{seed}.png")
    return root


class RunsCode:
    """Creates a folder called "ran" when it is unpickled without restrictions."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def save_pickle(obj: object, path: Path) -> None:
    Path(path).write_bytes(pickle.dumps(obj))


@functools.cache
def build_checkpoint() -> Mapping[str, bytes]:
    """The files of a valid checkpoint by name, with Python code among them that must never run."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        fastvit.ViTForImageClassification(ViTConfig(**CONFIG)).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
        Path(folder, "evil.py").write_text("import os\nos.mkdir('ran')\n")
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def load(folder: Path) -> tuple[fastvit.ViTForImageClassification, Preprocessor]:
    """A checkpoint's model and the preprocessor that matches it, as a predictor loads them."""
    model, preprocessor = fastvit.ViTForImageClassification.from_pretrained(folder), load_preprocessor(str(folder))
    check_compatibility(model, preprocessor)
    return model, preprocessor


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_header(data: bytes, edit: Callable[[dict], dict]) -> bytes:
    """A .safetensors file with an edited header and the same bytes of tensors."""
    end = 8 + int.from_bytes(data[:8], "little")
    changed = json.dumps(edit(json.loads(data[8:end]))).encode()
    return len(changed).to_bytes(8, "little") + changed + data[end:]
