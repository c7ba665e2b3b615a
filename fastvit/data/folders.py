"""Image folders: FOLDER/CLASS/*.jpg, or FOLDER/SPLIT/CLASS/*.jpg with a split for training.

Names of splits are read as the `datasets` library does: train_images, training_set, test-2017. A folder of images is a
class, whatever its name: "train" is a class beside "bus" and "car", and a split if it holds folders of images itself.
Folders that can be read in two ways are refused. Images in deeper folders belong to the class above. Links are
followed, and each folder is visited once. Names that begin with "." and folders that begin with "__" are ignored. Files
without the suffix of a readable image are left out and counted.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastvit.data.images import AVIF_HINT, HEIF_HINT, HEIF_SUFFIXES, list_image_suffixes
from fastvit.errors import InputError, escape_unprintable

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Suffixes of images that are not decoded, or by the extra `heif` only. A class of such files must not be lost.
UNREADABLE_SUFFIXES = {
    *HEIF_SUFFIXES,
    *(".avif", ".jxl", ".svg", ".psd", ".eps", ".tga", ".dds", ".exr", ".dcm"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
}

Classes = dict[str, list[str]]  # class -> its image files, sorted


@dataclass
class Listing:
    """The images of a folder.

    Attributes:
        splits: {split: {class: paths}}.
        left_out: (folder, suffix -> number of files that are no readable images, whether the folder is a class).
        notes: Other files that were left out.
    """

    splits: dict[str, Classes] = field(default_factory=dict)
    left_out: list[tuple[Path, Counter[str], bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self, root: Path) -> list[str]:
        """Describes what was left out, by folder and suffix; raises InputError for a class without readable images."""
        notes, found = list(self.notes), []
        for folder, counts, is_class in self.left_out:
            text = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
            name = escape_unprintable(os.path.relpath(folder, root))
            hint = f" ({HEIF_HINT})" if set(HEIF_SUFFIXES) & set(counts) else ""
            hint += f" ({AVIF_HINT})" if ".avif" in counts else ""
            if is_class:
                found.append(f"{text} in {name}{hint}")
            elif UNREADABLE_SUFFIXES & set(counts):
                raise InputError(
                    f"{escape_unprintable(str(folder))}: expected images of a class, found only files that cannot be"
                    f" read: {text}{hint}"
                )
            else:
                notes.append(f"{name} is no class: it has no images ({text or 'it is empty'})")
        if found:
            notes.append(f"left out, as their endings are not those of readable images: {format_list(found)}")
        return notes


def format_list(names: Sequence[str], limit: int = 10) -> str:
    """Joins names by commas; of many, the first `limit` and the number of the others."""
    shown = ", ".join(escape_unprintable(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def list_images(root: Path) -> Listing:
    """Lists the images of a folder by split and class.

    A single folder around those of the splits is passed over.

    Args:
        root: The folder.

    Returns:
        The images; without folders of splits, all are in "train".

    Raises:
        InputError: If there are no images, some are outside the folders of the classes, or the folders can be read in
            two ways.
    """
    folder, visited = root, {get_folder_id(root)}
    while (listing := read_splits(folder)) is None:
        inner = find_only_folder(folder)
        if inner is None or get_folder_id(inner) in visited:
            break
        folder = inner
        visited.add(get_folder_id(folder))
    return listing or read_classes(root)


def read_splits(root: Path) -> Listing | None:
    """Reads the folders of the splits; returns None if there are none."""
    folders = [entry for entry in list_entries(root) if is_folder(entry)]
    names = {entry.name: match_split(entry.name) for entry in folders}
    if "train" not in names.values():  # "test_tube" is a split beside one for training only
        names = {name: SPLIT_WORDS.get(name.lower()) for name in names}
    listing = Listing()
    outside: list[tuple[str, Iterator[str]]] = [("", find_images(root, recursive=False))]
    for entry in folders:
        split, found = names[entry.name], Listing()
        folder = unwrap_split(Path(entry.path), split)
        classes = {} if split is None else find_classes(folder, found)
        if split is None or not classes:
            outside.append((entry.name, find_images(entry.path)))
            continue
        if split in listing.splits:
            raise InputError(f"{root}: expected one folder for the split {split!r}, found another: {entry.name}")
        listing.splits[split] = classes
        listing.left_out += found.left_out
        outside.append((entry.name, find_images(folder, recursive=False)))
    if not listing.splits:
        return None
    for name, images in outside:
        first = next(images, None)
        if first is not None and names.get(name) == "test" and "test" not in listing.splits:
            count = 1 + sum(1 for _ in images)
            listing.notes.append(f"{escape_unprintable(name)}: {count} images without classes are left out")
        elif first is not None:
            raise InputError(
                f"{root}: expected every image in the folder of a class, found {escape_unprintable(first)} outside"
                f" (folders of splits: {format_list([name for name in names if names[name]])}; if they are classes,"
                " move their images out of sub-folders)"
            )
    return listing


def read_classes(root: Path) -> Listing:
    """Reads a folder without splits."""
    listing = Listing()
    if (first := next(find_images(root, recursive=False), None)) is not None:
        raise InputError(
            f"{root}: expected every image in the folder of a class, found {escape_unprintable(first)} outside; a table"
            " of file names and labels is given with --labels FILE"
        )
    classes = find_classes(root, listing)
    if not classes:
        if listing.left_out:
            listing.describe(root)
        tar = "; tar shards are read with --streaming" if next(root.rglob("*.tar"), None) else ""
        raise InputError(f"{root}: expected images, one folder per class, found none{tar}")
    splits = {name: split for name in classes if (split := match_split(name))}
    if "train" in splits.values() and len(set(splits.values())) > 1:
        raise InputError(
            f"{root}: the folders {format_list(list(splits))} can be read as splits, whose images have no classes, or"
            " as classes; give splits a folder per class or a table of labels (--labels FILE), or rename the classes"
        )
    subfolders = list_subfolders(root, classes)
    if len(classes) == 1 and len(inner := subfolders[0]) > 1:
        (name,) = classes
        raise InputError(
            f"{root}: expected at least 2 classes, found 1: {name}; if the classes are its folders"
            f" ({format_list(sorted(inner))}), the option is --data-dir {root / name}"
        )
    listing.splits["train"] = classes
    return listing


def match_split(name: str) -> str | None:
    """Returns the split that a folder's name stands for, as train_images for "train"; None for none or several."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def unwrap_split(folder: Path, split: str | None) -> Path:
    """Returns the folder of the classes: of train/train/CLASS, the inner train."""
    inner = find_only_folder(folder) if split is not None else None
    return inner if inner is not None and match_split(inner.name) == split else folder


