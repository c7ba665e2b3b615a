"""Fine-tune a Vision Transformer on pictures:  fastvit finetune --dataset beans

Options -> data -> model -> `transformers.Trainer` -> files. What Trainer has (loop, checkpoints, schedules, precision,
logging, several devices) is Trainer's; here is what is particular to pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
import yaml
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import (
    EarlyStoppingCallback,
    TrainerState,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

import fastvit
from fastvit.checkpoints.configuration import as_pair
from fastvit.data.datasets import TEST, TRAIN, VALIDATION, ImageDataset, load_images
from fastvit.data.images import MEMORY_CACHE_BYTES, Augment, ImageSet, cache_images
from fastvit.data.streaming import Stream, StreamedDataset, stream_images
from fastvit.errors import InputError, Stopped, is_out_of_memory, report_errors
from fastvit.files import PARTIAL, WriteError, remove_folder, whole_files, write_text
from fastvit.models import calibration
from fastvit.models.heads import ViTForImageClassification
from fastvit.models.loading import load_config, load_image_settings, load_pretrained
from fastvit.ops import eager
from fastvit.report import figures, info
from fastvit.report.classification import classification_metrics, confusion_matrix, format_metrics
from fastvit.report.run_log import LOG_FILE
from fastvit.train import page
from fastvit.train.distributed import MARKER, joined_processes, launch_id, lost_process_is_said
from fastvit.train.folds import summarize_folds, take_fold
from fastvit.train.options import SIZES, parse_options
from fastvit.train.recipes import (
    MixPictures,
    RandAugment,
    RecipeTuner,
    TargetLoss,
    add_adapters,
    class_weights,
    merge_adapters,
)
from fastvit.train.training import Progress, StopOnInterrupt, StopOnNonFiniteLoss, WriteLog
from fastvit.tuning.startup import tune_at_start

# What a run writes besides checkpoint-N folders; only these are removed by --overwrite.
RUN_FILES = (
    MARKER,
    "README.md",
    "all_results.json",
    "classification_report.txt",
    "config.json",
    "config.yaml",
    "eval_results.json",
    "examples.png",
    "folds.json",
    LOG_FILE,
    "model.safetensors",
    "preprocessor_config.json",
    "reliability_test.png",
    "reliability_validation.png",
    page.REPORT_FILE,
    "test_results.json",
    "train_results.json",
    "trainer_state.json",
    "training_args.bin",
)
ADAPTER = "adapter"  # what --lora trained, by itself


def remove_run(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):  # first, while config.yaml still says what they are of
        remove_folder(checkpoint)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for adapter in folder.glob(ADAPTER):
        remove_folder(adapter)
    for fold in folder.glob("fold-*"):
        remove_run(fold)
        with contextlib.suppress(OSError):  # somebody's own files are in it
            fold.rmdir()
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def load_model(options: argparse.Namespace, class_names: list[str]) -> ViTForImageClassification:
    """The model with a classifier for `class_names`, pretrained or from scratch."""
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "problem_type": "single_label_classification",
        "attention_probs_dropout_prob": options.attention_dropout,
        "hidden_dropout_prob": options.hidden_dropout,
        "drop_path_rate": options.drop_path,
    }
    if options.from_scratch is not None:
        hidden_size, num_layers, num_heads = SIZES[options.from_scratch]
        image_size = options.image_size or 224
        if image_size % options.patch_size:
            raise InputError(
                f"--image-size: expected a multiple of the patch size {options.patch_size}, got {image_size}"
            )
        config = ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * hidden_size,
            image_size=image_size,
            patch_size=options.patch_size,
            encoder_stride=options.patch_size,
            layer_norm_eps=1e-6,
            **labels,
        )
        return ViTForImageClassification(config)

    config = load_config(options.model)
    config.update(labels)
    if options.image_size is not None:
        config.image_size = options.image_size
        patch_size = as_pair(config.patch_size)
        if any(options.image_size % side for side in patch_size):
            raise InputError(
                f"--image-size: expected a multiple of the patch size {patch_size}, got {options.image_size}"
            )
    # The classifier is the one part that may not fit: other classes. Everything else must.
    return load_pretrained(options.model, ignore_mismatched_sizes=True, config=config)


def image_processor_for(options: argparse.Namespace, model: ViTForImageClassification) -> ViTImageProcessorPil:
    """The processor that goes with the model: its own normalisation and resampling, at the size it is trained for."""
    height, width = as_pair(model.config.image_size)
    settings: dict[str, Any] = {}
    if options.from_scratch is None:
        base = load_image_settings(options.model, model.config)
        if base is None:
            print(f"note: {options.model} has no image processor; mean and standard deviation 0.5 are used")
        else:
            settings = {"image_mean": list(base[0]), "image_std": list(base[1]), "resample": base[3]}
    return ViTImageProcessorPil(size={"height": height, "width": width}, **settings)


def decode_size(size: tuple[int, int], augment: Augment | None) -> tuple[int, int]:
    """Pictures that will be cropped are decoded a seventh larger, so that crops keep their detail."""
    return (math.ceil(size[0] * 8 / 7), math.ceil(size[1] * 8 / 7)) if augment else size


def make_image_sets(
    options: argparse.Namespace, images: ImageDataset, processor: ViTImageProcessorPil, processes: PartialState
) -> dict[str, ImageSet]:
    """Every split decoded and cached: by the first process of a machine, into a file that all of them read."""
    size = (processor.size["height"], processor.size["width"])
    cache_home = Path(os.environ.get("FASTVIT_CACHE_DIR") or Path.home() / ".cache" / "fastvit")
    sets = {}
    for name, split in images.splits.items():
        limit = options.max_train_samples if name == TRAIN else options.max_eval_samples
        if limit is not None and limit < len(split):
            split = split.select(np.sort(np.random.default_rng(options.seed).permutation(len(split))[:limit]))
        crop = Augment(size) if name == TRAIN and options.augment else None
        with processes.local_main_process_first():
            cache = cache_images(
                split.load,
                len(split),
                decode_size(size, crop),
                resample=processor.resample,
                skip_bad=options.skip_bad_images,
                key=split.key,
                cache_dir=cache_home / "images",
                memory_limit=MEMORY_CACHE_BYTES if processes.num_processes == 1 else 0,
                description=f"decoding {name}",
            )
        if cache.skipped:
            print(f"{name}: {len(cache.skipped)} of {len(split)} pictures skipped:")
            for reason in list(cache.skipped.values())[:10]:
                print(f"  {reason}")
        augment: Augment | RandAugment | None = crop
        if name == TRAIN and options.randaugment is not None:
            operations, magnitude = options.randaugment
            augment = RandAugment(operations, magnitude, first=crop)
        with_seeds = name == TRAIN and bool(options.mixup or options.cutmix)
        sets[name] = ImageSet(cache, split.labels, augment, seed=options.seed, with_seeds=with_seeds)
        if len(sets[name]) == 0:
            raise InputError(f"{images.name}: no picture left in split {name!r}")
    return sets


def print_counts(images: ImageDataset) -> None:
    width = max(len(name) for name in [*images.class_names, "class"])
    print(f"{images.name}: {len(images.class_names)} classes")
    print(f"  {'class':<{width}}" + "".join(f"{name:>12}" for name in images.splits))
    counts = images.counts()
    for label, class_name in list(enumerate(images.class_names))[:50]:
        print(f"  {class_name:<{width}}" + "".join(f"{count[label]:>12}" for count in counts.values()))
    if len(images.class_names) > 50:
        print(f"  ... and {len(images.class_names) - 50} more classes")
    print(f"  {'together':<{width}}" + "".join(f"{count.sum():>12}" for count in counts.values()))


def precision_of(options: argparse.Namespace, hidden_size: int) -> str:
    """bf16, fp16 or fp32; auto is bf16 where it is the faster: on most GPUs, and for wide models on CPUs with AMX."""
    if options.precision != "auto":
        return options.precision
    if torch.cuda.is_available() and not options.cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Below a width of about 192 the casts cost more than the matrix products gain.
    has_amx = hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("amx_bf16", False)
    return "bf16" if has_amx and hidden_size >= 192 else "fp32"


def make_stream(
    options: argparse.Namespace, images: StreamedDataset, processor: ViTImageProcessorPil, processes: PartialState
) -> Stream:
    """This process's training pictures; after --resume, those that come next."""
    size = (processor.size["height"], processor.size["width"])
    augment = Augment(size) if options.augment else None
    stream = Stream(
        images,
        decode_size(size, augment),
        augment,
        resample=processor.resample,
        seed=options.seed,
        shuffle_buffer=options.shuffle_buffer,
        skip_bad=options.skip_bad_images,
        rank=processes.process_index,
        world_size=processes.num_processes,
    )
    if options.resume and (checkpoint := last_checkpoint(options)):
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        stream.resume_after(state.global_step * options.gradient_accumulation, options.batch_size)
    return stream


