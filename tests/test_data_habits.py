"""Datasets as people have them: other names of splits, labels that are missing, files that are no images, tables."""

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from fastvit.data.datasets import ImageDataset, load_images
from fastvit.data.folders import match_split
from fastvit.data.images import HEIF_HINT, decode_image, list_readable_formats
from fastvit.data.streaming import Stream, stream_images
from fastvit.errors import InputError
from fastvit.train.build import print_counts
from fastvit.train.finetune import main

pytestmark = pytest.mark.usefixtures("own_folder")

TINY = ["--from-scratch", "micro", "--image-size", "16", "--patch-size", "8", "--precision", "fp32", "--cpu"]
TINY += ["--max-steps", "2", "--eval-steps", "2", "--batch-size", "4", "--output-dir", "out"]
COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "owl": (30, 30, 200)}
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(64)


def make_classes(root: Path, classes=("cat", "dog"), count: int = 3) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (16, 16), COLOURS.get(name, (number, 0, 0))).save(root / name / f"{name}{number}.png")
    return root


def count_images(images: ImageDataset) -> dict[str, dict[str, int]]:
    """{split: {class: number of images}}, also of a stream's training images."""
    return {
        split: dict(zip(images.class_names, counts.tolist(), strict=True))
        for split, counts in images.count_labels().items()
    }


def load(root: Path, **kwargs) -> dict[str, dict[str, int]]:
    return count_images(load_images(data_dir=root, validation_fraction=0, **kwargs))


def take_labels(images, count: int) -> list[str]:
    iterator = iter(Stream(images, (16, 16), None, shuffle_buffer=4))
    return [images.class_names[next(iterator)["labels"]] for _ in range(count)]


# --- folders of splits -----------------------------------------------------------------------------------------------

TWO = {"cat": 3, "dog": 3}


