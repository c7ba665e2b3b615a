"""Fine-tune a Vision Transformer on images:  fastvit finetune --dataset beans

Options -> data -> model (`build`) -> `transformers.Trainer` -> files (`results`). What Trainer has (loop, checkpoints,
schedules, precision, logging, several devices) is Trainer's; here is what is particular to images.
"""

from __future__ import annotations

import argparse
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
from transformers.trainer_utils import get_last_checkpoint

from fastvit.data.datasets import TRAIN, VALIDATION, ImageDataset
from fastvit.data.images import ImageSet
from fastvit.data.streaming import Stream, StreamedDataset
from fastvit.errors import InputError, Stopped, report_errors
from fastvit.files import write_atomically, write_text
from fastvit.report import figures, info
from fastvit.train.build import (
    choose_precision,
    compute_accuracy,
    count_steps,
    describe_count,
    load_data,
    load_image_processor,
    load_model,
    make_image_sets,
    make_loss,
    make_stream,
    make_training_arguments,
    prepare_model,
    print_counts,
)
from fastvit.train.distributed import MARKER, explain_lost_process, join_processes, launch_id
from fastvit.train.options import parse_options
from fastvit.train.recipes import MixPictures, RecipeTuner
from fastvit.train.results import write_fold_summary, write_results
from fastvit.train.resume import (
    OutOfMemory,
    describe_run_folder,
    explain_early_end,
    find_last_checkpoint,
    remove_run,
    resolve_resume,
    select_run_options,
    shrink_batch,
)
from fastvit.train.training import Progress, StopOnInterrupt, StopOnNonFiniteLoss, WriteLog
from fastvit.tuning.startup import tune_at_start


def run(options: argparse.Namespace) -> dict[str, float]:
    """Everything from options to files; returns the metrics of validation and of the test split, if there are any.

    With folds, the metrics' means over the folds. With --auto-batch as often as it takes to find a batch that the
    memory holds.
    """
    if options.folds is not None and options.fold is None:
        return run_folds(options)
    with join_processes(options.cpu) as processes:
        options = resolve_resume(options)
        while True:
            try:
                return fine_tune(options, processes)
            except OutOfMemory as error:
                options = shrink_batch(options, error)
            clear_device_cache(garbage_collection=True)


def run_folds(options: argparse.Namespace) -> dict[str, float]:
    """Train every fold in a folder of its own, and write the mean and the spread of the metrics."""
    output_dir = Path(options.output_dir)
    if options.overwrite:
        remove_run(output_dir)
    runs = []
    for fold in range(1, options.folds + 1):
        folder = output_dir / f"fold-{fold}"
        print(f"\nfold {fold} of {options.folds}")
        # A run ends with its model card: with one, there is nothing to go on with.
        if not (options.resume and (folder / "README.md").exists()):
            resume = options.resume and folder.is_dir() and get_last_checkpoint(folder) is not None
            given = {"output_dir": str(folder), "fold": fold, "resume": resume, "overwrite": not resume}
            run(argparse.Namespace(**{**vars(options), **given}))
        runs.append(json.loads((folder / "all_results.json").read_text()))
        if fold == 1:  # what was wrong with the input has been said
            write_text(output_dir / "config.yaml", yaml.safe_dump(select_run_options(options), sort_keys=False))
    return write_fold_summary(output_dir, runs)


