"""Which options of `fastvit finetune` make a model better?

    python benchmarks/recipes.py run BEANS_FOLDER     trains missing runs; can be interrupted and restarted
    python benchmarks/recipes.py table                writes the tables of docs/recipes.md

Small models on few images, so that a run takes half a minute on one core: each option against the plain recipe with the
same seeds. A line of results/recipes/runs.jsonl is one run. Images are split into train, validation (for early stopping
and the temperature) and test, which is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from fastvit.data.datasets import load_images
from fastvit.data.images import decode_image
from fastvit.files import write_text
from fastvit.models.calibration import compute_reliability
from fastvit.serve.predictor import Prediction, Predictor
from fastvit.train import finetune
from fastvit.train.options import parse_options
from fastvit.train.recipes import RecipeTuner

RESULTS = Path(__file__).parent / "results" / "recipes" / "runs.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
SEEDS = (1, 2, 3, 4, 5)

SCRATCH = ["--from-scratch", "micro", "--batch-size", "32", "--learning-rate", "1e-3", "--weight-decay", "0.05"]
SCRATCH += ["--warmup", "0.1", "--scheduler", "cosine"]
BEANS = [*SCRATCH, "--image-size", "48", "--patch-size", "8", "--epochs", "25"]
DIGITS = [*SCRATCH, "--image-size", "16", "--patch-size", "4", "--epochs", "40", "--no-augment"]
TUNED = ["--batch-size", "32", "--weight-decay", "0.05", "--warmup", "0.1", "--scheduler", "cosine", "--epochs", "10"]

# data set -> (description, plain recipe, switch -> further options)
SWITCHES: dict[str, list[str]] = {
    "plain": [],
    "--randaugment 2 9": [],
    "--cutmix 1.0": [],
    "--mixup 0.8 --cutmix 1.0": [],
    "--drop-path 0.1": [],
    "--ema 0.98": [],
    "--layer-decay 0.8": [],
    "--early-stopping 3": ["--eval-steps", "20"],
}
EXPERIMENTS: dict[str, tuple[str, list[str], dict[str, list[str]]]] = {
    "beans": ("beans photographs, 100 of each class to train on, 48 x 48, from scratch", BEANS, SWITCHES),
    "digits": ("handwritten digits, 20 of each class to train on, 16 x 16, from scratch", DIGITS, SWITCHES),
    "longer": (
        "the first set, four times as many epochs",
        [*BEANS, "--epochs", "100"],
        {"plain": [], "--randaugment 2 9": [], "--mixup 0.8 --cutmix 1.0": [], "--drop-path 0.1": []},
    ),
    "unequal": (
        "beans photographs, 150, 50 and 15 of the classes to train on, 48 x 48, from scratch",
        BEANS,
        {"plain": [], "--class-balanced": []},
    ),
    "tuned": (
        "the first set, from a model that was trained on 2,400 drawn leaves",
        TUNED,
        {
            "plain": ["--learning-rate", "5e-4"],
            "--layer-decay 0.7": ["--learning-rate", "5e-4"],
            "--lora 8": ["--learning-rate", "2e-3"],
            "--freeze-backbone": ["--learning-rate", "5e-3"],
            "--mixup 0.8 --cutmix 1.0": ["--learning-rate", "5e-4"],
        },
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def make_beans(source: Path, folder: Path, per_class: dict[str, int]) -> None:
    """Writes train/, validation/ (a fifth of the rest) and test/ with all photographs at a small size."""
    for name, count in per_class.items():
        paths = sorted(source.glob(f"*/{name}/*.jpg"))
        order = np.random.default_rng(0).permutation(len(paths))
        held_out = len(paths) - count
        splits = ["train"] * count + ["validation"] * (held_out // 5) + ["test"] * (held_out - held_out // 5)
        for index, split in zip(order, splits, strict=True):
            path = folder / split / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            decode_image(paths[index]).resize((55, 55), Image.Resampling.BILINEAR).save(path)


def make_digits(folder: Path, per_class: int = 20) -> None:
    """Writes the 1,797 handwritten digits of scikit-learn (UCI, 8 x 8, 16 gray levels) to a folder of images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        members = np.random.default_rng(label).permutation(np.flatnonzero(digits.target == label))
        for number, index in enumerate(members):
            split = "train" if number < per_class else "validation" if number < per_class + 30 else "test"
            path = folder / split / str(label) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[index] * 255 / 16).astype(np.uint8)).save(path)


