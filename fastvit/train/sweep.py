"""Look for good options:  fastvit sweep --data-dir my-pictures --trials 30

Every trial is a training with other options, proposed by Optuna through `Trainer.hyperparameter_search`: mostly near
what was good so far, and ended early where it stays behind. The study is an SQLite file in the output folder: the same
command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from fastvit.data.datasets import TRAIN, VALIDATION
from fastvit.errors import InputError
from fastvit.files import write_text
from fastvit.train import build
from fastvit.train.options import parse_options
from fastvit.train.recipes import MixPictures, RecipeTuner, TargetLoss, require
from fastvit.train.resume import select_run_options
from fastvit.train.training import NonFiniteLoss, Progress, StopOnNonFiniteLoss

# Option -> lowest, highest, and whether proposals are even in the logarithm.
SPACE = {
    "learning_rate": (1e-5, 1e-2, True),
    "weight_decay": (1e-4, 0.3, True),
    "layer_decay": (0.5, 1.0, False),
    "label_smoothing": (0.0, 0.2, False),
    "warmup": (0.0, 0.3, False),
    "drop_path": (0.0, 0.3, False),
    "hidden_dropout": (0.0, 0.3, False),
    "attention_dropout": (0.0, 0.3, False),
    "mixup": (0.0, 1.0, False),
    "cutmix": (0.0, 1.0, False),
}
DEFAULT_SEARCH = ("learning_rate", "weight_decay", "layer_decay")
STUDY, TABLE, BEST = "study.sqlite", "trials.csv", "config.yaml"

Range = tuple[float, float, bool]


def parse_range(text: str) -> tuple[str, Range]:
    """'weight-decay' or 'weight-decay=0.01:0.1' -> the option's name and its range."""
    name, _, limits = text.partition("=")
    name = name.replace("-", "_")
    if name not in SPACE:
        raise InputError(f"--search: expected one of {', '.join(SPACE)}, got {text!r}")
    if not limits:
        return name, SPACE[name]
    try:
        low, high = (float(limit) for limit in limits.split(":"))
    except ValueError:
        raise InputError(f"--search: expected {name}=LOW:HIGH, two numbers, got {text!r}") from None
    logarithmic = SPACE[name][2]
    if not low <= high or (logarithmic and low <= 0):
        raise InputError(f"--search: expected LOW:HIGH from low to high{', above 0' * logarithmic}, got {text!r}")
    return name, (low, high, logarithmic)


