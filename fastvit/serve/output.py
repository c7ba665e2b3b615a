"""Predictions as a .csv, .jsonl or .parquet file, which an interrupted command continues.

While a command runs, each of its processes appends one line of JSON per image to its own journal beside the file. At
the end the first process writes the file from the journals, in the order of the images, whole or not at all. A command
that finds journals of the same model and options leaves out their images, whatever their number of processes was.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastvit.errors import InputError
from fastvit.files import wrap_write_errors

Writers = dict[str, Callable[[Path, Iterator[dict[str, Any]], dict[str, Any]], None]]
PARQUET_ROWS = 10_000  # rows of one row group


class PredictionFile:
    """A file of predictions that is being written.

    Args:
        path: the file, whose suffix names the format.
        settings: the model and the options that change the predictions; those of a journal must be the same.
        overwrite: whether to replace an existing file, and to start over beside journals.
        writers: suffix -> function that writes the rows of a journal with its settings; default: of predictions.

    Attributes:
        done: the names of the images in the journals.

    Raises:
        InputError: the suffix is unknown, the file exists, or a journal has other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False, writers: Writers | None = None):
        self.writers = writers = writers or WRITERS
        if path.suffix not in writers:
            raise InputError(f"--output: expected a file ending in {', '.join(writers)}, got {path}")
        if not path.parent.is_dir():
            raise InputError(f"--output: no such folder: {path.parent}")
        if path.exists() and not overwrite:
            raise InputError(f"--output: {path} exists already: choose another name, or replace it (--overwrite)")
        self.path, self.settings = path, settings
        if overwrite:
            self._delete_journals()
        self.done = {name for journal in self._list_journals() for name, _ in self._scan(journal)}

    def open_journal(self, rank: int = 0) -> BinaryIO:
        """Open the journal of a process, to which `add` appends."""
        journal = self.path.with_name(f".{self.path.name}.journal{f'-{rank}' if rank else ''}")
        with wrap_write_errors(journal):
            file = journal.open("ab")
        if journal.stat().st_size == 0:
            self._write_line(file, self.settings)
        return file

    def add(self, file: BinaryIO, name: str, classes: list[Any], error: str = "") -> None:
        """Append the prediction of an image, or its error, to a journal."""
        self._write_line(file, {"image": name, "classes": classes, "error": error})

    def read_rows(self, names: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows of the journals, in the order of `names`; by default all, in their own order."""
        journals = self._list_journals()
        places = {name: (index, place) for index, path in enumerate(journals) for name, place in self._scan(path)}
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(journal.open("rb")) for journal in journals]
            for index, place in places.values() if names is None else map(places.__getitem__, names):
                files[index].seek(place)
                yield json.loads(files[index].readline())

    def merge(self, names: Iterable[str] | None = None) -> int:
        """Write the rows of `read_rows`, whole or not at all, and delete the journals; returns the number of errors."""
        failed = 0

        def count_errors() -> Iterator[dict[str, Any]]:
            nonlocal failed
            for row in self.read_rows(names):
                failed += bool(row["error"])
                yield row

        partial = self.path.with_name(f".{self.path.name}.partial")
        with wrap_write_errors(self.path):
            try:
                settings = dict(self.settings)
                if settings.get("task") == "multi-label":  # any number of labels reaches its threshold
                    settings["top"] = max([1, *(len(row["classes"]) for row in self.read_rows(names))])
                self.writers[self.path.suffix](partial, count_errors(), settings)
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)
            self._delete_journals()
        return failed

    def _list_journals(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{glob.escape(self.path.name)}.journal*"))

    def _delete_journals(self) -> None:
        for journal in self._list_journals():
            journal.unlink()

    def _write_line(self, file: BinaryIO, content: dict[str, Any]) -> None:
        with wrap_write_errors(self.path):
            file.write(json.dumps(content).encode() + b"\n")  # ASCII: names may hold bytes that are no text
            file.flush()

    def _scan(self, journal: Path) -> Iterator[tuple[str, int]]:
        """Yield the images in a journal with their places in bytes, and remove a last line not written whole."""
        with journal.open("r+b") as file:
            place = 0
            for line in iter(file.readline, b""):
                if not line.endswith(b"\n"):
                    file.truncate(place)
                    return
                try:
                    content = json.loads(line)
                    if place:
                        yield content["image"], place
                    else:
                        self._check_settings(content)
                except (ValueError, TypeError, KeyError) as error:
                    if isinstance(error, InputError):
                        raise
                    raise InputError(
                        f"{journal}: not a journal of predictions ({error}); start over (--overwrite)"
                    ) from None
                place += len(line)

    def _check_settings(self, found: dict[str, Any]) -> None:
        """Raise InputError if the settings of a journal differ."""
        differing = sorted(name for name in {*found, *self.settings} if found.get(name) != self.settings.get(name))
        if differing:
            changes = ", ".join(f"{name} {found.get(name)!r}, now {self.settings.get(name)!r}" for name in differing)
            raise InputError(
                f"--output: {self.path} was started with {changes}: continue with the same, or start over (--overwrite)"
            )


def write_csv(path: Path, rows: Iterator[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the columns image, label, probability, label_2, probability_2, ..., error, or image, numbers, error."""
    top, names = settings["top"], settings.get("names")
    numbers = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    header = names or [f"{kind}{number}" for number in numbers for kind in ("label", "probability")]
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *header, "error"])
        for row in rows:
            cells = [cell for pair in row["classes"] for cell in (pair[1:] if names else pair)]
            writer.writerow([row["image"], *cells, *[""] * (len(header) - len(cells)), row["error"]])


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the lines of `fastvit predict --json`; an image that could not be read has `error` instead of results."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(build_record(row["image"], row["classes"], row["error"], settings["task"])) + "\n")


def build_record(
    name: str, classes: list[tuple[str, float]], error: str = "", kind: str = "single-label"
) -> dict[str, Any]:
    """Build the JSON object of an image: its `classes`, or the `values` of a regression."""
    if error:
        return {"image": name, "error": error}
    if kind == "regression":
        return {"image": name, "values": dict(classes)}
    return {"image": name, "classes": [{"label": label, "probability": round(score, 6)} for label, score in classes]}


def write_parquet(path: Path, rows: Iterator[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the columns image, label, probability, labels, probabilities and error, or image, numbers and error."""
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.string(), pyarrow.float32()
    lists = [("labels", pyarrow.list_(text)), ("probabilities", pyarrow.list_(number))]
    names = settings.get("names")
    columns = [(name, number) for name in names] if names else [("label", text), ("probability", number), *lists]
    schema = pyarrow.schema([("image", text), *columns, ("error", text)])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            labels, scores = ([pair[index] for pair in row["classes"]] for index in (0, 1))
            batch.append({
                "image": row["image"].encode("utf-8", "backslashreplace").decode(),
                "label": labels[0] if labels else None, "probability": scores[0] if scores else None,
                "labels": labels, "probabilities": scores, **(dict(row["classes"]) if names else {}),
                "error": row["error"] or None,
            })  # fmt: skip
            if len(batch) == PARQUET_ROWS:
                writer.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        writer.write_table(pyarrow.Table.from_pylist(batch, schema))


WRITERS: Writers = {
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
}