def make_data(beans: Path, folder: Path) -> None:
    """Makes all three data sets, each complete or not at all."""
    names = ("angular_leaf_spot", "bean_rust", "healthy")
    makers = {
        "beans": lambda to: make_beans(beans, to, dict.fromkeys(names, 100)),
        "digits": make_digits,
        "unequal": lambda to: make_beans(beans, to, dict(zip(names, (150, 50, 15), strict=True))),
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            partial = folder / f".{name}"
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder / name)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class TimedTuner(RecipeTuner):
    """Records the processor time of training, which other processes disturb less than the wall clock."""

    seconds = 0.0

    def train(self, *args, **kwargs):
        start = time.process_time()
        result = super().train(*args, **kwargs)
        TimedTuner.seconds = time.process_time() - start
        return result


def pretrain(folder: Path) -> None:
    if not (folder / "model.safetensors").exists():
        finetune.run(parse_options([
            "--dataset", "generated", "--generated-images", "3000", "--epochs", "12", "--image-size", "48", "--cpu",
            "--precision", "fp32", "--output-dir", str(folder), "--overwrite", "--eval-steps", "100000",
        ]))  # fmt: skip


def get_data_folder(experiment: str, work: Path) -> Path:
    return work / ("beans" if experiment in ("tuned", "longer") else experiment)


def train(experiment: str, switch: str, seed: int, work: Path) -> dict[str, float]:
    """Trains once; returns metrics of the test split, calibration before and after, and processor seconds."""
    _, recipe, switches = EXPERIMENTS[experiment]
    data = get_data_folder(experiment, work)
    output = work / "run"
    start = ["--model", str(work / "leaves")] if experiment == "tuned" else []
    changes = [] if switch == "plain" else switch.split()
    options = parse_options([
        *recipe, *start, "--eval-steps", "100000", *changes, *switches[switch], "--seed", str(seed), "--calibrate",
        "--data-dir", str(data), "--output-dir", str(output), "--overwrite", "--cpu", "--precision", "fp32",
    ])  # fmt: skip
    metrics = finetune.run(options)
    state = json.loads((output / "trainer_state.json").read_text())
    return {
        "accuracy": metrics["test_accuracy"],
        "macro_f1": metrics["test_macro_f1"],
        "calibration_error": metrics["test_calibration_error_before"],
        "calibration_error_calibrated": metrics["test_calibration_error_after"],
        "temperature": metrics["temperature"],
        "seconds": round(TimedTuner.seconds, 2),
        "steps": state["global_step"],
    }


def evaluate_flip(experiment: str, work: Path) -> dict[str, float]:
    """Evaluates the last trained model with the mean over images and their mirror images."""
    split = load_images(data_dir=get_data_folder(experiment, work)).splits["test"]
    images = [split.load(index) for index in range(len(split))]
    with Predictor(str(work / "run"), "cpu", flip=True, workers=1) as predictor:
        answers = predictor.stream(images, raise_errors=True)
        rows = np.stack([answer.probabilities for answer in answers if isinstance(answer, Prediction)])
    return {
        "accuracy": float((rows.argmax(-1) == split.labels).mean()),
        "calibration_error_calibrated": compute_reliability(rows, split.labels).expected_calibration_error,
    }


