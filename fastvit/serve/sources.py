"""The images that a command is given: files, folders, glob patterns and datasets."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastvit.checkpoints.locations import find_nearest
from fastvit.data.datasets import load_images
from fastvit.data.images import list_image_suffixes
from fastvit.data.sources import IMAGE_COLUMNS, LabelledFiles, find_column, open_source
from fastvit.errors import InputError


class Source(NamedTuple):
    """An image to classify: its name, and what `Predictor` accepts: a path or a function that returns the image."""

    name: str
    image: str | Callable[[], Any]


def list_sources(arguments: Sequence[str]) -> list[Source]:
    """List the images that arguments of the command line name.

    Args:
        arguments: files, folders (all images below them, sorted) and glob patterns, in which ** matches any folders.

    Returns:
        The images in the order of the arguments. A file that does not exist is listed, for its error beside the results
        of the others.

    Raises:
        InputError: a folder or pattern has no images, or no file exists; the error names the nearest existing one.
    """
    sources: list[Source] = []
    missing = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = list(walk_images(argument))
            if not found:
                raise InputError(
                    f"{argument}: expected a folder with images, found none in it (a folder of Parquet or tar files, or"
                    " saved by `datasets`, is given with --dataset)"
                )
        elif path.exists() or not glob.has_magic(argument):
            found = [argument]
            missing += [] if path.exists() else [argument]
        else:
            found = expand_pattern(argument)
            if not found:
                raise InputError(f"{argument}: expected a pattern that matches images, it matches none")
        sources += [Source(name, name) for name in found]
    if len(missing) == len(sources):
        nearest = find_nearest(Path(missing[0]), files=True)
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        raise InputError(f"{missing[0]}: no such file or folder{hint}")
    return sources


def is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in list_image_suffixes()


def walk_images(folder: str) -> Iterator[str]:
    """Yield the image files below a folder, sorted; hidden files and folders are left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (str(Path(root, name)) for name in sorted(files) if is_image_name(name))


def expand_pattern(pattern: str) -> list[str]:
    """Return the images that match a glob pattern, or are in folders that match it, sorted and each once."""
    found: set[str] = set()
    for path in glob.glob(pattern, recursive=True):  # noqa: PTH207 (Path.glob accepts no absolute patterns)
        if Path(path).is_dir():
            found.update(walk_images(path))
        elif is_image_name(Path(path).name):
            found.add(str(Path(path)))
    return sorted(found)


def list_dataset_sources(dataset: str, split: str | None, image_column: str | None) -> list[Source]:
    """List the images of a split of a hub dataset or of a folder that `datasets` reads, named SPLIT/INDEX.

    Raises:
        InputError: the dataset or the split cannot be read.
    """
    import datasets

    splits: dict[str, Any]
    if dataset == "generated":
        splits = load_images(dataset, validation_fraction=0).splits
    else:
        is_local = Path(dataset).is_dir()
        opened = open_source(None if is_local else dataset, dataset if is_local else None, None, image_column, None)
        if isinstance(opened, LabelledFiles):
            raise InputError(f"--dataset: {dataset} is a folder of images, which is given as IMAGE")
        splits = opened
    name = split or next((name for name in ("test", "validation", "train") if name in splits), next(iter(splits)))
    if name not in splits:
        raise InputError(f"--split: expected one of {', '.join(splits)}, got {name!r}")
    rows: Any = splits[name]
    if dataset == "generated":
        return [Source(f"{name}/{index}", partial(rows.load, index)) for index in range(len(rows))]
    column = find_column("image", image_column, rows.features, IMAGE_COLUMNS, datasets.Image, dataset)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return [Source(f"{name}/{index}", partial(read_cell, rows, index, column)) for index in range(len(rows))]


def read_cell(rows: Any, index: int, column: str) -> Any:
    """Return the path or the bytes of an image in a row; raise InputError for an empty cell."""
    cell = rows[index][column]
    if cell is None:
        raise InputError(f"row {index}: expected an image in column {column!r}, found an empty cell")
    return cell["path"] if cell["bytes"] is None else cell["bytes"]
