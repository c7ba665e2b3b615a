"""Continuing a run: from its last checkpoint, with the batch size that fits, and the message when it ends early."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import yaml
from accelerate import PartialState

from fastvit.errors import InputError, is_out_of_memory
from fastvit.files import WriteError
from fastvit.ops import eager
from fastvit.train.options import FinetuneOptions
from fastvit.train.recipes import RecipeTuner
from fastvit.train.run_folder import describe_next_start, find_last_checkpoint, select_run_options


def resolve_resume(options: FinetuneOptions) -> FinetuneOptions:
    """With --resume: print which options differ from the run's, and keep the batch size that --auto-batch found.

    Raises:
        InputError: the `config.yaml` of the run cannot be read.
    """
    if not options.resume:
        return options
    if find_last_checkpoint(options.output_dir) is None:
        print(f"note: there is no checkpoint in {options.output_dir}; the run starts from the beginning")
    config = Path(options.output_dir) / "config.yaml"
    if not config.exists():
        return options
    try:
        before = dict(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError):
        raise InputError(f"--resume: {config}: expected the options of the run, found a damaged file") from None
    found = {name: before[name] for name in ("batch_size", "gradient_accumulation") if type(before.get(name)) is int}
    is_same_step = math.prod(found.values()) == options.batch_size * options.gradient_accumulation
    if options.auto_batch and is_same_step and found.get("batch_size", math.inf) < options.batch_size:
        options = dataclasses.replace(options, **found)
    now = select_run_options(options)
    for name in sorted((now.keys() | before.keys()) - {"output_dir"}):
        if now.get(name) != before.get(name):
            print(f"note: {name} is {now.get(name)}; the run had {before.get(name)} before")
    return options


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
