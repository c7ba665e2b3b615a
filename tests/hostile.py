"""Broken and malicious files, and a child process of limited memory and time to open them in."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
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

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the child's memory is read from /proc")
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
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            with contextlib.redirect_stdout(io.StringIO()):
                for action in actions:
                    signal.alarm(20)
                    os.write(writer, json.dumps(_run(action)[-60_000:]).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reports = [json.loads(line) for line in pipe]
    status = os.waitpid(child, 0)[1]
    return [*reports, f"died of signal {status & 127}"] if status else reports


def _run(action: Callable[[], object]) -> str:
    try:
        action()
    except InputError as error:
        return f"refused: {error}"
    except BaseException:
        return traceback.format_exc()
    return "done"


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encode_leaf(format: str) -> bytes:
    return encode(leaves.draw_leaf("healthy", seed=1, size=64), format)


def encode_hollow_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header declares that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


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


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_header(data: bytes, edit: Callable[[dict], None]) -> bytes:
    """A .safetensors file with an edited header and the same bytes of tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]
