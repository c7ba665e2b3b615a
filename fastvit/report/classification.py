"""Classification metrics and their plain-text report: confusion matrix, per-class precision, recall and F1."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_MATRIX_CLASSES = 20  # a wider confusion matrix does not fit a terminal
MAX_CONFUSIONS = 20
MAX_NAME_WIDTH = 32  # longest class name in a table, in terminal columns


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Count how often each true class was predicted as each class.

    Args:
        labels: integers `[N]` from 0 to num_classes - 1, the true classes.
        predictions: integers `[N]` from 0 to num_classes - 1, the predicted classes.
        num_classes: C.

    Returns:
        int64 `[C, C]`. Rows are true classes, columns predicted classes.

    Raises:
        ValueError: the lengths differ, or a class is not an integer or out of range.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.ndim != 1 or labels.shape != predictions.shape:
        raise ValueError(
            f"labels and predictions: expected the same length, got shapes {labels.shape} and {predictions.shape}"
        )
    for name, classes in (("labels", labels), ("predictions", predictions)):
        if classes.size and not np.issubdtype(classes.dtype, np.integer):
            raise ValueError(f"{name}: expected integers, got {classes.dtype}")
        if classes.size and (classes.min() < 0 or classes.max() >= num_classes):
            raise ValueError(
                f"{name}: expected classes from 0 to {num_classes - 1}, got {classes.min()} to {classes.max()}"
            )
    pairs = labels.astype(np.int64) * num_classes + predictions.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def classification_metrics(confusion: np.ndarray) -> dict[str, Any]:
    """Compute accuracy, and precision, recall and F1 of each class.

    precision = hits / images predicted as the class, recall = hits / images of the class, F1 = their harmonic mean. 0/0
    is defined as 0. Macro F1 is the unweighted mean of F1 over all classes, including those without an image.

    Args:
        confusion: integers `[C, C]`. Rows are true classes, columns predicted classes.

    Returns:
        A JSON-serialisable dictionary: `accuracy` and `macro_f1` are floats, `precision`, `recall` and `f1` lists of C
        floats, `support` (the number of images of each class) a list of C integers.

    Raises:
        ValueError: `confusion` is not a square matrix of counts.
    """
    confusion = _check_confusion(confusion)
    hits, support, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = divide(2 * hits, support + predicted)
    return {
        "accuracy": float(divide(hits.sum(), confusion.sum())),
        "macro_f1": float(f1.mean()),
        "precision": divide(hits, predicted).tolist(),
        "recall": divide(hits, support).tolist(),
        "f1": f1.tolist(),
        "support": support.tolist(),
    }


def _check_confusion(confusion: np.ndarray) -> np.ndarray:
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or confusion.size == 0:
        raise ValueError(f"confusion: expected a square matrix of at least one class, got shape {confusion.shape}")
    if not np.issubdtype(confusion.dtype, np.integer) or confusion.min() < 0:
        raise ValueError("confusion: expected non-negative integers")
    return confusion


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, 0 where the denominator is 0; both are counts."""
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), 0.0)


def format_metrics(confusion: np.ndarray, class_names: Sequence[str]) -> str:
    """Format a plain-text report: accuracy, a table of per-class metrics, and the confusions.

    For up to 20 classes the confusion matrix is included, for more classes the most frequent confusions.

    Args:
        confusion: integers `[C, C]`. Rows are true classes, columns predicted classes.
        class_names: C names.

    Returns:
        Several lines, without a newline at the end.

    Raises:
        ValueError: `confusion` is not a square matrix of counts, or the number of names differs from C.
    """
    confusion = _check_confusion(confusion)
    if len(class_names) != len(confusion):
        raise ValueError(f"class_names: expected {len(confusion)} names, got {len(class_names)}")
    metrics = classification_metrics(confusion)
    names = [_truncate(replace_unprintable(name), MAX_NAME_WIDTH) for name in class_names]
    summary = (
        f"accuracy {metrics['accuracy']:.4f}   macro F1 {metrics['macro_f1']:.4f}   "
        f"{confusion.sum():,} images, {len(names)} classes"
    )
    rows = [
        [str(index), name, f"{precision:.4f}", f"{recall:.4f}", f"{f1:.4f}", f"{support:,}"]
        for index, (name, precision, recall, f1, support) in enumerate(
            zip(names, *(metrics[key] for key in ("precision", "recall", "f1", "support")), strict=True)
        )
    ]
    sections = [summary, _format_table(["", "class", "precision", "recall", "F1", "support"], rows)]
    if len(names) <= MAX_MATRIX_CLASSES:
        sections.append(_format_matrix(confusion, names))
    else:
        sections.append(_format_worst_confusions(confusion, names))
    return "\n\n".join(sections)


def _format_matrix(confusion: np.ndarray, names: Sequence[str]) -> str:
    numbers = [str(index) for index in range(len(names))]
    rows = [[number, name, *map(str, row)] for number, name, row in zip(numbers, names, confusion, strict=True)]
    return "Confusion matrix (rows: true class, columns: predicted class)\n" + _format_table(
        ["", "true", *numbers], rows
    )


def find_worst_confusions(confusion: np.ndarray) -> list[tuple[int, int, int, float]]:
    """The 20 most frequent confusions as (true class, predicted class, images, fraction of the true class)."""
    errors = confusion - np.diag(np.diag(confusion))
    order = np.argsort(-errors, axis=None, kind="stable")[:MAX_CONFUSIONS]
    return [
        (
            int(true),
            int(predicted),
            int(errors[true, predicted]),
            float(errors[true, predicted] / confusion[true].sum()),
        )
        for true, predicted in zip(*np.unravel_index(order, errors.shape), strict=True)
        if errors[true, predicted] > 0
    ]


def _format_worst_confusions(confusion: np.ndarray, names: Sequence[str]) -> str:
    rows = [
        ["", names[true], names[predicted], str(count), f"{share:.1%}"]
        for true, predicted, count, share in find_worst_confusions(confusion)
    ]
    if not rows:
        return "No confusions."
    mistakes = confusion.sum() - np.trace(confusion)
    return f"Most frequent confusions ({mistakes:,} misclassified images in all)\n" + _format_table(
        ["", "true", "predicted", "images", "fraction of class"], rows, name_columns=(1, 2)
    )


def format_named_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str], Any]]) -> str:
    """Format rows of (name, cells, anything) as text, numbered from 0."""
    names = [_truncate(replace_unprintable(name), MAX_NAME_WIDTH) for name, _, _ in rows]
    cells = [[str(index), name, *row[1]] for index, (name, row) in enumerate(zip(names, rows, strict=True))]
    return _format_table(["", *header], cells)


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]], name_columns: tuple[int, ...] = (1,)) -> str:
    """Align columns, two spaces apart: names to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(_measure_width(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell + " " * (width - _measure_width(cell))
            if column in name_columns
            else " " * (width - _measure_width(cell)) + cell
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_percent(value: float) -> str:
    """Format 0.9625 as 96.3 % and 0.96 as 96 %."""
    return f"{100 * value:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def replace_unprintable(text: str) -> str:
    """Replace control characters, line breaks and lone surrogates, all of which file names may contain, by spaces."""
    return "".join(
        " " if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") else character for character in text
    )


def _measure_width(text: str) -> int:
    """Width in terminal columns: East Asian wide characters count 2, combining characters 0."""
    return sum(
        0
        if unicodedata.category(character) in ("Mn", "Me", "Cf")
        else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _truncate(text: str, columns: int) -> str:
    if _measure_width(text) <= columns:
        return text
    while _measure_width(text) > columns - 1:
        text = text[:-1]
    return text + "…"
