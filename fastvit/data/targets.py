"""What columns of labels stand for: one class per image, several labels per image, or numbers (regression).

Several labels are a list, a text such as "rust|spot", or one column of 0 and 1 per label. Where columns can be read in
two ways, `task` decides; without it they are an error.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from fastvit.data.folders import format_list
from fastvit.data.sources import TRAIN, format_label, is_absent, sort_values
from fastvit.errors import InputError

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single-label", "multi-label", "regression"
SEPARATORS = ("|", ";", ",")  # of the labels in a text: the first of them that occurs in the column

Rows = Mapping[str, Sequence[Sequence[Any]]]  # split -> the cells of each image, one for each column


@dataclass
class Targets:
    """Several labels per image, or numbers.

    Attributes:
        names: The labels, or the columns of the numbers.
        values: Split -> float32 [images, names].
        kept: Split -> the rows that have labels.
        notes: What was left out.
    """

    names: list[str]
    values: dict[str, np.ndarray]
    kept: dict[str, list[int]]
    notes: list[str]


def resolve_task(task: str, rows: Rows, columns: Sequence[str], source: str) -> str:
    """Returns the task that columns of labels are for; raises InputError if it is "auto" and there are two readings."""

    def build_error(found: str, reading: str, other: str) -> InputError:
        return InputError(f"{source}: {found} may be one class per image (--task single-label) or {reading} ({other})")

    if task != "auto":
        return task
    cells = [cell for cell in list_cells(rows) if not is_absent(cell)]
    numbers = [to_number(cell) for cell in cells]
    several = ("several labels per image", f"--task {MULTI_LABEL}")
    if cells and (all(map(is_list, cells)) or any(isinstance(cell, (list, tuple)) for cell in cells)):
        return MULTI_LABEL
    if len(columns) > 1:
        if not all(number in (0, 1) for number in numbers):
            return REGRESSION
        if any(sum(map(bool, map(to_number, row))) != 1 for row in chain(*rows.values()) if is_complete(row)):
            return MULTI_LABEL
        raise build_error(f"columns with a single 1 per image ({', '.join(columns)})", *several)
    if None not in numbers and any(number % 1 for number in numbers if number is not None):
        if 2 * len(set(numbers)) > len(numbers):
            return REGRESSION
        raise build_error(f"fractions that repeat, such as {cells[0]},", "numbers", f"--task {REGRESSION}")
    parts = {text: {part.strip() for part in re.split("[|;]", text)} for text in set(cells) if isinstance(text, str)}
    counts = Counter(chain.from_iterable(parts.values()))
    for text in sorted(parts):
        if len(parts[text]) > 1 and any(counts[part] > 1 for part in parts[text]):
            raise build_error(f"the label {text!r}", *several)
    return SINGLE_LABEL


def list_classes(rows: Rows, columns: Sequence[str], source: str) -> dict[str, list[Any]]:
    """Returns the class of each image: the cell of the only column, or the name of the column with a 1."""
    if len(columns) == 1:
        return {split: [cell for (cell,) in cells] for split, cells in rows.items()}

    def find_class(row: Sequence[Any]) -> str | None:
        numbers = [to_number(cell) for cell in row]
        if is_complete(row) and (numbers.count(1), numbers.count(0)) != (1, len(row) - 1):
            raise InputError(f"{source}: expected a single 1 in {', '.join(columns)}, found {', '.join(map(str, row))}")
        return columns[numbers.index(1)] if is_complete(row) else None

    return {split: list(map(find_class, cells)) for split, cells in rows.items()}


def read_targets(
    task: str, rows: Rows, columns: Sequence[str], source: str, class_names: Sequence[str] | None = None
) -> Targets:
    """Reads several labels per image, or numbers.

    Args:
        task: "multi-label" or "regression".
        rows: The cells of the columns.
        columns: Their names.
        source: The dataset in messages.
        class_names: The declared names of labels that are numbers.

    Returns:
        The targets of the splits that have any.

    Raises:
        InputError: If a cell has another type, may be read in two ways, or has a label that no training image has.
    """
    kept = {split: [i for i, row in enumerate(cells) if is_complete(row)] for split, cells in rows.items()}
    notes = [
        f"{split}: {len(rows[split]) - len(indices)} of {len(rows[split])} images have no label and are left out"
        for split, indices in kept.items()
        if len(indices) < len(rows[split])
    ]
    kept = {split: indices for split, indices in kept.items() if indices}
    if not kept or (TRAIN in rows and TRAIN not in kept):
        raise InputError(f"{source}: expected labels of the training images, found none")
    cells = {split: [rows[split][i] for i in indices] for split, indices in kept.items()}
    numbers = {split: [[to_number(cell) for cell in row] for row in found] for split, found in cells.items()}
    is_binary = class_names is None and all(number in (0, 1) for number in list_cells(numbers))
    names = list(columns)
    if task == MULTI_LABEL and len(columns) == 1 and not is_binary:
        if notes and any(isinstance(cell, str) for cell in list_cells(cells)):
            raise InputError(
                f"{source}: an empty cell may be an image without labels or a missing one; write [] for no labels, or"
                " leave out the row"
            )
        names, numbers = encode_labels(cells, class_names, source)
    for row, found in zip(chain(*cells.values()), chain(*numbers.values()), strict=True):
        is_wrong = [number is None or (task == MULTI_LABEL and number not in (0, 1)) for number in found]
        if any(is_wrong):
            wrong, expected = is_wrong.index(True), "0 or 1 for each label" if task == MULTI_LABEL else "numbers"
            raise InputError(f"{source}: column {names[wrong]!r}: expected {expected}, found {row[wrong]!r}")
    values = {split: np.array(matrix, dtype=np.float32) for split, matrix in numbers.items()}
    if task == MULTI_LABEL:
        missing = [name for name, column in zip(names, get_trained(values).T, strict=True) if not column.any()]
        used = [name for name in missing if any(matrix[:, names.index(name)].any() for matrix in values.values())]
        if used or len(missing) == len(names):
            used = used or names
            raise InputError(f"{source}: no training images for {len(used)} label(s): {format_list(used)}")
        notes += [f"no images of {len(missing)} declared label(s): {format_list(missing)}"] if missing else []
    return Targets(names, values, kept, notes)


def get_trained(splits: Mapping[str, Any]) -> Any:
    """The training split, which has every label; without one, as for an evaluation, the only split."""
    return splits.get(TRAIN, next(iter(splits.values())))


def encode_labels(
    rows: Rows, class_names: Sequence[str] | None, source: str
) -> tuple[list[str], dict[str, list[list[float | None]]]]:
    """Returns the labels in lists, or in texts with separators, and for each image 1 where it has the label."""
    texts = [cell for cell in list_cells(rows) if isinstance(cell, str) and not is_list(cell)]
    separator = next((mark for mark in SEPARATORS if any(mark in text for text in texts)), None)
    lists = {split: [parse_labels(cell, separator, source) for (cell,) in found] for split, found in rows.items()}
    everything = list(chain.from_iterable(lists.values()))
    is_binary = bool(everything[0]) and all(label in (0, 1) for label in chain(*everything))
    if class_names is None and is_binary and len({len(labels) for labels in everything}) == 1:
        raise InputError(
            f"{source}: lists such as {everything[0]} may be 0 or 1 for each label, or the numbers of labels; give one"
            " column per label, or names"
        )
    known = range(len(class_names)) if class_names else sort_values(set(chain(*get_trained(lists))))
    unknown = {format_label(label) for label in chain(*everything) if label not in known}
    if unknown:
        raise InputError(f"{source}: no training images for {len(unknown)} label(s): {format_list(sorted(unknown))}")
    encoded: dict[str, list[list[float | None]]] = {
        split: [[float(label in labels) for label in known] for labels in found] for split, found in lists.items()
    }
    return list(class_names or map(format_label, known)), encoded


def parse_labels(cell: Any, separator: str | None, source: str) -> list[Any]:
    """Returns the labels in a cell: a list, the text of a list, or texts between separators."""
    labels = list(cell) if isinstance(cell, (list, tuple)) else [cell]
    if isinstance(cell, str) and is_list(cell):
        try:
            labels = ast.literal_eval(cell)  # JSON, or as pandas writes lists
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise InputError(f"{source}: expected a list of labels, such as ['a', 'b'], found {cell[:80]!r}") from None
    elif isinstance(cell, str) and separator:
        labels = [part.strip() for part in cell.split(separator) if part.strip()]
    for label in labels:
        if not isinstance(label, (str, int)) and ((number := to_number(label)) is None or number % 1):
            raise InputError(f"{source}: expected labels, found {label!r} in {str(cell)[:80]}")
    return [format_label(label) for label in labels] if any(isinstance(label, str) for label in labels) else labels


def list_cells(rows: Mapping[str, Any]) -> list[Any]:
    return [cell for split in rows.values() for row in split for cell in row]


def is_complete(row: Sequence[Any]) -> bool:
    return not any(map(is_absent, row))


def is_list(cell: Any) -> bool:
    """Whether a cell is a list, or the text of one."""
    return isinstance(cell, (list, tuple)) or (isinstance(cell, str) and bool(re.fullmatch(r"\s*\[.*\]\s*", cell)))


def to_number(cell: Any) -> float | None:
    """Returns the number in a cell, true and false as 1 and 0; None for other cells and beyond float32."""
    try:
        number = float({"true": 1, "false": 0}.get(str(cell).strip().lower(), cell))
    except (TypeError, ValueError, OverflowError):
        return None
    return number if abs(number) < np.finfo(np.float32).max else None
