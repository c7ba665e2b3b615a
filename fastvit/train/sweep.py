"""Search for good options:  fastvit sweep --data-dir my-images --trials 30

Every trial is a training with other options, proposed by Optuna through `Trainer.hyperparameter_search`: mostly near
the best ones so far. Trials that fall behind are pruned. The study is an SQLite file in the output folder, so that the
same command continues a search that was stopped.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from accelerate import PartialState
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from fastvit.adapters.backbones import get_block_class_name
from fastvit.data.datasets import TRAIN, VALIDATION
from fastvit.data.targets import SINGLE_LABEL
from fastvit.errors import InputError
from fastvit.files import write_text
from fastvit.models.backbone import get_vision_config
from fastvit.report.tasks import TASKS
from fastvit.train import build
from fastvit.train.defaults import describe_recipe, resolve_recipe
from fastvit.train.objectives import build_metrics
from fastvit.train.options import FinetuneOptions
from fastvit.train.recipes import ImageMixer, RecipeTuner, TargetLoss, require
from fastvit.train.run_folder import select_run_options
from fastvit.train.search_space import Range
from fastvit.train.training import NonFiniteLoss, Progress, StopOnNonFiniteLoss

STUDY, TABLE, BEST = "study.sqlite", "trials.csv", "config.yaml"


class PruneOnNonFiniteLoss(StopOnNonFiniteLoss):
    """Prunes a trial whose loss is NaN or infinite, and so continues the search."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        try:
            super().on_log(args, state, control, logs, **kwargs)
        except NonFiniteLoss:
            raise require("optuna", "sweep", "fastvit sweep").TrialPruned from None


class Sweep:
    """One dataset and the options that all trials share, trained with the options of each trial."""

    def __init__(self, options: FinetuneOptions, space: dict[str, Range], processes: PartialState):
        self.options, self.space = options, space
        images = build.load_data(options, processes)
        build.print_counts(images)
        if images.task != SINGLE_LABEL:
            raise InputError(f"fastvit sweep: expected one class per image, found --task {images.task}")
        self.class_names = images.class_names
        model = build.load_model(options, self.class_names)
        processor = build.load_image_processor(options, model)
        self.normalization = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
        sets = build.build_image_sets(options, images, processor, processes)
        if VALIDATION not in sets:
            raise InputError(f"fastvit sweep: expected a validation split, {images.name} has none")
        precision = build.choose_precision(options, get_vision_config(model.config).hidden_size)
        arguments = build.build_training_arguments(
            options, precision, True, options.max_steps, get_block_class_name(model)
        )
        # A trial reports its accuracy after every epoch, and writes no files.
        arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.EPOCH, IntervalStrategy.NO
        arguments.load_best_model_at_end = False
        self.trainer: RecipeTuner | None = None
        self.trainer = RecipeTuner(
            model_init=self.build_model,
            args=arguments,
            train_dataset=sets[TRAIN],
            eval_dataset=sets[VALIDATION],
            data_collator=ImageMixer(len(self.class_names)),
            compute_metrics=build_metrics(TASKS[images.task], None),
            callbacks=[PruneOnNonFiniteLoss()],
            ema_decay=options.ema,
        )
        self.trainer.remove_callback(ProgressCallback)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(Progress())

    def propose(self, trial: Any) -> dict[str, float]:
        for name, (low, high, logarithmic) in self.space.items():
            trial.suggest_float(name, low, high, log=logarithmic)
        return {}  # `build_model` sets them all: most are no arguments of Trainer

    def build_model(self, trial: Any) -> Any:
        """Build the model of a trial, and apply the trial's options to the trainer."""
        if trial is not None:
            self.propose(trial)  # Trainer builds the model first; a second call proposes the same values
        proposed = {} if trial is None else trial.params
        options = dataclasses.replace(self.options, **proposed)
        if self.trainer is not None:
            print(f"trial {trial.number}: " + ", ".join(f"{name} {value:.4g}" for name, value in proposed.items()))
            train: Any = self.trainer.train_dataset
            train.with_seeds = bool(options.mixup or options.cutmix)
            self.trainer.data_collator = ImageMixer(len(self.class_names), options.mixup, options.cutmix)
            loss = build.build_loss(options, train, len(self.class_names))
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


def run(options: FinetuneOptions, space: dict[str, Range], trials: int, folder: Path) -> dict[str, Any]:
    """Search until the study in `folder` has `trials` finished trials.

    Returns:
        The options of the best trial.

    Raises:
        InputError: the folder holds a search with other options, or no trial was completed.
    """
    optuna = require("optuna", "sweep", "fastvit sweep")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    set_seed(options.seed)
    options = resolve_recipe(options)
    print(describe_recipe(options))
    shared = {name: value for name, value in select_run_options(options).items() if name != "output_dir"}
    study = {"study_name": "fastvit", "storage": f"sqlite:///{(folder / STUDY).resolve()}"}
    attributes = {"options": shared, "space": {name: list(limits) for name, limits in space.items()}}
    finished: list[Any] = []
    if (folder / STUDY).exists():
        before = optuna.load_study(**study)
        if before.trials and before.user_attrs != attributes:
            raise InputError(f"--output-dir: {folder} holds a search with other options; give another folder")
        finished = list_finished_trials(before)
        print(f"{folder / STUDY}: {len(finished)} trials are finished")
    if len(finished) < trials:
        sweep = Sweep(options, space, PartialState(cpu=options.cpu))
        folder.mkdir(parents=True, exist_ok=True)
        opened = optuna.create_study(**study, direction="maximize", load_if_exists=True)
        for name, value in attributes.items():
            opened.set_user_attr(name, value)
        # The same seed after a restart would repeat the first random proposals.
        sampler = optuna.samplers.TPESampler(seed=options.seed + len(finished))
        try:
            sweep.search(trials - len(finished), **study, sampler=sampler, load_if_exists=True)
        except ValueError:
            if is_any_complete(optuna.load_study(**study).trials):
                raise  # otherwise there is no best trial, which is reported below
    return write_results(optuna.load_study(**study), shared, list(space), folder)


def write_results(study: Any, shared: dict[str, Any], names: list[str], folder: Path) -> dict[str, Any]:
    """Write the table of trials and the best options, and print both; returns the best options.

    Args:
        shared: the options that all trials share.
        names: the options that were varied.
    """
    ranked = sorted(
        list_finished_trials(study), key=lambda trial: (trial.state.name, -(trial.value or 0), trial.number)
    )
    if not is_any_complete(ranked):
        raise InputError("fastvit sweep: no trial was completed; try --search learning-rate=LOW:HIGH, lower")
    rows = [[trial.number, trial.state.name.lower(), trial.value, *map(trial.params.get, names)] for trial in ranked]
    header = ["trial", "state", "accuracy", *names]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(folder / TABLE, text.getvalue())
    best = {**shared, **study.best_trial.params}
    write_text(folder / BEST, yaml.safe_dump(best, sort_keys=False))
    print(format_table(header, rows[:20]))
    print(f"\nall trials: {folder / TABLE}")
    print(f"train with the best: fastvit finetune --config {shlex.quote(str(folder / BEST))}")
    return best


def list_finished_trials(study: Any) -> list[Any]:
    """The trials that were completed or pruned; not those that were interrupted."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


def is_any_complete(trials: Sequence[Any]) -> bool:
    return any(trial.state.name == "COMPLETE" for trial in trials)


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
