"""Tables of file names and labels: CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastvit.data.folders import find_images, format_list, match_split
from fastvit.data.images import list_image_suffixes
from fastvit.data.sources import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    MORE_LABEL_COLUMNS,
    TRAIN,
    LabelledFiles,
    check_classes,
    check_label_texts,
    find_label_columns,
    format_label,
    is_absent,
    is_missing,
    map_labels,
)
from fastvit.data.targets import SINGLE_LABEL, list_classes, read_targets, resolve_task
from fastvit.errors import InputError, escape_unprintable

FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "path",
    "filepath",
    "file_path",
    "image_path",
    "image_name",
    "image_id",
)
NAME_COLUMNS = (*FILE_COLUMNS, *IMAGE_COLUMNS, "id")
SPLIT_COLUMNS = ("split", "set", "subset")
MISSING_TEXTS = ("", "nan", "NaN")  # pandas writes an empty cell in one of these ways


def read_label_file(
    file: Path, root: Path, image_column: str | None, label_column: str | None, task: str = "auto"
) -> LabelledFiles:
    """Reads a table of file names and labels.

    A column called "split" assigns the images to splits. Names may lack the ending of the file, and the folders below
    `root`, as long as one file matches.

    Args:
        file: The table: .csv, .tsv, .txt, .jsonl or .parquet. A CSV file of two columns needs no header.
        root: The folder that the names are relative to.
        image_column: The column of the names [found by name, or by its files].
        label_column: The column of the labels [found by name, or the only other one], or several: "a,b".
        task: What the labels are for, or "auto" (`fastvit.data.targets`).

    Returns:
        The files.

    Raises:
        InputError: If the table or its columns cannot be read, its files are not there, or a file has two labels.
    """
    rows, resolve = read_rows(file), build_resolver(root)
    columns = list(rows[0]) if rows else []
    is_header = bool(set(columns) & {image_column, label_column}) or find_by_name(columns, NAME_COLUMNS) is not None
    if not is_header and len(columns) == 2 and is_file(resolve, columns[0]):
        rows = [dict(zip(("file_name", "label"), row, strict=True)) for row in [columns, *(r.values() for r in rows)]]
    return label_rows(file, rows, root, image_column, label_column, task)


def label_rows(
    file: Path,
    rows: list[dict[str, Any]],
    root: Path,
    image_column: str | None,
    label_column: str | None,
    task: str = "auto",
) -> LabelledFiles:
    """Labels files by the rows of the table `file`; arguments and errors as those of `read_label_file`."""
    if not rows:
        raise InputError(f"{file}: expected rows of file names and labels, found none")
    resolve = build_resolver(root)
    split_column = find_by_name(rows[0], SPLIT_COLUMNS)
    image_column, columns = find_columns(rows[0], resolve, image_column, label_column, split_column, task)

    if file.suffix not in (".jsonl", ".parquet"):
        check_label_texts((row[column] for row in rows for column in columns), file)
    splits: dict[str, dict[str, Any]] = {}
    num_found, repeated = 0, 0
    for number, row in enumerate(rows, 1):
        given = row.get(split_column) if split_column is not None else None
        split = TRAIN if split_column is None else match_split(str(given))
        if split is None:
            raise InputError(f"{file}: row {number}: expected train, validation or test as the split, found {given!r}")
        path, label = resolve(str(row.get(image_column))), [read_label(row.get(column)) for column in columns]
        num_found += os.path.isfile(path)  # noqa: PTH113 (a million of them)
        known = splits.setdefault(split, {})
        for first, second in zip(known.get(path, label), label, strict=True):
            if first != second and not (is_missing(first, {}) and is_missing(second, {})):
                raise InputError(
                    f"{file}: expected one label per image, found {first!r} and {second!r} for"
                    f" {escape_unprintable(path)}"
                )
        repeated += path in known
        known[path] = label
    if not num_found:
        raise InputError(
            f"{file}: found none of its {len(rows)} files in {root}, such as {rows[0].get(image_column)}; --data-dir"
            " names their folder"
        )
    notes = [f"{repeated} rows of {file} repeat a file and are left out"] if repeated else []
    listed = {os.path.normpath(path) for split in splits.values() for path in split}
    found = [os.path.normpath(path) for path in find_images(root)]
    if unlisted := sum(path not in listed for path in found):
        notes.append(f"{unlisted} of {len(found)} images in {root} have no row in {file} and are left out")
    cells = {name: list(split.values()) for name, split in splits.items()}
    task = resolve_task(task, cells, columns, str(file))
    if task == SINGLE_LABEL:
        classes = list_classes(cells, columns, str(file))
        pairs = {name: dict(zip(split, classes[name], strict=True)) for name, split in splits.items()}
        return build_labelled_files(file, pairs, notes)
    targets = read_targets(task, cells, columns, str(file))
    paths = {name: list(split) for name, split in splits.items()}
    files = {
        name: [(paths[name][row], value) for row, value in zip(kept, targets.values[name], strict=True)]
        for name, kept in targets.kept.items()
    }
    return LabelledFiles(str(file), targets.names, files, notes + targets.notes, task)


def find_columns(
    row: dict[str, Any],
    resolve: Callable[[str], str],
    image_column: str | None,
    label_column: str | None,
    split_column: str | None,
    task: str,
) -> tuple[str, list[str]]:
    """Returns the columns of file names and of labels; arguments as in `read_label_file`, with the first row."""
    image_column = image_column or find_by_name(row, NAME_COLUMNS)
    image_column = image_column or next((name for name in row if is_file(resolve, row[name])), None)
    others = [name for name in row if name not in (image_column, split_column)]
    if image_column in row and (label_columns := find_label_columns(label_column, others, task)):
        return image_column, label_columns
    label_column = label_column or find_by_name(others, (*LABEL_COLUMNS, *MORE_LABEL_COLUMNS))
    label_column = label_column or (others[0] if len(others) == 1 else None)
    several = f" (several: {','.join(others[:2])})" if len(others) > 1 else ""
    for kind, name in (("image", image_column), ("label", label_column)):
        if name not in row:
            found = "found none" if name is None else f"got {name!r}"
            names = f"--{kind}-column names it{several if kind == 'label' else ''}"
            raise InputError(f"{kind}_column: expected one of {', '.join(row)}, {found}; {names}")
    assert image_column is not None and label_column is not None
    return image_column, [label_column]


def build_labelled_files(file: Path, splits: dict[str, dict[str, Any]], notes: list[str]) -> LabelledFiles:
    """Numbers the classes, and leaves out the files without a label."""
    convert = choose_number_type(value for split in splits.values() for value in split.values())
    values = {name: {path: convert(value) for path, value in split.items()} for name, split in splits.items()}
    counted = [values[TRAIN]] if TRAIN in values else values.values()
    _, trained = map_labels(None, (value for split in counted for value in split.values()), str(file))
    present = {
        name: {format_label(value) for value in split.values() if not is_missing(value, trained)}
        for name, split in values.items()
    }
    names = [format_label(value) for value in trained]
    notes += check_classes(names, present, str(file))
    files = {}
    for name, split in values.items():
        files[name] = [(path, trained[value]) for path, value in split.items() if not is_missing(value, trained)]
        if num_missing := len(split) - len(files[name]):
            notes.append(f"{name}: {num_missing} of {len(split)} images have no label and are left out")
    return LabelledFiles(str(file), names, {name: split for name, split in files.items() if split}, notes)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a table."""
    if not file.is_file():
        raise InputError(f"--labels: expected a file of file names and labels, found none at {file}")
    try:
        if file.suffix == ".parquet":
            import datasets
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(file)
            features, rows = datasets.Features.from_arrow_schema(table.schema), table.to_pylist()
            for name in [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]:
                for row in rows:
                    row[name] = None if row[name] in (None, -1) else features[name].int2str(row[name])
            return rows
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix in (".jsonl", ".ndjson"):
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise InputError(f"{file}: expected a JSON object per line")
            return rows
        if file.suffix not in (".csv", ".tsv", ".txt"):
            raise InputError(f"--labels: expected a .csv, .tsv, .jsonl or .parquet file, got {file}")
        header = text.partition("\n")[0]
        marks = ("\t", ",", ";", " ") if file.suffix == ".txt" else ("\t", ",", ";")
        delimiter = next((mark for mark in marks if mark in header), ",")
        opened = io.StringIO(text, newline="")
        lines = [line for line in csv.reader(opened, delimiter=delimiter, skipinitialspace=True) if line]
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: cannot be read ({next(iter(str(error).splitlines()), '')})") from None
    for number, line in enumerate(lines, 1):
        if len(line) != len(lines[0]):
            raise InputError(f"{file}: row {number}: expected {len(lines[0])} columns, found {len(line)}")
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def build_resolver(root: Path) -> Callable[[str], str]:
    """Returns a function: name in a table -> path, of a file that exists if there is one."""
    by_name: dict[str, set[str]] = {}

    def resolve(name: str) -> str:
        path = os.path.join(root, name)  # noqa: PTH118 (a million of them)
        if os.path.isfile(path):  # noqa: PTH113
            return path
        if not by_name:
            by_name[""] = set()
            for found in find_images(root):
                for key in {Path(found).name, Path(found).stem}:
                    by_name.setdefault(key, set()).add(found)
        endings = [path + suffix for suffix in list_image_suffixes() if os.path.isfile(path + suffix)]  # noqa: PTH113
        matches = sorted(endings or by_name.get(name, set()))
        if len(matches) > 1:
            raise InputError(f"{name}: expected one file in {root}, found {len(matches)}: {format_list(matches, 3)}")
        return matches[0] if matches else path

    return resolve


