"""Fine-tune a Vision Transformer on pictures:  fastvit finetune --dataset beans

Options -> data -> model -> `transformers.Trainer` -> files. What Trainer has (loop, checkpoints, schedules, precision,
logging, several devices) is Trainer's; here is what is particular to pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import (
    AutoImageProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTImageProcessorPil,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from fastvit import report
from fastvit.datasets import TEST, TRAIN, VALIDATION, ImageDataset, load_images
from fastvit.errors import InputError
from fastvit.images import Augment, ImageSet, cache_images
from fastvit.modeling import ViTForImageClassification, as_pair

DEFAULT_MODEL = "google/vit-base-patch16-224-in21k"

# Sizes of a ViT trained from scratch: hidden size, blocks, heads (head dim 64, micro 32); feed-forward 4 x hidden.
# Tiny to large are those of DeiT (Touvron et al. 2021) and of the ViT paper.
SIZES = {
    "micro": (128, 6, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}

# The drawn leaves need a model from scratch, and that other settings than a pretrained one.
GENERATED_DEFAULTS: dict[str, Any] = {
    "from_scratch": "micro",
    "image_size": 64,
    "patch_size": 8,
    "epochs": 16.0,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup": 0.1,
    "scheduler": "cosine",
    "weight_decay": 0.05,
}


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit finetune",
        description="Fine-tune a Vision Transformer to tell your pictures apart.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Example: fastvit finetune --data-dir my-pictures --output-dir runs/mine",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a file; those given here win")

    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, metavar="ID|FOLDER", help="pretrained ViT: hub id or folder")
    group.add_argument("--from-scratch", choices=SIZES, help="random weights instead, of this size")
    group.add_argument("--image-size", type=int, help="height and width in pixels [the model's; from scratch: 224]")
    group.add_argument("--patch-size", type=int, default=16, help="from scratch: height and width of a patch")
    group.add_argument("--freeze-backbone", action="store_true", help="train the classifier alone (linear probe)")
    group.add_argument("--attention-dropout", type=float, default=0.0, help="chance to drop an attention weight")
    group.add_argument("--hidden-dropout", type=float, default=0.0, help="chance to drop a hidden activation")

    group = parser.add_argument_group("pictures")
    group.add_argument("--dataset", metavar="ID", help="hub data set, 'beans', or 'generated' (leaves) [beans]")
    group.add_argument("--data-dir", metavar="FOLDER", help="or a folder of pictures: [train/ validation/ test/] CLASS/")
    group.add_argument("--image-column", help="column with the pictures [found by name]")
    group.add_argument("--label-column", help="column with the classes [found by name]")
    group.add_argument("--validation-fraction", type=float, default=0.15, help="set aside where there is no validation")
    group.add_argument("--max-train-samples", type=int, metavar="N", help="train on N pictures only")
    group.add_argument("--max-eval-samples", type=int, metavar="N", help="evaluate on N pictures only")
    group.add_argument("--generated-images", type=int, default=1500, metavar="N", help="size of the drawn set")
    group.add_argument("--skip-bad-images", action="store_true", help="leave out what cannot be decoded, and count it")
    group.add_argument(
        "--augment", action=argparse.BooleanOptionalAction, default=True, help="random resized crop and flip"
    )
    group.add_argument("--workers", type=int, default=0, help="processes that prepare batches")

    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=float, default=4.0, help="passes over the training pictures")
    group.add_argument("--max-steps", type=int, default=-1, metavar="N", help="stop after N steps instead")
    group.add_argument("--batch-size", type=int, default=16, help="pictures a step on each device")
    group.add_argument("--learning-rate", type=float, default=2e-4, help="peak learning rate (AdamW)")
    group.add_argument("--weight-decay", type=float, default=0.0, help="of weights; not of biases and norms")
    group.add_argument("--warmup", type=float, default=0.0, help="steps of warm-up, or below 1 the part of all steps")
    group.add_argument("--scheduler", default="linear", help="learning rate schedule, any of transformers'")
    group.add_argument("--layer-decay", type=float, default=1.0, help="learning rate factor from a block to the one below")
    group.add_argument("--label-smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    group.add_argument("--gradient-accumulation", type=int, default=1, help="batches a step")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 where hardware has it"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--cpu", action="store_true", help="do not use a GPU")
    group.add_argument("--seed", type=int, default=42, help="of weights, order, augmentation and splits")

    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", metavar="FOLDER", help="where everything goes [runs/DATASET]")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint there")
    group.add_argument("--eval-steps", type=int, default=100, metavar="N", help="evaluate and save every N steps")
    group.add_argument("--logging-steps", type=int, default=10, metavar="N", help="log every N steps")
    group.add_argument("--keep-checkpoints", type=int, default=2, metavar="N", help="how many are kept")
    group.add_argument("--report-to", default="none", metavar="NAME", help="tensorboard, wandb, ... as Trainer knows them")
    group.add_argument("--push-to-hub", metavar="ID", help="upload the result as this model")
    return parser


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    """Options from the command line, over those of --config, over the defaults."""
    parser = build_parser()
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    first = parser.parse_known_args(argv)[0]
    from_file: dict[str, Any] = {}
    if first.config is not None:
        try:
            from_file = yaml.safe_load(Path(first.config).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"--config: cannot read {first.config} ({' '.join(str(error).split())})") from None
        if not isinstance(from_file, dict):
            raise InputError(f"--config: expected 'option: value' lines in {first.config}")
        from_file = {name.replace("-", "_"): value for name, value in from_file.items()}
        unknown = sorted(set(from_file) - set(known))
        if unknown:
            raise InputError(f"--config: {first.config} has unknown option(s) {', '.join(unknown)}")
        for name, value in from_file.items():
            from_file[name] = _checked(name, known[name], value)
    parser.set_defaults(**from_file)
    options = parser.parse_args(argv)
    if options.dataset is None and options.data_dir is None:
        options.dataset = "beans"
    if options.dataset == "generated" and "model" not in from_file and options.model == DEFAULT_MODEL:
        parser.set_defaults(**{**GENERATED_DEFAULTS, **from_file})
        options = parser.parse_args(argv)
    if options.output_dir is None:
        options.output_dir = str(Path("runs") / Path(options.dataset or options.data_dir).name)
    _check_options(options)
    return options


def _checked(name: str, action: argparse.Action, value: Any) -> Any:
    """A value from a file, converted and checked as argparse does for the command line."""
    if value is None or isinstance(value, bool):
        return value
    try:
        value = action.type(value) if action.type is not None else value
    except (TypeError, ValueError):
        raise InputError(f"--config: {name}: expected {action.type.__name__}, got {value!r}") from None
    if action.choices is not None and value not in action.choices:
        raise InputError(f"--config: {name}: expected one of {', '.join(action.choices)}, got {value!r}")
    return value


def _check_options(options: argparse.Namespace) -> None:
    if options.dataset is not None and options.data_dir is not None:
        raise InputError("--data-dir: give a folder or a --dataset, not both")
    if options.overwrite and options.resume:
        raise InputError("--resume: give --resume or --overwrite, not both")
    for name in ("epochs", "batch_size", "learning_rate", "gradient_accumulation", "eval_steps", "logging_steps"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(options, name)}")
    for name in ("image_size", "patch_size", "max_train_samples", "max_eval_samples", "generated_images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    for name in ("attention_dropout", "hidden_dropout", "label_smoothing"):
        if not 0 <= getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected 0 or more and below 1, got {getattr(options, name)}")
    if not 0 < options.layer_decay <= 1:
        raise InputError(f"--layer-decay: expected above 0 and at most 1, got {options.layer_decay}")
    output_dir = Path(options.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output-dir: {output_dir} is a file")
    if is_run(output_dir) and not (options.overwrite or options.resume):
        raise InputError(f"--output-dir: {output_dir} already holds a run; give --overwrite, --resume or another folder")
    if options.resume and get_last_checkpoint(output_dir if output_dir.is_dir() else ".") is None:
        raise InputError(f"--resume: there is no checkpoint in {output_dir}")


# ---------------------------------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------------------------------

# What a run writes besides checkpoint-N folders; only these are removed by --overwrite.
RUN_FILES = (
    "README.md",
    "all_results.json",
    "classification_report.txt",
    "config.json",
    "config.yaml",
    "eval_results.json",
    "examples.png",
    "model.safetensors",
    "preprocessor_config.json",
    "test_results.json",
    "train_results.json",
    "trainer_state.json",
    "training_args.bin",
)


def is_run(folder: Path) -> bool:
    return folder.is_dir() and (
        any((folder / name).exists() for name in ("config.yaml", "model.safetensors", "trainer_state.json"))
        or get_last_checkpoint(folder) is not None
    )


def remove_run(folder: Path) -> None:
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary file in the same folder, then rename: the file is there whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


# ---------------------------------------------------------------------------------------------------------------------
# Model and pictures
# ---------------------------------------------------------------------------------------------------------------------


def load_model(options: argparse.Namespace, class_names: list[str]) -> ViTForImageClassification:
    """The model with a classifier for `class_names`, pretrained or from scratch."""
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
        "attention_probs_dropout_prob": options.attention_dropout,
        "hidden_dropout_prob": options.hidden_dropout,
    }
    if options.from_scratch is not None:
        hidden_size, num_layers, num_heads = SIZES[options.from_scratch]
        image_size = options.image_size or 224
        if image_size % options.patch_size:
            raise InputError(f"--image-size: expected a multiple of the patch size {options.patch_size}, got {image_size}")
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

    size = {} if options.image_size is None else {"image_size": options.image_size}
    if size:
        patch_size = as_pair(load_config(options.model).patch_size)
        if any(options.image_size % side for side in patch_size):
            raise InputError(f"--image-size: expected a multiple of the patch size {patch_size}, got {options.image_size}")
    # The classifier is the one part that may not fit: other classes. Everything else must.
    return load_pretrained(options.model, ignore_mismatched_sizes=True, **labels, **size)


def load_config(model: str) -> ViTConfig:
    """The config of a hub id or folder, with errors that a person can act on."""
    return _reach(model, lambda: ViTConfig.from_pretrained(model))


def load_pretrained(model: str, **kwargs: Any) -> ViTForImageClassification:
    """A pretrained classifier from a hub id or folder; only its head may differ from what `kwargs` asks for."""

    def load() -> ViTForImageClassification:
        loaded, info = ViTForImageClassification.from_pretrained(model, output_loading_info=True, **kwargs)
        for key, found, expected in info["mismatched_keys"]:
            if not key.startswith("classifier."):
                raise InputError(f"{model}: {key}: expected shape {list(expected)}, found {list(found)}")
        return loaded

    return _reach(model, load)


def _reach(model: str, load):
    """Run `load`, turning what transformers raises for a missing or broken checkpoint into one clear line."""
    if not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise InputError(f"model: expected a hub id (owner/name) or a folder, found no folder {model!r}")
    try:
        return load()
    except InputError:
        raise
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(model).is_dir():
            raise InputError(f"{model}: cannot be loaded as a ViT checkpoint ({first_line})") from error
        raise InputError(
            f"model: cannot get {model!r} from the hub ({first_line}); without a network use --model FOLDER (a checkpoint"
            " on this machine) or --from-scratch SIZE"
        ) from error


def image_processor_for(options: argparse.Namespace, model: ViTForImageClassification) -> ViTImageProcessorPil:
    """The processor that goes with the model: its own normalisation and resampling, at the size it is trained for."""
    height, width = as_pair(model.config.image_size)
    settings: dict[str, Any] = {}
    if options.from_scratch is None:
        try:
            base = AutoImageProcessor.from_pretrained(options.model, backend="pil")
            settings = {"image_mean": base.image_mean, "image_std": base.image_std, "resample": base.resample}
        except (OSError, ValueError):
            print(f"note: {options.model} has no image processor; mean and standard deviation 0.5 are used")
    return ViTImageProcessorPil(size={"height": height, "width": width}, **settings)


def make_image_sets(
    options: argparse.Namespace, images: ImageDataset, processor: ViTImageProcessorPil
) -> dict[str, ImageSet]:
    """Every split decoded and cached; training pictures a seventh larger, so that crops keep their detail."""
    size = (processor.size["height"], processor.size["width"])
    cache_home = Path(os.environ.get("FASTVIT_CACHE_DIR") or Path.home() / ".cache" / "fastvit")
    sets = {}
    for name, split in images.splits.items():
        limit = options.max_train_samples if name == TRAIN else options.max_eval_samples
        if limit is not None and limit < len(split):
            split = split.select(np.sort(np.random.default_rng(options.seed).permutation(len(split))[:limit]))
        augment = Augment(size) if name == TRAIN and options.augment else None
        cache = cache_images(
            split.load,
            len(split),
            tuple(math.ceil(side * 8 / 7) for side in size) if augment else size,
            resample=processor.resample,
            skip_bad=options.skip_bad_images,
            key=split.key,
            cache_dir=cache_home / "images",
            description=f"decoding {name}",
        )
        if cache.skipped:
            print(f"{name}: {len(cache.skipped)} of {len(split)} pictures skipped:")
            for reason in list(cache.skipped.values())[:10]:
                print(f"  {reason}")
        sets[name] = ImageSet(cache, split.labels, augment)
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


def save_examples(images: ImageDataset, path: Path, per_class: int = 8) -> None:
    """A picture of `per_class` training pictures of each class."""
    train = images.splits[TRAIN]
    examples = {}
    for label, name in enumerate(images.class_names[:20]):
        examples[name] = [train.load(int(index)) for index in np.flatnonzero(train.labels == label)[:per_class]]
    report.save_image(report.example_grid(examples), path)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class NonFiniteLoss(InputError):
    """The loss or the gradient became NaN or infinite; training cannot go on."""


class StopOnNonFiniteLoss(TrainerCallback):
    """Ends training before a checkpoint with NaN weights can replace a good one."""

    def on_step_end(self, args, state, control, **kwargs):
        # The loss is looked at before every save. Looking at every step would make a GPU wait at every step.
        if control.should_save:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            if not math.isfinite((logs or {}).get(name, 0.0)):
                last = get_last_checkpoint(args.output_dir)
                raise NonFiniteLoss(
                    f"training: the {name} is {logs[name]} at step {state.global_step}; the last good checkpoint is"
                    f" {last or 'none'}; try a lower --learning-rate, --warmup or --precision fp32"
                )


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once."""

    def __init__(self):
        self.interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGINT, self.handle)

    def handle(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\ninterrupted: saving a checkpoint after this step (Ctrl-C again to stop at once)", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.previous)


class Progress(ProgressCallback):
    """Trainer's progress bar, with the loss and images a second in it, and a line for each evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.start, self.start_step = time.perf_counter(), state.global_step
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs:
            speed = (state.global_step - self.start_step) * self.images_per_step / (time.perf_counter() - self.start)
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed:.0f} images/s")
            self.start, self.start_step = time.perf_counter(), state.global_step
        if "eval_accuracy" in logs:
            self.training_bar.write(
                f"step {state.global_step}: validation accuracy {logs['eval_accuracy']:.2%}, loss {logs['eval_loss']:.3f}",
                file=sys.stdout,
            )

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self.start, self.start_step = time.perf_counter(), state.global_step


class FineTuner(Trainer):
    """Trainer, with a learning rate for each depth (layer-wise decay, Clark et al. 2020, arXiv:2003.10555)."""

    def __init__(self, *args, layer_decay: float = 1.0, **kwargs):
        self.layer_decay = layer_decay
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model=None):
        if self.layer_decay == 1.0 or self.optimizer is not None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = self.layer_decay ** depth_from_top(name, self.model.config.num_hidden_layers)
                weight_decay = self.args.weight_decay if name in decayed else 0.0
                groups.setdefault((scale, weight_decay), []).append(parameter)
        optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {"params": parameters, "lr": self.args.learning_rate * scale, "weight_decay": weight_decay}
                for (scale, weight_decay), parameters in groups.items()
            ],
            **optimizer_kwargs,
        )
        return self.optimizer


def depth_from_top(name: str, num_layers: int) -> int:
    """0 for the head and the final norm, 1 for the last block, num_layers + 1 for the embeddings."""
    if "embeddings." in name:
        return num_layers + 1
    if ".layer." in name:
        return num_layers - int(name.split(".layer.")[1].split(".")[0])
    return 0


def precision_of(options: argparse.Namespace) -> str:
    """"bf16", "fp16" or "fp32"; auto is bf16 on hardware that multiplies it faster: most GPUs, CPUs with AMX."""
    if options.precision != "auto":
        return options.precision
    if torch.cuda.is_available() and not options.cpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def training_arguments(options: argparse.Namespace, has_validation: bool) -> TrainingArguments:
    precision = precision_of(options)
    strategy = "steps" if has_validation else "no"
    return TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=max(options.batch_size, 32),
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,
        lr_scheduler_type=options.scheduler,
        label_smoothing_factor=options.label_smoothing,
        gradient_accumulation_steps=options.gradient_accumulation,
        gradient_checkpointing=options.gradient_checkpointing,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        torch_compile=options.compile,
        use_cpu=options.cpu or not torch.cuda.is_available(),
        seed=options.seed,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=torch.cuda.is_available() and not options.cpu,
        remove_unused_columns=False,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=strategy,
        eval_steps=options.eval_steps,
        save_strategy="steps",
        save_steps=options.eval_steps,
        save_total_limit=options.keep_checkpoints,
        load_best_model_at_end=has_validation,
        metric_for_best_model="accuracy" if has_validation else None,
        report_to=options.report_to,
        push_to_hub=options.push_to_hub is not None,
        hub_model_id=options.push_to_hub,
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(options: argparse.Namespace) -> dict[str, float]:
    """Everything from options to files; returns the metrics of validation and, where there is one, of the test split."""
    set_seed(options.seed)
    output_dir = Path(options.output_dir)
    images = load_images(
        options.dataset,
        options.data_dir,
        image_column=options.image_column,
        label_column=options.label_column,
        validation_fraction=options.validation_fraction,
        seed=options.seed,
        image_size=options.image_size or 64,
        generated_images=options.generated_images,
    )
    print_counts(images)
    model = load_model(options, images.class_names)
    processor = image_processor_for(options, model)
    model.config.image_mean, model.config.image_std = list(processor.image_mean), list(processor.image_std)
    sets = make_image_sets(options, images, processor)
    if options.freeze_backbone:
        model.vit.requires_grad_(False)

    # From here on the folder is written; whatever was wrong with the input has been said.
    if options.overwrite:
        remove_run(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "config.yaml", yaml.safe_dump(run_options(options), sort_keys=False))
    save_examples(images, output_dir / "examples.png")
    processor.save_pretrained(output_dir)
    print(f"example pictures: {output_dir / 'examples.png'}")

    interrupt = StopOnInterrupt()
    trainer = FineTuner(
        model=model,
        args=training_arguments(options, VALIDATION in sets),
        train_dataset=sets[TRAIN],
        eval_dataset=sets.get(VALIDATION),
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        callbacks=[StopOnNonFiniteLoss(), interrupt],
        layer_decay=options.layer_decay,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress())
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"training {parameters / 1e6:.1f} M parameters on {len(sets[TRAIN])} pictures of"
        f" {processor.size['height']}x{processor.size['width']}, {precision_of(options)}, on {trainer.args.device}"
    )
    result = trainer.train(resume_from_checkpoint=True if options.resume else None)
    if interrupt.interrupted:
        print(f"stopped at step {trainer.state.global_step}; go on with the same command and --resume")
        raise KeyboardInterrupt
    return finish(trainer, result, images, sets, options)


def run_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `config.yaml` holds: every option that shapes the run, so that --config with it repeats the run."""
    once = ("config", "overwrite", "resume")
    return {name: value for name, value in vars(options).items() if name not in once and value is not None}


def finish(trainer: FineTuner, result, images: ImageDataset, sets: dict[str, ImageSet], options) -> dict[str, float]:
    """Metrics, model, model card."""
    output_dir = Path(options.output_dir)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model()

    metrics: dict[str, float] = {}
    reports = []
    for name, prefix in ((VALIDATION, "eval"), (TEST, "test")):
        if name not in sets:
            continue
        output = trainer.predict(sets[name], metric_key_prefix=prefix)
        confusion = report.confusion_matrix(output.label_ids, output.predictions.argmax(-1), len(images.class_names))
        split_metrics = {**output.metrics, f"{prefix}_macro_f1": report.classification_metrics(confusion)["macro_f1"]}
        split_metrics["epoch"] = trainer.state.epoch
        trainer.save_metrics(prefix, split_metrics)
        metrics |= split_metrics
        reports.append(f"{name}: accuracy {output.metrics[f'{prefix}_accuracy']:.2%}\n\n"
                       f"{report.format_metrics(confusion, images.class_names)}\n")
        print(f"\n{reports[-1]}", end="")
    write_text(output_dir / "classification_report.txt", "\n".join(reports))

    card = {"tasks": "image-classification", "tags": ["image-classification", "vision", "fastvit"], "dataset": images.name}
    if options.from_scratch is None:
        card["finetuned_from"] = options.model
    trainer.create_model_card(model_name=output_dir.name, **card)
    if options.push_to_hub:
        trainer.push_to_hub(**card)
    print(f"\nmodel, metrics and model card: {output_dir}")
    print(f"try it: fastvit predict {output_dir} IMAGE")
    return metrics


def main(argv: list[str] | None = None) -> int:
    from fastvit.cli import report_errors

    return report_errors(lambda: run(parse_options(argv)))


if __name__ == "__main__":
    sys.exit(main())