def fine_tune(options: argparse.Namespace, processes: PartialState) -> dict[str, float]:
    """The work of one of `processes`: load, train, write; returns the metrics."""
    transformers.utils.logging.disable_progress_bar()  # a bar for the writing of every checkpoint
    set_seed(options.seed)
    images = load_data(options, processes)
    print_counts(images)
    model = load_model(options, images.class_names)
    processor = load_image_processor(options, model)
    model.config.image_mean, model.config.image_std = list(processor.image_mean), list(processor.image_std)
    sets = make_image_sets(options, images, processor, processes)
    train_set: Stream | ImageSet
    if isinstance(images, StreamedDataset):
        train_set = make_stream(options, images, processor, processes)
    else:
        train_set = sets[TRAIN]
    for name in ("early_stopping", "calibrate"):
        asked = getattr(options, name)
        if asked is not None and asked is not False and VALIDATION not in sets:
            raise InputError(f"--{name.replace('_', '-')}: expected a validation split, {images.name} has none")
    model = prepare_model(options, model)
    mix = MixPictures(len(images.class_names), options.mixup, options.cutmix)

    # From here on the folder is written; whatever was wrong with the input has been said.
    with processes.main_process_first():
        if processes.is_main_process:
            begin_run(options, images, processor)
    print(f"example pictures: {Path(options.output_dir, 'examples.png')}")
    precision = choose_precision(options, model.config.hidden_size)
    interrupt, log, progress = StopOnInterrupt(), WriteLog(Path(options.output_dir)), Progress()
    trainer = RecipeTuner(
        model=model,
        args=make_training_arguments(options, precision, VALIDATION in sets, count_steps(options, images, processes)),
        train_dataset=train_set,
        eval_dataset=sets.get(VALIDATION),
        processing_class=processor,
        data_collator=mix,
        compute_loss_func=make_loss(options, sets.get(TRAIN), len(images.class_names)),
        compute_metrics=compute_accuracy,
        callbacks=[log, interrupt, StopOnNonFiniteLoss()],
        layer_decay=options.layer_decay,
        ema_decay=options.ema,
        keep_checkpoints=options.keep_checkpoints,
    )
    set_callbacks(trainer, options, progress)
    if options.tune:
        tune_operations(trainer, precision)
    announce_training(trainer, images, processor, precision, processes.num_processes)
    if processes.num_processes > 1:
        accelerate.utils.set_seed(options.seed, device_specific=True)  # other dropout on each
    try:
        return train(trainer, images, sets, options, interrupt, log)
    finally:
        progress.close()


def set_callbacks(trainer: RecipeTuner, options: argparse.Namespace, progress: Progress) -> None:
    """Early stopping where it is asked for, and one bar instead of Trainer's output."""
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
        f"training {parameters / 1e6:.1f} M parameters on {describe_count(images)} pictures of"
        f" {processor.size['height']}x{processor.size['width']}, {precision}, on {trainer.args.device}"
        + (f" and {num_processes - 1} more" if num_processes > 1 else "")
    )


def train(
    trainer: RecipeTuner,
    images: ImageDataset,
    sets: dict[str, ImageSet],
    options: argparse.Namespace,
    interrupt: StopOnInterrupt,
    log: WriteLog,
) -> dict[str, float]:
    """Train, write the results, and say in the log how it ended.

    Raises:
        Stopped: by a signal, with a checkpoint to go on from.
    """
    with log, explain_early_end(trainer, options):
        with interrupt, explain_lost_process(Path(options.output_dir)):
            result = trainer.train(resume_from_checkpoint=find_last_checkpoint(options) if options.resume else None)
        signum = interrupt.signum if interrupt.asked_to_stop() else None
        metrics = write_results(trainer, result, images, sets, options) if signum is None else {}
    if signum is not None:
        print(f"stopped at step {trainer.state.global_step}; {describe_run_folder(options)}")
    log_kernels(log)
    if signum is not None:
        log.append("end", outcome="interrupted", reason="go on with --resume")
        raise Stopped(signum)
    log.append("end", outcome="finished", reason="")
    return metrics


def begin_run(options: argparse.Namespace, images: ImageDataset, processor: ViTImageProcessorPil) -> None:
    """The folder and the files that stand in it from the start."""
    output_dir = Path(options.output_dir)
    if options.overwrite:
        remove_run(output_dir)
    with write_atomically(output_dir) as folder:
        if launch := launch_id():
            write_text(folder / MARKER, launch)
        write_text(folder / "config.yaml", yaml.safe_dump(select_run_options(options), sort_keys=False))
        examples = images.sample_examples(num_classes=20, per_class=8, side=256)
        figures.save_image(figures.draw_example_grid(examples), folder / "examples.png")
        processor.save_pretrained(folder)


def tune_operations(trainer: RecipeTuner, precision: str) -> None:
    """Measure the operations of training and of evaluation where they have not been, on a GPU."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    args = trainer.args
    wanted = [(args.per_device_train_batch_size, True), (args.per_device_eval_batch_size, False)]
    if (line := tune_at_start(trainer.model, wanted, dtype, is_distributed=True)) is not None:
        print(f"{line} (--no-tune leaves this out)")


def log_kernels(log: WriteLog) -> None:
    """What fell back to PyTorch, and what was chosen by a measurement, if anything was."""
    found = info.summarize_kernels()
    if any(found.values()):
        log.append("kernels", **found)


def main(argv: list[str] | None = None) -> int:
    return report_errors(lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
