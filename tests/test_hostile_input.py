"""Images, folders and runs that are broken or malicious: refused with one clear message, and nothing is written."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import shutil
import warnings
from functools import partial
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file

from fastvit import cli
from fastvit.checkpoints.inspection import check_shard_metadata
from fastvit.data import leaves
from fastvit.data.datasets import load_images
from fastvit.data.images import decode_image
from fastvit.errors import InputError, escape_unprintable
from fastvit.train.finetune import main

pytestmark = [
    hostile.LINUX,
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF"),
]

TINY = ["--from-scratch", "micro", "--image-size", "16", "--patch-size", "8", *hostile.SHORT]

# --- images ----------------------------------------------------------------------------------------------------------

RAMP = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16)  # 16 bits per pixel, each upper byte once
GREY_16_BITS = {
    "png": hostile.encode(Image.fromarray(RAMP), "PNG"),
    "tiff": hostile.encode(Image.fromarray(RAMP), "TIFF"),
    "big-endian tiff": hostile.encode(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
    "pgm": b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("data", GREY_16_BITS.values(), ids=GREY_16_BITS)
def test_16_bit_grey_retains_its_upper_byte(data):
    pixels = np.asarray(decode_image(data))
    assert np.array_equal(pixels, np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_16_bit_colour_and_16_bit_grey_are_scaled_alike():
    colour = b"P6 16 16 65535\n" + np.repeat(RAMP[..., None], 3, axis=2).astype(">u2").tobytes()
    difference = np.asarray(decode_image(colour)).astype(int) - np.asarray(decode_image(GREY_16_BITS["pgm"]))
    assert np.abs(difference).max() <= 1  # Pillow rounds the colours of a PPM


WHITE = (255, 255, 255)
PALETTE = Image.new("P", (4, 4), 0)
PALETTE.putpalette([9, 9, 9, 200, 0, 0])
PALETTE.putpixel((0, 0), 1)


MODES = {
    "palette with a transparent colour": (PALETTE, "PNG", {"transparency": 0}, (200, 0, 0), WHITE),
    "palette with alpha": (PALETTE, "PNG", {"transparency": b"\0\xff"}, (200, 0, 0), WHITE),
    "palette": (PALETTE, "PNG", {}, (200, 0, 0), (9, 9, 9)),
    "transparent red": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG", {}, WHITE, WHITE),
    "half transparent": (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG", {}, (127, 127, 127), (127, 127, 127)),
    "grey with alpha": (Image.new("LA", (4, 4), (0, 0)), "PNG", {}, WHITE, WHITE),
    "transparent colour": (Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, WHITE, WHITE),
    "cmyk": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", {}, (255, 0, 0), (255, 0, 0)),
    "grey": (Image.new("L", (8, 8), 70), "JPEG", {}, (70, 70, 70), (70, 70, 70)),
    "one bit": (Image.new("1", (8, 8), 1), "PNG", {}, WHITE, WHITE),
    "1x1": (Image.new("RGB", (1, 1), (7, 8, 9)), "PNG", {}, (7, 8, 9), (7, 8, 9)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_on_white(mode, tmp_path):
    image, format, options, corner, centre = MODES[mode]
    (tmp_path / "a.png").write_bytes(hostile.encode(image, format, **options))
    decoded = decode_image(tmp_path / "a.png")
    assert decoded.mode == "RGB" and decoded.size == image.size
    found = [decoded.getpixel((0, 0)), decoded.getpixel((image.width // 2, image.height // 2))]
    assert np.abs(np.subtract(found, [corner, centre])).max() <= (format == "JPEG")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_decoded(format):
    if format in ("WEBP", "AVIF") and not features.check(format.lower()):
        pytest.skip(f"this Pillow has no {format}")
    red, *others = (Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue"))
    pixel = decode_image(hostile.encode(red, format, save_all=True, append_images=others)).getpixel((8, 8))
    assert np.abs(np.subtract(pixel, (255, 0, 0))).max() < 5


TRANSPOSE = Image.Transpose
STORED_TRANSPOSES = {  # EXIF orientation -> how a camera held that way stores an upright image
    1: None, 2: TRANSPOSE.FLIP_LEFT_RIGHT, 3: TRANSPOSE.ROTATE_180, 4: TRANSPOSE.FLIP_TOP_BOTTOM,
    5: TRANSPOSE.TRANSPOSE, 6: TRANSPOSE.ROTATE_90, 7: TRANSPOSE.TRANSVERSE, 8: TRANSPOSE.ROTATE_270,
}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED_TRANSPOSES)
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray((np.arange(6 * 4 * 3) * 3).astype(np.uint8).reshape(6, 4, 3))
    transpose, exif = STORED_TRANSPOSES[orientation], Image.Exif()
    exif[0x0112] = orientation
    stored = upright if transpose is None else upright.transpose(transpose)
    assert np.array_equal(decode_image(hostile.encode(stored, "PNG", exif=exif)), upright)


@pytest.mark.parametrize(
    "exif", [b"II*\0garbage", b"\xff" * 40, b"MM\0*\xff\xff\xff\xff"], ids=["text", "ff", "offset"]
)
def test_broken_exif_is_ignored(exif):
    image = Image.new("RGB", (8, 4), (200, 30, 40))
    assert decode_image(hostile.encode(image, "JPEG", exif=b"Exif\0\0" + exif)).size == (8, 4)


NO_IMAGES = {
    "zero bytes": (b"", "expected an image, found a file in none of these formats"),
    "text": (b"just words, whatever the name says", "expected an image, found a file in none of these formats"),
    "eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "expected an image, found",
    ),  # Ghostscript
    "truncated png": (hostile.encode_leaf("PNG")[:500], "cannot be decoded"),
    "truncated jpeg": (hostile.encode_leaf("JPEG")[:500], "cannot be decoded"),
    "no width": (hostile.encode_hollow_png(0, 10), "expected an image"),
    "no pixels": (hostile.encode_hollow_png(10, 10), "cannot be decoded"),
    "int32": (hostile.encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "expected 8 or 16 bits .*, found 32"),
    "float32": (hostile.encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "expected 8 or 16 bits .*, found 32"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_a_file_that_cannot_be_decoded_is_refused_by_name(kind, tmp_path):
    data, message = NO_IMAGES[kind]
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.png: {message}"):
        decode_image(tmp_path / "a.png")


def test_a_decompression_bomb_is_refused_before_memory_is_allocated(tmp_path):
    (tmp_path / "bomb.png").write_bytes(hostile.encode_hollow_png(30_000, 30_000))  # 2,700 MB of pixels
    (report,) = hostile.run_limited([lambda: decode_image(tmp_path / "bomb.png")], memory=100 * 2**20)
    assert re.fullmatch(r"refused: .*bomb\.png: expected an image of at most 178,956,970 pixels, .*", report)


def test_a_png_called_jpg_is_decoded():
    assert decode_image(hostile.encode(Image.new("RGB", (3, 2)), "PNG"), "a.jpg").size == (3, 2)


# --- folders ---------------------------------------------------------------------------------------------------------


def count_images(root: Path) -> dict[str, int]:
    """The number of training images of each class."""
    images = load_images(data_dir=root, validation_fraction=0)
    return dict(zip(images.class_names, images.count_labels()["train"].tolist(), strict=True))


FILE_NAMES = ["a\nb.png", "글자.png", "[1]*?.png", "a::b.png", "a\\b.png", "a#b%20c.png", "-x.png", "train.png",
              "test_1.JPG", b"not \xff\xfe text.png"]  # fmt: skip


def test_file_names_do_not_matter(tmp_path):
    root = hostile.make_image_folder(tmp_path / "[images]::*\n1")
    image = (root / "healthy" / "0.png").read_bytes()
    for name in FILE_NAMES:
        (root / "healthy" / os.fsdecode(name)).write_bytes(image)
    images = load_images(data_dir=root, validation_fraction=0)
    assert images.count_labels()["train"].tolist() == [4, 4, 4 + len(FILE_NAMES)]
    for index in range(len(images.splits["train"])):
        assert images.splits["train"].load(index).size == (24, 24)


@pytest.mark.parametrize("name", ["train", "test", "val", "[c]*", "a::b", "글자"])
def test_class_names_do_not_matter(name, tmp_path):
    root = hostile.make_image_folder(tmp_path / "images")
    (root / "healthy").rename(root / name)
    assert count_images(root) == {"angular_leaf_spot": 4, "bean_rust": 4, name: 4}


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\x1b[2J", b"two\nlines"])
def test_class_names_that_cannot_be_printed_are_refused(name, tmp_path):
    root = hostile.make_image_folder(tmp_path / "images")
    (root / "healthy").rename(root / os.fsdecode(name))
    with pytest.raises(InputError, match="expected a printable class name, found") as refused:
        count_images(root)
    assert str(refused.value).isprintable()


def test_links_in_circles_are_followed_once(tmp_path):
    root = hostile.make_image_folder(tmp_path / "images")
    (root / "healthy" / "up").symlink_to("..")
    (root / "healthy" / "self").symlink_to(".")
    (root / "again").symlink_to(root)
    (root / "healthy" / "circle.d").symlink_to("circle.d")
    for name in "abcdefgh":  # 8 folders with a link to each of them: paths without end
        (tmp_path / "web" / name).mkdir(parents=True)
        for other in "abcdefgh":
            (tmp_path / "web" / name / other).symlink_to(tmp_path / "web" / other)
    (root / "healthy" / "web").symlink_to(tmp_path / "web")
    assert count_images(root) == {"angular_leaf_spot": 4, "bean_rust": 4, "healthy": 4}


def test_a_class_may_be_a_link_and_have_folders(tmp_path):
    root = hostile.make_image_folder(tmp_path / "images")
    (root / "healthy").rename(tmp_path / "elsewhere")
    (root / "healthy").symlink_to(tmp_path / "elsewhere")
    (root / "bean_rust" / "2019").mkdir()
    (root / "bean_rust" / "0.png").rename(root / "bean_rust" / "2019" / "0.png")
    assert count_images(root) == {"angular_leaf_spot": 4, "bean_rust": 4, "healthy": 4}


def test_splits_are_found_and_images_beside_them_are_refused(tmp_path):
    root = tmp_path / "images"
    for split in ("Train", "val", "test"):
        hostile.make_image_folder(root / split)
    images = load_images(data_dir=root)
    assert {name: len(split) for name, split in images.splits.items()} == {"train": 12, "validation": 12, "test": 12}
    shutil.copytree(root / "test", root / "more")
    with pytest.raises(InputError, match=r"expected every image in the folder of a class, found .*/more/.* outside"):
        load_images(data_dir=root)
    shutil.move(root / "more", root / "validation")
    with pytest.raises(InputError, match="expected one folder for the split 'validation', found another"):
        load_images(data_dir=root)


# --- bad images in a folder, with every command ----------------------------------------------------------------------

BAD_IMAGES = {
    "broken link": lambda path: path.symlink_to("nowhere.png"),
    "circle": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "zero bytes": Path.touch,
    "text": lambda path: path.write_text("hello"),
    "truncated": lambda path: path.write_bytes(hostile.encode_leaf("PNG")[:500]),
    "bomb": lambda path: path.write_bytes(hostile.encode_hollow_png(30_000, 30_000)),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_stops_a_run_before_anything_is_written(kind, tmp_path, capsys):
    root = hostile.make_image_folder(tmp_path / "images")
    BAD_IMAGES[kind](root / "healthy" / "00\nbad.png")
    assert main(["--data-dir", str(root), "--output-dir", "out", *TINY]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "00\\nbad.png: " in line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with --skip-bad-images over a folder where every kind of bad image comes first in its class."""
    root = tmp_path_factory.mktemp("run")
    hostile.make_image_folder(root / "images", per_class=6)
    for number, make in enumerate(BAD_IMAGES.values()):
        make(root / "images" / "healthy" / f"!{number}.png")
    options = ["--data-dir", str(root / "images"), "--output-dir", str(root / "out"), "--skip-bad-images"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main([*options, *TINY]) == 0
    (root / "printed.txt").write_text(output.getvalue())
    return root


def test_finetune_leaves_out_and_counts_bad_images_on_request(finished_run):
    printed = (finished_run / "printed.txt").read_text()
    assert len(re.findall(r"^  /", printed, re.MULTILINE)) == len(BAD_IMAGES) and " skipped:" in printed
    assert (finished_run / "out" / "examples.png").is_file()


def test_predict_labels_the_good_images_and_names_the_bad_ones(finished_run, tmp_path, capsys):
    leaves.draw_leaf("healthy", seed=1, size=24).save(tmp_path / "good\n1.png")
    (tmp_path / "bad.png").write_bytes(b"")
    command = ["predict", str(finished_run / "out"), "bad.png", "good\n1.png", "missing.png", "--device", "cpu"]
    assert cli.main([*command, "--top", "1"]) == 2
    printed, errors = (text.splitlines() for text in capsys.readouterr())
    assert printed[0] == "good\\n1.png" and len(printed) == 2
    assert "bad.png: expected an image, found" in errors[-2] and "missing.png: no such file" in errors[-1]
    assert cli.main([*command, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["image"] == "good\n1.png"


def test_evaluate_leaves_out_bad_images_on_request(finished_run, capsys):
    command = ["evaluate", str(finished_run / "out"), "--data-dir", str(finished_run / "images"), "--device", "cpu"]
    assert cli.main(command) == 2
    assert "!0.png: " in capsys.readouterr().err.splitlines()[-1]
    assert cli.main([*command, "--skip-bad-images"]) == 0
    assert re.search(rf"on 18 \w+, {len(BAD_IMAGES)} skipped", capsys.readouterr().out)
    assert cli.main([*command, "--skip-bad-images", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["skipped"] == len(BAD_IMAGES) and np.sum(found["confusion"]) == 18


def test_unprintable_characters_are_escaped():
    assert escape_unprintable("a\nb\x1b[2J\udcff글자 é") == "a\\nb\\x1b[2J\\udcff글자 é"


# --- a checkpoint of a run that is resumed ---------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:999])


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(hostile.RunsCode()))


RUN_FAULTS = {
    "code in optimizer.pt": ("optimizer.pt", lambda path: torch.save({"a": hostile.RunsCode()}, path)),
    "code in scheduler.pt": ("scheduler.pt", lambda path: torch.save({"a": hostile.RunsCode()}, path)),
    "code in rng_state.pth": ("rng_state.pth", write_pickle),
    "another optimizer": ("optimizer.pt", lambda path: torch.save({"state": {}, "param_groups": []}, path)),
    "truncated optimizer": ("optimizer.pt", truncate),
    "truncated weights": ("model.safetensors", truncate),
    "weights of another model": (
        "model.safetensors",
        lambda path: save_file({hostile.TOKEN: torch.zeros(1, 1, 8)}, path),
    ),
    "nested state": ("trainer_state.json", lambda path: path.write_text("[" * 10**5)),
    "step that is no number": ("trainer_state.json", partial(hostile.change_json, global_step="two")),
    "negative step": ("trainer_state.json", partial(hostile.change_json, global_step=-5)),
    "epoch of NaN": ("trainer_state.json", partial(hostile.change_json, epoch=math.nan)),
    "unknown state": ("trainer_state.json", partial(hostile.change_json, surprise=1)),
    "code in the metadata of a shard": (".metadata", write_pickle),
}


def resume(finished_run: Path) -> int:
    options = ["--data-dir", str(finished_run / "images"), "--output-dir", "out", "--skip-bad-images", *TINY]
    return main([*options, "--max-steps", "3", "--resume"])


@pytest.mark.parametrize("kind", RUN_FAULTS)
def test_a_run_is_not_resumed_from_a_bad_checkpoint(kind, finished_run, tmp_path, capsys):
    shutil.copytree(finished_run / "out", tmp_path / "out")
    name, damage = RUN_FAULTS[kind]
    damage(tmp_path / "out" / "checkpoint-2" / name)
    assert resume(finished_run) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "checkpoint-2" in line and "weights_only" not in line
    assert not Path("ran").exists() and not (tmp_path / "out" / "checkpoint-3").exists()


def test_training_args_are_never_unpickled(finished_run, tmp_path):
    shutil.copytree(finished_run / "out", tmp_path / "out")
    for path in (tmp_path / "out").rglob("training_args.bin"):
        write_pickle(path)
    assert resume(finished_run) == 0
    assert not Path("ran").exists() and (tmp_path / "out" / "checkpoint-3").exists()


def test_metadata_of_shards_written_by_pytorch_is_accepted_and_code_in_it_refused(tmp_path):
    import torch.distributed.checkpoint as sharded

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a single process
        sharded.save({"a": torch.zeros(3), "b": {"c": 1}}, checkpoint_id=tmp_path / "shards", no_dist=True)
    check_shard_metadata(tmp_path)
    # The pickle calls os.mkdir by way of `os` in the module whose classes are allowed.
    path = tmp_path / "shards" / ".metadata"
    path.write_bytes(b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93\x8c\x03ran\x85R.")
    with pytest.raises(InputError, match=r"\.metadata: expected only parts of a sharded checkpoint"):
        check_shard_metadata(tmp_path)
    assert not Path("ran").exists()
