"""The options of `fastvit finetune`, from the command line and a YAML file.

The command line takes precedence over `--config`, that over `GENERATED_DEFAULTS`, and those over the defaults of the
fields. Values are checked when a `FinetuneOptions` is made, before any file is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastvit.errors import InputError
from fastvit.train.arguments import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    Expected,
    HelpFormatter,
    Parser,
    add_arguments,
    check_values,
    get_flag,
    option,
    parse_given,
    read_config,
)

DEFAULT_MODEL = "google/vit-base-patch16-224-in21k"

# Sizes of a ViT trained from scratch: hidden size, blocks, heads (head dim 64; micro: 32). The feed-forward layer has
# 4 x the hidden size. Tiny to large are those of DeiT (Touvron et al. 2021) and of the ViT paper.
SIZES = {
    "micro": (96, 4, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}

# The generated leaves train a model from scratch, which needs other settings than a pretrained one.
GENERATED_DEFAULTS: dict[str, Any] = {
    "from_scratch": "micro",
    "image_size": 64,
    "patch_size": 8,
    "epochs": 30.0,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup": 0.1,
    "scheduler": "cosine",
    "weight_decay": 0.05,
}


@dataclass
class ModelOptions:
    model: str = option(
        DEFAULT_MODEL, "pretrained model: hub id or folder of a ViT, DeiT, BEiT, DINOv2, DINOv3, CLIP, SigLIP, ...",
        metavar="ID|FOLDER",
    )  # fmt: skip
    pool: Literal["cls", "mean", "cls+mean"] | None = option(
        None, "classify by the class token, the mean of the patch tokens, or both [the model's usual]"
    )
    from_scratch: Literal["micro", "tiny", "small", "base", "large"] | None = option(
        None, "random weights instead, for a model of this size"
    )
    image_size: int | list[int] | None = option(  # noqa: RUF009
        None, "height and width in pixels, or one number for both [the model's; from scratch: 224]", AT_LEAST_ONE,
        metavar=("PIXELS", "WIDTH"), is_repeated=True,
    )  # fmt: skip
    channels: int = option(3, "channels: 1 for grey, or those of multispectral TIFF or .npy files", AT_LEAST_ONE)
    patch_size: int = option(16, "from scratch: height and width of a patch", AT_LEAST_ONE, metavar="PIXELS")
    freeze_backbone: bool = option(False, "fit the classifier alone, on features computed once (linear probe)")
    attention_dropout: float = option(0.0, "dropout probability of the attention weights", BELOW_ONE, metavar="P")
    hidden_dropout: float = option(0.0, "dropout probability of the hidden states", BELOW_ONE, metavar="P")


@dataclass
class ImageOptions:
    dataset: str | None = option(None, "hub dataset, 'beans', or 'generated' (leaves) [beans]", metavar="ID")
    data_dir: str | None = option(
        None, "or a folder of images: [train/ validation/ test/] CLASS/", metavar="FOLDER"
    )  # fmt: skip
    labels: str | None = option(
        None, "or a table (csv, tsv, jsonl, parquet) of file names, in --data-dir or beside it, and labels",
        metavar="FILE",
    )  # fmt: skip
    image_column: str | None = option(None, "column of the images [found by name]")
    label_column: str | None = option(None, "column of the labels, or several: A,B,C [found by name]")
    task: Literal["auto", "single-label", "multi-label", "regression"] | None = option(
        None, "one class per image, several labels, or numbers [auto: as the labels show, if they have one reading]"
    )
    validation_fraction: float = option(0.15, "share held out if there is no validation split", metavar="SHARE")
    max_train_samples: int | None = option(None, "train on N images only [all]", AT_LEAST_ONE)
    max_eval_samples: int | None = option(None, "evaluate on N images only [all]", AT_LEAST_ONE)
    generated_images: int = option(2000, "size of the generated dataset", AT_LEAST_ONE)
    streaming: bool = option(False, "read images while training; --data-dir may hold tar shards")
    class_names: str | None = option(
        None, "with --streaming: the classes [from the dataset, or from a pass over all labels]", metavar="FILE|A,B,C"
    )
    shuffle_buffer: int = option(1000, "with --streaming: shuffle N images at a time", AT_LEAST_ONE)
    skip_bad_images: bool = option(False, "skip images that cannot be decoded, and count them")
    augment: bool = option(True, "random resized crop and flip")
    workers: int = option(0, "processes that prepare batches", NOT_NEGATIVE)


@dataclass
class TrainingOptions:
    """Options of the optimization. Those marked [recipe] are None until `defaults.resolve_recipe` has set them."""

    recipe: Literal["plain", "dinov2", "mae", "clip"] | None = option(
        None, "defaults of the options marked [recipe] [by the model's family]"
    )
    epochs: float = option(None, "passes over the training images [recipe]", POSITIVE)
    max_steps: int = option(-1, "train for N steps instead; -1: use --epochs")
    batch_size: int = option(16, "images per step and device", POSITIVE)
    learning_rate: float = option(None, "peak learning rate of AdamW [recipe]", POSITIVE, metavar="RATE")
    weight_decay: float = option(None, "weight decay, not for biases and norms [recipe]", NOT_NEGATIVE)
    warmup: float = option(
        None, "warm-up steps; below 1: their share of all steps [recipe]", NOT_NEGATIVE, metavar="STEPS"
    )
    scheduler: str = option(None, "schedule of transformers: linear, cosine, constant, ... [recipe]")
    layer_decay: float = option(
        None,
        "learning rate of a block relative to the block above [recipe]",
        Expected("above 0 and at most 1", lambda value: 0 < value <= 1),
        metavar="FACTOR",
    )
    label_smoothing: float = option(0.0, "share of the target spread over all classes", BELOW_ONE, metavar="SHARE")
    gradient_accumulation: int = option(1, "batches per step", POSITIVE)
    auto_batch: bool = option(False, "on out of memory, halve the batch and double the batches per step")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "auto: bf16 where the hardware has it")
    tune: bool = option(True, "on a GPU, first measure which operations our kernels or PyTorch compute faster")
    compile: bool = option(False, "torch.compile the model")
    fsdp: bool = option(False, "under torchrun: shard the model over the processes (FSDP2)")
    cpu: bool = option(False, "do not use a GPU")
    seed: int = option(42, "seed of weights, order, augmentation and splits")


@dataclass
class RecipeOptions:
    randaugment: list[int] | None = option(  # noqa: RUF009
        None,
        "N random operations of magnitude M per image",
        Expected("N from 1 to 15 and M from 1 to 29", lambda value: 1 <= value[0] <= 15 and 0 < value[1] < 30),
        metavar=("N", "M"),
    )
    mixup: float = option(0.0, "blend pairs of images by Beta(ALPHA, ALPHA)", NOT_NEGATIVE, metavar="ALPHA")
    cutmix: float = option(0.0, "paste boxes of other images", NOT_NEGATIVE, metavar="ALPHA")
    drop_path: float = option(0.0, "probability of skipping the last block", BELOW_ONE, metavar="P")
    ema: float | None = option(
        None,
        "keep a moving average of the weights, with a decay such as 0.99",
        Expected("a number between 0 and 1", lambda value: 0 < value < 1),
        metavar="DECAY",
    )
    class_balanced: float | None = option(
        None,
        "weight the classes by effective number; 1: by inverse frequency [without BETA: 0.999]",
        Expected("a number from 0 to 1", lambda value: 0 <= value <= 1),
        metavar="BETA",
        bare=0.999,
    )
    lora: int | None = option(
        None,
        "train adapters of this rank instead of the weights (peft)",
        Expected("a rank of at least 1", lambda value: value >= 1),
        metavar="RANK",
    )
    early_stopping: int | None = option(
        None,
        "stop after N evaluations without a better one",
        Expected("at least 1 evaluation", lambda value: value >= 1),
    )
    flip: bool = option(False, "evaluate the mean prediction over an image and its mirror image")
    calibrate: bool = option(False, "fit the temperature of the probabilities at the end")
    folds: int | None = option(
        None,
        "cross-validation: train K models, each in a sub-folder",
        Expected("at least 2 folds", lambda value: value >= 2),
        metavar="K",
    )
    fold: int | None = option(None, "train the I-th of the folds only (1 to K), in the folder itself", metavar="I")


@dataclass
class OutputOptions:
    output_dir: str = option("", "folder of the run [runs/DATASET]", metavar="FOLDER")
    overwrite: bool = option(False, "replace the run in the folder")
    resume: bool = option(False, "continue from the last checkpoint in the folder, if there is one")
    eval_steps: int = option(100, "evaluate and save every N steps", POSITIVE)
    logging_steps: int = option(10, "log every N steps", POSITIVE)
    keep_checkpoints: int = option(2, "keep N checkpoints, always the newest and the best; 0: all", NOT_NEGATIVE)
    report_to: str = option("none", "log to tensorboard, wandb, ... as Trainer does")
    push_to_hub: str | None = option(None, "upload the model under this hub id", metavar="ID")


GROUPS = {
    "model": ModelOptions,
    "images": ImageOptions,
    "training": TrainingOptions,
    "recipes": RecipeOptions,
    "output": OutputOptions,
}


@dataclass
class FinetuneOptions(OutputOptions, RecipeOptions, TrainingOptions, ImageOptions, ModelOptions):
    """All options of a run. The fields are in the order of `GROUPS`: a dataclass starts with those of its last base."""

    def __post_init__(self) -> None:
        if self.dataset is None and self.data_dir is None and self.labels is None:
            self.dataset = "beans"
        self.task = None if self.task == "auto" else self.task  # runs of earlier versions have no task
        if not self.output_dir:
            source = Path(self.dataset or self.data_dir or Path(self.labels or "").with_suffix(""))
            self.output_dir = str(Path("runs") / (source.parent.name if "*" in source.name else source.name))
        check_values(self)
        check_combinations(self)


def check_combinations(options: FinetuneOptions) -> None:
    """Check options that depend on each other.

    Raises:
        InputError: the first combination that does not work.
    """

    def refuse(condition: object, message: str) -> None:
        if condition:
            raise InputError(message)

    check_start(options.from_scratch, options.model != DEFAULT_MODEL and options.model)
    size = options.image_size
    refuse(
        isinstance(size, list) and len(size) != 2, f"--image-size: expected one number, or height and width, got {size}"
    )
    folds, fold, lora = options.folds, options.fold, options.lora
    refuse(options.dataset and options.data_dir, "--data-dir: give a folder or a --dataset, not both")
    refuse(options.dataset and options.labels, "--labels: give a table of files or a --dataset, not both")
    refuse(options.overwrite and options.resume, "--resume: give --resume or --overwrite, not both")
    refuse(
        fold is not None and not 1 <= fold <= (folds or 0), f"--fold: expected 1 to the number of --folds, got {fold}"
    )
    refuse(
        folds and options.push_to_hub, "--folds: its models are for measuring; give --folds or --push-to-hub, not both"
    )
    refuse(
        folds and fold is None and int(os.environ.get("WORLD_SIZE", "1")) > 1,
        "--folds: expected one process; several processes train one fold after the other with --fold I",
    )
    refuse(options.pool and options.from_scratch, "--pool: expected a pretrained --model, got --from-scratch")
    refuse(lora and options.from_scratch, "--lora: expected a pretrained --model to adapt, got --from-scratch")
    refuse(lora and options.freeze_backbone, "--lora: give --lora or --freeze-backbone, not both")
    refuse(
        options.fsdp and "LOCAL_RANK" not in os.environ,
        "--fsdp: expected several processes; start them with torchrun --nproc-per-node N -m fastvit.finetune ...",
    )
    check_task(options, options.task)
    for name in ("randaugment", "lora"):
        refuse(
            getattr(options, name) and options.channels != 3,
            f"{get_flag(name)}: expected images of 3 channels, got --channels {options.channels}",
        )
    refuse(
        options.dataset == "generated" and options.channels != 3,
        f"--channels: expected 3 for the generated leaves, got {options.channels}",
    )
    if not options.streaming:
        refuse(options.class_names, "--class-names: expected together with --streaming; else the dataset has the names")
        return
    for name in ("randaugment", "mixup", "cutmix", "class_balanced", "folds"):
        refuse(getattr(options, name), f"{get_flag(name)}: cannot be used with --streaming")
    refuse(options.task in OTHER_TASKS, f"--streaming: cannot be used with --task {options.task}")
    refuse(
        options.dataset == "generated",
        "--streaming: expected a hub dataset or --data-dir; generated leaves cannot be streamed",
    )
    refuse(
        options.max_train_samples,
        "--max-train-samples: cannot be used with --streaming; limit the images with --max-steps",
    )


# With --freeze-backbone these, and --augment, need a backbone that computes the images again in every epoch.
STEPWISE = (
    *("max_steps", "randaugment", "mixup", "cutmix", "drop_path", "attention_dropout", "hidden_dropout", "ema"),
    *("early_stopping", "streaming", "fsdp"),
)


def list_stepwise_options(options: FinetuneOptions) -> list[str]:
    """What needs training step by step although the backbone is frozen: options, and several processes."""
    found = [get_flag(name) for name in STEPWISE if getattr(options, name) not in (None, False, 0, -1)]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found.append("several processes")
    return found or ["--augment"] * options.augment


# Options that the task has no meaning for. FSDP cannot shard the head of a regression, which has its own state.
OF_CLASSES = ("label_smoothing", "mixup", "cutmix", "class_balanced", "calibrate")
OTHER_TASKS: dict[str, tuple[str, ...]] = {"multi-label": OF_CLASSES, "regression": (*OF_CLASSES, "fsdp")}


def check_task(options: FinetuneOptions, task: str | None) -> None:
    """Check the options of a run for a task; raises InputError for one that cannot be used."""
    for name in OTHER_TASKS.get(task or "", ()):
        if value := getattr(options, name):
            raise InputError(f"{get_flag(name)}: cannot be used with --task {task}, got {value}")


def check_start(from_scratch: str | None, model: str | Literal[False] | None) -> None:
    """Check that a run starts from a checkpoint or from scratch, not both."""
    if from_scratch and model:
        raise InputError(
            f"--from-scratch: give --from-scratch {from_scratch} (random weights) or --model {model} (its weights), not"
            " both; one of them may be in the --config file"
        )


def build_parser() -> argparse.ArgumentParser:
    generated = ", ".join(f"{get_flag(name)} {value}" for name, value in GENERATED_DEFAULTS.items())
    parser = Parser(
        prog="fastvit finetune",
        usage="fastvit finetune [OPTION ...]",
        description="Fine-tune a Vision Transformer to classify your images.",
        formatter_class=HelpFormatter,
        epilog=f"With --dataset generated and without --model, the defaults are: {generated}. Example: fastvit finetune"
        " --data-dir my-images --output-dir runs/mine",
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="read options from a file; the command line takes precedence"
    )
    for title, options_class in GROUPS.items():
        description = "Ways to a better model; docs/recipes.md measures them." if title == "recipes" else None
        add_arguments(parser.add_argument_group(title, description), options_class)
    return parser


def parse_options(argv: list[str] | None) -> FinetuneOptions:
    """Parse and check the options of a run, and check its output folder.

    Raises:
        InputError: an option cannot be used.
    """
    given = parse_given(build_parser(), FinetuneOptions, argv)
    check_start(given.get("from_scratch"), given.get("model"))
    config = given.pop("config")
    given = (read_config(config, FinetuneOptions) if config is not None else {}) | given
    if given.get("dataset") == "generated" and "model" not in given:
        given = GENERATED_DEFAULTS | given
    options = FinetuneOptions(**given)
    if options.freeze_backbone and "augment" not in given:
        # Random crops would need the backbone again in every epoch: they are the default of training step by step.
        without = dataclasses.replace(options, augment=False)
        options = options if list_stepwise_options(without) else without

    # These import PyTorch, which --help and the errors above do not wait for.
    from transformers import SchedulerType

    from fastvit.train.run_folder import resolve_output_dir

    schedules = [schedule.value for schedule in SchedulerType]
    if options.scheduler and options.scheduler not in schedules:
        raise InputError(f"--scheduler: expected one of {', '.join(schedules)}, got {options.scheduler!r}")
    return resolve_output_dir(options)
