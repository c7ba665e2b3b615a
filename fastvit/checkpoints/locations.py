"""Where a checkpoint is: a folder or the hub. A name that can be neither is refused before the hub is asked."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from fastvit.errors import InputError

# Ending of a file that `fastvit export` writes -> its format.
EXPORTED_SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch-export", ".engine": "tensorrt"}


class MissingFolderError(InputError, OSError):
    """No folder has this name. An OSError too, as transformers raises one."""


def check_location(model: str | os.PathLike[str], *, has_owner: bool = False) -> None:
    """Checks that a model may be a folder with a checkpoint, or else a hub id. The hub is not asked.

    A name such as "runs/leaves" may be either. It is a hub id unless there is a folder "runs" that has a checkpoint in
    it, or a folder of nearly this name.

    Args:
        model: A folder or hub id.
        has_owner: Whether hub ids are "owner/name"; transformers also accepts the old ones without an owner.

    Raises:
        InputError: If it cannot be either; the error names the nearest existing folder.
    """
    name, path = os.fspath(model), Path(model)
    if path.is_dir():
        return
    if path.is_file():
        raise InputError(
            f"model: expected a hub id (owner/name) or a folder, got the file {name!r}; `fastvit convert` makes a"
            " folder of a file"
        )
    is_path = isinstance(model, Path) or "\\" in name or name.startswith((".", "/", "~"))
    if not is_path and name.count("/") == 1:
        is_path = path.parent.is_dir() and (find_nearest(path) is not None or contains_checkpoint(path.parent))
    elif not is_path:
        is_path = has_owner or name.count("/") > 1
    if is_path:
        nearest = find_nearest(path)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise MissingFolderError(f"model: expected a hub id (owner/name) or a folder, found no folder {name!r}{hint}")


def find_exported(model: object) -> Path | None:
    """Returns the path of an exported file, or None if `model` is something else.

    Raises:
        InputError: If its name is that of an exported file, and there is none.
    """
    if not isinstance(model, (str, os.PathLike)):
        return None
    path = Path(model)
    if path.suffix not in EXPORTED_SUFFIXES or path.is_dir():
        return None
    if not path.is_file():
        nearest = find_nearest(path, files=True)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise InputError(f"model: no such file: {os.fspath(model)!r}{hint}")
    return path


def find_nearest(path: Path, *, files: bool = False) -> str | None:
    """Returns the existing sibling whose name is nearest to that of a missing folder, or file, if any is similar."""
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:  # the first part of the path that does not exist
        missing = missing.parent
    try:
        names = [entry.name for entry in os.scandir(missing.parent) if files or entry.is_dir()]
    except OSError:
        return None
    nearest = suggest(missing.name, names)
    if nearest is None:
        return None
    whole = missing.parent / nearest / path.relative_to(missing)
    return str(whole if whole.exists() else missing.parent / nearest)


def suggest(name: str, known: Iterable[str]) -> str | None:
    """Returns the name that is nearest to a misspelt one, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def contains_checkpoint(folder: Path) -> bool:
    return next(folder.glob("*/config.json"), None) is not None