def max_steps_of(options: argparse.Namespace, images: ImageDataset, processes: PartialState) -> int:
    """Steps to train for; -1 leaves that to the number of epochs. A stream has no end, so that it needs a number."""
    if options.max_steps > 0 or not isinstance(images, StreamedDataset) or images.num_train is None:
        return options.max_steps
    pictures_a_step = options.batch_size * options.gradient_accumulation * processes.num_processes
    return math.ceil(options.epochs * images.num_train / pictures_a_step)


def training_arguments(
    options: argparse.Namespace, precision: str, has_validation: bool, max_steps: int
) -> TrainingArguments:
    strategy = "steps" if has_validation else "no"
    return TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        max_steps=max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size if options.auto_batch else max(options.batch_size, 32),
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        lr_scheduler_type=options.scheduler,
        label_smoothing_factor=options.label_smoothing,
        gradient_accumulation_steps=options.gradient_accumulation,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        torch_compile=options.compile,
        use_cpu=options.cpu or not torch.cuda.is_available(),
        seed=options.seed,
        data_seed=options.seed,
        ddp_find_unused_parameters=False,
        fsdp=True if options.fsdp else None,
        fsdp_config={"transformer_layer_cls_to_wrap": ["ViTLayer"], "state_dict_type": "SHARDED_STATE_DICT"},
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available() and not options.cpu,
        remove_unused_columns=False,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=strategy,
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.eval_steps,
        load_best_model_at_end=has_validation,
        restore_callback_states_from_checkpoint=True,  # early stopping's patience
        metric_for_best_model="accuracy" if has_validation else None,
        report_to=options.report_to,
        push_to_hub=options.push_to_hub is not None,
        hub_model_id=options.push_to_hub,
    )


