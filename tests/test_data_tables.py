"""Labels in tables as people have them: metadata files beside folders, and `--labels FILE`."""

import csv
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from test_data_habits import TINY, TWO, count_images, load, make_classes, take_labels

from fastvit import cli
from fastvit.data.datasets import load_images
from fastvit.data.streaming import stream_images
from fastvit.errors import InputError
from fastvit.train.finetune import main

pytestmark = pytest.mark.usefixtures("own_folder")


def write_csv(file: Path, rows: list[list], delimiter: str = ",") -> Path:
    with file.open("w", newline="") as opened:
        csv.writer(opened, delimiter=delimiter).writerows(rows)
    return file


def test_a_caption_column_does_not_hide_the_folders(tmp_path):
    root = make_classes(tmp_path / "data")
    rows = [["cat/cat0.png", "a pet"], ["dog/dog0.png", "a pet", "of ours"]]
    write_csv(root / "metadata.csv", [["file_name", "text"], *rows])
    assert load(root) == {"train": TWO}
    assert stream_images(data_dir=root, need_validation=False).class_names == ["cat", "dog"]
    (root / "metadata.csv").unlink()
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "cat/cat0.png", "text": "a pet"}))
    assert load(root) == {"train": TWO}
    flat = shutil.copytree(root / "cat", tmp_path / "flat")
    write_csv(flat / "metadata.csv", [["file_name", "text"], ["cat0.png", "a pet"]])
    with pytest.raises(InputError, match="no label column among file_name, text; --label-column names it"):
        load(flat)


@pytest.mark.parametrize("folder", ["", "archive", "archive/train"])
def test_a_metadata_file_with_labels_is_found_in_the_folders_around(folder, tmp_path):
    root = make_classes(tmp_path / "data" / folder, ["photos"], count=6) / "photos"
    rows = [[f"photos{number}.png", ["cat", "dog", ""][number % 3]] for number in range(6)]
    write_csv(root / "metadata.csv", [["file_name", "label"], *rows])
    images = load_images(data_dir=tmp_path / "data", validation_fraction=0)
    assert count_images(images) == {"train": {"cat": 2, "dog": 2}}
    assert images.notes == ["train: 2 of 6 images have no label and are left out"]
    streamed = stream_images(data_dir=tmp_path / "data", need_validation=False)
    assert sorted(take_labels(streamed, 4)) == ["cat", "cat", "dog", "dog"]


