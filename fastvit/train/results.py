"""The files of a finished training: model, metrics, reports, model card and page."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PredictionOutput, TrainOutput

from fastvit.data.datasets import TEST, VALIDATION, ImageDataset
from fastvit.data.images import ImageSet
from fastvit.data.targets import MULTI_LABEL
from fastvit.files import write_text
from fastvit.models import calibration
from fastvit.models.calibration import compute_probabilities, get_thresholds
from fastvit.report import figures
from fastvit.report.tasks import TASKS, choose_thresholds
from fastvit.train import page
from fastvit.train.build import describe_count
from fastvit.train.distributed import MARKER
from fastvit.train.folds import summarize_folds
from fastvit.train.meters import Clock
from fastvit.train.model_card import build_model_card
from fastvit.train.options import FinetuneOptions
from fastvit.train.recipes import RecipeTuner, merge_adapters
from fastvit.train.run_folder import ADAPTER, REPORT_FILE

SPLITS = {VALIDATION: "eval", TEST: "test"}  # split that is evaluated at the end -> prefix of its metrics


def write_results(
    trainer: RecipeTuner, result: TrainOutput, images: ImageDataset, sets: dict[str, ImageSet], options: FinetuneOptions
) -> dict[str, float]:
    """Evaluate the trained model and write its files.

    Args:
        result: returned by `trainer.train`.
        sets: split -> images; the splits in `SPLITS` are evaluated.

    Returns:
        Metrics of the evaluated splits.
    """
    output_dir = Path(options.output_dir)
    save_model(trainer, result, options)
    trainer.flip = options.flip
    metrics: dict[str, float] = {}
    reports, evaluations = [], {}
    temperature = 1.0
    for name, prefix in SPLITS.items():
        if name not in sets:
            continue
        output = trainer.predict(sets[name], metric_key_prefix=prefix)
        split_metrics = {**output.metrics, "epoch": trainer.state.epoch}
        if options.calibrate:
            if name == VALIDATION:
                temperature = metrics["temperature"] = calibrate_model(trainer, output, output_dir)
                print(f"\ntemperature {temperature:.3f}, fitted on {name}")
            before, after = measure_calibration(trainer, output, temperature, output_dir / f"reliability_{name}.png")
            split_metrics |= {
                f"{prefix}_calibration_error_before": before,
                f"{prefix}_calibration_error_after": after,
            }
        scores = compute_probabilities(torch.from_numpy(output.predictions), trainer.model.config).numpy()
        if images.task == MULTI_LABEL and name == VALIDATION:
            store_in_config(trainer, output_dir, label_thresholds=choose_thresholds(output.label_ids, scores))
        evaluations[name] = TASKS[images.task].evaluate(
            output.label_ids, scores, images.class_names, get_thresholds(trainer.model.config)
        )
        numbers = {k: v for k, v in evaluations[name].metrics.items() if isinstance(v, float)}
        split_metrics |= {f"{prefix}_{metric}": value for metric, value in numbers.items()}
        trainer.save_metrics(prefix, split_metrics)
        metrics |= split_metrics
        reports.append(f"{name}: {evaluations[name].format_text()}\n")
        print(f"\n{reports[-1]}", end="")
    if trainer.is_world_process_zero():
        write_text(output_dir / "classification_report.txt", "\n".join(reports))
        (output_dir / MARKER).unlink(missing_ok=True)
    trainer.model_card = build_model_card(options, images, metrics, "\n".join(reports), trainer.model.config)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        seconds = result.metrics["train_runtime"]
        report = page.gather_report(
            options,
            images,
            describe_count(images),
            sets,
            evaluations,
            trainer.state,
            trainer.args.device,
            seconds,
        )
        write_text(output_dir / REPORT_FILE, page.render(report))
    if options.push_to_hub:
        trainer.push_to_hub()
    print(f"\nmodel, metrics and model card: {output_dir}")
    print(f"report: {output_dir / REPORT_FILE}")
    print(f"try it: fastvit predict {shlex.quote(str(output_dir))} IMAGE")
    return metrics


def save_model(trainer: RecipeTuner, result: TrainOutput, options: FinetuneOptions) -> None:
    """Save the metrics of training, Trainer's state, and the model as one file with merged adapters."""
    output_dir = Path(options.output_dir)
    result.metrics["train_loss"] = compute_mean_loss(
        trainer.state.log_history
    )  # Trainer's covers the steps of this process only
    has_trained = trainer.state.global_step > trainer.find_callback(Clock).first_step
    if has_trained or not (output_dir / "train_results.json").exists():
        # Otherwise there was nothing left to train, and the file has the time and speed of the run before.
        trainer.log_metrics("train", {name: value for name, value in result.metrics.items() if name != "total_flos"})
        trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if options.lora is not None:
        merge_adapters(trainer, output_dir / ADAPTER)
    if trainer.is_fsdp_enabled:  # checkpoints are sharded; the result is one file
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()


def calibrate_model(trainer: RecipeTuner, output: PredictionOutput, output_dir: Path) -> float:
    """Fit the temperature of the probabilities, and store it in the model's config."""
    temperature = calibration.fit_temperature(output.predictions, output.label_ids)
    store_in_config(trainer, output_dir, calibration_temperature=temperature)
    return temperature


def store_in_config(trainer: RecipeTuner, output_dir: Path, **values: Any) -> None:
    """Set values of the config of the model, and of the model that was saved."""
    trainer.model.config.update(values)
    if trainer.is_world_process_zero():
        trainer.model.config.save_pretrained(output_dir)


def measure_calibration(
    trainer: RecipeTuner, output: PredictionOutput, temperature: float, plot: Path
) -> tuple[float, float]:
    """Expected calibration error without and with the temperature; plots both reliability diagrams to `plot`."""
    diagrams = {
        title: calibration.compute_reliability(calibration.softmax(output.predictions, divisor), output.label_ids)
        for title, divisor in (("before", 1.0), ("after", temperature))
    }
    if trainer.is_world_process_zero():
        figures.save_image(calibration.plot_reliability(diagrams), plot)
    return diagrams["before"].expected_calibration_error, diagrams["after"].expected_calibration_error


def compute_mean_loss(log_history: list[dict[str, float]]) -> float:
    """Mean loss over all steps, from the logged means over the steps between two logs."""
    total, last = 0.0, 0.0
    for log in log_history:
        if "loss" in log:
            total, last = total + log["loss"] * (log["step"] - last), log["step"]
    return total / last


def write_fold_summary(output_dir: Path, runs: list[dict[str, float]]) -> dict[str, float]:
    """Write and print the mean and standard deviation of the folds' metrics; returns the means."""
    summary = summarize_folds(runs)
    write_text(output_dir / "folds.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{len(runs)} folds, mean ± standard deviation")
    for name, spread in summary.items():
        print(f"  {name:<16}{spread['mean']:.4f} ± {spread['standard_deviation']:.4f}")
    print(f"\nmodels and metrics: {output_dir}")
    return {name: spread["mean"] for name, spread in summary.items()}