def accuracy(prediction) -> dict[str, float]:
    """Accuracy, and the loss of every picture once: Trainer's own counts those twice that fill up the last batches."""
    logits, labels = torch.as_tensor(prediction.predictions).float(), torch.as_tensor(prediction.label_ids)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return {"accuracy": float((logits.argmax(-1) == labels).double().mean()), "loss": float(loss)}


def run(options: argparse.Namespace) -> dict[str, float]:
    """Everything from options to files; returns the metrics of validation and of the test split, if there are any.

    With folds, the metrics' means over the folds. With --auto-batch as often as it takes to find a batch that the
    memory holds.
    """
    if options.folds is not None and options.fold is None:
        return run_folds(options)
    with joined_processes(options.cpu) as processes:
        options = take_up(options)
        while True:
            try:
                return fine_tune(options, processes)
            except OutOfMemory as error:
                options = with_smaller_batch(options, error)
            clear_device_cache(garbage_collection=True)


def load_data(options: argparse.Namespace, processes: PartialState) -> ImageDataset:
    """The pictures that the options name, with one of the folds for validation if that is asked for."""
    if options.streaming:
        return stream_images(
            options.dataset,
            options.data_dir,
            image_column=options.image_column,
            label_column=options.label_column,
            class_names=options.class_names,
            max_eval_samples=options.max_eval_samples,
            seed=options.seed,
            need_length=options.max_steps <= 0,
            need_validation=options.validation_fraction != 0,
        )
    with processes.local_main_process_first():
        images = load_images(
            options.dataset,
            options.data_dir,
            image_column=options.image_column,
            label_column=options.label_column,
            validation_fraction=options.validation_fraction if options.fold is None else 0,
            seed=options.seed,
            image_size=options.image_size or 64,
            generated_images=options.generated_images,
        )
    return images if options.fold is None else take_fold(images, options.folds, options.fold, options.seed)


