"""The options of `fastvit finetune`: command line over --config file over defaults, checked before anything is read."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

from fastvit.errors import InputError
from fastvit.train.distributed import is_own_run

DEFAULT_MODEL = "google/vit-base-patch16-224-in21k"

# Sizes of a ViT trained from scratch: hidden size, blocks, heads (of 64; micro's of 32); feed-forward 4 x hidden.
# Tiny to large are those of DeiT (Touvron et al. 2021) and of the ViT paper.
SIZES = {
    "micro": (96, 4, 3),
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
    "epochs": 30.0,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "warmup": 0.1,
    "scheduler": "cosine",
    "weight_decay": 0.05,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit finetune",
        description="Fine-tune a Vision Transformer to tell your pictures apart.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Example: fastvit finetune --data-dir my-pictures --output-dir runs/mine",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a file; those given here win")

    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="ID|FOLDER", help=f"pretrained ViT: hub id or folder [{DEFAULT_MODEL}]")
    group.add_argument("--from-scratch", choices=SIZES, help="random weights instead, of this size")
    group.add_argument("--image-size", type=int, help="height and width in pixels [the model's; from scratch: 224]")
    group.add_argument("--patch-size", type=int, default=16, help="from scratch: height and width of a patch")
    group.add_argument("--freeze-backbone", action="store_true", help="train the classifier alone (linear probe)")
    group.add_argument("--attention-dropout", type=float, default=0.0, help="chance to drop an attention weight")
    group.add_argument("--hidden-dropout", type=float, default=0.0, help="chance to drop a hidden activation")

    group = parser.add_argument_group("pictures")
    group.add_argument("--dataset", metavar="ID", help="hub data set, 'beans', or 'generated' (leaves) [beans]")
    group.add_argument(
        "--data-dir", metavar="FOLDER", help="or a folder of pictures: [train/ validation/ test/] CLASS/"
    )
    group.add_argument("--image-column", help="column with the pictures [found by name]")
    group.add_argument("--label-column", help="column with the classes [found by name]")
    group.add_argument("--validation-fraction", type=float, default=0.15, help="set aside where there is no validation")
    group.add_argument("--max-train-samples", type=int, metavar="N", help="train on N pictures only")
    group.add_argument("--max-eval-samples", type=int, metavar="N", help="evaluate on N pictures only")
    group.add_argument("--generated-images", type=int, default=2000, metavar="N", help="size of the drawn set")
    group.add_argument(
        "--streaming", action="store_true", help="read pictures while training; --data-dir may hold tar shards"
    )
    group.add_argument(
        "--class-names", metavar="FILE|A,B,C", help="with --streaming: the classes [the data's, or all labels]"
    )
    group.add_argument(
        "--shuffle-buffer", type=int, default=1000, metavar="N", help="with --streaming: N pictures that are mixed"
    )
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
    group.add_argument(
        "--layer-decay", type=float, default=1.0, help="learning rate factor from a block to the one below"
    )
    group.add_argument("--label-smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    group.add_argument("--gradient-accumulation", type=int, default=1, help="batches a step")
    group.add_argument(
        "--auto-batch", action="store_true", help="out of memory: halve the batch, twice as many of them a step"
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 where hardware has it"
    )
    group.add_argument(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, measure at the start what was not measured there before: our kernels or PyTorch's",
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model over the processes (FSDP2)")
    group.add_argument("--cpu", action="store_true", help="do not use a GPU")
    group.add_argument("--seed", type=int, default=42, help="of weights, order, augmentation and splits")

    group = parser.add_argument_group("recipes", "What may make the model better; docs/recipes.md measures it.")
    group.add_argument("--randaugment", nargs=2, type=int, metavar=("N", "M"), help="N operations of strength M < 30")
    group.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="blend pictures by Beta(ALPHA, ALPHA)")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="paste boxes of other pictures")
    group.add_argument("--drop-path", type=float, default=0.0, metavar="RATE", help="chance to skip the last block")
    group.add_argument("--ema", type=float, metavar="DECAY", help="keep a running mean of the weights, such as 0.99")
    group.add_argument(
        "--class-balanced",
        type=float,
        nargs="?",
        const=0.999,
        metavar="BETA",
        help="weigh classes by effective number; 1: by inverse frequency [without BETA: 0.999]",
    )
    group.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank, not the weights (peft)")
    group.add_argument("--early-stopping", type=int, metavar="N", help="stop after N evaluations without a better one")
    group.add_argument("--flip", action="store_true", help="evaluate with the mean over picture and mirror image")
    group.add_argument("--calibrate", action="store_true", help="fit the temperature of the probabilities at the end")
    group.add_argument("--folds", type=int, metavar="K", help="cross-validation: K models, each in a sub-folder")
    group.add_argument("--fold", type=int, metavar="I", help="of these, only the I-th (1 to K), in the folder itself")

    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", metavar="FOLDER", help="where everything goes [runs/DATASET]")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint there, if there is one")
    group.add_argument("--eval-steps", type=int, default=100, metavar="N", help="evaluate and save every N steps")
    group.add_argument("--logging-steps", type=int, default=10, metavar="N", help="log every N steps")
    group.add_argument("--keep-checkpoints", type=int, default=2, metavar="N", help="how many are kept (0: all)")
    group.add_argument(
        "--report-to", default="none", metavar="NAME", help="tensorboard, wandb, ... as Trainer knows them"
    )
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
    if options.dataset == "generated" and options.model is None:
        parser.set_defaults(**{**GENERATED_DEFAULTS, **from_file})
        options = parser.parse_args(argv)
    if options.model is None:
        options.model = DEFAULT_MODEL
    if options.output_dir is None:
        source = Path(options.dataset or options.data_dir)
        options.output_dir = str(Path("runs") / (source.parent.name if "*" in source.name else source.name))
    if is_own_run(Path(options.output_dir)):  # torchrun has started this run again
        options.resume = get_last_checkpoint(options.output_dir) is not None
        options.overwrite = not options.resume
    _check_options(options)
    return options


def _checked(name: str, action: argparse.Action, value: Any) -> Any:
    """A value from a file, converted and checked as argparse does for the command line."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(action.nargs, int):
        if not isinstance(value, list) or len(value) != action.nargs:
            raise InputError(f"--config: {name}: expected a list of {action.nargs} values, got {value!r}")
        return [_checked(name, _one_of(action), entry) for entry in value]
    try:
        if isinstance(action.type, type):
            value = action.type(value)
    except (TypeError, ValueError):
        raise InputError(
            f"--config: {name}: expected {getattr(action.type, '__name__', 'text')}, got {value!r}"
        ) from None
    if action.choices is not None and value not in action.choices:
        raise InputError(f"--config: {name}: expected one of {', '.join(action.choices)}, got {value!r}")
    return value


