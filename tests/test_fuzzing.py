"""Valid images and checkpoints, changed at random: each is read or refused, in limited memory and time."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import hostile
import pytest
import torch
from PIL import Image, features
from safetensors.torch import load_file

from fastvit.checkpoints.convert import convert, read_checkpoint
from fastvit.data import leaves
from fastvit.data.images import decode_image
from fastvit.errors import InputError

pytestmark = [
    *hostile.MARKS,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning"),
]

EXAMPLES = int(os.environ.get("FASTVIT_FUZZ_EXAMPLES", "0"))  # per kind of file, drawn anew every time
CASES = 25  # per example, in one child

LENGTHS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [10**9, 10**4000, 0, -1, 1, 2**31, 2**63, 0.5, math.nan, 1e308, "", "32", "../x", True, None, [], [1], {},
          {"a": [{}]}]  # fmt: skip


def overwrite_length(data: bytes, at: int, rng: random.Random) -> bytes:
    size, value = rng.choice([4, 8]), rng.choice(LENGTHS)
    return data[:at] + (value % 256**size).to_bytes(size, rng.choice(["little", "big"])) + data[at + size :]


EDITS: list[Callable[[bytes, int, random.Random], bytes]] = [
    lambda data, at, rng: data[:at] + bytes(bits ^ 1 << rng.randrange(8) for bits in data[at:][:1]) + data[at + 1 :],
    lambda data, at, rng: data[:at] + rng.randbytes(1) + data[at + 1 :],
    lambda data, at, rng: data[:at],
    lambda data, at, rng: data[:at] + data[at + rng.randint(1, 64) :],
    lambda data, at, rng: data[: at + rng.randint(1, 64)] + data[at:],
    lambda data, at, rng: data[:at] + data[rng.randint(0, len(data)) :][:64] + data[at:],
    lambda data, at, rng: data[:at] + rng.randbytes(rng.randint(1, 16)) + data[at:],
    overwrite_length,
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Applies up to 6 edits to a file, half of them within its first 256 bytes: its header."""
    for _ in range(rng.choice([1, 1, 2, 6])):
        at = rng.randint(0, rng.choice([len(data), min(len(data), 256)]))
        data = rng.choice(EDITS)(data, at, rng)
    return data


def replace_values(data: bytes, rng: random.Random) -> bytes:
    """Replaces 1 to 3 values, at any depth, of a JSON file or of the header of a .safetensors file."""
    if not data.startswith(b"{"):
        return hostile.edit_header(data, lambda header: json.loads(replace_values(json.dumps(header).encode(), rng)))
    content = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        places, nodes = [], [content]
        while nodes:
            node = nodes.pop()
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    nodes.append(node[key])
        node, key = rng.choice(places)
        node[key] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(content).encode()


@functools.cache
def encode_images() -> list[bytes]:
    """A valid file of each format, and of each mode that is decoded in another way."""
    leaf = leaves.draw_leaf("bean_rust", seed=1, size=40)
    grey = Image.frombytes("I;16", (16, 16), bytes(range(256)) * 2)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 40), "red")]}
    files = [
        (leaf, "JPEG", {"exif": exif}), (leaf, "JPEG", {"progressive": True}), (leaf.convert("CMYK"), "JPEG", {}),
        (leaf, "PNG", {"exif": exif}), (leaf.quantize(16), "PNG", {"transparency": 3}),
        (leaf.convert("RGBA"), "PNG", frames), (grey, "PNG", {}), (leaf, "GIF", frames),
        (leaf.quantize(16), "BMP", {}), (leaf, "PPM", {}),
        *((leaf, "TIFF", {"compression": name}) for name in (None, "tiff_lzw", "jpeg", "tiff_deflate")),
        (leaf.convert("1"), "TIFF", {"compression": "group4"}), (grey, "TIFF", {}),
    ]  # fmt: skip
    optional = {"webp": [("WEBP", {}), ("WEBP", {"lossless": True, **frames})], "avif": [("AVIF", {})],
                "jpg_2000": [("JPEG2000", {})]}  # fmt: skip
    files += [(leaf, *file) for feature, kinds in optional.items() if features.check(feature) for file in kinds]
    return [hostile.encode(image, format, **options) for image, format, options in files]