def ready_to_train(options: argparse.Namespace, model: ViTForImageClassification) -> Any:
    """The model with what is to be trained of it, and adapters if they are asked for."""
    if options.freeze_backbone:
        model.vit.requires_grad_(False)
    if options.gradient_checkpointing:
        # The method's new name from transformers 5.2x on.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    return model if options.lora is None else add_adapters(model, options.lora)


def loss_of(options: argparse.Namespace, train: ImageSet | None, num_classes: int) -> TargetLoss | None:
    """The loss, where it is not the model's own with Trainer's label smoothing."""
    weights = None
    if options.class_balanced is not None and train is not None:
        weights = class_weights(np.bincount(train.labels, minlength=num_classes), options.class_balanced)
    elif not (options.mixup or options.cutmix):
        return None
    return TargetLoss(weights, options.label_smoothing)


def fine_tune(options: argparse.Namespace, processes: PartialState) -> dict[str, float]:
    """The work of one of `processes`."""
    transformers.utils.logging.disable_progress_bar()  # a bar for the writing of every checkpoint
    set_seed(options.seed)
    output_dir = Path(options.output_dir)
    images = load_data(options, processes)
    print_counts(images)
    model = load_model(options, images.class_names)
    processor = image_processor_for(options, model)
    model.config.image_mean, model.config.image_std = list(processor.image_mean), list(processor.image_std)
    sets = make_image_sets(options, images, processor, processes)
    train_set: Stream | ImageSet
    if isinstance(images, StreamedDataset):
        train_set = make_stream(options, images, processor, processes)
    else:
        train_set = sets[TRAIN]
    if options.early_stopping is not None and VALIDATION not in sets:
        raise InputError(f"--early-stopping: expected a validation split, {images.name} has none")
    if options.calibrate and VALIDATION not in sets:
        raise InputError(f"--calibrate: expected a validation split, {images.name} has none")
    model = ready_to_train(options, model)
    mix = MixPictures(len(images.class_names), options.mixup, options.cutmix)

    # From here on the folder is written; whatever was wrong with the input has been said.
    with processes.main_process_first():
        if processes.is_main_process:
            begin_run(options, images, processor)
    print(f"example pictures: {output_dir / 'examples.png'}")

    interrupt, log = StopOnInterrupt(), WriteLog(output_dir)
    precision = precision_of(options, model.config.hidden_size)
    trainer = RecipeTuner(
        model=model,
        args=training_arguments(options, precision, VALIDATION in sets, max_steps_of(options, images, processes)),
        train_dataset=train_set,
        eval_dataset=sets.get(VALIDATION),
        processing_class=processor,
        data_collator=mix,
        compute_loss_func=loss_of(options, sets.get(TRAIN), len(images.class_names)),
        compute_metrics=accuracy,
        callbacks=[log, interrupt, StopOnNonFiniteLoss()],
        layer_decay=options.layer_decay,
        ema_decay=options.ema,
        keep_checkpoints=options.keep_checkpoints,
    )
    if options.early_stopping is not None:
        trainer.add_callback(EarlyStoppingCallback(options.early_stopping))
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress = Progress()
    trainer.add_callback(progress)
    if options.tune:
        tune_operations(trainer, precision)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"training {parameters / 1e6:.1f} M parameters on {number_of_pictures(images)} pictures of"
        f" {processor.size['height']}x{processor.size['width']}, {precision}, on {trainer.args.device}"
        + (f" and {processes.num_processes - 1} more" if processes.num_processes > 1 else "")
    )
    if processes.num_processes > 1:
        accelerate.utils.set_seed(options.seed, device_specific=True)  # other dropout on each
    try:
        with log, early_end_is_said(trainer, options):
            with interrupt, lost_process_is_said(output_dir):
                result = trainer.train(resume_from_checkpoint=last_checkpoint(options) if options.resume else None)
            signum = interrupt.signum if interrupt.asked_to_stop() else None
            metrics = finish(trainer, result, images, sets, options) if signum is None else {}
    finally:
        progress.close()
    if signum is not None:
        print(f"stopped at step {trainer.state.global_step}; {what_stands(options)}")
        log_kernels(log)
        log.append("end", outcome="interrupted", reason="go on with --resume")
        raise Stopped(signum)
    log_kernels(log)
    log.append("end", outcome="finished", reason="")
    return metrics