def run_experiments(beans: Path, work: Path, seeds: int) -> None:
    torch.set_num_threads(1)
    vars(finetune)["RecipeTuner"] = TimedTuner  # the trainer of `finetune.run`
    read = functools.cache(lambda folder: load_images(data_dir=folder))
    read_leaves = finetune.load_data
    vars(finetune)["load_data"] = lambda options, processes: (
        read(options.data_dir) if options.data_dir else read_leaves(options, processes)
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    make_data(beans, work)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for seed in SEEDS[:seeds]:
        for experiment, (_, _, switches) in EXPERIMENTS.items():
            if experiment == "tuned":
                with silence_output():
                    pretrain(work / "leaves")
            for switch in switches:
                done = {(line["data"], line["switch"], line["seed"]) for line in read_results()}
                if (experiment, switch, seed) in done:
                    continue
                with silence_output():
                    figures = train(experiment, switch, seed, work)
                lines = [{"data": experiment, "switch": switch, "seed": seed, **figures, **versions}]
                if switch == "plain":
                    mirrored = {**figures, **evaluate_flip(experiment, work)}
                    lines.append({"data": experiment, "switch": "--flip", "seed": seed, **mirrored, **versions})
                with RESULTS.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                print(f"{experiment} {switch} seed {seed}: {figures['accuracy']:.4f}, {figures['seconds']:.1f} s")


@contextlib.contextmanager
def silence_output() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def read_results() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


# Student's t for the 95 % interval of a mean, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def format_difference(differences: list[float]) -> str:
    """Returns the mean difference between runs of the same seeds, and whether 0 is outside its 95 % interval."""
    if len(differences) < 2:
        return "one seed"
    error = statistics.stdev(differences) / len(differences) ** 0.5 * STUDENT[len(differences) - 1]
    mean = statistics.mean(differences)
    word = "within the noise" if abs(mean) <= error else "better" if mean > 0 else "worse"
    return f"{100 * mean:+.1f} ± {100 * error:.1f}: {word}"


def format_mean(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def format_row(name: str, lines: list[dict], plain: dict[int, dict], metric: str) -> str:
    cells = [name, format_mean([line[metric] for line in lines]), "", str(len(lines)), "1"]
    if name != "plain":
        cells[0] = f"`{name}`"
        cells[2] = format_difference([line[metric] - plain[line["seed"]][metric] for line in lines])
        cells[4] = f"{statistics.mean(line['seconds'] / plain[line['seed']]['seconds'] for line in lines):.2f}"
    return f"| {' | '.join(cells)} |"


def format_tables() -> str:
    """Returns all results as Markdown."""
    parts = []
    for experiment, (title, _, switches) in EXPERIMENTS.items():
        lines = [line for line in read_results() if line["data"] == experiment]
        plain = {line["seed"]: line for line in lines if line["switch"] == "plain"}
        metric = "macro_f1" if experiment == "unequal" else "accuracy"
        label = {"accuracy": "accuracy", "macro_f1": "macro F1"}[metric]
        parts.append(f"### {title[0].upper()}{title[1:]}\n")
        parts.append(f"| switch | {label} % | against plain, 95 % interval | seeds | training time |")
        parts.append("|---|---:|---|---:|---:|")
        names = [
            "plain",
            *(() if metric == "macro_f1" else ("--flip",)),
            *(name for name in switches if name != "plain"),
        ]
        for name in names:
            chosen = [line for line in lines if line["switch"] == name and line["seed"] in plain]
            if chosen:
                parts.append(format_row(name, chosen, plain, metric))
        parts.append("")
    parts += ["### Calibration of the plain models, on the test images\n"]
    parts += ["| data | temperature | calibration error % before | after | seeds |", "|---|---:|---:|---:|---:|"]
    for experiment in EXPERIMENTS:
        lines = [line for line in read_results() if line["data"] == experiment and line["switch"] == "plain"]
        if lines:
            temperature = statistics.mean(line["temperature"] for line in lines)
            errors = [format_mean([line[f"calibration_error{end}"] for line in lines]) for end in ("", "_calibrated")]
            parts.append(f"| {experiment} | {temperature:.2f} | {errors[0]} | {errors[1]} | {len(lines)} |")
    return "\n".join(parts)


def write_tables() -> None:
    begin, end = (
        "<!-- results: benchmarks/recipes.py table writes what is between these two lines -->",
        "<!-- /results -->",
    )
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE}: expected the two lines around the tables")
    write_text(PAGE, f"{before}{begin}\n\n{format_tables()}\n\n{end}{after}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Measure the options of fastvit finetune.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("beans", type=Path, help="folder of the beans photographs: train/ and validation/")
    runs.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fastvit-recipes")
    runs.add_argument("--seeds", type=int, default=3)
    commands.add_parser("table")
    options = parser.parse_args(argv)
    if options.command == "run":
        run_experiments(options.beans, options.work, options.seeds)
    else:
        write_tables()


if __name__ == "__main__":
    main(sys.argv[1:])
