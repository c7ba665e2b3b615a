"""Where labelled images come from: the hub, folders of images, of Parquet files or saved by `datasets`, and tables.

`open_source` returns either `LabelledFiles` or splits of the `datasets` library. `fastvit.data.datasets` loads them,
and `fastvit.data.streaming` streams them.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvit.data.folders import (
    METADATA_FILES,
    SPLIT_WORDS,
    find_files,
    find_images,
    find_only_folder,
    format_list,
    is_folder,
    list_entries,
    list_images,
    match_split,
)
from fastvit.errors import InputError

# Short names of datasets on the hub.
ALIASES = {"beans": "AI-Lab-Makerere/beans"}
IMAGE_COLUMNS = ("image", "img", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "cls")
MORE_LABEL_COLUMNS = ("target", "category", "class_name", "label_name")  # in tables
TRAIN, VALIDATION, TEST = "train", "validation", "test"
# Labels of a CSV file that pandas and `datasets` read as empty cells.
AMBIGUOUS_TEXTS = {"None", "NA", "N/A", "n/a", "NULL", "null", "<NA>"}


@dataclass
class LabelledFiles:
    """Image files and their labels.

    Attributes:
        name: The folder or file in messages.
        class_names: The classes in the order of their labels.
        splits: Split -> (path, label) of each image; the label is float32 [names] unless `task` is "single-label".
        notes: What was left out.
    """

    name: str
    class_names: list[str]
    splits: dict[str, list[tuple[str, Any]]]
    notes: list[str] = field(default_factory=list)
    task: str = "single-label"


def open_source(
    dataset: str | None,
    data_dir: str | Path | None,
    labels: str | Path | None,
    image_column: str | None,
    label_column: str | None,
    *,
    streaming: bool = False,
    task: str = "auto",
) -> LabelledFiles | dict[str, Any]:
    """Opens labelled images.

    Args:
        dataset: A hub id; either this, or `data_dir`, `labels` or both.
        data_dir: A folder, or a glob pattern of tar files.
        labels: A table of file names and labels; the names are relative to `data_dir`, or to the table's folder.
        image_column: The column of the images.
        label_column: The column of the labels.
        streaming: Whether to open hub datasets, Parquet and tar files without reading them.
        task: What the labels are for, or "auto" (`fastvit.data.targets`).

    Returns:
        Files, or splits of the `datasets` library by their normalized names.

    Raises:
        InputError: If the source cannot be read.
    """
    import datasets

    if labels is not None:
        from fastvit.data.label_files import read_label_file

        root = Path(labels).parent if data_dir is None else check_folder(data_dir)
        return read_label_file(Path(labels), root, image_column, label_column, task)
    source = ALIASES.get(dataset or "", dataset) or str(data_dir)
    with wrap_read_errors(source):
        if data_dir is None:
            return normalize_splits(datasets.load_dataset(source, streaming=streaming), source)
        if glob.has_magic(source) and not Path(source).exists():
            files = sorted(glob.glob(source, recursive=True))  # noqa: PTH207 (the pattern is a whole path)
            if not files or not all(file.endswith(".tar") for file in files):
                raise InputError(f"data_dir: expected a folder, or a pattern of .tar files, got {source}")
            return datasets.load_dataset("webdataset", data_files={TRAIN: files}, streaming=streaming)
        root = check_folder(data_dir)
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            saved = datasets.load_from_disk(source).with_format(None)  # a saved format may return tensors
            return normalize_splits(saved if isinstance(saved, datasets.DatasetDict) else {TRAIN: saved}, source)
        if (builder := find_builder(root)) is not None:
            return normalize_splits(datasets.load_dataset(builder, data_dir=source, streaming=streaming), source)
    return read_folder(root, image_column, label_column, task)


def check_folder(data_dir: str | Path) -> Path:
    """Raises InputError unless `data_dir` is a folder."""
    if not Path(data_dir).is_dir():
        hint = "; a table of file names and labels is given with --labels" if Path(data_dir).is_file() else ""
        raise InputError(f"data_dir: expected a folder of images, found none at {data_dir}{hint}")
    return Path(data_dir)


def find_builder(root: Path) -> str | None:
    """Returns what `datasets` reads a folder without image files with: "parquet" or "webdataset"."""
    if next(find_images(root), None) is not None:
        return None
    suffixes = {Path(path).suffix for path in find_files(root) if Path(path).name not in METADATA_FILES}
    builder = "parquet" if ".parquet" in suffixes else "webdataset" if ".tar" in suffixes else None
    if builder is not None and glob.has_magic(str(root)):
        raise InputError(f"data_dir: {root}: its name has * ? [ or ], which `datasets` reads as a pattern; rename it")
    return builder


def read_folder(root: Path, image_column: str | None, label_column: str | None, task: str) -> LabelledFiles:
    """Reads a folder of image files, with labels from metadata files or one sub-folder per class."""
    from fastvit.data.label_files import label_rows, read_rows

    base, files = find_metadata_files(root)
    with wrap_read_errors(str(root)):
        columns = list(dict.fromkeys(name for file in files for name in read_columns(file)))
    usual = LABEL_COLUMNS if label_column is None else (label_column,)
    several = find_label_columns(label_column, [name for name in columns if name != "file_name"], task)
    if "file_name" in columns and (several or set(usual) & set(columns)):
        rows = [row for file in files for row in locate_rows(base, file, read_rows(file))]
        return label_rows(files[0], rows, base, None if image_column == "image" else image_column, label_column, task)
    try:
        return read_class_folders(root, image_column, label_column)
    except InputError as error:
        if not columns:
            raise
        lacking = "label column" if "file_name" in columns else "column file_name"
        hint = "--label-column names it" if "file_name" in columns else "--labels reads other tables"
        found = f"the metadata file has no {lacking} among {format_list(columns)}; {hint}"
        raise InputError(f"{error} ({found})") from None


def locate_rows(base: Path, file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a metadata file with whole paths, and the split if the file's folder is called after one."""
    split = match_split(file.parent.name) if file.parent != base else None
    tops = {Path(str(row.get("file_name"))).parts[:-1][:1] for row in rows}
    found = sorted(top[0] for top in tops if top and match_split(top[0]))
    if found and file.parent == base and not any("split" in row for row in rows):
        raise InputError(
            f"{file}: its labels are not read, as the folders {format_list(found)} can be splits or hold training"
            " images; put a metadata file into the folder of each split, or give this file with --labels (its column"
            " called split, if there is one, assigns the images to splits)"
        )
    located = [{**row, "file_name": str(file.parent / str(row.get("file_name")))} for row in rows]
    return located if split is None else [{**row, "split": split} for row in located]


