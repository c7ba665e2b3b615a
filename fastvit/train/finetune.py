"""Fine-tune a Vision Transformer on images:  fastvit finetune --dataset beans

Options -> data -> model (`build`) -> `transformers.Trainer` -> files (`results`). Trainer has the loop, checkpoints,
schedules, precision, logging and several devices; this module adds what is specific to images.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import accelerate
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from transformers import EarlyStoppingCallback, ViTImageProcessorPil, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from fastvit.adapters.backbones import get_block_class_name
from fastvit.data.datasets import TRAIN, VALIDATION, ImageDataset
from fastvit.data.images import ImageSet
from fastvit.data.streaming import Stream, StreamedDataset
from fastvit.data.targets import REGRESSION, SINGLE_LABEL
from fastvit.errors import InputError, Stopped, report_errors
from fastvit.files import write_atomically, write_text
from fastvit.models.backbone import get_vision_config
from fastvit.report import figures, info
from fastvit.report.tasks import TASKS
from fastvit.train.build import (
    build_image_sets,
    build_loss,
    build_stream,
    build_training_arguments,
    choose_precision,
    count_steps,
    describe_count,
    is_plain_vit,
    load_data,
    load_image_processor,
    load_model,
    prepare_model,
    print_counts,
    set_statistics,
)
from fastvit.train.defaults import describe_recipe, resolve_recipe
from fastvit.train.distributed import MARKER, explain_lost_process, get_launch_id, join_processes
from fastvit.train.lock import FolderLock, StopOnLostLock, lock_for_all
from fastvit.train.objectives import build_metrics, compute_spread
from fastvit.train.options import FinetuneOptions, check_task, list_stepwise_options, parse_options
from fastvit.train.probe import fit_classifier
from fastvit.train.recipes import ImageMixer, RecipeTuner
from fastvit.train.results import write_fold_summary, write_results
from fastvit.train.resume import (
    OutOfMemory,
    check_fixed_options,
    explain_early_end,
    resolve_resume,
    shrink_batch,
)
from fastvit.train.run_folder import (
    check_is_free,
    describe_next_start,
    find_last_checkpoint,
    read_run_options,
    remove_run,
    select_run_options,
)
from fastvit.train.training import Progress, RunLogWriter, StopOnInterrupt, StopOnNonFiniteLoss
from fastvit.tuning.startup import tune_at_start


def run(options: FinetuneOptions) -> dict[str, float]:
    """Fine-tune a model and write its files.

    With --auto-batch, training restarts from its last checkpoint until a batch fits into the memory.

    Returns:
        Metrics of the validation and test splits that there are; with folds, their means over the folds.

    Raises:
        InputError: an option, an image or a checkpoint cannot be used, training cannot continue, or another run uses
            the folder.
        Stopped: a signal ended the run.
    """
    if options.folds is not None and options.fold is None:
        with FolderLock(Path(options.output_dir)):
            return run_folds(resolve_recipe(options), options.folds)
    output_dir = Path(options.output_dir)
    with join_processes(options.cpu) as processes, lock_for_all(output_dir, processes) as lock:
        check_is_free(options)  # again: another run may have ended since the options were parsed
        options = resolve_resume(resolve_recipe(options))
        while True:
            try:
                return fine_tune(options, processes, lock)
            except OutOfMemory as error:
                options = shrink_batch(options, error)
            clear_device_cache(garbage_collection=True)


def run_folds(options: FinetuneOptions, folds: int) -> dict[str, float]:
    """Train every fold in its own folder, and write the mean and standard deviation of the metrics."""
    output_dir = Path(options.output_dir)
    check_is_free(options)
    if options.overwrite:
        remove_run(output_dir)
    if options.resume and (before := read_run_options(output_dir)):
        check_fixed_options(before, options)
    runs = []
    for fold in range(1, folds + 1):
        folder = output_dir / f"fold-{fold}"
        print(f"\nfold {fold} of {folds}")
        # The model card is the last file of a run: a fold that has one is finished.
        if not (options.resume and (folder / "README.md").exists()):
            resume = options.resume and find_last_checkpoint(folder) is not None
            run(dataclasses.replace(options, output_dir=str(folder), fold=fold, resume=resume, overwrite=not resume))
        runs.append(json.loads((folder / "all_results.json").read_text()))
        if fold == 1:  # the options and the images have been checked
            write_text(output_dir / "config.yaml", yaml.safe_dump(select_run_options(options), sort_keys=False))
    return write_fold_summary(output_dir, runs)


def fine_tune(options: FinetuneOptions, processes: PartialState, lock: FolderLock | None) -> dict[str, float]:
    """Load, train and write in one of `processes`; returns the metrics."""
    transformers.utils.logging.disable_progress_bar()  # one per written checkpoint
    set_seed(options.seed)
    images = load_data(options, processes)
    print_counts(images)
    check_task(options, images.task)
    stepwise = list_stepwise_reasons(options) + ([] if images.task == SINGLE_LABEL else [f"--task {images.task}"])
    if options.freeze_backbone:
        print(
            f"note: the classifier is trained step by step because of {', '.join(stepwise)}; without, it is fitted to"
            " features that are computed once"
            if stepwise
            else "note: the classifier is fitted to features that are computed once; --epochs, --learning-rate and the"
            " other options of the optimizer have no effect"
        )
    if stepwise:
        print(describe_recipe(options))
    model = load_model(options, images.class_names, images.task)
    processor = load_image_processor(options, model)
    sets = build_image_sets(options, images, processor, processes)
    set_statistics(options, images, sets, processor)
    model.config.image_mean, model.config.image_std = list(processor.image_mean), list(processor.image_std)
    train_set: Stream | ImageSet
    if isinstance(images, StreamedDataset):
        train_set = build_stream(options, images, processor, processes)
    else:
        train_set = sets[TRAIN]
    for name in ("early_stopping", "calibrate"):
        if getattr(options, name) and VALIDATION not in sets:
            raise InputError(f"--{name.replace('_', '-')}: expected a validation split, {images.name} has none")
    model = prepare_model(options, model, compute_spread(sets[TRAIN].labels) if images.task == REGRESSION else None)
    task, num_classes = TASKS[images.task], len(images.class_names)
    loss = build_loss(options, sets.get(TRAIN), num_classes, is_plain_vit(options), images.task)
    mix = ImageMixer(num_classes, options.mixup, options.cutmix)

    # The options and the images have been checked: from here on the folder is written.
    with processes.main_process_first():
        if processes.is_main_process:
            begin_run(options, images, processor)
    print(f"example images: {Path(options.output_dir, 'examples.png')}")
    precision = choose_precision(options, get_vision_config(model.config).hidden_size)
    interrupt, log, progress = StopOnInterrupt(), RunLogWriter(Path(options.output_dir)), Progress()
    trainer = RecipeTuner(
        model=model,
        args=build_training_arguments(
            options,
            precision,
            VALIDATION in sets,
            count_steps(options, images, processes),
            get_block_class_name(model),
            images.task,
            num_classes,
        ),
        train_dataset=train_set,
        eval_dataset=sets.get(VALIDATION),
        processing_class=processor,
        data_collator=mix,
        compute_loss_func=loss,
        compute_metrics=build_metrics(task, loss),
        callbacks=[StopOnLostLock(lock), log, interrupt, StopOnNonFiniteLoss()],
        layer_decay=options.layer_decay,
        ema_decay=options.ema,
        keep_checkpoints=options.keep_checkpoints,
    )
    set_callbacks(trainer, options, progress)
    if options.tune:
        tune_operations(trainer, precision)
    announce_training(trainer, images, processor, precision, processes.num_processes)
    if processes.num_processes > 1:
        accelerate.utils.set_seed(options.seed, device_specific=True)  # different dropout on each
    try:
        return train(trainer, images, sets, options, interrupt, log, fits_features=not stepwise)
    finally:
        progress.close()


def list_stepwise_reasons(options: FinetuneOptions) -> list[str]:
    """Why training goes step by step; empty if the classifier is fitted to the features of a frozen backbone."""
    if not options.freeze_backbone:
        return ["a backbone that is trained"]
    has_checkpoint = options.resume and find_last_checkpoint(options.output_dir) is not None
    return list_stepwise_options(options) + ["the checkpoint"] * has_checkpoint


def set_callbacks(trainer: RecipeTuner, options: FinetuneOptions, progress: Progress) -> None:
    """Add early stopping if it is on, and one progress bar instead of Trainer's output."""
    if options.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(options.early_stopping))
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress)


