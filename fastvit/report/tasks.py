"""What a model predicts: classes, several labels per image, or numbers. Each `Task` has its metrics and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fastvit.report.classification import (
    classification_metrics,
    confusion_matrix,
    divide,
    format_metrics,
    format_named_table,
    format_percent,
)

MAX_MISTAKES = 12
Mistake = tuple[int, str, str, float | None]  # image, truth, prediction, its probability


class Row(NamedTuple):
    """A class, label or number in a table: its values as text, and a share from 0 to 1 that is drawn as a bar."""

    name: str
    cells: list[str]
    share: float


@dataclass
class Evaluation:
    """The metrics of a split.

    Attributes:
        metrics: name -> number, or a list of one number per class; JSON-serialisable.
        figures: (name, value as text) of the main ones.
        num_images: number of images.
        header: names of the columns of `rows`; the first is that of the names, the last that of the bar.
        rows: one per class.
        mistakes: the worst ones first; of numbers the largest errors, each of the worst number of its image.
        confusion: confusion matrix of classes, int `[C, C]`.
        points: of each number, (name, true values, predicted values).
    """

    metrics: dict[str, Any]
    figures: list[tuple[str, str]]
    num_images: int
    header: list[str]
    rows: list[Row]
    mistakes: list[Mistake] = field(default_factory=list)
    confusion: np.ndarray | None = None
    points: list[tuple[str, np.ndarray, np.ndarray]] = field(default_factory=list)

    def format_text(self) -> str:
        """Format a plain-text report, as `classification.format_metrics`."""
        if self.confusion is not None:
            return format_metrics(self.confusion, [row.name for row in self.rows])
        summary = "   ".join(f"{name} {value}" for name, value in self.figures)
        return f"{summary}   {self.num_images:,} images\n\n{format_named_table(self.header[:-1], self.rows)}"


class Task:
    """One class per image: labels int64 `[N]`. Scores are probabilities, or for `measure` logits: float `[N, classes]`.

    Attributes:
        kind: value of --task.
        problem_type: that of the config.
        metric: name of the metric that selects the best checkpoint, and `metric_name` in words.
        noun: what is predicted, in the plural.
    """

    kind, problem_type = "single-label", "single_label_classification"
    metric, metric_name, noun = "accuracy", "accuracy", "classes"
    greater_is_better = True

    def format_metric(self, value: float) -> str:
        return f"{value:.2%}"

    def format_score(self, value: float) -> str:
        return f"{value:.2%}"

    def measure(self, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """Compute the metric that selects the best checkpoint."""
        return {self.metric: float((scores.argmax(-1) == labels).mean())}

    def select(self, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """The indices of what is predicted for an image with scores `[classes]`, best first."""
        return scores.argmax(-1, keepdims=True)

    def evaluate(
        self, labels: np.ndarray, scores: np.ndarray, names: Sequence[str], thresholds: np.ndarray
    ) -> Evaluation:
        """Compute all metrics. `thresholds`: probability from which each label is predicted, float `[labels]`."""
        predicted, certainty = scores.argmax(-1), scores.max(-1)
        evaluation = evaluate_confusion(confusion_matrix(labels, predicted, len(names)), names)
        wrong = np.flatnonzero(predicted != labels)
        wrong = wrong[np.argsort(-certainty[wrong], kind="stable")][:MAX_MISTAKES]
        evaluation.mistakes = [(int(i), names[labels[i]], names[predicted[i]], float(certainty[i])) for i in wrong]
        return evaluation


def evaluate_confusion(confusion: np.ndarray, names: Sequence[str]) -> Evaluation:
    """The metrics of a confusion matrix, int `[C, C]`, whose rows are true classes."""
    metrics = classification_metrics(confusion)
    per_class = zip(names, *(metrics[name] for name in ("precision", "recall", "f1", "support")), strict=True)
    return Evaluation(
        metrics,
        [("accuracy", format_percent(metrics["accuracy"])), ("macro F1", f"{metrics['macro_f1']:.3f}")],
        int(confusion.sum()),
        ["class", "precision", "recall", "F1", "images", "F1 as a bar"],
        [Row(name, [*(f"{v:.3f}" for v in row[:3]), f"{row[3]:,}"], row[2]) for name, *row in per_class],
        confusion=confusion,
    )


class MultiLabel(Task):
    """Any number of labels per image: labels float `[N, labels]` of 0 and 1."""

    kind, problem_type = "multi-label", "multi_label_classification"
    metric, metric_name, noun = "map", "mAP", "labels"

    def format_metric(self, value: float) -> str:
        return f"{value:.4f}"

    def measure(self, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        """The mean over the labels of the average precision, as scikit-learn's `average_precision_score`."""
        return {self.metric: float(np.mean(list(map(compute_average_precision, labels.T, scores.T))))}

    def select(self, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        best = np.argsort(-scores, kind="stable")
        return best[scores[best] >= thresholds[best]]

    def evaluate(
        self, labels: np.ndarray, scores: np.ndarray, names: Sequence[str], thresholds: np.ndarray
    ) -> Evaluation:
        predicted, support = (scores >= thresholds).sum(0), labels.sum(0).astype(np.int64)
        hits = ((scores >= thresholds) & (labels == 1)).sum(0)
        found = {
            "average_precision": np.array(list(map(compute_average_precision, labels.T, scores.T))),
            "precision": divide(hits, predicted),
            "recall": divide(hits, support),
            "f1": divide(2 * hits, support + predicted),
            "threshold": thresholds,
        }
        means = {
            "map": float(found["average_precision"].mean()),
            "micro_f1": float(divide(2 * hits.sum(), support.sum() + predicted.sum())),
            "macro_f1": float(found["f1"].mean()),
        }
        return Evaluation(
            {**means, **{name: values.tolist() for name, values in found.items()}, "support": support.tolist()},
            [
                (name, f"{value:.4f}")
                for name, value in zip(("mAP", "micro F1", "macro F1"), means.values(), strict=True)
            ],
            len(labels),
            ["label", "AP", "precision", "recall", "F1", "threshold", "images", "F1 as a bar"],
            [
                Row(name, [*(f"{value:.3f}" for value in row), f"{count:,}"], row[3])
                for name, count, *row in zip(names, support, *found.values(), strict=True)
            ],
            find_wrong_labels(labels, scores, names, thresholds),
        )


def find_wrong_labels(
    labels: np.ndarray, scores: np.ndarray, names: Sequence[str], thresholds: np.ndarray
) -> list[Mistake]:
    """The images with a wrong label, the worst first, each with its worst label."""
    errors = np.where((scores >= thresholds) != (labels == 1), np.abs(scores - labels), -1.0)
    found: list[Mistake] = []
    for i in np.argsort(-errors.max(-1), kind="stable")[: (errors >= 0).any(-1).sum()][:MAX_MISTAKES]:
        worst = errors[i].argmax()
        words = [names[worst], f"not {names[worst]}"][:: 1 if labels[i, worst] else -1]
        found.append(
            (int(i), words[0], words[1], float(1 - scores[i, worst] if labels[i, worst] else scores[i, worst]))
        )
    return found


def choose_thresholds(labels: np.ndarray, scores: np.ndarray) -> list[float]:
    """The threshold of each label with the highest F1 on these images; 0.5 for a label that none of them has.

    A threshold lies halfway between two probabilities; of equal F1, the one next to 0.5 is chosen.
    """
    chosen = []
    for truth, score in zip(labels.T, scores.T, strict=True):
        values, hits, predicted = count_hits(truth, score)
        f1 = 2 * hits / (predicted + truth.sum())
        cuts = (values + np.append(values[1:], 0.0)) / 2
        best = cuts[f1 == f1.max()] if truth.any() else [0.5]
        chosen.append(float(min(best, key=lambda cut: abs(cut - 0.5))))
    return chosen


def compute_average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The sum over the ranks of (recall - recall before) x precision; 0 without an image that has the label."""
    _, hits, predicted = count_hits(truth, scores)
    return float((np.diff(hits, prepend=0) * hits / predicted).sum() / max(hits[-1], 1))


def count_hits(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each distinct score, from the highest: the score, true positives and images with at least this score."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order].astype(np.float64)
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    return ranked[last], truth[order].cumsum()[last], last + 1


def format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class Regression(Task):
    """Numbers: labels and scores float `[N, targets]`, in the units of the data."""

    kind, problem_type = "regression", "regression"
    metric, metric_name, noun = "mae", "MAE", "targets"
    greater_is_better = False

    def format_metric(self, value: float) -> str:
        return format_number(value)

    def format_score(self, value: float) -> str:
        return f"{value:.6g}"

    def measure(self, labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
        return {self.metric: float(np.abs(scores - labels).mean())}

    def select(self, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        return np.arange(len(scores))

    def evaluate(
        self, labels: np.ndarray, scores: np.ndarray, names: Sequence[str], thresholds: np.ndarray
    ) -> Evaluation:
        labels, scores = labels.astype(np.float64), scores.astype(np.float64)
        squares, spread = ((scores - labels) ** 2).sum(0), ((labels - labels.mean(0)) ** 2).sum(0)
        # R² of a target that is constant here is 1 or 0, as in scikit-learn.
        r2 = np.where(spread > 0, 1 - squares / np.where(spread > 0, spread, 1), squares == 0)
        found = {"mae": np.abs(scores - labels).mean(0), "rmse": np.sqrt(squares / len(labels)), "r2": r2}
        means = {name: float(values.mean()) for name, values in found.items()}
        errors = np.abs(scores - labels) / np.maximum(labels.std(0), 1e-30)  # in units that compare
        worst = [(i, errors[i].argmax()) for i in np.argsort(-errors.max(-1), kind="stable")[:MAX_MISTAKES]]
        ends = zip(map(format_number, labels.min(0)), map(format_number, labels.max(0)), strict=True)
        cells = [list(map(format_number, row)) for row in zip(*found.values(), strict=True)]
        return Evaluation(
            {**means, **{f"target_{name}": values.tolist() for name, values in found.items()}},
            list(zip(("MAE", "RMSE", "R²"), map(format_number, means.values()), strict=True)),
            len(labels),
            ["target", "MAE", "RMSE", "R²", "true values", "R² as a bar"],
            [
                Row(name, [*row, " to ".join(span)], float(np.clip(share, 0, 1)))
                for name, row, span, share in zip(names, cells, ends, r2, strict=True)
            ],
            [(int(i), f"{names[k]} {labels[i, k]:.6g}", f"{scores[i, k]:.6g}", None) for i, k in worst],
            points=list(zip(names, labels.T, scores.T, strict=True)),
        )


TASKS: dict[str, Task] = {task.kind: task for task in (Task(), MultiLabel(), Regression())}


def get_task(config: Any) -> Task:
    """The task of a model with this config; one logit is a label of its own, unless it is a regression."""
    if config.problem_type == "regression":
        return TASKS["regression"]
    is_multi_label = config.num_labels == 1 or config.problem_type == "multi_label_classification"
    return TASKS["multi-label" if is_multi_label else "single-label"]


def find_metric(record: dict[str, Any]) -> tuple[Task, float] | None:
    """The task and the value of the metric that an evaluation has logged in a record; None if it has none."""
    values = ((task, record.get(f"eval_{task.metric}")) for task in TASKS.values())
    return next(((task, value) for task, value in values if value is not None), None)