def find_metadata_files(root: Path) -> tuple[Path, list[Path]]:
    """Finds the metadata files in a folder, in the folders in it, or inside a wrapping folder; returns that as well."""
    folders = [root, *(Path(entry.path) for entry in list_entries(root) if is_folder(entry))]
    files = [path for folder in folders for name in METADATA_FILES if (path := folder / name).is_file()]
    inner = find_only_folder(root) if not files else None
    return (root, files) if inner is None else find_metadata_files(inner)


def read_columns(file: Path) -> list[str]:
    """Reads the names of a metadata file's columns, of which the rows need not be well-formed if they have no label."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(file).names)
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as opened:
        if file.suffix == ".csv":
            return next(csv.reader(opened), [])
        first = json.loads(opened.readline() or "{}")
        return list(first) if isinstance(first, dict) else []


def check_label_texts(texts: Iterable[str | None], file: Path) -> None:
    """Raises InputError for labels that are a class or a missing label, such as "None"."""
    for text in texts:
        if text is not None and text.strip() in AMBIGUOUS_TEXTS:
            raise InputError(
                f"{file}: the label {text!r} may be a class or stand for a missing label; rename the class, or leave"
                " the cells of missing labels empty"
            )


def read_class_folders(root: Path, image_column: str | None, label_column: str | None) -> LabelledFiles:
    """Reads a folder with one sub-folder per class (`fastvit.data.folders`)."""
    for kind, given in (("image", image_column), ("label", label_column)):
        if given not in (None, kind):
            raise InputError(f"{kind}_column: expected one of image, label, got {given!r}")
    listing = list_images(root)
    splits = listing.splits
    names = sorted({name for classes in splits.values() for name in classes})
    notes = listing.describe(root) + check_classes(names, splits, str(root))
    labels = {name: label for label, name in enumerate(names)}
    files = {
        split: [(path, labels[name]) for name, paths in sorted(classes.items()) for path in paths]
        for split, classes in splits.items()
    }
    return LabelledFiles(str(root), names, files, notes)


def check_classes(names: Sequence[str], present: dict[str, Iterable[str]] | dict[str, Any], source: str) -> list[str]:
    """Checks that there are at least two classes to train.

    Args:
        names: The declared classes.
        present: Split -> the classes with images in it.
        source: The dataset in messages.

    Returns:
        Notes on declared classes without images; none if there is no training split.

    Raises:
        InputError: If fewer than two classes have training images, or a class has images in other splits only.
    """
    if TRAIN not in present:
        return []
    trained = set(present[TRAIN])
    untrained = sorted({name for split in present.values() for name in split} - trained)
    if untrained:
        raise InputError(f"{source}: no training images for {len(untrained)} class(es): {', '.join(untrained[:10])}")
    if len(trained) < 2:
        found = sorted(trained)
        raise InputError(f"{source}: expected at least 2 classes, found {len(found)}: {', '.join(found)}")
    empty = [name for name in names if name not in trained]
    return [f"no images of {len(empty)} declared class(es): {format_list(empty)}"] if empty else []


@contextlib.contextmanager
def wrap_read_errors(source: str) -> Iterator[None]:
    """Turns errors of the `datasets` library for a missing or broken dataset into an InputError of one line."""
    import datasets

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # five retries, ten lines
    try:
        yield
    except InputError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"dataset: there is no {source!r} on the hub, or it is private ({error})") from None
    except ConnectionError:
        raise InputError(
            f"dataset: cannot reach the hub for {source!r}; without a network use --data-dir FOLDER (a folder of"
            " images, one sub-folder per class) or --dataset generated"
        ) from None
    except (
        datasets.exceptions.DatasetGenerationError,
        ValueError,
        FileNotFoundError,
        csv.Error,
        RecursionError,
    ) as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise InputError(f"{source}: expected images, one folder per class ({reason})") from None


def normalize_splits(loaded: dict[str, Any], source: str) -> dict[str, Any]:
    """Maps the usual names of splits to "train", "validation" and "test"."""
    splits: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, split in loaded.items():
        usual = SPLIT_WORDS.get(name, name)
        if usual in splits:
            raise InputError(f"{source}: expected one split for {usual}, found two: {given[usual]} and {name}")
        splits[usual], given[usual] = split, name
    return splits


def check_training_split(splits: Iterable[str], source: str) -> None:
    """Raises InputError if there are no training images."""
    if TRAIN not in splits:
        raise InputError(f"{source}: expected a split called 'train', found {', '.join(splits)}")


def find_column(kind: str, given: str | None, features, usual: tuple[str, ...], feature_type: type, source: str) -> str:
    """Returns the column of images or labels: the given one, else the first with a usual name, else one of the type."""
    if given is not None:
        if given not in features:
            raise InputError(f"{kind}_column: expected one of {', '.join(features)}, got {given!r}")
        return given
    for name in [n for n in usual if n in features] + [n for n, f in features.items() if isinstance(f, feature_type)]:
        return name
    raise InputError(
        f"{source}: found no {kind} column among {', '.join(features)}; name it with --{kind}-column"
        + (" (in a folder, each class is a sub-folder; at least 2 are needed)" if kind == "label" else "")
    )


def find_label_columns(given: str | None, others: Sequence[str], task: str) -> list[str]:
    """Returns the columns of labels if there are several: those of "a,b", or all `others` of a task without classes.

    Args:
        given: The value of --label-column.
        others: The columns that may hold labels.
        task: What the labels are for.
    """
    if given is not None and given not in others and "," in given:
        names = [name.strip() for name in given.split(",")]
        if unknown := [name for name in names if name not in others]:
            raise InputError(f"label_column: expected some of {', '.join(others)}, got {', '.join(unknown)}")
        return names
    usual = (*LABEL_COLUMNS, *MORE_LABEL_COLUMNS)
    is_given = given is not None or any(name.strip().lower() in usual for name in others)
    return list(others) if task in ("multi-label", "regression") and len(others) > 1 and not is_given else []


# ---------------------------------------------------------------------------------------------------------------------
# Values of a label column


def is_absent(value: Any) -> bool:
    """Whether a cell of a label column is empty: None or NaN."""
    return value is None or value != value


def find_values(values: Iterable[Any], source: str, total: int | None = None) -> list[Any]:
    """Returns the sorted labels of the training images, without missing ones: None, NaN, and -1 if all are.

    Args:
        values: The labels.
        source: The dataset in messages.
        total: The number of images, if `values` holds each label once [the number of values].

    Raises:
        InputError: If -1 may be a class or a missing label, or the labels are lists or measurements.
    """
    found, count = set(), 0
    for value in values:
        if isinstance(value, (list, tuple, dict)):
            raise InputError(f"{source}: expected one label per image, found {value!r}")
        if not is_absent(value):
            found.add(value)
            count += 1
    if -1 in found and len(found) != 2:
        if found != {-1}:
            others = format_list([format_label(value) for value in sort_values(found - {-1})])
            raise InputError(
                f"{source}: the label -1 beside {others} may be a class or stand for a missing label; give the class"
                " another number, or leave missing labels empty (a ClassLabel column has them as -1)"
            )
        found.clear()
    if not found:
        raise InputError(f"{source}: expected labels of the training images, found none")
    fractions = [value for value in found if is_fraction(value)]
    if fractions and 2 * len(found) > (count if total is None else total):
        raise InputError(
            f"{source}: expected classes, found numbers that hardly repeat, such as {fractions[0]}; --label-column"
            " names another column"
        )
    return sort_values(found)


def is_fraction(value: Any) -> bool:
    """Whether a label is a number, or the text of one, that is not whole."""
    try:
        return not float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False


def sort_values(values: Iterable[Any]) -> list[Any]:
    """Sorts labels: numbers by value, others as text."""
    values = list(values)
    return sorted(values, key=None if all(isinstance(value, (int, float)) for value in values) else str)


def format_label(value: Any) -> str:
    """Returns the class name of a label: "3" for 3.0, as a column of integers with an empty cell is read."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def map_labels(feature, train_values: Iterable[Any], source: str) -> tuple[list[str], dict[Any, int]]:
    """Returns the class names, and value of the label column -> class; other values are missing labels or unknown."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names), {label: label for label in range(len(feature.names))}
    values = find_values(train_values, source)
    return [format_label(value) for value in values], {value: label for label, value in enumerate(values)}


def is_missing(value: Any, labels: dict[Any, int]) -> bool:
    """Whether a label is missing: None, NaN, or -1 where that is no class."""
    return is_absent(value) or (value == -1 and -1 not in labels)
