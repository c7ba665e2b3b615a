"""What the folder of a run holds, how a run goes on from it, and what is said when one ends early."""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

from fastvit.errors import InputError, is_out_of_memory
from fastvit.files import PARTIAL, WriteError, remove_folder
from fastvit.ops import eager
from fastvit.report.run_log import LOG_FILE
from fastvit.train import page
from fastvit.train.distributed import MARKER
from fastvit.train.recipes import RecipeTuner

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
    """Remove what a run has written, its folds' too, and nothing else."""
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


def select_run_options(options: argparse.Namespace) -> dict[str, Any]:
    """What `config.yaml` holds: every option that shapes the run, so that --config with it repeats the run."""
    once = ("config", "overwrite", "resume")
    return {name: value for name, value in vars(options).items() if name not in once and value is not None}


def find_last_checkpoint(options: argparse.Namespace) -> str | None:
    return get_last_checkpoint(options.output_dir) if Path(options.output_dir).is_dir() else None


def describe_run_folder(options: argparse.Namespace) -> str:
    """How to go on after a run has ended early."""
    checkpoint = find_last_checkpoint(options)
    begin = f"{checkpoint} is whole" if checkpoint else "there is no checkpoint yet"
    return f"{begin}: the same command with --resume goes on from {'it' if checkpoint else 'the beginning'}"


def resolve_resume(options: argparse.Namespace) -> argparse.Namespace:
    """With --resume: say where the run goes on, with what other options; keep the batch that --auto-batch found."""
    if not options.resume:
        return options
    if find_last_checkpoint(options) is None:
        print(f"note: there is no checkpoint in {options.output_dir}; the run starts from the beginning")
    config = Path(options.output_dir) / "config.yaml"
    if not config.exists():
        return options
    before = yaml.safe_load(config.read_text(encoding="utf-8"))
    found = {name: before[name] for name in ("batch_size", "gradient_accumulation")}
    same_steps = math.prod(found.values()) == options.batch_size * options.gradient_accumulation
    if options.auto_batch and same_steps and found["batch_size"] < options.batch_size:
        options = argparse.Namespace(**vars(options) | found)
    now = select_run_options(options)
    for name in sorted((now.keys() | before.keys()) - {"output_dir"}):
        if now.get(name) != before.get(name):
            print(f"note: {name} is {now.get(name)}; before, the run had {before.get(name)}")
    return options


class OutOfMemory(InputError):
    """A batch was too large for the memory."""


@contextlib.contextmanager
def explain_early_end(trainer: RecipeTuner, options: argparse.Namespace) -> Iterator[None]:
    """Add to what ended training or the writing of its results what stands on the disk, and how to go on.

    Raises:
        WriteError: as it came, with more to say.
        OutOfMemory: in place of what PyTorch raised.
    """
    try:
        yield
    except WriteError as error:
        raise WriteError(f"{error}; {describe_run_folder(options)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        eager.disable_onednn_after(error)
        advice = "--gradient-checkpointing or a smaller --image-size"
        if options.batch_size > 1:
            advice = f"--auto-batch, a smaller --batch-size, {advice}"
        raise OutOfMemory(
            f"training: out of memory with {options.batch_size} picture(s) a batch after step"
            f" {trainer.state.global_step} ({str(error).splitlines()[0] if str(error) else 'MemoryError'});"
            f" try {advice}; {describe_run_folder(options)}"
        ) from None


def shrink_batch(options: argparse.Namespace, error: OutOfMemory) -> argparse.Namespace:
    """Options for a half of the images a batch (or a third, ...: a whole number) and as many more batches a step.

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
