"""Pictures, folders and checkpoints that are broken or made to do harm: refused by one clear line, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTImageProcessorPil

import fastvit
from fastvit import cli
from fastvit.checkpoints.configuration import SIZE_LIMITS, read_json
from fastvit.checkpoints.convert import convert, read_checkpoint
from fastvit.checkpoints.inspection import check_checkpoint, check_shard_metadata, read_config
from fastvit.data import leaves
from fastvit.data.datasets import load_images
from fastvit.data.images import decode_image
from fastvit.errors import InputError, escape_unprintable
from fastvit.models.loading import load_pretrained
from fastvit.serve.predictor import check_compatibility
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor
from fastvit.train.finetune import main

pytestmark = [
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and read the way of Linux"),
]

SHORT = ["--precision", "fp32", "--cpu", "--max-steps", "2", "--eval-steps", "2", "--batch-size", "4"]
TINY = ["--from-scratch", "micro", "--image-size", "16", "--patch-size", "8", *SHORT]

# How many examples each fuzz test draws, and whether they are others every time.
EXAMPLES = int(os.environ.get("FASTVIT_FUZZ_EXAMPLES", "0"))
MEMORY = 2**30  # bytes that a child may take beyond what it was born with
SECONDS = 20


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# A child that may do anything: its memory and its time are limited
# ---------------------------------------------------------------------------------------------------------------------


def outcomes(actions: list[Callable[[], object]], memory: int = MEMORY) -> list[str]:
    """What each of `actions` does in a forked child: "done", "refused: ..." by an InputError, or how it died.

    One child does them one after the other; should it die, another goes on behind the one that killed it.
    """
    reports: list[str] = []
    while len(reports) < len(actions):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                do_all(actions[len(reports) :], writer, memory)
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            reports += [json.loads(line) for line in pipe]
        status = os.waitpid(child, 0)[1]
        if status:
            reports.append(f"died of signal {status & 127}")
    return reports


def do_all(actions: list[Callable[[], object]], writer: int, memory: int) -> None:
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.redirect_stdout(io.StringIO()):
        for action in actions:
            signal.alarm(SECONDS)
            try:
                action()
                report = "done"
            except InputError as error:
                report = f"refused: {error}"
            except BaseException:
                report = traceback.format_exc()
            os.write(writer, json.dumps(report[-60_000:]).encode() + b"\n")


def outcome(action: Callable[[], object], memory: int = MEMORY) -> str:
    (report,) = outcomes([action], memory)
    return report


def is_civil(report: str) -> bool:
    return report == "done" or report.startswith("refused: ")


def assert_civil(actions: list[Callable[[], object]]) -> None:
    for index, report in enumerate(outcomes(actions)):
        assert is_civil(report), f"case {index}: {report}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def hollow_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


RAMP = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16)  # 16 bits: each upper byte once


@pytest.mark.parametrize("kind", ["png", "tiff", "big-endian tiff", "pgm"])
def test_16_bit_grey_keeps_its_upper_byte(kind):
    data = {
        "png": lambda: encoded(Image.fromarray(RAMP), "PNG"),
        "tiff": lambda: encoded(Image.fromarray(RAMP), "TIFF"),
        "big-endian tiff": lambda: encoded(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
        "pgm": lambda: b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(),
    }[kind]()
    pixels = np.asarray(decode_image(data))
    assert np.array_equal(pixels, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_16_bit_colour_and_16_bit_grey_are_scaled_alike():
    colour = b"P6 16 16 65535\n" + np.repeat(RAMP[..., None], 3, axis=2).astype(">u2").tobytes()
    grey = b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes()
    difference = np.asarray(decode_image(colour)).astype(int) - np.asarray(decode_image(grey))
    assert np.abs(difference).max() <= 1  # Pillow rounds the colours of a PPM


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_a_channel_are_refused(dtype):
    with pytest.raises(InputError, match=r"image: expected 8 or 16 bits a channel, found 32"):
        decode_image(encoded(Image.fromarray(RAMP.astype(dtype)), "TIFF"))


def palette(**options) -> bytes:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 9, 9, 200, 0, 0])
    image.putpixel((0, 0), 1)
    return encoded(image, "PNG", **options)


@pytest.mark.parametrize(
    ("data", "corner", "middle"),
    [
        pytest.param(palette(transparency=0), (200, 0, 0), (255, 255, 255), id="palette, one transparent colour"),
        pytest.param(palette(transparency=bytes([0, 255])), (200, 0, 0), (255, 255, 255), id="palette with alpha"),
        pytest.param(palette(), (200, 0, 0), (9, 9, 9), id="palette"),
        pytest.param(
            encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"), (255, 255, 255), (255, 255, 255), id="hidden red"
        ),
        pytest.param(
            encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"), (127, 127, 127), (127, 127, 127), id="half"
        ),
        pytest.param(
            encoded(Image.new("LA", (4, 4), (0, 0)), "PNG"), (255, 255, 255), (255, 255, 255), id="grey with alpha"
        ),
        pytest.param(
            encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
            (255, 255, 255),
            (255, 255, 255),
            id="a colour that is transparent",
        ),
    ],
)
def test_what_is_transparent_is_laid_on_white(data, corner, middle):
    image = decode_image(data)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == corner and image.getpixel((2, 2)) == middle


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(format):
    if format in ("WEBP", "AVIF") and not features.check(format.lower()):
        pytest.skip(f"this Pillow has no {format}")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    red, green, blue = decode_image(encoded(frames[0], format, save_all=True, append_images=frames[1:])).getpixel(
        (8, 8)
    )
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("L", (8, 8), 70), "JPEG", (70, 70, 70)),
        (Image.new("1", (8, 8), 1), "PNG", (255, 255, 255)),
        (Image.new("RGB", (1, 1), (7, 8, 9)), "PNG", (7, 8, 9)),
    ],
    ids=["cmyk", "grey", "one bit", "1x1"],
)
def test_every_mode_and_size_becomes_rgb(image, format, expected, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(image, format))
    decoded = decode_image(tmp_path / "a.png")
    assert decoded.size == image.size
    assert np.abs(np.array(decoded.getpixel((0, 0))) - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray((np.arange(6 * 4 * 3) * 3).astype(np.uint8).reshape(6, 4, 3))
    stored = {  # how a camera that was held so stores it
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode_image(encoded(stored, "PNG", exif=exif)), upright)


def test_broken_exif_does_not_take_the_image_away():
    image = Image.new("RGB", (8, 4), (200, 30, 40))
    for exif in (b"Exif\0\0II*\0garbage", b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        assert decode_image(encoded(image, "JPEG", exif=exif)).size == (8, 4)


def test_a_decompression_bomb_is_refused_before_memory_is_taken(tmp_path):
    (tmp_path / "bomb.png").write_bytes(hollow_png(30_000, 30_000))
    report = outcome(lambda: decode_image(tmp_path / "bomb.png"), memory=100 * 2**20)  # its pixels would be 2,700 MB
    assert report.startswith("refused: ")
    assert report.endswith("bomb.png: expected a picture of at most 178,956,970 pixels, to fit into memory")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected an image, found a file that is none"),
        (b"just words, whatever the name says", "expected an image, found a file that is none"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "expected an image"),  # Ghostscript
        (encoded(leaves.draw_leaf("healthy", seed=1, size=64), "PNG")[:500], "cannot be decoded"),
        (encoded(leaves.draw_leaf("healthy", seed=1, size=64), "JPEG")[:500], "cannot be decoded"),
        (hollow_png(0, 10), "expected an image"),
        (hollow_png(10, 10), "cannot be decoded"),
    ],
    ids=["zero bytes", "text", "eps", "truncated png", "truncated jpeg", "no width", "no pixels"],
)
def test_what_is_no_image_is_told_with_its_name(data, message, tmp_path):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.png: {message}"):
        decode_image(tmp_path / "a.png")


def test_a_png_called_jpg_is_read():
    assert decode_image(encoded(Image.new("RGB", (3, 2)), "PNG"), "a.jpg").size == (3, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def make_folder(root: Path, per_class: int = 4) -> Path:
    for label in leaves.CLASSES:
        (root / label).mkdir(parents=True)
        for seed in range(per_class):
            leaves.draw_leaf(label, seed=seed, size=24).save(root / label / f"{seed}.png")
    return root


def listed(root: Path) -> dict[str, int]:
    """Pictures a class of the training split."""
    images = load_images(data_dir=root, validation_fraction=0)
    return dict(zip(images.class_names, images.count_labels()["train"].tolist(), strict=True))


STRANGE = [
    "a\nb.png",
    "글자.png",
    "[1]*?.png",
    "a::b.png",
    "a\\b.png",
    "a#b%20c.png",
    "-x.png",
    "train.png",
    "test_1.JPG",
]


def test_file_names_do_not_matter(tmp_path):
    root = make_folder(tmp_path / "[pictures]::*\n1")
    image = (root / "healthy" / "0.png").read_bytes()
    for name in [*map(os.fsencode, STRANGE), b"not \xff\xfe text.png"]:
        Path(os.fsdecode(os.fsencode(root / "healthy") + b"/" + name)).write_bytes(image)
    images = load_images(data_dir=root, validation_fraction=0)
    assert images.count_labels()["train"].tolist() == [4, 4, 4 + len(STRANGE) + 1]
    for index in range(len(images.splits["train"])):
        assert images.splits["train"].load(index).size == (24, 24)


@pytest.mark.parametrize("name", ["train", "test", "val", "[c]*", "a::b", "글자"])
def test_class_names_do_not_matter(name, tmp_path):
    root = make_folder(tmp_path / "pictures")
    (root / "healthy").rename(root / name)
    assert listed(root) == {"angular_leaf_spot": 4, "bean_rust": 4, name: 4}


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\x1b[2J", b"two\nlines"])
def test_class_names_that_cannot_be_shown_are_refused(name, tmp_path):
    root = make_folder(tmp_path / "pictures")
    (root / "healthy").rename(os.fsdecode(os.fsencode(root) + b"/" + name))
    with pytest.raises(InputError, match="expected a printable class name, found") as refused:
        listed(root)
    assert str(refused.value).isprintable()


def test_links_in_circles_end(tmp_path):
    root = make_folder(tmp_path / "pictures")
    (root / "healthy" / "up").symlink_to("..")
    (root / "healthy" / "self").symlink_to(".")
    (root / "again").symlink_to(root)
    (root / "healthy" / "circle.d").symlink_to("circle.d")
    for name in "abcdefgh":  # each holds a link to all: paths without end, folders but eight
        (tmp_path / "web" / name).mkdir(parents=True)
    for name in "abcdefgh":
        for other in "abcdefgh":
            (tmp_path / "web" / name / other).symlink_to(tmp_path / "web" / other)
    (root / "healthy" / "web").symlink_to(tmp_path / "web")
    assert listed(root) == {"angular_leaf_spot": 4, "bean_rust": 4, "healthy": 4}


def test_a_class_may_be_a_link_and_have_folders(tmp_path):
    root = make_folder(tmp_path / "pictures")
    (root / "healthy").rename(tmp_path / "elsewhere")
    (root / "healthy").symlink_to(tmp_path / "elsewhere")
    (root / "bean_rust" / "2019").mkdir()
    (root / "bean_rust" / "0.png").rename(root / "bean_rust" / "2019" / "0.png")
    assert listed(root) == {"angular_leaf_spot": 4, "bean_rust": 4, "healthy": 4}


def test_splits_are_found_and_what_lies_beside_them_is_told(tmp_path):
    for split in ("Train", "val", "test"):
        make_folder(tmp_path / "pictures" / split)
    images = load_images(data_dir=tmp_path / "pictures")
    assert {name: len(split) for name, split in images.splits.items()} == {"train": 12, "validation": 12, "test": 12}
    shutil.copytree(tmp_path / "pictures" / "test", tmp_path / "pictures" / "more")
    with pytest.raises(InputError, match=r"expected every picture in the folder of a class, found .*/more/.* outside"):
        load_images(data_dir=tmp_path / "pictures")
    shutil.move(tmp_path / "pictures" / "more", tmp_path / "pictures" / "validation")
    with pytest.raises(InputError, match="expected one folder for the split 'validation', found another"):
        load_images(data_dir=tmp_path / "pictures")


BAD_IMAGES = {
    "broken link": lambda path: path.symlink_to("nowhere.png"),
    "circle": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "zero bytes": Path.touch,
    "text": lambda path: path.write_text("hello"),
    "truncated": lambda path: path.write_bytes(encoded(leaves.draw_leaf("healthy", seed=1, size=64), "PNG")[:500]),
    "bomb": lambda path: path.write_bytes(hollow_png(30_000, 30_000)),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_stops_a_run_before_anything_is_written(kind, tmp_path, capsys):
    root = make_folder(tmp_path / "pictures")
    BAD_IMAGES[kind](root / "healthy" / "00\nbad.png")
    assert main(["--data-dir", str(root), "--output-dir", "out", *TINY]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "00\\nbad.png: " in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run over a folder that has every kind of bad picture first in a class, with --skip-bad-images."""
    root = tmp_path_factory.mktemp("run")
    make_folder(root / "pictures", per_class=6)
    for number, make in enumerate(BAD_IMAGES.values()):
        make(root / "pictures" / "healthy" / f"!{number}.png")
    # Drawn for validation or not, in training there are 6 good ones or fewer behind the bad ones.
    options = ["--data-dir", str(root / "pictures"), "--output-dir", str(root / "out"), "--skip-bad-images"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main([*options, *TINY]) == 0
    (root / "printed.txt").write_text(output.getvalue())
    return root


def test_bad_images_are_left_out_and_counted_when_asked(finished_run):
    printed = (finished_run / "printed.txt").read_text()
    lines = [line for line in printed.splitlines() if line.startswith("  /")]
    assert len(lines) == len(BAD_IMAGES) and "images skipped" in printed
    assert (finished_run / "out" / "examples.png").is_file()


def test_predict_names_the_good_images_and_tells_of_the_bad(finished_run, tmp_path, capsys):
    leaves.draw_leaf("healthy", seed=1, size=24).save(tmp_path / "good\n1.png")
    (tmp_path / "bad.png").write_bytes(b"")
    command = ["predict", str(finished_run / "out"), "bad.png", "good\n1.png", "missing.png", "--device", "cpu"]
    assert cli.main([*command, "--top", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "good\\n1.png" and len(captured.out.splitlines()) == 2
    assert [line.partition(": ")[2].partition(",")[0] for line in captured.err.splitlines()[-2:]] == [
        "bad.png: expected an image",
        "missing.png: no such file",
    ]
    assert cli.main([*command, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["image"] == "good\n1.png"


def test_evaluate_leaves_bad_images_out_when_asked(finished_run, capsys):
    command = ["evaluate", str(finished_run / "out"), "--data-dir", str(finished_run / "pictures"), "--device", "cpu"]
    assert cli.main(command) == 2
    assert "!0.png: " in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*command, "--skip-bad-images"]) == 0
    assert f"on 18 images, {len(BAD_IMAGES)} skipped" in capsys.readouterr().out
    assert cli.main([*command, "--skip-bad-images", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["skipped"] == len(BAD_IMAGES) and np.sum(found["confusion"]) == 18


def test_what_is_shown_stays_on_its_line():
    assert escape_unprintable("a\nb\x1b[2J\udcff글자 é") == "a\\nb\\x1b[2J\\udcff글자 é"


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

CONFIG = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
    "layer_norm_eps": 1e-6,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A whole checkpoint, with code beside it that must never run."""
    folder = tmp_path_factory.mktemp("checkpoint") / "good"
    torch.manual_seed(0)
    fastvit.ViTForImageClassification(ViTConfig(**CONFIG)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    (folder / "evil.py").write_text("import os\nos.mkdir('ran')\n")
    return folder


@pytest.fixture
def model(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(folder: Path):
    return fastvit.ViTForImageClassification.from_pretrained(folder)


class RunsCode:
    """Unpickled by anything but a careful reader, it leaves a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


NAN = math.nan
BAD_SIZES = [10**9, 10**4000, 0, -32, "32", NAN, True, 32.0, None, [], {}]
BAD_CONFIGS = [
    *({name: value} for name in CONFIG if name in SIZE_LIMITS and name != "num_labels" for value in BAD_SIZES),
    *({"image_size": value} for value in ([16, 16, 16], ["16", "16"], [16, -16], [10**9, 1], 4)),
    *({"id2label": None, "num_labels": value} for value in (10**9, -1, "3", 1.5)),
    *({"id2label": value} for value in (["a"], {"a": "b"}, {"0": {}}, {"9" * 5000: "a"}, "abc")),
    *({name: NAN} for name in ("layer_norm_eps", "initializer_range", "hidden_dropout_prob")),
    *({name: value} for name in ("layer_norm_eps", "hidden_dropout_prob") for value in (-1.0, "0.1", 1e309, 10**400)),
    *({"dtype": value} for value in ("load", "__name__", "int8", "hub", 3)),
    *({"image_mean": value} for value in ([0.5], [0.5, 0.5, NAN], "abc", ["0"] * 3)),
    *({"image_std": value} for value in ([0.5], [0, 0, 0], [0.5, 0.5, -1])),
    {"num_attention_heads": 5},
    {"num_hidden_layers": 1000},
    {"encoder_stride": 10**6},
    {"pooler_output_size": 10**12},
    {"hidden_act": "x" * 10**6},
    {"label2id": 3},
    {"qkv_bias": "yes"},
    # What would lead to other files, to code, to the inside of the config.
    {"transformers_weights": "../elsewhere.safetensors"},
    {"attn_implementation": "someone/kernel"},
    {"_attn_implementation": "someone/kernel"},
    {"_attn_implementation_internal": "someone/kernel"},
    {"per_layer_config": {"0": {"hidden_size": 64}}},
    {"fusion_config": {"patch_embeddings": True}},
    {"quantization_config": {"quant_method": "someone's"}},
    {"quantization_config": 3},
    {"to_dict": 3},
    {"attribute_map": 3},
    {"__class__": 3},
]


@pytest.mark.parametrize(
    "change", BAD_CONFIGS, ids=lambda change: escape_unprintable(str(list(change.items())[-1])[:50])
)
def test_a_config_that_cannot_be_is_refused(change, model):
    change_json(model / "config.json", **change)
    with pytest.raises(InputError) as refused:
        load(model)
    assert list(change)[-1].strip("_") in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"a":' * 50_000, "[" * 10**6, '{"hidden_size":' + "9" * 10_000 + "}", "\ud800"],
    ids=["empty", "open", "list", "null", "number", "deep", "deeper", "digits", "not text"],
)
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_what_is_no_json_object_is_refused(name, text, model):
    (model / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=rf"{name}: expected a JSON"):
        load_fitting_preprocessor(model)
    with pytest.raises(InputError, match=rf"{name}: expected a JSON"):
        convert(model, "converted")


def test_a_json_file_that_would_fill_the_memory_is_refused(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**34)  # takes no place on disk
    with pytest.raises(InputError, match="expected a JSON file of at most 104,857,600 bytes, found 17,179,869,184"):
        read_json(tmp_path / "config.json")


def test_a_config_is_checked_against_the_weights_before_memory_is_taken(model):
    """Sizes that some model could have, and this checkpoint has not: 2 layers of 3 x 10**9 weights."""
    change_json(model / "config.json", hidden_size=2**14, intermediate_size=2**16, num_hidden_layers=2)

    def finetune() -> None:  # with other labels, mismatched shapes are not transformers' concern
        load_pretrained(str(model), ignore_mismatched_sizes=True)

    report = outcome(finetune, memory=300 * 2**20)
    assert "expected shape [16384, 3, 8, 8], as config.json describes it, found [32, 3, 8, 8]" in report
    # The same of weights under names that nobody knows.
    tensors = load_file(model / "model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    report = outcome(finetune, memory=300 * 2**20)
    assert "config.json describes a model of 6,446,170,112 weights, its files hold 23,619" in report


@pytest.mark.parametrize("kind", ["resampled", "fewer layers", "another head", "own config", "renamed"])
def test_what_the_caller_asks_for_is_no_contradiction(kind, model):
    if kind == "resampled":
        loaded = fastvit.ViTForImageClassification.from_pretrained(model, image_size=32)
        assert loaded.vit.embeddings.position_embeddings.shape == (1, 17, 32)
    elif kind == "fewer layers":
        with pytest.raises(InputError, match="unexpected keys"):
            fastvit.ViTForImageClassification.from_pretrained(model, num_hidden_layers=1)
    elif kind == "another head":
        loaded = fastvit.ViTForImageClassification.from_pretrained(model, num_labels=7, ignore_mismatched_sizes=True)
        assert loaded.classifier.out_features == 7
    elif kind == "own config":
        loaded = fastvit.ViTForImageClassification.from_pretrained(model, config=ViTConfig(**CONFIG, hidden_act="relu"))
        assert loaded.config.hidden_act == "relu"
    else:
        tensors = load_file(model / "model.safetensors")
        renamed = {name.replace("vit.", "mine."): tensor for name, tensor in tensors.items()}
        save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
        stored, names = read_config(model), {r"^mine\.": "vit."}
        check_checkpoint(model, stored, names)
        with pytest.raises(InputError, match="num_hidden_layers: expected 2, as its weights have, got 3"):
            check_checkpoint(model, {**stored, "num_hidden_layers": 3}, names)


CODE_FILES = {"pytorch_model.bin": torch.save, "raw pickle": lambda obj, path: path.write_bytes(pickle.dumps(obj))}


@pytest.mark.parametrize("kind", CODE_FILES)
def test_a_pickle_with_code_is_refused_and_never_run(kind, model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    CODE_FILES[kind]({**tensors, "more": RunsCode()}, model / "pytorch_model.bin")
    for use in (load, lambda folder: load_pretrained(str(folder)), lambda folder: convert(folder, "converted")):
        with pytest.raises(InputError, match=r"pytorch_model\.bin: expected tensors alone"):
            use(model)
    for suffix in (".bin", ".pt", ".pth"):
        shutil.copy(model / "pytorch_model.bin", f"alone{suffix}")
        with pytest.raises(InputError, match=rf"alone{suffix}: expected tensors alone"):
            convert(f"alone{suffix}", "converted")
    assert not Path("ran").exists() and not Path("converted").exists()


def test_an_npz_with_objects_is_refused_and_never_run():
    np.savez("a.npz", cls=np.array([RunsCode()], dtype=object))
    with pytest.raises(InputError, match=r"a\.npz: not a readable \.npz file of plain arrays"):
        convert("a.npz", "converted")
    assert not Path("ran").exists()


def test_remote_code_is_never_run(model, capsys):
    classes = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForImageClassification")}
    change_json(model / "config.json", auto_map=classes, architectures=["Evil"])
    change_json(model / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    change_json(model / "preprocessor_config.json", processor_class="Evil")
    leaves.draw_leaf("healthy", seed=1, size=24).save("leaf.png")
    assert type(load(model)) is fastvit.ViTForImageClassification
    trusting = fastvit.ViTForImageClassification.from_pretrained(model, trust_remote_code=True)
    assert type(trusting) is fastvit.ViTForImageClassification
    assert cli.main(["predict", str(model), "leaf.png", "--device", "cpu"]) == 0
    assert cli.main(["convert", str(model), "converted"]) == 0
    change_json(model / "preprocessor_config.json", image_processor_type="Evil")
    assert cli.main(["predict", str(model), "leaf.png", "--device", "cpu"]) == 2
    assert "image_processor_type: expected one for ViT, " in capsys.readouterr().err
    assert not Path("ran").exists()


def test_an_index_names_files_beside_it_alone(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = model / "model.safetensors.index.json"
    for weight_map in ({"a": "../elsewhere.safetensors"}, {"a": str(tmp_path / "elsewhere.safetensors")}, {"a": 3}, 3):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for use in (load, read_checkpoint):
            with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: expected"):
                use(model)


def test_tensors_that_claim_more_than_their_file_holds_are_refused(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    change_json(model / "config.json", intermediate_size=2**18)
    wide = {
        name: torch.zeros(1).expand([2**18 if side == 64 else side for side in tensor.shape])
        for name, tensor in tensors.items()
        if 64 in tensor.shape
    }
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in wide.items()}
    sparse = {name: torch.zeros(tensor.shape, layout=torch.sparse_coo) for name, tensor in wide.items()}
    for claims in (wide, empty, sparse):
        torch.save({**tensors, **claims}, model / "pytorch_model.bin")
        for use in (load, read_checkpoint):
            with pytest.raises(InputError, match="expected values that the file holds, found a view"):
                use(model)


def test_an_npz_that_grows_in_memory_is_refused():
    with zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cls.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (1, 1, 100 * 2**18)}
        )
        for _ in range(100):
            file.write(bytes(2**20))
    with pytest.raises(InputError, match=r"a\.npz: expected weights, found [\d,]+ bytes that grow to 104,857,728"):
        convert("a.npz", "converted")


def edited_header(data: bytes, edit: Callable[[dict], None]) -> bytes:
    """A .safetensors file with another header over the same tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + data[8 + length :]


TOKEN = "vit.embeddings.cls_token"
LYING_HEADERS = {
    "overlap": {"data_offsets": [0, 128]},
    "beyond the end": {"data_offsets": [10**9, 10**9 + 128]},
    "backwards": {"data_offsets": [128, 0]},
    "huge": {"shape": [1, 1, 10**12]},
    "overflow": {"shape": [2**40, 2**40]},
    "negative": {"shape": [-1, 1, 32]},
    "another shape": {"shape": [1, 32, 1]},
    "integers": {"dtype": "I32"},
    "wider": {"dtype": "F64"},
    "unknown": {"dtype": "F7"},
    "words": {"shape": "wide"},
}


@pytest.mark.parametrize("kind", LYING_HEADERS)
def test_a_header_that_lies_is_refused(kind, model):
    path = model / "model.safetensors"
    path.write_bytes(edited_header(path.read_bytes(), lambda header: header[TOKEN].update(LYING_HEADERS[kind])))
    for use in (load, lambda folder: load_pretrained(str(folder)), lambda folder: convert(folder, "converted")):
        with pytest.raises(InputError):
            use(model)
    assert not Path("converted").exists()


@pytest.mark.parametrize("length", [0, 1, 99 * 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_another_length_is_refused(length, model):
    path = model / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    for use in (load, read_checkpoint):
        assert outcome(lambda use=use: use(model), memory=300 * 2**20).startswith("refused: ")


def load_fitting_preprocessor(folder: Path) -> Preprocessor:
    """As a predictor does."""
    model = load(folder)
    preprocessor = load_preprocessor(str(folder))
    check_compatibility(model, preprocessor)
    return preprocessor


BAD_PROCESSORS = [
    *(
        {"size": value}
        for value in (10**9, {"height": 10**9, "width": 10**9}, {"height": -1, "width": 16}, "big", [16])
    ),
    *({"size": value} for value in ({"height": 32, "width": 32}, {"height": NAN, "width": 16}, 0.5)),
    *({"image_mean": value} for value in ([0.5], [NAN] * 3, "abc", None, ["0"] * 3)),
    *({"image_std": value} for value in ([0, 0, 0], [-1, 1, 1], [1e999] * 3, [0.5])),
    *({"resample": value} for value in (99, -1, "bilinear", NAN)),
    *({"rescale_factor": value} for value in (0, NAN, "x", 1e300, None)),
    {"do_resize": False},
    {"do_center_crop": True, "crop_size": {"height": 10**9, "width": 10**9}},
    {"do_pad": True, "pad_size": {"height": 10**9, "width": 10**9}},
]


@pytest.mark.parametrize(
    "change", BAD_PROCESSORS, ids=lambda change: escape_unprintable(str(next(iter(change.items()))))
)
def test_image_settings_that_cannot_be_are_refused(change, good, model, capsys):
    change_json(model / "preprocessor_config.json", **change)
    with pytest.raises(
        InputError, match=r"preprocessor_config\.json: |image processor: expected pictures of \(16, 16\)"
    ):
        load_fitting_preprocessor(model)


def test_image_settings_set_nothing_but_numbers(model):
    change_json(model / "preprocessor_config.json", preprocess=3, device="cuda", data_format="channels_last")
    pixels = load_fitting_preprocessor(model)(Image.new("RGB", (9, 9), "white"))
    assert pixels.shape == (16, 16, 3) and (pixels == 255).all()


@pytest.mark.parametrize("command", ["predict", "attention", "evaluate", "convert", "finetune"])
@pytest.mark.parametrize("fault", ["layers", "code", "header", "json"])
def test_every_command_refuses_a_bad_checkpoint_and_writes_nothing(command, fault, model, tmp_path, capsys):
    if fault == "layers":
        change_json(model / "config.json", num_hidden_layers=10**6)
    elif fault == "code":
        (model / "model.safetensors").unlink()
        torch.save({"a": RunsCode()}, model / "pytorch_model.bin")
    elif fault == "header":
        (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    else:
        (model / "config.json").write_text("[" * 10**5)
    make_folder(tmp_path / "pictures", per_class=2)
    image = str(tmp_path / "pictures" / "healthy" / "0.png")
    commands = {
        "predict": ["predict", str(model), image, "--device", "cpu"],
        "attention": ["attention", str(model), image, "-o", "out", "--device", "cpu"],
        "evaluate": ["evaluate", str(model), "--data-dir", "pictures", "--device", "cpu"],
        "convert": ["convert", str(model), "out"],
        "finetune": ["finetune", "--model", str(model), "--data-dir", "pictures", "--output-dir", "out", *SHORT],
    }
    assert cli.main(commands[command]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "pictures"}


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run that is gone on with
# ---------------------------------------------------------------------------------------------------------------------


def trainer_state(**values) -> Callable[[Path], None]:
    return lambda path: change_json(path, **values)


RUN_FAULTS = {
    "code in optimizer.pt": ("optimizer.pt", lambda path: torch.save({"a": RunsCode()}, path)),
    "code in scheduler.pt": ("scheduler.pt", lambda path: torch.save({"a": RunsCode()}, path)),
    "code in rng_state.pth": ("rng_state.pth", lambda path: path.write_bytes(pickle.dumps(RunsCode()))),
    "another optimizer": ("optimizer.pt", lambda path: torch.save({"state": {}, "param_groups": []}, path)),
    "cut-off optimizer": ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:999])),
    "cut-off weights": ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:999])),
    "weights of another model": ("model.safetensors", lambda path: save_file({TOKEN: torch.zeros(1, 1, 8)}, path)),
    "deep state": ("trainer_state.json", lambda path: path.write_text("[" * 10**5)),
    "step that is no number": ("trainer_state.json", trainer_state(global_step="two")),
    "negative step": ("trainer_state.json", trainer_state(global_step=-5)),
    "epoch that is none": ("trainer_state.json", trainer_state(epoch=NAN)),
    "unknown state": ("trainer_state.json", trainer_state(surprise=1)),
    "code in a shard's metadata": (".metadata", lambda path: path.write_bytes(pickle.dumps(RunsCode()))),
}


@pytest.mark.parametrize("kind", RUN_FAULTS)
def test_a_run_is_not_gone_on_with_from_a_bad_checkpoint(kind, finished_run, tmp_path, capsys):
    shutil.copytree(finished_run / "out", tmp_path / "out")
    name, spoil = RUN_FAULTS[kind]
    spoil(tmp_path / "out" / "checkpoint-2" / name)
    options = ["--data-dir", str(finished_run / "pictures"), "--output-dir", "out", "--skip-bad-images", *TINY]
    assert main([*options, "--max-steps", "3", "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "checkpoint-2" in line and "weights_only" not in line
    assert not Path("ran").exists()
    assert not (tmp_path / "out" / "checkpoint-3").exists()


def test_training_args_are_never_unpickled(finished_run, tmp_path):
    shutil.copytree(finished_run / "out", tmp_path / "out")
    for path in (tmp_path / "out").rglob("training_args.bin"):
        path.write_bytes(pickle.dumps(RunsCode()))
    options = ["--data-dir", str(finished_run / "pictures"), "--output-dir", "out", "--skip-bad-images", *TINY]
    assert main([*options, "--max-steps", "3", "--resume"]) == 0
    assert not Path("ran").exists() and (tmp_path / "out" / "checkpoint-3").exists()


def test_a_shards_metadata_as_pytorch_writes_it_is_accepted(tmp_path):
    import torch.distributed.checkpoint as sharded

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        sharded.save({"a": torch.zeros(3), "b": {"c": 1}}, checkpoint_id=tmp_path / "shards", no_dist=True)
    check_shard_metadata(tmp_path)
    # `os` stands in the module whose classes are allowed.
    path = tmp_path / "shards" / ".metadata"
    path.write_bytes(b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93\x8c\x03ran\x85R.")
    with pytest.raises(InputError, match=r"\.metadata: expected parts of a sharded checkpoint alone"):
        check_shard_metadata(tmp_path)
    assert not Path("ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzing: valid files, changed at random
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [
    *BAD_SIZES[:2],
    0,
    -1,
    1,
    2**31,
    2**63,
    0.5,
    NAN,
    1e308,
    "",
    "32",
    "../x",
    True,
    None,
    [],
    [1],
    {},
    {"a": [{}]},
]

place = st.integers(0, 2**32 - 1)  # taken modulo the length of the file
order = st.sampled_from(["little", "big"])
mutation = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(0, 7)),
    st.tuples(st.just("byte"), place, st.integers(0, 255)),
    st.tuples(st.just("cut"), place, st.just(0)),
    st.tuples(st.just("drop"), place, st.integers(1, 64)),
    st.tuples(st.just("repeat"), place, st.integers(1, 64)),
    st.tuples(st.just("move"), place, place),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=16)),
    st.tuples(
        st.just("length"), place, st.tuples(st.sampled_from(LENGTHS), st.sampled_from(["little", "big"]), st.booleans())
    ),
)
mutations = st.lists(mutation, min_size=1, max_size=6)


def mutated(data: bytes, changes: list[tuple]) -> bytes:
    for kind, where, what in changes:
        at = where % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :]
        elif kind == "byte":
            data = data[:at] + bytes([what]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + what :]
        elif kind == "repeat":
            data = data[:at] + data[at : at + what] * 2 + data[at + what :]
        elif kind == "move":
            data = data[:at] + data[what % (len(data) + 1) :][:64] + data[at:]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "length":
            value, order, is_long = what
            size = 8 if is_long else 4
            data = data[:at] + (value % 256**size).to_bytes(size, order) + data[at + size :]
    return data


def with_right_sums(data: bytes) -> bytes:
    """A PNG whose checksums fit its chunks again, so that what is in them is looked at."""
    at, out = 8, data[:8]
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        content = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + content + struct.pack(">I", zlib.crc32(content))
        at += 12 + length
    return out + data[at:]


json_changes = st.lists(st.tuples(place, st.sampled_from(VALUES)), min_size=1, max_size=3)


def replace_values(content: dict, changes: list[tuple[int, object]]) -> None:
    """Replace values in a JSON object, on whatever level they stand."""
    for where, value in changes:
        places: list[tuple] = []
        waiting: list = [content]
        while waiting:
            node = waiting.pop()
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    waiting.append(node[key])
        node, key = places[where % len(places)]
        node[key] = copy.deepcopy(value)


CASES = 25  # in one child, and in one example


def fuzzing(examples: int):
    """A fuzz test of `examples` times 25 cases, the same ones every time; by hand, of other ones and more."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        phases=[
            Phase.generate
        ],  # to make a list of cases smaller would take longer than to look at the one that failed
        suppress_health_check=list(HealthCheck),
    )


def cases(**fields):
    return st.lists(st.fixed_dictionaries(fields), min_size=CASES, max_size=CASES)


@pytest.fixture(scope="module")
def encoded_images() -> list[bytes]:
    """A valid file of each format and of the modes that are decoded in another way."""
    leaf = leaves.draw_leaf("bean_rust", seed=1, size=40)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    frames = {"save_all": True, "append_images": [Image.new("RGB", (40, 40), "red")]}
    found = [
        encoded(leaf, "JPEG", exif=exif),
        encoded(leaf, "JPEG", progressive=True),
        encoded(leaf.convert("CMYK"), "JPEG"),
        encoded(leaf, "PNG", exif=exif),
        encoded(leaf.quantize(16), "PNG", transparency=3),
        encoded(leaf.convert("RGBA"), "PNG", **frames),
        encoded(Image.fromarray(RAMP), "PNG"),
        encoded(leaf, "GIF", **frames),
        encoded(leaf.quantize(16), "BMP"),
        encoded(leaf, "PPM"),
        *(encoded(leaf, "TIFF", compression=name) for name in (None, "tiff_lzw", "jpeg", "tiff_deflate")),
        encoded(leaf.convert("1"), "TIFF", compression="group4"),
        encoded(Image.fromarray(RAMP), "TIFF"),
    ]
    optional = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
    for format, feature in optional.items():
        if features.check(feature):
            found.append(encoded(leaf, format))
    if features.check("webp"):
        found.append(encoded(leaf, "WEBP", lossless=True, **frames))
    return found


def check_decoding(data: bytes) -> None:
    image = decode_image(data)
    assert image.mode == "RGB" and min(image.size) > 0


def test_fuzzed_images_are_decoded_or_refused(encoded_images):
    @fuzzing(8)
    @given(drawn=cases(which=place, changes=mutations, sums=st.booleans()))
    def check(drawn):
        changed = []
        for case in drawn:
            data = mutated(encoded_images[case["which"] % len(encoded_images)], case["changes"])
            changed.append(with_right_sums(data) if case["sums"] and data.startswith(b"\x89PNG") else data)
        assert_civil([partial(check_decoding, data) for data in changed])

    check()


@pytest.fixture(scope="module")
def checkpoints(good, tmp_path_factory) -> dict[str, bytes]:
    """The files of a valid checkpoint in every format."""
    root = tmp_path_factory.mktemp("formats")
    convert(good, root / "timm.safetensors")
    convert(good, root / "google.npz")
    tensors = load_file(good / "model.safetensors")
    torch.save(tensors, root / "hub.bin")
    torch.save(tensors, root / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(load_file(root / "timm.safetensors"), root / "timm.pth")
    return {path.name: path.read_bytes() for path in root.iterdir()} | {
        name: (good / name).read_bytes() for name in ("config.json", "model.safetensors", "preprocessor_config.json")
    }


HUB_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "hub.bin", "legacy.bin")


def check_loading(folder: Path) -> None:
    """All that reads a Hugging Face folder; what it does not refuse computes."""
    try:
        loaded = load(folder)
    except RuntimeError as error:  # a head of another shape is transformers' to report, which can ignore it
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(str(error)) from error
        raise
    preprocessor = load_preprocessor(str(folder))
    check_compatibility(loaded, preprocessor)
    pixels = torch.from_numpy(preprocessor(Image.new("RGB", (9, 9))).copy())[None]
    assert loaded(pixels).logits.shape == (1, loaded.num_labels)


def check_converting(source: Path, scratch: Path) -> None:
    """A conversion that is refused leaves nothing; one that is not leaves a checkpoint that can be read."""
    scratch.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            convert(source, scratch / "out", num_heads=2)
        read_checkpoint(scratch / "out")
        expected = {"out"}
    except InputError:
        expected = set()
        raise
    finally:
        assert {path.name for path in scratch.iterdir()} == expected, list(scratch.iterdir())


def check_folder_of(folder: Path, files: dict[str, bytes]) -> None:
    """Loading and converting a checkpoint of these files: each is done or refused, and neither leaves anything."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    for name, data in files.items():
        (folder / "model" / ("pytorch_model.bin" if name.endswith(".bin") else name)).write_bytes(data)
    refusals = []
    for use in (check_loading, partial(check_converting, scratch=folder / "scratch")):
        try:
            use(folder / "model")
        except InputError as error:
            refusals.append(error)
    assert {path.name for path in folder.iterdir()} == {"model", "scratch"}
    if refusals:
        raise refusals[0]


def test_fuzzed_checkpoints_are_loaded_or_refused(checkpoints, tmp_path):
    @fuzzing(2)
    @given(drawn=cases(name=st.sampled_from(HUB_FILES), changes=mutations))
    def check(drawn):
        actions = []
        for case in drawn:
            name = case["name"]
            weights = name if name.endswith((".bin", ".safetensors")) else "model.safetensors"
            files = {kept: checkpoints[kept] for kept in ("config.json", "preprocessor_config.json", weights)}
            files[name] = mutated(checkpoints[name], case["changes"])
            actions.append(partial(check_folder_of, tmp_path / "case", files))
        assert_civil(actions)

    check()


def test_fuzzed_settings_and_headers_are_loaded_or_refused(checkpoints, tmp_path):
    @fuzzing(2)
    @given(drawn=cases(name=st.sampled_from(HUB_FILES[:3]), changes=json_changes))
    def check(drawn):
        actions = []
        for case in drawn:
            name, edit = case["name"], partial(replace_values, changes=case["changes"])
            files = {kept: checkpoints[kept] for kept in HUB_FILES[:3]}
            if name == "model.safetensors":
                files[name] = edited_header(files[name], edit)
            else:
                content = json.loads(files[name])
                edit(content)
                files[name] = json.dumps(content).encode()
            actions.append(partial(check_folder_of, tmp_path / "case", files))
        assert_civil(actions)

    check()


def check_file(folder: Path, name: str, data: bytes) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(data)
    check_converting(folder / name, folder / "scratch")


def test_fuzzed_foreign_files_are_converted_or_refused(checkpoints, tmp_path):
    @fuzzing(2)
    @given(drawn=cases(name=st.sampled_from(["timm.safetensors", "google.npz", "timm.pth"]), changes=mutations))
    def check(drawn):
        files = [(case["name"], mutated(checkpoints[case["name"]], case["changes"])) for case in drawn]
        assert_civil([partial(check_file, tmp_path / "case", *file) for file in files])

    check()
