"""Images, folders and runs that are broken or malicious: refused with one clear message, and nothing is written."""

from __future__ import annotations

import contextlib
import json
import math
import os
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
    *hostile.MARKS,
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF"),
]

RAMP = np.arange(0, 2**16, 2**8, dtype=np.uint16).reshape(16, 16)  # 16 bits per pixel, each upper byte once
RGB_RAMP = np.repeat(RAMP[..., None], 3, axis=2)
SIXTEEN_BITS = {
    "png": hostile.encode(Image.fromarray(RAMP), "PNG"),
    "tiff": hostile.encode(Image.fromarray(RAMP), "TIFF"),
    "big-endian tiff": hostile.encode(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
    "pgm": b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes(),
    "colour ppm": b"P6 16 16 65535\n" + RGB_RAMP.astype(">u2").tobytes(),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_16_bits_retain_their_upper_byte(kind):
    pixels = np.asarray(decode_image(SIXTEEN_BITS[kind])).astype(int)
    assert pixels.shape == RGB_RAMP.shape
    assert np.abs(pixels - (RGB_RAMP >> 8)).max() <= (kind == "colour ppm")  # Pillow rounds the colours of a PPM


WHITE, RED = (255, 255, 255), (255, 0, 0)
PALETTE = Image.new("P", (4, 4), 0)
PALETTE.putpalette([9, 9, 9, 200, 0, 0])
PALETTE.putpixel((0, 0), 1)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), colour) for colour in ("lime", "blue")]}
MODES = {  # image, format, options, colour of the corner, colour of the centre
    "palette with a transparent colour": (PALETTE, "PNG", {"transparency": 0}, (200, 0, 0), WHITE),
    "palette with alpha": (PALETTE, "PNG", {"transparency": b"\0\xff"}, (200, 0, 0), WHITE),
    "palette": (PALETTE, "PNG", {}, (200, 0, 0), (9, 9, 9)),
    "transparent red": (Image.new("RGBA", (4, 4), (*RED, 0)), "PNG", {}, WHITE, WHITE),
    "half transparent": (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG", {}, (127, 127, 127), (127, 127, 127)),
    "grey with alpha": (Image.new("LA", (4, 4), (0, 0)), "PNG", {}, WHITE, WHITE),
    "transparent colour": (Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, WHITE, WHITE),
    "cmyk": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", {}, RED, RED),
    "grey": (Image.new("L", (8, 8), 70), "JPEG", {}, (70, 70, 70), (70, 70, 70)),
    "one bit": (Image.new("1", (8, 8), 1), "PNG", {}, WHITE, WHITE),
    "1x1": (Image.new("RGB", (1, 1), (7, 8, 9)), "PNG", {}, (7, 8, 9), (7, 8, 9)),
    "3x2": (Image.new("RGB", (3, 2)), "PNG", {}, (0, 0, 0), (0, 0, 0)),
    **{f"first frame of {format}": (Image.new("RGB", (16, 16), RED), format, FRAMES, RED, RED)
       for format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF")},
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_on_white_whatever_the_name(mode, tmp_path):
    image, format, options, corner, centre = MODES[mode]
    if format in ("WEBP", "AVIF") and not features.check(format.lower()):
        pytest.skip(f"this Pillow has no {format}")
    (tmp_path / "a.png").write_bytes(data := hostile.encode(image, format, **options))
    decoded = decode_image(tmp_path / "a.png")
    assert decoded.mode == "RGB" and decoded.size == image.size and decoded == decode_image(data, "a.jpg")
    found = [decoded.getpixel((0, 0)), decoded.getpixel((image.width // 2, image.height // 2))]
    assert np.abs(np.subtract(found, [corner, centre])).max() <= {"JPEG": 1, "WEBP": 4, "AVIF": 4}.get(format, 0)


# How a camera stores an upright image, by its EXIF orientation.
TRANSPOSES = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE",
              "ROTATE_270"]  # fmt: skip


@pytest.mark.parametrize(("orientation", "transpose"), [*enumerate(TRANSPOSES, start=1)])
def test_exif_orientation_is_applied(orientation, transpose):
    upright, exif = Image.fromarray((np.arange(6 * 4 * 3) * 3).astype(np.uint8).reshape(6, 4, 3)), Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(Image.Transpose[transpose]) if transpose else upright
    assert np.array_equal(decode_image(hostile.encode(stored, "PNG", exif=exif)), upright)


@pytest.mark.parametrize("exif", [b"II*\0garbage", b"\xff" * 40, b"MM\0*\xff\xff\xff\xff"])
def test_broken_exif_is_ignored(exif):
    image = Image.new("RGB", (8, 4), (200, 30, 40))
    assert decode_image(hostile.encode(image, "JPEG", exif=b"Exif\0\0" + exif)).size == (8, 4)


NO_IMAGES = {  # Pillow would start Ghostscript for an EPS
    "zero bytes": (b"", "expected an image, found a file in none of these formats"),
    "text": (b"just words, whatever the name says", "expected an image, found a file in none of these formats"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "expected an image, found"),
    "truncated png": (hostile.encode_leaf("PNG")[:500], "cannot be decoded"),
    "truncated jpeg": (hostile.encode_leaf("JPEG")[:500], "cannot be decoded"),
    "no width": (hostile.encode_hollow_png(0, 10), "expected an image"),
    "no pixels": (hostile.encode_hollow_png(10, 10), "cannot be decoded"),
    "bomb": (hostile.encode_hollow_png(30_000, 30_000), "expected an image of at most 178,956,970 pixels, "),
    "int32": (hostile.encode(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "expected 8 or 16 bits .*, found 32"),
    "float32": (hostile.encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "expected 8 or 16 bits .*, found 32"),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_a_file_that_cannot_be_decoded_is_refused_by_name_in_little_memory(kind, tmp_path):
    data, message = NO_IMAGES[kind]
    (tmp_path / "a.png").write_bytes(data)
    (report,) = hostile.run_limited([lambda: decode_image(tmp_path / "a.png")], memory=100 * 2**20)
    assert re.fullmatch(rf"refused: .*a\.png: {message}.*", report)


@pytest.fixture
def images(tmp_path) -> Path:
    return hostile.make_image_folder(tmp_path / "images")


def count_images(root: Path) -> dict[str, int]:
    """The number of training images of each class."""
    images = load_images(data_dir=root, validation_fraction=0)
    return dict(zip(images.class_names, images.count_labels()["train"].tolist(), strict=True))


FILE_NAMES = ["a\nb.png", "글자.png", "[1]*?.png", "a::b.png", "a\\b.png", "a#b%20c.png", "-x.png", "train.png",
              "test_1.JPG", b"not \xff\xfe text.png"]  # fmt: skip


def test_file_names_do_not_matter(images):
    root = images.rename("[images]::*\n1")
    for name in FILE_NAMES:
        shutil.copy(root / "healthy" / "0.png", root / "healthy" / os.fsdecode(name))
    found = load_images(data_dir=root, validation_fraction=0)
    assert found.count_labels()["train"].tolist() == [4, 4, 4 + len(FILE_NAMES)]
    for index in range(len(found.splits["train"])):
        assert found.splits["train"].load(index).size == (24, 24)


@pytest.mark.parametrize("name", ["train", "test", "val", "[c]*", "a::b", "글자"])
def test_class_names_do_not_matter(name, images):
    (images / "healthy").rename(images / name)
    assert count_images(images) == {"angular_leaf_spot": 4, "bean_rust": 4, name: 4}


@pytest.mark.parametrize("name", [b"\xff\xfe", b"\x1b[2J", b"two\nlines"])
def test_class_names_that_cannot_be_printed_are_refused(name, images):
    (images / "healthy").rename(images / os.fsdecode(name))
    with pytest.raises(InputError, match="expected a printable class name, found") as refused:
        count_images(images)
    assert str(refused.value).isprintable()


def add_circles(healthy: Path) -> None:
    for link, target in {"up": "..", "self": ".", "../again": healthy.parent, "circle.d": "circle.d"}.items():
        (healthy / link).symlink_to(target)
    web = healthy.parents[1] / "web"  # 8 folders with a link to each of them: paths without end
    for name in "abcdefgh":
        (web / name).mkdir(parents=True)
        for other in "abcdefgh":
            (web / name / other).symlink_to(web / other)
    (healthy / "web").symlink_to(web)


def link_class_and_nest_images(healthy: Path) -> None:
    healthy.symlink_to(healthy.rename(healthy.parents[1] / "elsewhere"))
    nested = healthy.with_name("bean_rust") / "2019"
    nested.mkdir()
    (nested.parent / "0.png").rename(nested / "0.png")


@pytest.mark.parametrize("change", [add_circles, link_class_and_nest_images])
def test_links_and_folders_in_classes_are_followed_once(change, images):
    change(images / "healthy")
    assert count_images(images) == {"angular_leaf_spot": 4, "bean_rust": 4, "healthy": 4}


def test_splits_are_found_and_images_beside_them_are_refused(tmp_path):
    root = tmp_path / "images"
    for split in ("Train", "val", "test"):
        hostile.make_image_folder(root / split)
    splits = load_images(data_dir=root).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "validation": 12, "test": 12}
    shutil.copytree(root / "test", root / "more")
    with pytest.raises(InputError, match=r"expected every image in the folder of a class, found .*/more/.* outside"):
        load_images(data_dir=root)
    shutil.move(root / "more", root / "validation")
    with pytest.raises(InputError, match="expected one folder for the split 'validation', found another"):
        load_images(data_dir=root)


BAD_IMAGES = {
    "broken link": lambda path: path.symlink_to("nowhere.png"),
    "circle": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    **{kind: partial(Path.write_bytes, data=NO_IMAGES[kind][0])
       for kind in ("zero bytes", "text", "truncated png", "bomb")},
}  # fmt: skip


def finetune(images: Path, *options: str, output: Path | str = "out") -> int:
    tiny = ["--from-scratch", "micro", "--image-size", "16", "--patch-size", "8", *hostile.SHORT]
    return main(["--data-dir", str(images), "--output-dir", str(output), *tiny, *options])


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_stops_a_run_before_anything_is_written(kind, images, capsys):
    BAD_IMAGES[kind](images / "healthy" / "00\nbad.png")
    assert finetune(images) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "00\\nbad.png: " in line
    assert not Path("out").exists()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A run with --skip-bad-images over a folder where every kind of bad image comes first in its class."""
    root = tmp_path_factory.mktemp("run")
    hostile.make_image_folder(root / "images", per_class=6)
    for number, make in enumerate(BAD_IMAGES.values()):
        make(root / "images" / "healthy" / f"!{number}.png")
    with (root / "printed.txt").open("w") as file, contextlib.redirect_stdout(file):
        assert finetune(root / "images", "--skip-bad-images", output=root / "out") == 0
    return root


def test_finetune_leaves_out_and_counts_bad_images_on_request(finished_run):
    printed = (finished_run / "printed.txt").read_text()
    assert len(re.findall(r"^  /", printed, re.MULTILINE)) == len(BAD_IMAGES) and " skipped:" in printed
    assert (finished_run / "out" / "examples.png").is_file()


def test_predict_labels_the_good_images_and_names_the_bad_ones(finished_run, capsys):
    leaves.draw_leaf("healthy", seed=1, size=24).save("good\n1.png")
    Path("bad.png").touch()
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


save_code = partial(torch.save, {"a": hostile.RunsCode()})
pickle_code = partial(hostile.save_pickle, hostile.RunsCode())
RUN_FAULTS = {
    "code in optimizer.pt": ("optimizer.pt", save_code),
    "code in scheduler.pt": ("scheduler.pt", save_code),
    "code in rng_state.pth": ("rng_state.pth", pickle_code),
    "another optimizer": ("optimizer.pt", partial(torch.save, {"state": {}, "param_groups": []})),
    "truncated optimizer": ("optimizer.pt", partial(os.truncate, length=999)),
    "truncated weights": ("model.safetensors", partial(os.truncate, length=999)),
    "weights of another model": ("model.safetensors", partial(save_file, {hostile.TOKEN: torch.zeros(1, 1, 8)})),
    "nested state": ("trainer_state.json", lambda path: path.write_text("[" * 10**5)),
    **{f"state of {values}": ("trainer_state.json", partial(hostile.change_json, **values))
       for values in ({"global_step": "two"}, {"global_step": -5}, {"epoch": math.nan}, {"surprise": 1})},
    "code in the metadata of a shard": (".metadata", pickle_code),
}  # fmt: skip


@pytest.fixture
def resume(finished_run):
    """Continues a copy of the finished run, at "out"."""
    shutil.copytree(finished_run / "out", "out")
    return partial(finetune, finished_run / "images", "--skip-bad-images", "--max-steps", "3", "--resume")


@pytest.mark.parametrize("kind", RUN_FAULTS)
def test_a_run_is_not_resumed_from_a_bad_checkpoint(kind, resume, capsys):
    name, damage = RUN_FAULTS[kind]
    damage(Path("out", "checkpoint-2", name))
    assert resume() == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "checkpoint-2" in line and "weights_only" not in line
    assert not Path("ran").exists() and not Path("out", "checkpoint-3").exists()


def test_training_args_are_never_unpickled(resume):
    for path in Path("out").rglob("training_args.bin"):
        pickle_code(path)
    assert resume() == 0
    assert not Path("ran").exists() and Path("out", "checkpoint-3").exists()


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