def tune_operations(trainer: RecipeTuner, precision: str) -> None:
    """Measure the operations of training and of evaluation where they have not been, on a GPU."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]
    args = trainer.args
    wanted = [(args.per_device_train_batch_size, True), (args.per_device_eval_batch_size, False)]
    if (line := tune_at_start(trainer.model, wanted, dtype, together=True)) is not None:
        print(f"{line} (--no-tune leaves this out)")


def log_kernels(log: WriteLog) -> None:
    """What fell back to PyTorch, and what was chosen by a measurement, if anything was."""
    found = info.kernels()
    if any(found.values()):
        log.append("kernels", **found)


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
            write_text(output_dir / "config.yaml", yaml.safe_dump(run_options(options), sort_keys=False))
    summary = summarize_folds(runs)
    write_text(output_dir / "folds.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{options.folds} folds, mean ± standard deviation")
    for name, spread in summary.items():
        print(f"  {name:<16}{spread['mean']:.4f} ± {spread['standard_deviation']:.4f}")
    print(f"\nmodels and metrics: {output_dir}")
    return {name: figures["mean"] for name, figures in summary.items()}


@contextlib.contextmanager
def early_end_is_said(trainer: RecipeTuner, options: argparse.Namespace) -> Iterator[None]:
    """Adds to what ended training or the writing of its results what stands on the disk, and how to go on."""
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error}; {what_stands(options)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        eager.turn_off_after(error)
        advice = "--gradient-checkpointing or a smaller --image-size"
        if options.batch_size > 1:
            advice = f"--auto-batch, a smaller --batch-size, {advice}"
        raise OutOfMemory(
            f"training: out of memory with {options.batch_size} picture(s) a batch after step"
            f" {trainer.state.global_step} ({str(error).splitlines()[0] if str(error) else 'MemoryError'});"
            f" try {advice}; {what_stands(options)}"
        ) from None


def begin_run(options: argparse.Namespace, images: ImageDataset, processor: ViTImageProcessorPil) -> None:
    """The folder and the files that stand in it from the start."""
    output_dir = Path(options.output_dir)
    if options.overwrite:
        remove_run(output_dir)
    with whole_files(output_dir) as folder:
        if launch := launch_id():
            write_text(folder / MARKER, launch)
        write_text(folder / "config.yaml", yaml.safe_dump(run_options(options), sort_keys=False))
        examples = images.examples(num_classes=20, per_class=8, side=256)
        figures.save_image(figures.example_grid(examples), folder / "examples.png")
        processor.save_pretrained(folder)


def number_of_pictures(images: ImageDataset) -> str:
    return "streamed" if isinstance(images, StreamedDataset) else f"{len(images.splits[TRAIN]):,}"


def run_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `config.yaml` holds: every option that shapes the run, so that --config with it repeats the run."""
    once = ("config", "overwrite", "resume")
    return {name: value for name, value in vars(options).items() if name not in once and value is not None}


