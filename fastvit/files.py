"""Atomic writes: a file is complete or absent, even if the writing process is killed.

Files are written under a temporary name in the same file system, synced to disk, and renamed. A rename is atomic.
Folders are removed in the opposite order: renamed, then deleted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastvit.errors import InputError

# Folder of files that are being written or deleted. Leftovers of an ended process are never used. The underscore makes
# `Trainer.push_to_hub` skip the folder.
PARTIAL = "_partial"


class WriteError(InputError):
    """A file could not be written, e.g. because the disk is full, the folder is read-only or a quota is exceeded."""


@contextlib.contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Convert the errors of file writers to a WriteError that names `path` and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteError(f"cannot write {path} ({reason})") from error
    except RuntimeError as error:
        # torch.save raises RuntimeError without a reason; writing the data and closing the archive fail in these files.
        if not any(source in str(error) for source in ("PytorchStreamWriter", "inline_container.cc")):
            raise
        raise WriteError(f"cannot write {path} (the disk may be full: {str(error).splitlines()[0]})") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Args:
        path: the file. Missing parent folders are created.
        text: written as it is; line ends are not converted.

    Raises:
        WriteError: the file cannot be written.
    """
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
    """Open a temporary folder whose files are moved to `folder` when the block ends without an error.

    Args:
        folder: the destination, created if missing. After an error in the block its contents are unchanged.

    Yields:
        The temporary folder.

    Raises:
        WriteError: a file cannot be written.
    """
    partial = folder / PARTIAL
    with wrap_write_errors(folder):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            reset_modes(partial)
            sync(*partial.rglob("*"))
            for path in sorted(partial.iterdir()):
                path.replace(folder / path.name)
            sync(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first, so that an interruption never leaves an incomplete folder of this name."""
    doomed = folder.parent / PARTIAL / f"deleted-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.parent.mkdir(exist_ok=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def reset_modes(path: Path) -> None:
    """Give a file, or all files of a folder, the mode of new files; safetensors lets only their owner read them."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    for file in (path, *path.rglob("*")):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~mask)


def sync(*paths: Path) -> None:
    """Flush files and folder entries to disk, so that they survive a power failure."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