def _one_of(action: argparse.Action) -> argparse.Action:
    """What one of the values of an option with several is."""
    single = copy.copy(action)
    single.nargs = None
    return single


def _check_recipes(options: argparse.Namespace) -> None:
    def check(name: str, holds: bool, expected: str) -> None:
        if getattr(options, name) is not None and not holds:
            raise InputError(f"--{name.replace('_', '-')}: expected {expected}, got {getattr(options, name)}")

    operations, magnitude = options.randaugment or (1, 1)
    check("randaugment", 1 <= operations <= 15 and 0 < magnitude < 30, "N from 1 to 15 and M from 1 to 29")
    for name in ("mixup", "cutmix"):
        check(name, 0 <= getattr(options, name) < float("inf"), "a number of at least 0")
    check("drop_path", 0 <= options.drop_path < 1, "0 or more and below 1")
    check("ema", 0 < (options.ema or 0) < 1, "a number between 0 and 1")
    check("class_balanced", 0 <= (options.class_balanced or 0) <= 1, "a number from 0 to 1")
    check("lora", (options.lora or 0) >= 1, "a rank of at least 1")
    check("early_stopping", (options.early_stopping or 0) >= 1, "at least 1 evaluation")
    check("folds", (options.folds or 0) >= 2, "at least 2 folds")
    check("fold", 1 <= (options.fold or 0) <= (options.folds or 0), "1 to the number of --folds")
    if options.folds is not None and options.push_to_hub is not None:
        raise InputError("--folds: its models are for measuring; give --folds or --push-to-hub, not both")
    if options.folds is not None and options.fold is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--folds: expected one process; several train one fold after the other with --fold I")
    for name in ("randaugment", "mixup", "cutmix", "class_balanced", "folds"):
        if options.streaming and getattr(options, name):
            raise InputError(f"--{name.replace('_', '-')}: cannot be used with --streaming")
    if options.lora is not None and options.from_scratch is not None:
        raise InputError("--lora: expected a pretrained --model, whose weights stay; got --from-scratch")
    if options.lora is not None and options.freeze_backbone:
        raise InputError("--lora: give --lora or --freeze-backbone, not both")


def _check_options(options: argparse.Namespace) -> None:
    if options.dataset is not None and options.data_dir is not None:
        raise InputError("--data-dir: give a folder or a --dataset, not both")
    if options.overwrite and options.resume:
        raise InputError("--resume: give --resume or --overwrite, not both")
    for name in ("epochs", "batch_size", "learning_rate", "gradient_accumulation", "eval_steps", "logging_steps"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name.replace('_', '-')}: expected a number above 0, got {getattr(options, name)}")
    counts = ("image_size", "patch_size", "max_train_samples", "max_eval_samples", "generated_images", "shuffle_buffer")
    for name in counts:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    if options.keep_checkpoints < 0:
        raise InputError(f"--keep-checkpoints: expected 0 or more, got {options.keep_checkpoints}")
    for name in ("attention_dropout", "hidden_dropout", "label_smoothing"):
        if not 0 <= getattr(options, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')}: expected 0 or more and below 1, got {getattr(options, name)}"
            )
    if not 0 < options.layer_decay <= 1:
        raise InputError(f"--layer-decay: expected above 0 and at most 1, got {options.layer_decay}")
    _check_recipes(options)
    if options.fsdp and "LOCAL_RANK" not in os.environ:
        raise InputError(
            "--fsdp: expected several processes; start them with torchrun --nproc-per-node N -m fastvit.finetune ..."
        )
    if options.streaming and options.dataset == "generated":
        raise InputError("--streaming: expected a hub data set or --data-dir; drawn leaves are not read from anywhere")
    if options.streaming and options.max_train_samples is not None:
        raise InputError("--max-train-samples: cannot be used with --streaming; --max-steps limits what is read")
    if options.class_names is not None and not options.streaming:
        raise InputError("--class-names: expected together with --streaming; otherwise the data say them")
    output_dir = Path(options.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output-dir: {output_dir} is a file")
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output-dir: cannot write in {there}")
    if is_run(output_dir) and not (options.overwrite or options.resume):
        raise InputError(
            f"--output-dir: {output_dir} already holds a run; give --overwrite, --resume or another folder"
        )


def is_run(folder: Path) -> bool:
    return folder.is_dir() and (
        any((folder / name).exists() for name in ("config.yaml", "model.safetensors", "trainer_state.json"))
        or get_last_checkpoint(folder) is not None
        or any(is_run(fold) for fold in folder.glob("fold-*"))
    )