def last_checkpoint(options: argparse.Namespace) -> str | None:
    return get_last_checkpoint(options.output_dir) if Path(options.output_dir).is_dir() else None


def what_stands(options: argparse.Namespace) -> str:
    """How to go on after a run has ended early."""
    checkpoint = last_checkpoint(options)
    begin = f"{checkpoint} is whole" if checkpoint else "there is no checkpoint yet"
    return f"{begin}: the same command with --resume goes on from {'it' if checkpoint else 'the beginning'}"


def take_up(options: argparse.Namespace) -> argparse.Namespace:
    """With --resume: says where the run goes on, with what other options; keeps the batch that --auto-batch found."""
    if not options.resume:
        return options
    if last_checkpoint(options) is None:
        print(f"note: there is no checkpoint in {options.output_dir}; the run starts from the beginning")
    config = Path(options.output_dir) / "config.yaml"
    if not config.exists():
        return options
    before = yaml.safe_load(config.read_text(encoding="utf-8"))
    found = {name: before[name] for name in ("batch_size", "gradient_accumulation")}
    same_steps = math.prod(found.values()) == options.batch_size * options.gradient_accumulation
    if options.auto_batch and same_steps and found["batch_size"] < options.batch_size:
        options = argparse.Namespace(**vars(options) | found)
    now = run_options(options)
    for name in sorted((now.keys() | before.keys()) - {"output_dir"}):
        if now.get(name) != before.get(name):
            print(f"note: {name} is {now.get(name)}; before, the run had {before.get(name)}")
    return options


class OutOfMemory(InputError):
    """A batch was too large for the memory."""