def announce_training(
    trainer: RecipeTuner, images: ImageDataset, processor: ViTImageProcessorPil, precision: str, num_processes: int
) -> None:
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(
        f"training {parameters / 1e6:.1f} M parameters on {describe_count(images)} images of"
        f" {processor.size['height']}x{processor.size['width']}, {precision}, on {trainer.args.device}"
        + (f" and {num_processes - 1} more" if num_processes > 1 else "")
    )


def train(
    trainer: RecipeTuner,
    images: ImageDataset,
    sets: dict[str, ImageSet],
    options: FinetuneOptions,
    interrupt: StopOnInterrupt,
    log: RunLogWriter,
    *,
    fits_features: bool,
) -> dict[str, float]:
    """Train, write the results, and log how the run ended.

    Args:
        fits_features: fit the classifier to features in place of training step by step.

    Raises:
        Stopped: by a signal, after a checkpoint was saved.
    """
    with log, explain_early_end(trainer, options):

        def describe_remedy() -> str:
            last = find_last_checkpoint(options.output_dir)
            return f"the last checkpoint is {last or 'none'}; continue with the same command and --resume"

        if fits_features:
            assert isinstance(trainer.train_dataset, ImageSet)
            result = fit_classifier(trainer, trainer.train_dataset, options.label_smoothing)
        else:
            with interrupt, explain_lost_process(describe_remedy):
                result = trainer.train(
                    resume_from_checkpoint=find_last_checkpoint(options.output_dir) if options.resume else None
                )
        signum = interrupt.signum if interrupt.is_stop_requested() else None
        metrics = write_results(trainer, result, images, sets, options) if signum is None else {}
    if signum is not None:
        print(f"stopped at step {trainer.state.global_step}; {describe_next_start(options.output_dir)}")
    log_kernels(log)
    if signum is not None:
        log.append("end", outcome="interrupted", reason="continue with --resume")
        raise Stopped(signum)
    log.append("end", outcome="finished", reason="")
    return metrics