@pytest.mark.parametrize("name", ["train/site{}/{}.png", "images/train_{}{}.png", "test_{}{}.png", "eval/{}{}.png"])
def test_folders_with_names_of_splits_below_a_metadata_file_are_an_error(name, tmp_path):
    names = [name.format(n % 2, n) for n in range(4)] + [f"photo{n}.png" for n in range(2) if "site" not in name]
    for file in names:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / file)
    rows = [[file, ["cat", "dog"][number // 2 % 2]] for number, file in enumerate(names)]
    file = write_csv(tmp_path / "metadata.csv", [["file_name", "label"], *rows])
    if name[:5] in ("train", "eval/"):
        for read in (load_images, stream_images):
            with pytest.raises(InputError, match=r"metadata\.csv: its labels are not read.*--labels"):
                read(data_dir=tmp_path)
    else:  # names of files, which the `datasets` library reads as splits, too, are not
        assert sum(load(tmp_path)["train"].values()) == len(names)
    assert load_images(labels_file=file, validation_fraction=0).class_names == ["cat", "dog"]
    with pytest.raises(InputError, match=r"found none at .*metadata\.csv; .* is given with --labels"):
        load(file)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_two_labels_of_an_image_in_a_metadata_file_are_an_error(kind, tmp_path):
    root = make_classes(tmp_path, ["photos"], count=4) / "photos"
    rows = [{"file_name": f"photos{n % 4}.png", "label": "cat" if n % 2 else "dog"} for n in (0, 1, 2, 3, 3)]
    for last, error in (
        ("cat", None),
        ("dog", "expected one label per image, found 'cat' and 'dog' for .*photos3.png"),
    ):
        rows[-1]["label"] = last
        table, file = datasets.Dataset.from_list(rows), root / f"metadata.{kind}"
        {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind](file)
        with pytest.raises(InputError, match=error) if error else nullcontext():
            images = load_images(data_dir=root, validation_fraction=0)
            assert count_images(images) == {"train": {"cat": 2, "dog": 2}}
            assert images.notes == [f"1 rows of {file} repeat a file and are left out"]


@pytest.mark.parametrize("kind", ["metadata", "metadata of splits", "labels"])
def test_images_without_a_row_are_counted(kind, own_folder):
    root = make_classes(Path("pets [2024]") / "train", ["photos"], count=5) / "photos"
    rows = [["file_name", "label"], *[[f"photos{n}.png", ["cat", "dog"][n % 2]] for n in range(4)]]
    file = write_csv(root / ("metadata.csv" if kind != "labels" else "labels.csv"), rows)
    if kind == "metadata of splits":
        root.rename(root.parent.parent / "train_photos")
        root = root.parent.parent
        shutil.copytree(root / "train_photos", root / "test_photos")
        file = root / "test_photos" / "metadata.csv"
    options = {"data_dir": root, **({"labels_file": file} if kind == "labels" else {})}
    images, number = load_images(**options, validation_fraction=0), 2 if kind == "metadata of splits" else 1
    pets = {"cat": 2, "dog": 2}
    assert count_images(images) == ({"train": pets, "test": pets} if number == 2 else {"train": pets})
    assert images.notes == [f"{number} of {5 * number} images in {root} have no row in {file} and are left out"]
    assert stream_images(**options, need_validation=False).notes == images.notes


@pytest.mark.parametrize("kind", ["folders", "table", "metadata", "saved"])
def test_a_single_split_is_evaluated(kind, tmp_path, capsys):
    root = make_classes(tmp_path / "data" / "test", ["cat", "dog", "owl"])
    assert main(["--data-dir", str(root), *TINY]) == 0
    options = ["--data-dir", str(root.parent)]
    paths = sorted(root.rglob("*.png"))
    if kind == "table":
        rows = [["path", "label", "split"], *[[path, path.parent.name, "test"] for path in paths]]
        options = ["--labels", str(write_csv(tmp_path / "labels.csv", rows))]
    elif kind == "metadata":
        write_csv(root / "metadata.csv", [["file_name", "label"], *[[path, path.parent.name] for path in paths]])
    elif kind == "saved":
        split = datasets.load_dataset("imagefolder", data_dir=str(root), split="train")
        datasets.DatasetDict({"test": split}).save_to_disk(tmp_path / "saved")
        options = ["--data-dir", str(tmp_path / "saved")]
    capsys.readouterr()
    assert cli.main(["evaluate", "out", *options, "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "test" and np.sum(found["confusion"]) == 9
    if kind == "saved":
        assert cli.main(["predict", "out", "--dataset", options[1], "--json", "--device", "cpu"]) == 0
        assert capsys.readouterr().out.count('"test/') == 9
    assert main([*options, *TINY, "--overwrite"]) == 2
    assert "expected a split called 'train', found test" in capsys.readouterr().err


def test_classes_that_a_parquet_metadata_file_declares_are_read(tmp_path):
    root = make_classes(tmp_path, ["photos"], count=4) / "photos"
    rows = datasets.Dataset.from_list([{"file_name": f"photos{n}.png", "label": n % 2} for n in range(4)])
    rows.cast_column("label", datasets.ClassLabel(names=["owl", "cat"])).to_parquet(root / "metadata.parquet")
    assert load(root) == {"train": {"owl": 2, "cat": 2}}


@pytest.mark.parametrize("text", ["None", "NA", "null"])
def test_labels_in_words_for_missing_are_an_error_with_both_readings(text, tmp_path):
    root = make_classes(tmp_path / "data", ["photos"], count=4)
    rows = [["file_name", "label"], *[[f"photos/photos{n}.png", ["cat", text, "dog", "cat"][n]] for n in range(4)]]
    file = write_csv(root / "metadata.csv", rows)
    for options in ({"data_dir": root}, {"labels_file": file}):
        for read in (load_images, stream_images):
            with pytest.raises(InputError, match=f"the label '{text}' may be a class or stand for a missing label"):
                read(**options)


@pytest.fixture
def flat(tmp_path) -> Path:
    """A folder of images without classes: images/DEEPER/*.png."""
    root = make_classes(tmp_path / "images")
    (root / "dog").rename(root / "deeper")
    return root


FLAT = {"cat": [f"cat/cat{n}.png" for n in range(3)], "dog": [f"deeper/dog{n}.png" for n in range(3)]}
PAIRS = [[path, name] for name, paths in FLAT.items() for path in paths]


@pytest.mark.parametrize(
    "form", ["csv", "headerless", "semicolon", "tsv", "jsonl", "parquet", "stems", "ids", "cased", "txt", "mixed"]
)
def test_a_table_of_file_names_and_labels(form, flat, tmp_path):
    rows, header, file = PAIRS, ["file_name", "label"], tmp_path / "labels.csv"
    if form == "headerless":
        write_csv(file, rows)
    elif form in ("semicolon", "tsv"):
        file = tmp_path / "labels.tsv" if form == "tsv" else file
        write_csv(file, [header, *rows], "\t" if form == "tsv" else ";")
    elif form == "txt":
        file = tmp_path / "labels.txt"
        write_csv(file, rows, " ")
    elif form == "mixed":
        file = tmp_path / "labels.jsonl"
        labels = [1, "1", 1, "two", "two", "two"]
        file.write_text(
            "\n".join(json.dumps({"file": path, "cls": label}) for (path, _), label in zip(rows, labels, strict=True))
        )
        assert load(flat, labels_file=file) == {"train": {"1": 3, "two": 3}}
        return
    elif form == "jsonl":
        file = tmp_path / "labels.jsonl"
        file.write_text("\n".join(json.dumps({"file_name": path, "label": name}) for path, name in rows))
    elif form == "parquet":
        file = tmp_path / "labels.parquet"
        datasets.Dataset.from_dict({"path": [r[0] for r in rows], "class": [r[1] for r in rows]}).to_parquet(file)
    elif form == "stems":
        write_csv(file, [["id", "breed"], *([Path(path).stem, name] for path, name in rows)])
    elif form == "ids":
        write_csv(file, [["photo", "kind of pet"], *rows])
    else:
        write_csv(file, [["Filename", "Label"] if form == "cased" else header, *rows])
    assert load(flat, labels_file=file) == {"train": TWO}
    streamed = stream_images(data_dir=flat, labels_file=file, need_validation=False)
    assert streamed.num_train == 6 and sorted(take_labels(streamed, 6)) == ["cat"] * 3 + ["dog"] * 3


def test_files_called_like_columns_do_not_matter(flat, tmp_path):
    for name in ("id.png", "cat/id.png", "cat/cat.png", "deeper/cat.png"):
        shutil.copy(flat / "cat" / "cat0.png", flat / name)
    file = write_csv(tmp_path / "labels.csv", [["id", "label"], *PAIRS])
    assert load(flat, labels_file=file) == {"train": TWO}
    write_csv(file, [["label", "photo"], *[pair[::-1] for pair in PAIRS]])
    assert load(flat, labels_file=file) == {"train": TWO}


def test_a_table_may_name_splits_and_numbers_and_lack_labels(flat, tmp_path):
    values = ["9", "10", "", "9", "10", "nan"]
    splits = ["train", "training", "train", "val", "val", "val"]
    rows = [[path, value, split] for (path, _), value, split in zip(PAIRS, values, splits, strict=True)]
    file = write_csv(tmp_path / "labels.csv", [["file_name", "label", "split"], *rows])
    images = load_images(data_dir=flat, labels_file=file)
    assert count_images(images) == {"train": {"9": 1, "10": 1}, "validation": {"9": 1, "10": 1}}
    assert images.class_names == ["9", "10"] and images.notes == [
        f"{split}: 1 of 3 images have no label and are left out" for split in ("train", "validation")
    ]
    assert images.splits["validation"].get_name(1) == str(flat / "deeper" / "dog1.png")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["file_name", "label"], *PAIRS, ["cat/cat0.png", "dog"]], "one label per image, found 'cat' and 'dog' for"),
        ([["file_name", "label"], ["x.png", "cat"], ["y.png", "dog"]], "found none of its 2 files in .*--data-dir"),
        ([["file_name", "red", "green"], ["cat/cat0.png", "1", "0"]], "label_column: expected one of .*, found none"),
        ([["file_name", "label"], ["cat/cat0.png"]], "row 2: expected 2 columns, found 1"),
        ([["file_name", "label", "split"], ["cat/cat0.png", "cat", "x"]], "row 1: expected train, validation or test"),
        ([["file_name", "label"]], "expected rows of file names and labels, found none"),
    ],
)
def test_wrong_tables_are_refused(rows, message, flat, tmp_path):
    file = write_csv(tmp_path / "labels.csv", rows)
    with pytest.raises(InputError, match=message):
        load_images(data_dir=flat, labels_file=file)


def test_a_table_is_trained_and_evaluated(flat, tmp_path, capsys):
    write_csv(flat / "labels.csv", [["file_name", "label"], *PAIRS])
    assert main(["--labels", str(flat / "labels.csv"), *TINY]) == 0
    command = ["evaluate", "out", "--labels", str(flat / "labels.csv"), "--json", "--device", "cpu"]
    capsys.readouterr()
    assert cli.main(command) == 0
    assert np.sum(json.loads(capsys.readouterr().out)["confusion"]) == 6
    assert main(["--labels", "labels.csv", "--dataset", "beans", *TINY]) == 2
    assert "--labels: give a table of files or a --dataset, not both" in capsys.readouterr().err