@pytest.mark.parametrize(
    ("train", "held_out", "split"),
    [
        ("training_set", "test_set", "test"),
        ("train_images", "val_images", "validation"),
        ("Train-2017", "valid 2017", "validation"),
        ("seg_train", "seg_dev", "validation"),
        ("my.training", "my.testing", "test"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "archive", "archive/images"])
def test_folders_with_the_word_of_a_split_are_splits(train, held_out, split, wrapper, tmp_path):
    root = tmp_path / "data"
    make_classes(root / wrapper / train)
    make_classes(root / wrapper / held_out)
    assert load(root) == {"train": TWO, split: TWO}
    streamed = stream_images(data_dir=root, need_validation=False)
    assert count_images(streamed) == {split: TWO} and streamed.num_train == 6
    assert sorted(take_labels(streamed, 6)) == ["cat"] * 3 + ["dog"] * 3


def test_words_of_splits_are_found_as_the_datasets_library_finds_them():
    assert [match_split(name) for name in ("train", "TRAIN_2", "x-val", "test.set", "development", "latest")] == [
        "train", "train", "validation", "test", None, None,
    ]  # fmt: skip
    assert match_split("train_val") is None


def test_a_split_inside_a_folder_of_the_same_split_is_found(tmp_path):
    make_classes(tmp_path / "data" / "seg_train" / "seg_train")
    make_classes(tmp_path / "data" / "seg_test" / "seg_test")
    assert load(tmp_path / "data") == {"train": TWO, "test": TWO}


def test_test_images_without_classes_are_left_out_with_a_note(tmp_path, capsys):
    root = make_classes(tmp_path / "data" / "train_images").parent
    shutil.copytree(root / "train_images" / "cat", root / "test_images")
    images = load_images(data_dir=root, validation_fraction=0)
    assert count_images(images) == {"train": TWO}
    print_counts(images)
    assert "note: test_images: 3 images without classes are left out" in capsys.readouterr().out


def test_folders_of_splits_without_classes_are_not_classes(tmp_path):
    make_classes(tmp_path / "data", ["train_images", "val_images"])
    with pytest.raises(InputError, match=r"train_images, val_images can be read as splits, .* or as classes.*--labels"):
        load(tmp_path / "data")


@pytest.mark.parametrize("split", [None, "train"])
def test_classes_that_hold_the_same_folders_are_an_error_with_both_readings(split, tmp_path):
    root = tmp_path / "data"
    for name in ("part1", "part2"):
        make_classes(root / (split or "") / name, ["cat", "dog"])
    with pytest.raises(InputError, match="two ways: the classes are part1, part2, or they are cat, dog"):
        load(root)
    with pytest.raises(InputError, match="two ways"):
        stream_images(data_dir=root, need_validation=False)


def test_classes_with_one_folder_of_the_same_name_are_classes(tmp_path):
    for name in ("cat", "dog"):
        make_classes(tmp_path / "data" / name, ["images"])
    assert load(tmp_path / "data") == {"train": TWO}


def test_one_folder_around_the_classes_is_named_in_the_error(tmp_path):
    make_classes(tmp_path / "data" / "PetImages")
    with pytest.raises(InputError, match=r"found 1: PetImages; .*\(cat, dog\), the option is --data-dir .*PetImages"):
        load(tmp_path / "data")


# --- missing labels --------------------------------------------------------------------------------------------------


def save_hub_dataset(root: Path, labels: dict[str, list], feature) -> str:
    """Writes a folder that `load_dataset` reads as a hub dataset."""
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    (root / "data").mkdir(parents=True)
    for split, values in labels.items():
        rows = {"image": [Image.new("RGB", (16, 16), (index, 0, 0)) for index in range(len(values))], "label": values}
        split_rows = datasets.Dataset.from_dict(rows, features=features)
        split_rows.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return str(root)


PETS = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("feature", "labels", "names"),
    [
        (PETS, [0, 1, -1, 0, 1], ["cat", "dog"]),
        (PETS, [0, 1, None, 0, 1], ["cat", "dog"]),
        (datasets.Value("string"), ["cat", "dog", None, "cat", "dog"], ["cat", "dog"]),
        (datasets.Value("float64"), [3.0, 10.0, float("nan"), 3.0, 10.0], ["3", "10"]),
        (datasets.Value("int64"), [3, 10, None, 3, 10], ["3", "10"]),
    ],
    ids=["-1", "None", "text", "NaN", "int"],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_images_without_a_label_are_left_out_and_counted(feature, labels, names, split, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    complete = [value for value in labels if value is not None and value == value and value != -1]
    given = {name: labels if name == split else complete for name in ("train", "validation")}
    root = save_hub_dataset(tmp_path / "pets", given, feature)
    images = load_images(root)
    assert count_images(images) == {name: dict.fromkeys(names, 2) for name in given}
    assert images.notes == [f"{split}: 1 of 5 images have no label and are left out"]
    pixels = [np.asarray(images.splits[split].load(index))[0, 0, 0] for index in range(4)]
    assert pixels == [0, 1, 3, 4] and images.splits[split].get_name(2).endswith("row 3")

    streamed = stream_images(root)
    assert streamed.class_names == names and len(streamed.splits["validation"]) == 4
    assert sorted(take_labels(streamed, 8)) == sorted(names * 4)
    assert "no label" in str(streamed.notes) or "without a label are left out" in capsys.readouterr().err


def test_files_of_a_stream_are_shards_that_mix_the_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvit.data.streaming.MAX_FILE_SHARDS", 4)
    root = make_classes(tmp_path / "data", count=20)
    images = stream_images(data_dir=root, need_validation=False)
    paths = [row["image"]["path"] for row in images.train]
    assert len(set(paths)) == 40 and images.train.num_shards == 4
    assert 5 <= sum("cat" in path for path in paths[:20]) <= 15


def test_class_names_of_a_stream_order_the_declared_classes(tmp_path):
    root = make_classes(tmp_path / "data" / "train").parent
    images = stream_images(data_dir=root, class_names="dog,cat", need_validation=False)
    rows = [(Path(row["image"]["path"]).parent.name, images.get_label(row, "")) for row in images.train]
    assert set(rows) == {("cat", 1), ("dog", 0)}


def test_a_split_without_any_label_is_left_out_with_a_note(tmp_path):
    root = save_hub_dataset(tmp_path / "pets", {"train": [0, 1, 0, 1], "test": [-1, -1]}, PETS)
    images = load_images(root, validation_fraction=0)
    assert list(images.splits) == ["train"] and "test: 2 of 2 images have no label" in images.notes[0]
    streamed = stream_images(root, need_validation=False)
    assert not streamed.splits and "test: 2 of its images have no label" in streamed.notes[0]


def test_minus_one_among_numbers_is_an_error_with_both_readings(tmp_path):
    root = save_hub_dataset(tmp_path / "pets", {"train": [0, 1, -1, 0]}, datasets.Value("int64"))
    for read in (load_images, lambda root: stream_images(root, need_validation=False)):
        with pytest.raises(InputError, match="the label -1 beside 0, 1 may be a class or stand for a missing label"):
            read(root)


def test_minus_one_is_a_class_if_there_is_only_one_other(tmp_path):
    root = save_hub_dataset(tmp_path / "pets", {"train": [1, 1, -1, -1]}, datasets.Value("int64"))
    assert count_images(load_images(root, validation_fraction=0)) == {"train": {"-1": 2, "1": 2}}
    streamed = stream_images(root, need_validation=False)
    assert sorted(take_labels(streamed, 4)) == ["-1", "-1", "1", "1"]


def test_training_images_without_any_label_are_an_error(tmp_path):
    root = save_hub_dataset(tmp_path / "pets", {"train": [None, None]}, datasets.Value("int64"))
    for read in (load_images, lambda root: stream_images(root, need_validation=False)):
        with pytest.raises(InputError, match="expected labels of the training images, found none"):
            read(root)


def test_labels_that_are_measurements_or_lists_are_another_task_and_an_error_in_a_stream(tmp_path):
    measured = save_hub_dataset(tmp_path / "pets", {"train": [0.5, 0.25, 0.75, 0.5]}, datasets.Value("float64"))
    tagged = save_hub_dataset(tmp_path / "tags", {"train": [[0, 1], [1]]}, datasets.List(datasets.Value("int64")))
    stars = save_hub_dataset(tmp_path / "stars", {"train": [0.5, 1.5] * 3}, datasets.Value("float64"))
    for root, kind, message in (
        (measured, "regression", "expected classes, found numbers that hardly repeat, such as 0"),
        (tagged, "multi-label", "expected one label per image, found"),
    ):
        assert load_images(root).task == kind
        for read in (
            lambda root: load_images(root, task="single-label"),
            lambda root: stream_images(root, need_validation=False),
        ):
            with pytest.raises(InputError, match=message):
                read(root)
    with pytest.raises(InputError, match=r"may be one class per image \(--task single-label\) or numbers"):
        load_images(stars)
    assert load_images(stars, task="single-label").class_names == ["0.5", "1.5"]
    assert stream_images(stars, need_validation=False).class_names == ["0.5", "1.5"]


def test_two_splits_for_validation_are_an_error(tmp_path):
    splits = {
        name: datasets.Dataset.from_dict({"image": ["a"], "label": [0]}) for name in ("train", "dev", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    make_classes(tmp_path / "data" / "train")
    for name in ("dev", "validation"):
        make_classes(tmp_path / "data" / name)
    for root, message in ((tmp_path / "saved", "dev and validation"), (tmp_path / "data", "found another")):
        for read in (load_images, stream_images):
            with pytest.raises(InputError, match=f"expected one .*split.*{message}"):
                read(data_dir=root)


# --- files that are no images ----------------------------------------------------------------------------------------


@pytest.fixture
def without_heif(monkeypatch):
    """Pillow as it is without pillow-heif."""
    formats = tuple(name for name in list_readable_formats() if name != "HEIF")
    suffixes = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*formats, "MPO"))
    monkeypatch.setattr("fastvit.data.images.list_readable_formats", lambda: formats)
    monkeypatch.setattr("fastvit.data.folders.list_image_suffixes", lambda: suffixes)


def test_files_of_other_endings_are_counted_by_ending_and_class(tmp_path, without_heif, capsys):
    root = make_classes(tmp_path / "data")
    for name in ("1.heic", "2.HEIC", "notes.txt", "README"):
        (root / "cat" / name).write_bytes(HEIC)
    assert main(["--data-dir", str(root), *TINY]) == 0
    note = next(line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert "2 .heic, 1 .txt, 1 without ending in cat" in note and HEIF_HINT in note


def test_a_class_of_files_that_cannot_be_read_is_an_error(tmp_path, without_heif):
    root = make_classes(tmp_path / "data")
    (root / "owl").mkdir()
    for number in range(3):
        (root / "owl" / f"{number}.heic").write_bytes(HEIC)
    with pytest.raises(InputError, match=r"owl: expected images of a class, .*: 3 \.heic \(HEIC needs pillow-heif"):
        load(root)
    with pytest.raises(InputError, match=r"3 \.heic"):
        stream_images(data_dir=root, need_validation=False)


def test_folders_without_images_are_noted(tmp_path):
    root = make_classes(tmp_path / "data")
    (root / "empty").mkdir()
    (root / "docs").mkdir()
    (root / "docs" / "a.txt").touch()
    images = load_images(data_dir=root)
    assert images.class_names == ["cat", "dog"]
    assert images.notes[:2] == [
        "docs is no class: it has no images (1 .txt)", "empty is no class: it has no images (it is empty)",
    ]  # fmt: skip


def test_a_heic_image_names_the_package_that_decodes_it(tmp_path, without_heif):
    (tmp_path / "a.jpg").write_bytes(HEIC)
    for source in (tmp_path / "a.jpg", HEIC):
        with pytest.raises(InputError, match=r"expected an image, .*HEIC needs pillow-heif: pip install"):
            decode_image(source)


def test_an_avif_image_names_the_pillow_that_decodes_it(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(HEIC.replace(b"heic", b"avif"))
    monkeypatch.setattr("fastvit.data.images.list_readable_formats", lambda: ("JPEG",))
    with pytest.raises(InputError, match=r"expected an image, .*AVIF needs Pillow 11\.3"):
        decode_image(tmp_path / "a.jpg")


def test_heic_images_are_decoded_with_pillow_heif(tmp_path):
    pytest.importorskip("pillow_heif")
    assert "HEIF" in list_readable_formats()
    root = make_classes(tmp_path / "data")
    (root / "owl").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), COLOURS["owl"]).save(root / "owl" / f"{number}.HEIC", format="HEIF", quality=95)
    images = load_images(data_dir=root, validation_fraction=0)
    assert count_images(images) == {"train": {"cat": 3, "dog": 3, "owl": 3}} and not images.notes
    owl = images.splits["train"].load(int(np.flatnonzero(images.splits["train"].labels == 2)[0]))
    assert np.abs(np.asarray(owl).astype(int) - COLOURS["owl"]).max() < 24


# --- classes of few images -------------------------------------------------------------------------------------------


def test_a_class_with_one_image_is_trained_on(tmp_path):
    root = make_classes(tmp_path / "data")
    make_classes(root, ["owl"], count=1)
    images = load_images(data_dir=root)
    assert count_images(images)["train"]["owl"] == 1 and count_images(images)["validation"] == {
        "cat": 1, "dog": 1, "owl": 0,
    }  # fmt: skip
    assert images.notes == ["only one image of owl: it is trained on, and not validated"]
    make_classes(tmp_path / "ones", count=1)
    with pytest.raises(InputError, match=r"expected a class with at least 2 images, .*--validation-fraction 0"):
        load_images(data_dir=tmp_path / "ones")


def test_a_declared_class_without_images_is_a_note_and_can_be_trained(tmp_path, capsys):
    feature = datasets.ClassLabel(names=["cat", "yeti", "dog"])
    root = save_hub_dataset(tmp_path / "pets", {"train": [0, 2] * 6}, feature)
    assert main(["--data-dir", root, *TINY, "--class-balanced"]) == 0
    assert "note: no images of 1 declared class(es): yeti" in capsys.readouterr().out
    assert json.loads(Path("out/config.json").read_text())["id2label"] == {"0": "cat", "1": "yeti", "2": "dog"}
    pytest.importorskip("sklearn")
    assert main(["--data-dir", root, *TINY, "--folds", "2", "--fold", "1", "--overwrite"]) == 0


# --- folders of the datasets library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "plain parquet", "DatasetDict", "Dataset"])
def test_folders_of_parquet_files_and_saved_datasets(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    root = tmp_path / "saved"
    splits = {"train": [0, 1, 0, 1, 0, 1], "val": [0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": PETS})
    pixels = [Image.new("RGB", (16, 16), (index, 0, 0)) for index in range(6)]
    rows = {
        name: datasets.Dataset.from_dict({"image": pixels[: len(values)], "label": values}, features=features)
        for name, values in splits.items()
    }
    if kind == "plain parquet":  # as other programs write it: bytes, and no declared classes
        plain = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("string")})
        for name, split in rows.items():
            cells = [row["bytes"] for row in split.cast_column("image", datasets.Image(decode=False))["image"]]
            names = [PETS.names[label] for label in split["label"]]
            rows[name] = datasets.Dataset.from_dict({"image": cells, "label": names}, features=plain)
    if kind.endswith("parquet"):
        (root / "deep").mkdir(parents=True)
        for name, split in rows.items():
            split.to_parquet(root / "deep" / f"{name}.parquet")
    elif kind == "DatasetDict":
        datasets.DatasetDict(rows).save_to_disk(root)
    else:
        rows["train"].with_format("torch").save_to_disk(root)
    expected = {"train": TWO} if kind == "Dataset" else {"train": TWO, "validation": {"cat": 1, "dog": 1}}
    images = load_images(data_dir=root, validation_fraction=0)
    assert count_images(images) == expected
    assert [np.asarray(images.splits["train"].load(index))[0, 0, 0] for index in range(6)] == list(range(6))
    streamed = stream_images(data_dir=root, need_validation=False)
    assert sorted(take_labels(streamed, 6)) == ["cat"] * 3 + ["dog"] * 3
    assert kind.endswith("parquet") or streamed.num_train == 6


# --- mistakes in the report ------------------------------------------------------------------------------------------


def test_mistakes_of_the_report_name_their_files(tmp_path):
    root = make_classes(tmp_path / "data" / "train").parent
    make_classes(root / "val", ["cat"], count=8)
    make_classes(root / "val", ["dog"], count=8)
    (root / "val" / "cat" / "!broken.png").touch()
    for label in ("cat", "dog"):  # each image with both labels: half of the predictions are wrong
        for path in list((root / "val" / label).glob(f"{label}*.png")):
            shutil.copy(path, root / "val" / ("dog" if label == "cat" else "cat") / f"wrong-{path.name}")
    assert main(["--data-dir", str(root), *TINY, "--skip-bad-images"]) == 0
    page = Path("out/report.html").read_text()
    named = [line for line in page.splitlines() if '<code class="path">' in line]
    assert len(named) == 12
    for line in named:
        path = Path(line.partition('<code class="path">')[2].partition("</code>")[0])
        assert path.is_file()
        truth = line.partition("<b>")[2].partition("</b>")[0]
        assert path.parent.name == truth
    assert os.sep in named[0]