def find_only_folder(folder: Path) -> Path | None:
    """Returns the sub-folder with all images below a folder; None if images are elsewhere as well."""
    if next(find_images(folder, recursive=False), None) is not None:
        return None
    found = None
    for entry in filter(is_folder, list_entries(folder)):
        if next(find_images(entry.path), None) is not None:
            if found is not None:
                return None
            found = Path(entry.path)
    return found


def find_classes(folder: Path, listing: Listing) -> Classes:
    """Returns the sub-folders of a folder that hold images, and adds to `listing` what was left out.

    Raises:
        InputError: If a name cannot be printed, or all sub-folders hold the same folders.
    """
    ancestors = {get_folder_id(folder.parent), get_folder_id(folder)}
    suffixes = list_image_suffixes()
    classes: Classes = {}
    for entry in list_entries(folder):
        if not is_folder(entry) or get_folder_id(entry.path) in ancestors:
            continue
        paths, others = [], Counter[str]()
        for path in find_files(entry.path, ancestors=ancestors):
            suffix = Path(path).suffix.lower()
            if suffix in suffixes:
                paths.append(path)
            else:
                others[escape_unprintable(suffix) or "without ending"] += 1
        if paths and not entry.name.isprintable():
            raise InputError(f"{folder}: expected a printable class name, found {escape_unprintable(entry.name)}")
        if paths:
            classes[entry.name] = sorted(paths)
        if others or not paths:
            listing.left_out.append((Path(entry.path), others, bool(paths)))
    subfolders = list_subfolders(folder, classes)
    shared = sorted(set.intersection(*subfolders)) if len(subfolders) > 1 else []
    if len(shared) > 1:
        raise InputError(
            f"{folder}: the folders can be read in two ways: the classes are {format_list(list(classes))}, or they are"
            f" {format_list(shared)}, which each of these folders holds. In the first case move the images out of the"
            " sub-folders or give a table of labels (--labels FILE); in the second rename the folders above to train,"
            " validation and test, or join them"
        )
    return classes


def list_subfolders(folder: Path, classes: Classes) -> list[set[str]]:
    """Returns for each class the folders of its images; none if there are images outside of them."""
    found = []
    for name, paths in classes.items():
        start = len(os.path.join(folder, name)) + 1  # noqa: PTH118 (paths as `os.scandir` joins them)
        parts = [path[start:].split(os.sep) for path in paths]  # noqa: PTH206
        found.append({part[0] for part in parts} if all(len(part) > 1 for part in parts) else set())
    return found


def find_images(folder: str | Path, *, recursive: bool = True) -> Iterator[str]:
    """Yields the files of a folder with the suffix of an image; a broken link is reported when it is decoded."""
    suffixes = list_image_suffixes()
    return (path for path in find_files(folder, recursive=recursive) if Path(path).suffix.lower() in suffixes)


def find_files(
    folder: str | Path, *, ancestors: set[tuple[int, int]] | None = None, recursive: bool = True
) -> Iterator[str]:
    """Yields the files of a folder, and everything else that is no folder.

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
            elif not (entry.name.startswith("__") and Path(entry.path).is_dir()):
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
