"""`report.html`: the report of a run as one file that needs neither a network nor other files.

`gather_report` collects the content from a finished run, `render` writes it as HTML (`templates/run.html`). The
template engine escapes all text from outside, such as class names, and the page's security policy forbids the browser
to load anything or to run any script but its own.

The page stays small for large datasets: of many classes it shows some, and states which.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerState

import fastvit
from fastvit import ops
from fastvit.adapters.backbones import load_classifier
from fastvit.data.datasets import TEST, VALIDATION, ImageDataset, count_names
from fastvit.data.images import ImageSet, to_bands
from fastvit.data.targets import REGRESSION
from fastvit.errors import escape_unprintable
from fastvit.models.backbone import describe_model, get_vision_config
from fastvit.report import classification, figures, info
from fastvit.report.charts import Series, draw_line_chart, draw_scatter_chart, format_thousands
from fastvit.report.classification import format_percent
from fastvit.report.html import render_template
from fastvit.report.run_log import extract_curve
from fastvit.report.tasks import TASKS, Evaluation, Task
from fastvit.serve.attention import classify_with_attention
from fastvit.serve.preprocessing import load_preprocessor
from fastvit.train.defaults import compute_defaults
from fastvit.train.options import FinetuneOptions

MAX_EXAMPLE_CLASSES, EXAMPLES_PER_CLASS, EXAMPLE_SIDE = 20, 6, 96
MAX_ROWS = 40  # in a table of classes
MISTAKE_SIDE = 192
MAX_PLOTS = 12  # of numbers
MAX_READINGS = 50  # rows in the table of the curves


@dataclass(frozen=True)
class Mistake:
    """An image that the model classified wrongly, or whose number it missed the most.

    Attributes:
        number: position in the split, from 1.
        probability: of the prediction; None for a number.
        image: the image itself.
        attention: the image with the attention map of the class token over it.
        name: path of the image, or its row in the dataset.
    """

    number: int
    truth: str
    predicted: str
    probability: float | None
    image: Image.Image
    attention: Image.Image
    name: str = ""


@dataclass
class RunReport:
    """The content of the page.

    Attributes:
        num_images: number of training images, as text.
        counts: split -> images per class, int `[C]`; not for streamed splits, nor for numbers.
        examples: class name -> some training images.
        history: Trainer's log records.
        evaluations: split -> its metrics.
        mistakes: the worst ones of the split `mistakes_in`.
        options: name -> (value, default).
        environment: name -> text.
        task: what the model predicts.
    """

    folder: str
    dataset: str
    model: str
    class_names: list[str]
    num_images: str
    counts: Mapping[str, np.ndarray]
    examples: Mapping[str, Sequence[Image.Image]]
    history: list[dict[str, Any]]
    best_step: int | None
    seconds: float
    evaluations: Mapping[str, Evaluation]
    mistakes: Sequence[Mistake]
    mistakes_in: str | None
    options: Mapping[str, tuple[Any, Any]]
    environment: Mapping[str, str]
    finished: datetime.datetime
    task: Task = TASKS["single-label"]


def render(run: RunReport) -> str:
    """Render the page as HTML."""
    return render_template(
        "run.html",
        run=run,
        title=Path(run.folder).name or run.folder,
        tiles=list_tiles(run),
        charts=build_learning_charts(run),
        machine_charts=build_machine_charts(run),
        readings=tabulate_history(run.history),
        results=[(split, summarize_split(found, run.class_names)) for split, found in run.evaluations.items()],
        counts=count_classes(run),
        example_side=EXAMPLE_SIDE,
        mistake_side=MISTAKE_SIDE,
        changed={name: pair for name, pair in run.options.items() if pair[0] != pair[1]},
        unchanged={name: pair for name, pair in run.options.items() if pair[0] == pair[1]},
        commands=list_commands(run),
    )


# ---------------------------------------------------------------------------------------------------------------------
# From a finished run
# ---------------------------------------------------------------------------------------------------------------------


def gather_report(
    options: FinetuneOptions,
    images: ImageDataset,
    num_images: str,
    sets: Mapping[str, ImageSet],
    evaluations: Mapping[str, Evaluation],
    state: TrainerState,
    device: torch.device,
    seconds: float,
) -> RunReport:
    """Collect the content of the page from a run whose model is saved in its output folder.

    Args:
        num_images: number of training images, as text.
        sets: split -> images; a streamed split is not counted.
        evaluations: split -> its metrics; mistakes are numbered in the order of `sets[split]`.
        state: Trainer's state, with its logs.
        device: device that computes the attention maps.
        seconds: duration of training.
    """
    model = load_classifier(options.output_dir).to(device).eval()
    examined = next((split for split in (VALIDATION, TEST) if split in evaluations), None)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    config = get_vision_config(model.config)
    architecture = (
        f"{config.num_hidden_layers} blocks of hidden size {config.hidden_size}, {parameters:.1f} M parameters,"
        f" images of {'×'.join(map(str, load_preprocessor(options.output_dir, options.channels).image_size))}"
    )
    origin = f"fine-tuned from {options.model}" if options.from_scratch is None else "trained from scratch"
    defaults = compute_defaults(options.recipe or "plain", options)
    return RunReport(
        folder=options.output_dir,
        dataset=images.name,
        model=f"{describe_model(config)} of {architecture}, {origin}",
        class_names=images.class_names,
        num_images=num_images,
        counts={
            name: count_names(split.labels, len(images.class_names), images.task)
            for name, split in sets.items()
            if isinstance(split, ImageSet) and images.task != REGRESSION  # not a stream
        },
        examples=images.sample_examples(MAX_EXAMPLE_CLASSES, EXAMPLES_PER_CLASS, EXAMPLE_SIDE),
        history=state.log_history,
        best_step=state.best_global_step if state.best_model_checkpoint else None,
        seconds=seconds,
        evaluations=evaluations,
        mistakes=[] if examined is None else show_mistakes(model, sets[examined], evaluations[examined]),
        mistakes_in=examined,
        options={
            field.name: (getattr(options, field.name), defaults.get(field.name, field.default))
            for field in dataclasses.fields(options)
            if field.name not in ("overwrite", "resume") and not (field.name == "model" and options.from_scratch)
        },
        environment=describe_environment(device),
        finished=datetime.datetime.now().astimezone(),
        task=TASKS[images.task],
    )


def show_mistakes(model, images: ImageSet, evaluation: Evaluation) -> list[Mistake]:
    """The images of the mistakes, with their attention maps."""
    found = []
    for index, truth, predicted, probability in evaluation.mistakes:
        pixels = images.get_pixels(index)
        image = to_bands(pixels).convert("RGB")
        result = classify_with_attention(model, torch.from_numpy(pixels)[None])
        found.append(
            Mistake(
                index + 1,
                truth,
                predicted,
                probability,
                image,
                figures.overlay_last_layer(image, *result[1:]),
                escape_unprintable(images.get_name(index)),
            )
        )
    return found


def describe_environment(device: torch.device) -> dict[str, str]:
    commit, whole = info.read_commit()
    by_answer: dict[str, list[str]] = {}
    for operation in ops.KERNEL_MODULES:
        by_answer.setdefault(info.describe_backend(operation, device), []).append(operation)
    computed_by = "; ".join(
        answer if len(by_answer) == 1 else f"{', '.join(operations)}: {answer}"
        for answer, operations in by_answer.items()
    )
    return {
        "device": info.describe_device(device),
        "operations": computed_by,
        **{f"kernels {what}": "; ".join(lines) for what, lines in info.summarize_kernels().items() if lines},
        "fastvit": fastvit.__version__,
        "commit": "not known" if commit is None else commit[:12] + ("" if whole else ", with changes"),
        "Python": platform.python_version(),
        "system": platform.platform(),
        **{name: info.get_installed_version(name) for name in info.PACKAGES},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Sections of the page
# ---------------------------------------------------------------------------------------------------------------------


def list_tiles(run: RunReport) -> list[tuple[str, str, str]]:
    """The main figures of a run: (name, value, note)."""
    found = []
    for split, evaluation in run.evaluations.items():
        note = f"{evaluation.num_images:,} images"
        found += [(f"{split.capitalize()} {name}", value, note) for name, value in evaluation.figures]
    if run.best_step is not None:
        found.append(("Best model", f"step {run.best_step:,}", f"of {get_last_step(run.history):,}"))
    found.append(("Training took", format_duration(run.seconds), ""))
    if speeds := [value for _, value in extract_curve(run.history, "images_per_second")]:
        found.append(("Speed", format_speed(statistics.median(speeds)), "images per second, median"))
    if memory := [value for _, value in extract_curve(run.history, "peak_memory_gib")]:
        found.append(("Memory", f"{max(memory):.1f} GiB", "peak"))
    return found


def build_learning_charts(run: RunReport) -> list[dict[str, Any]]:
    """Charts of loss, the task's metric and learning rate over the steps, as far as they were logged."""
    mark = None if run.best_step is None else (run.best_step, "best")
    loss = [Series("training", extract_curve(run.history, "loss"))]
    loss.append(Series("validation", extract_curve(run.history, "eval_loss"), "second", dots=True))
    metric = [Series("validation", extract_curve(run.history, f"eval_{run.task.metric}"), "second", dots=True)]
    format_y = format_percent if run.task.kind == "single-label" else format_thousands
    name = "Accuracy" if run.task.kind == "single-label" else run.task.metric_name
    rate = [Series("learning rate", extract_curve(run.history, "learning_rate"))]
    return draw_charts([
        ("Loss", loss, {"mark": mark, "format_y": "{:.3g}".format}),
        (name, metric, {"mark": mark, "format_y": format_y, "from_zero": False}),
        ("Learning rate", rate, {"format_y": format_power}),
    ])  # fmt: skip


