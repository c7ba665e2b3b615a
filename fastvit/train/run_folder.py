"""The folder of a run: its files, which checkpoint is the last, and how a run that ended early is continued."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import get_last_checkpoint

from fastvit.errors import InputError
from fastvit.files import PARTIAL, remove_folder
from fastvit.report.run_log import LOG_FILE
from fastvit.train.distributed import MARKER, is_own_run
from fastvit.train.lock import LOCK_FILE
from fastvit.train.options import FinetuneOptions

REPORT_FILE = "report.html"
ADAPTER = "adapter"  # the adapters that --lora trained, by themselves
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
    REPORT_FILE,
    "test_results.json",
    "train_results.json",
    "trainer_state.json",
    "training_args.bin",
)


def resolve_output_dir(options: FinetuneOptions) -> FinetuneOptions:
    """Check that the run can be written to its folder; resume it there if torchrun has restarted it.

    Raises:
        InputError: the folder cannot be written, or already holds another run.
    """
    output_dir = Path(options.output_dir)
    if is_own_run(output_dir):
        resume = find_last_checkpoint(output_dir) is not None
        options = dataclasses.replace(options, resume=resume, overwrite=not resume)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output-dir: {output_dir} is a file")
    existing = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--output-dir: cannot write in {existing}")
    check_is_free(options)
    return options


def check_is_free(options: FinetuneOptions) -> None:
    """Check that the folder holds no run, or that the options say what to do with it.

    Raises:
        InputError: they do not.
    """
    if is_run(Path(options.output_dir)) and not (options.overwrite or options.resume):
        raise InputError(
            f"--output-dir: {options.output_dir} already holds a run; give --overwrite, --resume or another folder"
        )


def is_run(folder: Path) -> bool:
    return folder.is_dir() and (
        any((folder / name).exists() for name in ("config.yaml", "model.safetensors", "trainer_state.json"))
        or get_last_checkpoint(folder) is not None
        or any(is_run(fold) for fold in folder.glob("fold-*"))
    )


def remove_run(folder: Path) -> None:
    """Remove the files of a run and of its folds, and nothing else."""
    for checkpoint in folder.glob("checkpoint-*"):  # first, while config.yaml still tells which run they belong to
        remove_folder(checkpoint)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    for adapter in folder.glob(ADAPTER):
        remove_folder(adapter)
    for fold in folder.glob("fold-*"):
        remove_run(fold)
        for lock in fold.glob(f"{LOCK_FILE}*"):  # of a process that has ended
            lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds the user's own files
            fold.rmdir()
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def select_run_options(options: FinetuneOptions) -> dict[str, Any]:
    """The content of `config.yaml`: every option that shapes the run, so that --config with it repeats the run."""
    return {
        name: value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("overwrite", "resume")
        and value is not None
        and not (name == "model" and options.from_scratch is not None)
    }


def read_run_options(output_dir: Path) -> dict[str, Any]:
    """Read the `config.yaml` of a run; empty where there is none.

    Raises:
        InputError: the file is damaged.
    """
    config = output_dir / "config.yaml"
    if not config.exists():
        return {}
    try:
        return dict(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError):
        raise InputError(f"--resume: {config}: expected the options of the run, found a damaged file") from None


def find_last_checkpoint(output_dir: str | Path) -> str | None:
    return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None


def describe_next_start(output_dir: str | Path) -> str:
    """How to continue after a run has ended early, for an error message."""
    checkpoint = find_last_checkpoint(output_dir)
    if checkpoint is None:
        return "there is no checkpoint yet: the same command with --resume starts from the beginning"
    return f"{checkpoint} is complete: the same command with --resume continues from it"
