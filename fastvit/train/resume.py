"""Continuing a run: from its last checkpoint, with the batch size that fits, and the message when it ends early."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from fastvit.errors import InputError, is_out_of_memory
from fastvit.files import WriteError
from fastvit.ops import eager
from fastvit.train.arguments import get_flag
from fastvit.train.defaults import PLAIN
from fastvit.train.options import FinetuneOptions
from fastvit.train.recipes import RecipeTuner
from fastvit.train.run_folder import describe_next_start, find_last_checkpoint, read_run_options, select_run_options

# Options that a run keeps, and why. All others may change: they apply from the resumed step on, the learning rate,
# weight decay and schedule in place of those in the checkpoint.
ADAPTED = "the checkpoint has other weights and optimizer states"
SPLIT = "images for validation would be among those that the model was trained on"
FIXED = {
    **dict.fromkeys(("from_scratch", "patch_size", "image_size", "channels", "freeze_backbone"), ADAPTED),
    **dict.fromkeys(("lora", "fsdp", "task"), ADAPTED),
    **dict.fromkeys(("seed", "validation_fraction", "streaming", "folds", "fold"), SPLIT),
}
ADAPTIVE_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # with a state of their own


def resolve_resume(options: FinetuneOptions) -> FinetuneOptions:
    """With --resume: print which options differ from the run's, and keep the batch size that --auto-batch found.

    Raises:
        InputError: the `config.yaml` of the run cannot be read, or an option differs that cannot change within a run.
    """
    if not options.resume:
        return options
    has_checkpoint = find_last_checkpoint(options.output_dir) is not None
    if not has_checkpoint:
        print(f"note: there is no checkpoint in {options.output_dir}; the run starts from the beginning")
    before = read_run_options(Path(options.output_dir))
    if not before:
        return options
    found = {name: before[name] for name in ("batch_size", "gradient_accumulation") if type(before.get(name)) is int}
    is_same_step = math.prod(found.values()) == options.batch_size * options.gradient_accumulation
    if options.auto_batch and is_same_step and found.get("batch_size", math.inf) < options.batch_size:
        options = dataclasses.replace(options, **found)
    now = select_run_options(options)
    if has_checkpoint:
        check_fixed_options(before, options)
    unused = {"output_dir", "recipe"} | ({"model"} if options.from_scratch is not None else set())
    defaults = {field.name: field.default for field in dataclasses.fields(options)}  # of options newer than the run
    for name in sorted((now.keys() | before.keys()) - unused):
        if now.get(name) != (earlier := before.get(name, defaults.get(name))):
            print(f"note: {name} is {now.get(name)}; the run had {earlier} before")
    return options


def check_fixed_options(before: dict[str, Any], options: FinetuneOptions) -> None:
    """Check the options that cannot change within a run.

    Args:
        before: content of the run's `config.yaml`, without the options that were None.
        options: those of the resumed run.

    Raises:
        InputError: the first one that differs, with both values.
    """
    earlier = {
        field.name: before.get(field.name, PLAIN.get(field.name, field.default))
        for field in dataclasses.fields(options)
    }

    def refuse(name: str, reason: str) -> None:
        flag, value = get_flag(name), getattr(options, name)
        raise InputError(
            f"{flag}: the run in {options.output_dir} has {format_option(earlier[name])}, got {format_option(value)};"
            f" it cannot change with --resume, as {reason}; give {flag} as before, or start another run"
        )

    for name, reason in FIXED.items():
        is_size = name in ("image_size", "patch_size")  # from scratch; else of the model, whose shapes are checked
        if getattr(options, name) != earlier[name] and not (is_size and options.from_scratch is None):
            refuse(name, reason)
    # A model's folder may have been moved, or be a copy from the hub.
    if options.from_scratch is None and Path(options.model).name != Path(earlier["model"]).name:
        refuse("model", ADAPTED)
    if (options.ema is None) != (earlier["ema"] is None):
        refuse("ema", "the best checkpoint was selected with the other weights")
    if options.layer_decay != earlier["layer_decay"] and 1.0 in (options.layer_decay, earlier["layer_decay"]):
        refuse("layer_decay", "the optimizer groups the weights otherwise")
    if {options.scheduler, earlier["scheduler"]} & {*ADAPTIVE_SCHEDULERS}:
        for name in ("scheduler", "learning_rate"):
            if getattr(options, name) != earlier[name]:
                refuse(name, "the schedule has adapted the learning rate to the evaluations before")
    step = options.batch_size * options.gradient_accumulation
    if options.max_steps <= 0 and step != earlier["batch_size"] * earlier["gradient_accumulation"]:
        name = "batch_size" if options.batch_size != earlier["batch_size"] else "gradient_accumulation"
        refuse(name, "epochs are counted in steps of as many images (batch size x gradient accumulation)")


def format_option(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class OutOfMemory(InputError):
    """A batch was too large for the memory."""


@contextlib.contextmanager
def explain_early_end(trainer: RecipeTuner, options: FinetuneOptions) -> Iterator[None]:
    """Add to an error of training, or of writing its results, how the run can be continued.

    Raises:
        WriteError: with the last checkpoint added to its message.
        OutOfMemory: in place of PyTorch's error.
    """
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error}; {describe_next_start(options.output_dir)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        eager.disable_onednn_after(error)
        advice = "--gradient-checkpointing or a smaller --image-size"
        if options.batch_size > 1:
            advice = f"--auto-batch, a smaller --batch-size, {advice}"
        raise OutOfMemory(
            f"training: out of memory with {options.batch_size} image(s) per batch after step"
            f" {trainer.state.global_step} ({str(error).splitlines()[0] if str(error) else 'MemoryError'});"
            f" try {advice}; {describe_next_start(options.output_dir)}"
        ) from None


def shrink_batch(options: FinetuneOptions, error: OutOfMemory) -> FinetuneOptions:
    """Options that resume the run with half the images per batch and twice the batches per step.

    A batch of odd size is divided by its smallest factor instead, so that a step has as many images as before.

    Raises:
        OutOfMemory: `error`, where --auto-batch is off, the batch has one image, or several processes train: one of
            them cannot restart alone.
    """
    batch = options.batch_size
    if not options.auto_batch or batch == 1 or PartialState().num_processes > 1:
        raise error
    factor = next(factor for factor in range(2, batch + 1) if batch % factor == 0)
    smaller, batches = batch // factor, options.gradient_accumulation * factor
    print(f"out of memory with {batch} images per batch; continuing with {smaller} and {batches} batches per step")
    return dataclasses.replace(options, batch_size=smaller, gradient_accumulation=batches, overwrite=False, resume=True)
