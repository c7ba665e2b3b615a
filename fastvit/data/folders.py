"""Image folders: FOLDER/CLASS/*.jpg, or FOLDER/SPLIT/CLASS/*.jpg with a split called train.

A folder of images is a class, whatever its name: "train" is a class beside "bus" and "car", and a split if it holds
folders of images itself. Images in deeper folders belong to the class above. Links are followed, and each folder is
visited once. Ignored are names that begin with ".", folders that begin with "__", and files without the suffix of an
image.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from fastvit.data.images import list_image_suffixes
from fastvit.errors import InputError, escape_unprintable

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

Classes = dict[str, list[str]]  # class -> its image files, sorted


def has_metadata(root: Path) -> bool:
    """Whether the folder, or a folder in it, has a metadata file of the `datasets` library with the labels."""
    folders = [root, *(Path(entry.path) for entry in list_entries(root) if is_folder(entry))]
    return any((folder / name).is_file() for folder in folders for name in METADATA_FILES)


def list_images(root: Path) -> dict[str, Classes]:
    """Lists the images of a folder by split and class.

    Args:
        root: The folder.

    Returns:
        {split: {class: paths}}; without folders of splits, every image is in "train".

    Raises:
        InputError: If there are no images, or some are outside the folders of the classes.
    """
    splits: dict[str, Classes] = {}
    outside = [find_images(root, recursive=False)]
    for entry in filter(is_folder, list_entries(root)):
        split = SPLIT_FOLDERS.get(entry.name.lower())
        classes = find_classes(Path(entry.path)) if split is not None else {}
        if split is None or not classes:
            outside.append(find_images(entry.path))
            continue
        if split in splits:
            raise InputError(f"{root}: expected one folder for the split {split!r}, found another: {entry.name}")
        splits[split] = classes
        outside.append(find_images(entry.path, recursive=False))
    if not splits:
        splits, outside = {"train": find_classes(root)}, outside[:1]
    stray = next(itertools.chain(*outside), None)
    if stray is not None:
        raise InputError(
            f"{root}: expected every image in the folder of a class, found {escape_unprintable(stray)} outside"
        )
    if not any(splits.values()):
        raise InputError(f"{root}: expected images, one folder per class, found none")
    return splits


def find_classes(folder: Path) -> Classes:
    """Returns the sub-folders of a folder that hold images."""
    ancestors = {get_folder_id(folder.parent), get_folder_id(folder)}
    classes: Classes = {}
    for entry in list_entries(folder):
        if is_folder(entry) and get_folder_id(entry.path) not in ancestors:
            paths = sorted(find_images(entry.path, ancestors=ancestors))
            if paths and not entry.name.isprintable():
                raise InputError(f"{folder}: expected a printable class name, found {escape_unprintable(entry.name)}")
            classes |= {entry.name: paths} if paths else {}
    return classes


def find_images(
    folder: str | Path, *, ancestors: set[tuple[int, int]] | None = None, recursive: bool = True
) -> Iterator[str]:
    """Yields the image files of a folder.

    Every entry with the suffix of an image is listed; a broken link is reported when it is decoded.

    Args:
        folder: The folder.
        ancestors: Ids of folders that links must not lead back to.
        recursive: Whether to visit the folders below as well.

    Yields:
        Paths in no particular order.
    """
    visited = (ancestors or set()) | {get_folder_id(folder)}
    waiting = [str(folder)]
    while waiting:
        for entry in list_entries(waiting.pop()):
            if is_folder(entry):
                if recursive and (place := get_folder_id(entry.path)) not in visited:
                    visited.add(place)
                    waiting.append(entry.path)
            elif Path(entry.name).suffix.lower() in list_image_suffixes():
                yield entry.path


def list_entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Lists the entries of a folder by name, without hidden ones."""
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{escape_unprintable(str(folder))}: cannot be read ({error.strerror})") from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one, that is not ignored."""
    try:
        return entry.is_dir() and not entry.name.startswith("__")
    except OSError:  # a link to itself
        return False


def get_folder_id(folder: str | Path) -> tuple[int, int]:
    """Returns device and inode: the same for every path of a folder."""
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def compute_fingerprint(paths: list[str]) -> str:
    """Computes a digest of the names, sizes and modification times of files."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = Path(path).stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:
            state = (0, 0)
        digest.update(os.fsencode(path) + repr(state).encode() + b"\0")
    return digest.hexdigest()
