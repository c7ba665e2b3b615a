"""Predictions as a .csv, .jsonl or .parquet file, which an interrupted command continues.

While a command runs, it appends one line of JSON per image to a journal beside the file. At the end it writes the file
from the journal, whole or not at all. A command that finds a journal of the same model and options leaves out its
images.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fastvit.errors import InputError
from fastvit.files import wrap_write_errors

Writers = dict[str, Callable[[Path, Iterator[dict[str, Any]], dict[str, Any]], None]]
PARQUET_ROWS = 10_000  # rows of one row group


class PredictionFile:
    """A file of predictions that is being written; a context manager.

    Args:
        path: the file, whose suffix names the format.
        settings: the model and the options that change the predictions; those of a journal must be the same.
        overwrite: whether to replace an existing file, and to start over beside a journal.
        writers: suffix -> function that writes the rows of a journal with its settings; default: of predictions.

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
        self.journal = path.with_name(f".{path.name}.journal")
        if overwrite:
            self.journal.unlink(missing_ok=True)
        self.done = self._read_journal()
        with wrap_write_errors(self.journal):
            self._file: TextIO = self.journal.open("a", encoding="utf-8")
            if self.journal.stat().st_size == 0:
                self._write_line(settings)

    def add(self, name: str, classes: list[Any], error: str = "") -> None:
        """Append the prediction of an image, or its error, to the journal."""
        self._write_line({"image": name, "classes": classes, "error": error})

    def finish(self) -> None:
        """Write the file and delete the journal."""
        self._file.close()
        partial = self.path.with_name(f".{self.path.name}.partial")
        with wrap_write_errors(self.path):
            try:
                settings = dict(self.settings)
                if settings.get("task") == "multi-label":  # any number of labels reaches its threshold
                    settings["top"] = max([1, *(len(row["classes"]) for row in self.read_rows())])
                self.writers[self.path.suffix](partial, self.read_rows(), settings)
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)
            self.journal.unlink()

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def _write_line(self, content: dict[str, Any]) -> None:
        with wrap_write_errors(self.journal):
            self._file.write(json.dumps(content) + "\n")  # ASCII: names may hold bytes that are no text
            self._file.flush()

    def _read_journal(self) -> set[str]:
        """Return the names of the images in the journal, and remove a last line that was not written whole."""
        if not self.journal.is_file():
            return set()
        content = self.journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.journal.open("r+b") as file:
                file.truncate(len(whole))
        try:
            first, *rows = [json.loads(line) for line in whole.splitlines()] or [self.settings]
            done = {row["image"] for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.journal}: not a journal of predictions ({error}); start over (--overwrite)"
            ) from None
        if first != self.settings:
            differing = sorted(name for name in {*first, *self.settings} if first.get(name) != self.settings.get(name))
            changes = ", ".join(f"{name} {first.get(name)!r}, now {self.settings.get(name)!r}" for name in differing)
            raise InputError(
                f"--output: {self.path} was started with {changes}: continue with the same, or start over (--overwrite)"
            )
        return done

    def read_rows(self) -> Iterator[dict[str, Any]]:
        with self.journal.open(encoding="utf-8") as file:
            next(file)
            yield from map(json.loads, file)


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