def begin_run(options: FinetuneOptions, images: ImageDataset, processor: ViTImageProcessorPil) -> None:
    """Create the folder and the files that are written before training."""
    output_dir = Path(options.output_dir)
    if options.overwrite:
        remove_run(output_dir)
    with write_atomically(output_dir) as folder:
        if launch := get_launch_id():
            write_text(folder / MARKER, launch)
        write_text(folder / "config.yaml", yaml.safe_dump(select_run_options(options), sort_keys=False))
        examples = images.sample_examples(num_classes=20, per_class=8, side=256)
        figures.save_image(figures.draw_example_grid(examples), folder / "examples.png")
        processor.save_pretrained(folder)


def tune_operations(trainer: RecipeTuner, precision: str) -> None:
    """On a GPU, measure the operations of training and of evaluation that have no record yet."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    args = trainer.args
    batches = [(args.per_device_train_batch_size, True), (args.per_device_eval_batch_size, False)]
    if (line := tune_at_start(trainer.model, batches, dtype, is_distributed=True)) is not None:
        print(f"{line} (--no-tune skips this)")


def log_kernels(log: RunLogWriter) -> None:
    """Log the kernels that failed, and the records that chose between kernels and PyTorch."""
    found = info.summarize_kernels()
    if any(found.values()):
        log.append("kernels", **found)


def main(argv: list[str] | None = None) -> int:
    return report_errors(lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