def build_machine_charts(run: RunReport) -> list[dict[str, Any]]:
    """Charts of speed and memory over the steps."""
    memory = [Series("in use", extract_curve(run.history, "memory_gib"))]
    memory.append(Series("peak so far", extract_curve(run.history, "peak_memory_gib"), "second"))
    speeds = [Series("images per second", extract_curve(run.history, "images_per_second"))]
    return draw_charts([
        ("Images per second", speeds, {"format_y": format_speed}),
        ("Memory, GiB", memory, {"format_y": "{:.3g}".format}),
    ])  # fmt: skip


def draw_charts(charts: list[tuple[str, list[Series], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {"title": title, "svg": svg, "series": [one for one in series if one.points]}
        for title, series, settings in charts
        if (svg := draw_line_chart(title, series, x_label="step", **settings))
    ]


READINGS = {
    "epoch": ("epoch", "{:.2f}".format),
    "loss": ("training loss", "{:.4f}".format),
    "eval_loss": ("validation loss", "{:.4f}".format),
    **{f"eval_{task.metric}": (f"validation {task.metric_name}", task.format_metric) for task in TASKS.values()},
    "learning_rate": ("learning rate", "{:.2e}".format),
    "images_per_second": ("images/s", "{:,.0f}".format),
    "memory_gib": ("memory, GiB", "{:.2f}".format),
}


def tabulate_history(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of the curves, one row per step; of many steps some, evenly spaced, with the first and the last."""
    steps: dict[int, dict[str, Any]] = {}
    for record in history:
        steps.setdefault(record["step"], {}).update(record)
    rows = [step for step in steps.values() if {"loss", "eval_loss"} & step.keys()]
    names = [name for name in READINGS if any(row.get(name) is not None for row in rows)]
    shown = rows if len(rows) <= MAX_READINGS else [rows[i] for i in space_evenly(len(rows), MAX_READINGS)]
    return {
        "header": ["step", *(READINGS[name][0] for name in names)],
        "rows": [
            [f"{row['step']:,}", *("" if row.get(n) is None else READINGS[n][1](row[n]) for n in names)]
            for row in shown
        ],
        "left_out": len(rows) - len(shown),
    }


def space_evenly(count: int, number: int) -> list[int]:
    """Select `number` of the indices below `count`, evenly spaced, with the first and the last."""
    return [round(index * (count - 1) / (number - 1)) for index in range(number)]


def summarize_split(evaluation: Evaluation, class_names: list[str]) -> dict[str, Any]:
    """Metrics per class, and what fits the task: the confusion matrix, plots of numbers; of many classes the worst."""
    rows, confusion = evaluation.rows, evaluation.confusion
    if len(rows) > MAX_ROWS:
        rows = sorted(rows, key=lambda row: row.share)[:MAX_ROWS]
    found: dict[str, Any] = {"evaluation": evaluation, "rows": rows, "matrix": None, "confused": [], "wrong": None}
    found["plots"] = [
        {"title": name, "svg": draw_scatter_chart(name, list(zip(true.tolist(), predicted.tolist(), strict=True)))}
        for name, true, predicted in evaluation.points[:MAX_PLOTS]
    ]
    if confusion is None:
        return found
    found["wrong"] = int(confusion.sum() - np.trace(confusion))
    if len(class_names) <= classification.MAX_MATRIX_CLASSES:
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        found["matrix"] = [
            (name, list(zip(row.tolist(), share.tolist(), strict=True)))
            for name, row, share in zip(class_names, confusion, shares, strict=True)
        ]
    found["confused"] = [
        (class_names[true], class_names[predicted], count, share)
        for true, predicted, count, share in classification.find_worst_confusions(confusion)
    ]
    return found


def count_classes(run: RunReport) -> dict[str, Any] | None:
    """Images per class and split; of many classes the smallest and the largest in the first split."""
    splits = list(run.counts)
    if not splits:
        return None
    first = run.counts[splits[0]]
    order = np.arange(len(first))
    if len(order) > MAX_ROWS:
        by_size = np.argsort(-first, kind="stable")
        order = np.concatenate([by_size[: MAX_ROWS // 2], by_size[-MAX_ROWS // 2 :]])
    return {
        "splits": splits,
        "rows": [(run.class_names[i], [int(run.counts[split][i]) for split in splits], first[i]) for i in order],
        "largest": int(first.max()),
        "together": [int(run.counts[split].sum()) for split in splits],
    }


def list_commands(run: RunReport) -> list[tuple[str, str]]:
    """Commands and code that use the model: (purpose, text to copy)."""
    folder = shlex.quote(run.folder)
    literal = json.dumps(run.folder, ensure_ascii=False)
    again = shlex.quote(f"{run.folder.rstrip('/')}-again")
    settings = ', function_to_apply="none"' if run.task.kind == REGRESSION else ""  # older versions apply a sigmoid
    return [
        ("Predict for an image", f"fastvit predict {folder} image.jpg"),
        ("Serve a page on this machine that predicts for images", f"fastvit demo {folder}"),
        ("Draw the attention of the class token", f"fastvit attention {folder} image.jpg -o attention.png"),
        ("Evaluate it on other labelled images", f"fastvit evaluate {folder} --data-dir my-images"),
        (
            "Use it in Python, with transformers alone",
            "from transformers import pipeline\n\n"
            f'classify = pipeline("image-classification", {literal}{settings})\nprint(classify("image.jpg"))',
        ),
        (
            "Use it in Python, with our kernels on a GPU",
            f"from fastvit import ViTForImageClassification\n\n"
            f"model = ViTForImageClassification.from_pretrained({literal}).eval()",
        ),
        (
            "Repeat this run",
            f"fastvit finetune --config {shlex.quote(str(Path(run.folder, 'config.yaml')))} --output-dir {again}",
        ),
    ]


def format_speed(value: float) -> str:
    return format_thousands(round(value)) if value >= 10 else f"{value:.2g}"


def format_power(value: float) -> str:
    """Format 0.00025 as 2.5e-4."""
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "0"


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def get_last_step(history: list[dict[str, Any]]) -> int:
    return max((record["step"] for record in history), default=0)