def is_file(resolve: Callable[[str], str], name: Any) -> bool:
    """Whether a cell is the name of one file."""
    try:
        return isinstance(name, str) and bool(name) and os.path.isfile(resolve(name))  # noqa: PTH113
    except InputError:  # several files match
        return False


def find_by_name(columns: Iterable[str], usual: tuple[str, ...]) -> str | None:
    """Returns the column with the first of the usual names, in upper or lower case."""
    by_name = {name.strip().lower(): name for name in reversed(list(columns))}
    return next((by_name[name] for name in usual if name in by_name), None)


def read_label(value: Any) -> Any:
    """Returns a label, None for an empty cell."""
    if isinstance(value, str):
        value = value.strip()
        return None if value in MISSING_TEXTS else value
    return value


def choose_number_type(values: Iterable[Any]) -> Callable[[Any], Any]:
    """Returns the conversion of labels: whole numbers as text to numbers, so that 10 follows 9; mixed ones to text."""
    present = [value for value in values if not is_absent(value) and not isinstance(value, (list, dict))]
    texts = {value for value in present if isinstance(value, str)}
    if texts and all(is_whole_number(text) for text in texts):
        return lambda value: int(value) if isinstance(value, str) else value
    if texts and len(texts) < len(set(present)):
        return lambda value: value if is_absent(value) else format_label(value)
    return lambda value: value


def is_whole_number(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdecimal() and text == str(int(text))