def with_smaller_batch(options: argparse.Namespace, error: OutOfMemory) -> argparse.Namespace:
    """Options for a half of the pictures a batch (or a third, ...: a whole number) and as many more batches a step.

    The run goes on from its last checkpoint. Raises `error` where that cannot help or was not asked for: of several
    processes, one alone cannot start again.
    """
    batch = options.batch_size
    if not options.auto_batch or batch == 1 or PartialState().num_processes > 1:
        raise error
    factor = next(factor for factor in range(2, batch + 1) if batch % factor == 0)
    smaller = {"batch_size": batch // factor, "gradient_accumulation": options.gradient_accumulation * factor}
    print(
        f"out of memory with {batch} pictures a batch; going on with {smaller['batch_size']},"
        f" {smaller['gradient_accumulation']} batches a step"
    )
    return argparse.Namespace(**vars(options) | smaller | {"overwrite": False, "resume": True})


def finish(trainer: RecipeTuner, result, images: ImageDataset, sets: dict[str, ImageSet], options) -> dict[str, float]:
    """Metrics, model, model card."""
    output_dir = Path(options.output_dir)
    result.metrics["train_loss"] = mean_loss(trainer.state.log_history)  # Trainer's is of this process's steps
    if result.metrics["train_samples_per_second"] > 0 or not (output_dir / "train_results.json").exists():
        # Else there was nothing left to train, and the speed is known from before.
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    if options.lora is not None:
        merge_adapters(trainer, output_dir / ADAPTER)
    if trainer.is_fsdp_enabled:  # checkpoints were sharded; the result is one file
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    trainer.flip = options.flip

    metrics: dict[str, float] = {}
    reports, predictions = [], {}
    temperature = 1.0
    for name, prefix in ((VALIDATION, "eval"), (TEST, "test")):
        if name not in sets:
            continue
        output = trainer.predict(sets[name], metric_key_prefix=prefix)
        confusion = confusion_matrix(output.label_ids, output.predictions.argmax(-1), len(images.class_names))
        split_metrics = {
            **output.metrics,
            f"{prefix}_macro_f1": classification_metrics(confusion)["macro_f1"],
        }
        split_metrics["epoch"] = trainer.state.epoch
        if options.calibrate:
            if name == VALIDATION:
                temperature = calibration.fit_temperature(output.predictions, output.label_ids)
                trainer.model.config.calibration_temperature = temperature
                if trainer.is_world_process_zero():
                    trainer.model.config.save_pretrained(output_dir)
                metrics["temperature"] = temperature
                print(f"\ntemperature {temperature:.3f}, fitted on {name}")
            diagrams = {
                title: calibration.reliability(calibration.softmax(output.predictions, divisor), output.label_ids)
                for title, divisor in (("before", 1.0), ("after", temperature))
            }
            for title, diagram in diagrams.items():
                split_metrics[f"{prefix}_calibration_error_{title}"] = diagram.expected_calibration_error
            if trainer.is_world_process_zero():
                figures.save_image(calibration.reliability_plot(diagrams), output_dir / f"reliability_{name}.png")
        predictions[name] = (output.label_ids, output.predictions / temperature)
        trainer.save_metrics(prefix, split_metrics)
        metrics |= split_metrics
        reports.append(f"{name}: {format_metrics(confusion, images.class_names)}\n")
        print(f"\n{reports[-1]}", end="")
    if trainer.is_world_process_zero():
        write_text(output_dir / "classification_report.txt", "\n".join(reports))
        (output_dir / MARKER).unlink(missing_ok=True)
    trainer.model_card = model_card(options, images, metrics, "\n".join(reports))
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        shown = page.of_run(
            options,
            images,
            number_of_pictures(images),
            sets,
            predictions,
            trainer.state,
            trainer.args.device,
            result.metrics["train_runtime"],
        )
        write_text(output_dir / page.REPORT_FILE, page.render(shown))
    if options.push_to_hub:
        trainer.push_to_hub()
    print(f"\nmodel, metrics and model card: {output_dir}")
    print(f"a page to look at: {output_dir / page.REPORT_FILE}")
    print(f"try it: fastvit predict {output_dir} IMAGE")
    return metrics


def mean_loss(log_history: list[dict[str, float]]) -> float:
    """The mean loss over all steps, from the logs of the means between them."""
    total, last = 0.0, 0.0
    for log in log_history:
        if "loss" in log:
            total, last = total + log["loss"] * (log["step"] - last), log["step"]
    return total / last


CARD = """
# {name}

A Vision Transformer that tells {classes} apart. It was {origin} on {pictures} pictures of {dataset}.

## How good it is

```
{reports}```

## How to use it

```python
from transformers import pipeline

print(pipeline("image-classification", "{name}")("picture.jpg"))
```

`from fastvit import ViTForImageClassification` loads it as well.

## How it was trained

`fastvit finetune --config config.yaml`, with fastvit {version}, transformers {transformers} and PyTorch {torch}:

```yaml
{options}```
"""


def model_card(options: argparse.Namespace, images: ImageDataset, metrics: dict[str, float], reports: str) -> ModelCard:
    """What the model is, how good it is, how to use it, how it came about; with the hub's metadata."""
    name = options.push_to_hub or Path(options.output_dir).name
    results = [
        EvalResult("image-classification", images.name, images.name, "accuracy", metrics[f"{prefix}_accuracy"],
                   dataset_split=split)
        for split, prefix in ((VALIDATION, "eval"), (TEST, "test"))
        if f"{prefix}_accuracy" in metrics
    ]  # fmt: skip
    pretrained = options.from_scratch is None and not Path(options.model).exists()
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "vision", "fastvit"],
        base_model=options.model if pretrained else None,
        datasets=[images.name] if options.dataset not in (None, "generated") else None,
        eval_results=results or None,
    )
    origin = f"fine-tuned from {options.model}" if options.from_scratch is None else "trained from scratch"
    classes = ", ".join(images.class_names[:20]) + (", ..." if len(images.class_names) > 20 else "")
    text = CARD.format(
        name=name,
        classes=classes,
        origin=origin,
        pictures=number_of_pictures(images),
        dataset=images.name,
        reports=reports,
        version=fastvit.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        options=yaml.safe_dump(run_options(options), sort_keys=False),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def main(argv: list[str] | None = None) -> int:
    return report_errors(lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