class PruneOnNonFiniteLoss(StopOnNonFiniteLoss):
    """A trial whose loss explodes is a bad trial, not an end of the search."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        try:
            super().on_log(args, state, control, logs, **kwargs)
        except NonFiniteLoss:
            raise require("optuna", "sweep", "fastvit sweep").TrialPruned from None


class Sweep:
    """One data set and one plain recipe, trained with the options of each trial."""

    def __init__(self, options: argparse.Namespace, space: dict[str, Range], processes: PartialState):
        self.options, self.space = options, space
        images = build.load_data(options, processes)
        build.print_counts(images)
        self.class_names = images.class_names
        model = build.load_model(options, self.class_names)
        processor = build.load_image_processor(options, model)
        self.normalization = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
        sets = build.make_image_sets(options, images, processor, processes)
        if VALIDATION not in sets:
            raise InputError(f"fastvit sweep: expected a validation split, {images.name} has none")
        precision = build.choose_precision(options, model.config.hidden_size)
        arguments = build.make_training_arguments(options, precision, True, options.max_steps)
        # A trial leaves its accuracy, measured after every epoch, and no files.
        arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.EPOCH, IntervalStrategy.NO
        arguments.load_best_model_at_end = False
        self.trainer: RecipeTuner | None = None
        self.trainer = RecipeTuner(
            model_init=self.model_of,
            args=arguments,
            train_dataset=sets[TRAIN],
            eval_dataset=sets[VALIDATION],
            data_collator=MixPictures(len(self.class_names)),
            compute_metrics=build.compute_accuracy,
            callbacks=[PruneOnNonFiniteLoss()],
            ema_decay=options.ema,
        )
        self.trainer.remove_callback(ProgressCallback)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(Progress())

    def propose(self, trial: Any) -> dict[str, float]:
        for name, (low, high, logarithmic) in self.space.items():
            trial.suggest_float(name, low, high, log=logarithmic)
        return {}  # all are set by `model_of`: most are no arguments of Trainer

    def model_of(self, trial: Any) -> Any:
        """A new model for a trial; everything else that its options change is changed as well."""
        if trial is not None:
            self.propose(trial)  # Trainer makes the model first; a trial proposes the same again when asked again
        proposed = {} if trial is None else trial.params
        options = argparse.Namespace(**{**vars(self.options), **proposed})
        if self.trainer is not None:
            print(f"trial {trial.number}: " + ", ".join(f"{name} {value:.4g}" for name, value in proposed.items()))
            train: Any = self.trainer.train_dataset
            train.with_seeds = bool(options.mixup or options.cutmix)
            self.trainer.data_collator = MixPictures(len(self.class_names), options.mixup, options.cutmix)
            loss = build.make_loss(options, train, len(self.class_names))
            self.trainer.compute_loss_func = loss or TargetLoss(label_smoothing=options.label_smoothing)
            self.trainer.layer_decay = options.layer_decay
            arguments = self.trainer.args
            arguments.learning_rate, arguments.weight_decay = options.learning_rate, options.weight_decay
            arguments.warmup_steps = options.warmup
        model = build.load_model(options, self.class_names)
        model.config.update(self.normalization)
        return build.prepare_model(options, model)

    def search(self, trials: int, **study: Any) -> None:
        assert self.trainer is not None
        self.trainer.hyperparameter_search(
            self.propose, lambda metrics: metrics["eval_accuracy"], trials, "maximize", "optuna", **study
        )


def run(options: argparse.Namespace, space: dict[str, Range], trials: int, folder: Path) -> dict[str, Any]:
    """Search until the study in `folder` has `trials` finished trials; returns the options of the best."""
    optuna = require("optuna", "sweep", "fastvit sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    set_seed(options.seed)
    plain = {name: value for name, value in select_run_options(options).items() if name != "output_dir"}
    study = {"study_name": "fastvit", "storage": f"sqlite:///{(folder / STUDY).resolve()}"}
    told = {"options": plain, "space": {name: list(limits) for name, limits in space.items()}}
    finished: list[Any] = []
    if (folder / STUDY).exists():
        before = optuna.load_study(**study)
        if before.trials and before.user_attrs != told:
            raise InputError(f"--output-dir: {folder} holds a search with other options; give another folder")
        finished = finished_trials(before)
        print(f"{folder / STUDY}: {len(finished)} trials are there")
    if len(finished) < trials:
        sweep = Sweep(options, space, PartialState(cpu=options.cpu))
        folder.mkdir(parents=True, exist_ok=True)
        opened = optuna.create_study(**study, direction="maximize", load_if_exists=True)
        for name, value in told.items():
            opened.set_user_attr(name, value)
        # Proposals depend on the seed and the trials so far. The same seed again would repeat the first random ones.
        sampler = optuna.samplers.TPESampler(seed=options.seed + len(finished))
        try:
            sweep.search(trials - len(finished), **study, sampler=sampler, load_if_exists=True)
        except ValueError:
            if is_any_complete(optuna.load_study(**study).trials):
                raise  # else it is that there is no best trial, which is said below
    done = optuna.load_study(**study)
    ranked = sorted(finished_trials(done), key=lambda trial: (trial.state.name, -(trial.value or 0), trial.number))
    if not is_any_complete(ranked):
        raise InputError("fastvit sweep: no trial came to its end; try --search learning-rate=LOW:HIGH, lower")
    names = list(space)
    rows = [[trial.number, trial.state.name.lower(), trial.value, *map(trial.params.get, names)] for trial in ranked]
    header = ["trial", "state", "accuracy", *names]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(folder / TABLE, text.getvalue())
    best = {**plain, **done.best_trial.params}
    write_text(folder / BEST, yaml.safe_dump(best, sort_keys=False))
    print(table(header, rows[:20]))
    print(f"\nall trials: {folder / TABLE}\ntrain with the best: fastvit finetune --config {folder / BEST}")
    return best


def finished_trials(study: Any) -> list[Any]:
    """Those that came to an end, or were ended for staying behind; not those that were interrupted."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


def is_any_complete(trials: Sequence[Any]) -> bool:
    return any(trial.state.name == "COMPLETE" for trial in trials)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit sweep",
        description="Look for good options of `fastvit finetune`, all of whose options are taken too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Example: fastvit sweep --data-dir my-pictures --trials 30 --search learning-rate drop-path=0:0.2",
        allow_abbrev=False,
    )
    parser.add_argument("--trials", type=int, default=20, help="how many trainings, with those that are there already")
    parser.add_argument(
        "--search",
        nargs="+",
        default=list(DEFAULT_SEARCH),
        metavar="OPTION[=LOW:HIGH]",
        help=f"what to vary, of {', '.join(SPACE)}",
    )
    parser.add_argument("--output-dir", default="runs/sweep", metavar="FOLDER", help="study, table and best options")
    return parser


def main(argv: list[str]) -> None:
    own, rest = build_parser().parse_known_args(argv)
    if own.trials < 1:
        raise InputError(f"--trials: expected at least 1, got {own.trials}")
    space = dict(parse_range(text) for text in own.search)
    folder = Path(own.output_dir)
    options = parse_options([*rest, "--output-dir", str(folder / "trial")])
    for name in ("folds", "early_stopping", "streaming"):
        if getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')}: is for fastvit finetune, not for a sweep")
    try:
        run(options, space, own.trials, folder)
    finally:
        shutil.rmtree(folder / "trial", ignore_errors=True)  # Trainer makes it and leaves it empty