def build_image_case(rng: random.Random, _: Path) -> Callable[[], object]:
    data = mutate(rng.choice(encode_images()), rng)
    if data.startswith(b"\x89PNG") and rng.random() < 0.5:
        data = hostile.repair_checksums(data)
    return partial(check_decoding, data)


def check_decoding(data: bytes) -> None:
    image = decode_image(data)
    assert image.mode == "RGB" and min(image.size) > 0


SETTINGS = ("config.json", "preprocessor_config.json")
HUB_FILES = (*SETTINGS, "model.safetensors", "hub.bin", "legacy.bin")
FOREIGN_FILES = ("timm.safetensors", "google.npz", "timm.pth")


@functools.cache
def build_checkpoints() -> dict[str, bytes]:
    """The files of one valid checkpoint in every format."""
    with tempfile.TemporaryDirectory() as root:
        model = hostile.write_files(Path(root, "model"), hostile.build_checkpoint())
        convert(model, Path(root, "google.npz"))
        tensors, timm = load_file(model / "model.safetensors"), convert(model, Path(root, "timm.safetensors"))
        torch.save(tensors, Path(root, "hub.bin"))
        torch.save(tensors, Path(root, "legacy.bin"), _use_new_zipfile_serialization=False)
        torch.save(load_file(timm), Path(root, "timm.pth"))
        files = {path.name: path.read_bytes() for path in Path(root).iterdir() if path.suffix}
        return {**hostile.build_checkpoint(), **files}


def build_checkpoint_case(names, change, rng: random.Random, folder: Path) -> Callable[[], object]:
    """One of the files `names` changed, beside the other files of a folder if it belongs into one."""
    files, name = build_checkpoints(), rng.choice(names)
    others = () if name in FOREIGN_FILES else SETTINGS if name.endswith(".bin") else HUB_FILES[:3]
    stored = "pytorch_model.bin" if name.endswith(".bin") else name
    return partial(check_files, folder, {key: files[key] for key in others} | {stored: change(files[name], rng)})


def check_files(folder: Path, files: dict[str, bytes]) -> None:
    """Computes the logits of a checkpoint, then converts it, or a lone file; either may be refused."""
    shutil.rmtree(folder, ignore_errors=True)
    source, scratch = hostile.write_files(folder / "model", files), folder / "scratch"
    if len(files) == 1:
        source /= next(iter(files))
    else:
        with contextlib.suppress(InputError):
            check_loading(source)
    scratch.mkdir()
    try:
        convert(source, scratch / "out", num_heads=2)
    except InputError:
        assert not list(scratch.iterdir())
        raise
    assert [path.name for path in scratch.iterdir()] == ["out"]
    read_checkpoint(scratch / "out")


def check_loading(folder: Path) -> None:
    try:
        model, preprocessor = hostile.load(folder)
    except RuntimeError as error:  # transformers reports a head of another shape, which a caller may ignore
        if "ignore_mismatched_sizes" in str(error):
            return
        raise
    pixels = torch.from_numpy(preprocessor(Image.new("RGB", (9, 9))).copy())[None]
    assert model(pixels).logits.shape == (1, model.num_labels)


KINDS = {  # number of examples, and what builds a case
    "images": (8, build_image_case),
    "weights": (2, partial(build_checkpoint_case, HUB_FILES, mutate)),
    "settings": (2, partial(build_checkpoint_case, HUB_FILES[:3], replace_values)),
    "foreign": (2, partial(build_checkpoint_case, FOREIGN_FILES, mutate)),
}


@pytest.mark.parametrize(
    ("kind", "example"), [(kind, example) for kind in KINDS for example in range(EXAMPLES or KINDS[kind][0])]
)
def test_fuzzed_files_are_read_or_refused(kind, example, tmp_path):
    seed = random.SystemRandom().getrandbits(32) if EXAMPLES else example
    rng = random.Random(seed)
    cases = [KINDS[kind][1](rng, tmp_path / "case") for _ in range(CASES)]
    for number, report in enumerate(hostile.run_limited(cases)):
        assert report == "done" or report.startswith("refused: "), f"seed {seed}, case {number}: {report}"
