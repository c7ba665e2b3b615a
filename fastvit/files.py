"""Files that are there whole or not at all, whatever ends the process that writes them.

Everything is written under a temporary name in the same file system, pushed to the disk, and renamed: a rename happens
or does not, there is nothing in between. Folders are removed the other way round: renamed first, then deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastvit.errors import InputError

# Where a run's files are while they are written or deleted; never of use after the process that wrote there has ended.
# `Trainer.push_to_hub` leaves out names that begin with an underscore.
PARTIAL = "_partial"


class WriteError(InputError):
    """A file could not be written: the disk is full, the folder read-only, a quota used up, ..."""


@contextlib.contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turns what the writers of files raise into a WriteError that names `path` and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteError(f"cannot write {path} ({reason})") from error
    except RuntimeError as error:
        # torch.save reports a failed write without saying why; that of its end fails in another place of its source.
        if not any(source in str(error) for source in ("PytorchStreamWriter", "inline_container.cc")):
            raise
        raise WriteError(f"cannot write {path} (the disk may be full: {str(error).splitlines()[0]})") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, making its folder where there is none; raises WriteError."""
    partial = path.with_name(f".{path.name}.partial")
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8", newline="")
            sync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_atomically(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved to `folder` (made where missing) once they have all been written.

    Raises WriteError; then, and after any other error, `folder` has what it had.
    """
    partial = folder / PARTIAL
    with wrap_write_errors(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            sync(*partial.rglob("*"))
            for path in sorted(partial.iterdir()):
                path.replace(folder / path.name)
            sync(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder, so that none of its files is missing while it still has its name."""
    doomed = folder.parent / PARTIAL / f"deleted-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(exist_ok=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sync(*paths: Path) -> None:
    """Push files, and the entries of folders, to the disk: they are there after a loss of power too."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
