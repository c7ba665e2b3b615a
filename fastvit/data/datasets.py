"""Labelled images from the hub, from an image folder, or drawn by code.

Every source becomes an `ImageDataset`: class names, and for each split the labels and a function that loads one image.
The `datasets` library reads and caches datasets of the hub.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvit.data import leaves
from fastvit.data.folders import compute_fingerprint, format_list
from fastvit.data.images import decode_image
from fastvit.data.sources import (
    ALIASES,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    TEST,
    TRAIN,
    VALIDATION,
    LabelledFiles,
    check_classes,
    check_training_split,
    find_column,
    find_label_columns,
    format_label,
    is_missing,
    map_labels,
    open_source,
    wrap_read_errors,
)
from fastvit.data.targets import MULTI_LABEL, REGRESSION, SINGLE_LABEL, list_classes, read_targets, resolve_task
from fastvit.errors import InputError, escape_unprintable

__all__ = ["TEST", "TRAIN", "VALIDATION", "ImageDataset", "Split", "load_images"]


@dataclass
class Split:
    """Labels and images of one split.

    Attributes:
        labels: Classes, int64 [num_images]; or of several labels, or numbers, float32 [num_images, num_names].
        load: Index -> upright RGB image. Raises InputError if the image cannot be decoded.
        key: A fingerprint that changes whenever the images do.
        get_name: Index -> the image's path, or its row in the dataset.
    """

    labels: np.ndarray
    load: Callable[[int], Image.Image]
    key: str
    get_name: Callable[[int], str] = "row {}".format

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> Split:
        """Returns the split of the images at `indices`, in that order."""
        return Split(
            self.labels[indices],
            lambda i: self.load(int(indices[i])),
            f"{self.key}{indices.tolist()}",
            lambda i: self.get_name(int(indices[i])),
        )


@dataclass
class ImageDataset:
    """A dataset in memory or on disk.

    Attributes:
        name: The hub id, the folder or the file.
        class_names: The classes in the order of their labels, some perhaps without images; or the names of the numbers.
        splits: The splits by name.
        task: "single-label", "multi-label" or "regression".
        notes: What the user should know about the images, one line each: files and rows that were left out.
    """

    name: str
    class_names: list[str]
    splits: dict[str, Split]
    task: str = field(default=SINGLE_LABEL, kw_only=True)
    notes: list[str] = field(default_factory=list, kw_only=True)

    def count_labels(self) -> dict[str, np.ndarray]:
        """Counts the images of each class or label, [num_classes], by split; the mean of each number instead."""
        return {
            name: count_names(split.labels, len(self.class_names), self.task) for name, split in self.splits.items()
        }

    def sample_examples(self, num_classes: int, per_class: int, side: int) -> dict[str, list[Image.Image]]:
        """Returns the first decodable training images of the first classes.

        Args:
            num_classes: The number of classes.
            per_class: The largest number of images of a class.
            side: The largest height and width in pixels: full-size images of many classes could exhaust memory.

        Returns:
            The images by class name; of a number, those with its lowest and its highest values.
        """
        chosen: dict[str, np.ndarray] = {}
        train = self.load_example_split()
        for label, name in enumerate(self.class_names[:num_classes]):
            if self.task == REGRESSION:
                order = np.argsort(train.labels[:, label], kind="stable")
                chosen |= {f"{name}: lowest": order, f"{name}: highest": order[::-1]}
            else:
                is_member = train.labels == label if self.task == SINGLE_LABEL else train.labels[:, label] == 1
                chosen[name] = np.flatnonzero(is_member)
        return {
            name: list(islice(_make_thumbnails(train, indices, side), per_class)) for name, indices in chosen.items()
        }

    def load_example_split(self) -> Split:
        """Returns the split that examples are taken from."""
        return self.splits[TRAIN]


def count_names(labels: np.ndarray, num_names: int, task: str) -> np.ndarray:
    """Counts the images of each class or label, [num_names]; returns the mean of each number in a regression."""
    if task == REGRESSION:
        return labels.mean(axis=0)
    return np.bincount(labels, minlength=num_names) if task == SINGLE_LABEL else labels.sum(axis=0).astype(np.int64)


def _make_thumbnails(split: Split, indices: np.ndarray, side: int) -> Iterator[Image.Image]:
    for index in indices:
        with contextlib.suppress(InputError):
            image = split.load(int(index)).convert("RGB")
            image.thumbnail((side, side))
            yield image


def load_images(
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    *,
    labels_file: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    task: str = "auto",
    validation_fraction: float = 0.15,
    seed: int = 0,
    image_size: int = 64,
    generated_images: int = 2000,
    need_train: bool = True,
    channels: int = 3,
) -> ImageDataset:
    """Loads a dataset of the hub, an image folder or the generated dataset.

    Args:
        dataset: A hub id, or "generated".
        data_dir: A folder of images, of Parquet files, or saved by `datasets`; either this or `dataset`.
        labels_file: A table of file names, relative to `data_dir` or to the table's folder, and labels.
        image_column: The column with the images [found by name or type].
        label_column: The column with the labels [found by name or type], or several: "a,b".
        task: "single-label", "multi-label" or "regression"; "auto" raises InputError where labels have two readings.
        validation_fraction: The share of the training images (of each class, if there are classes) that becomes the
            validation split if there is none; 0 for no such split.
        seed: Seed of that choice and of the generated images.
        image_size: Height and width of the generated images.
        generated_images: Number of generated images.
        need_train: Whether to raise InputError if there is no training split.
        channels: The number of channels of the images (`decode_image`).

    Returns:
        The dataset.

    Raises:
        InputError: If the dataset cannot be read, or lacks training images, labels or classes.
    """
    if (dataset is None) == (data_dir is None and labels_file is None):
        raise InputError("dataset: expected either a dataset or an image folder (data_dir), got both or neither")
    if dataset == "generated":
        images = generate_dataset(generated_images, image_size, seed)
    else:
        source = open_source(dataset, data_dir, labels_file, image_column, label_column, task=task)
        if isinstance(source, LabelledFiles):
            images = read_files(source, channels)
        else:
            images = read_tables(
                source,
                image_column,
                label_column,
                ALIASES.get(dataset or "", dataset) or str(data_dir),
                task,
                channels,
            )
    if need_train:
        check_training_split(images.splits, images.name)
    if task not in ("auto", images.task):
        spread_classes(images, task)
    if VALIDATION not in images.splits and validation_fraction:
        train = images.splits.pop(TRAIN)
        # Stratified by class; combinations of labels, and numbers, hardly repeat.
        strata = train.labels if images.task == SINGLE_LABEL else np.zeros(len(train), dtype=np.int64)
        kept, held_out = split_stratified(strata, validation_fraction, seed)
        counts = np.bincount(strata, minlength=len(images.class_names))
        if single := [name for name, count in zip(images.class_names, counts, strict=True) if count == 1]:
            images.notes.append(f"only one image of {format_list(single)}: it is trained on, and not validated")
        images.splits = {TRAIN: train.select(kept), VALIDATION: train.select(held_out), **images.splits}
    return images


def spread_classes(images: ImageDataset, task: str) -> None:
    """Turns classes into multi-label targets, of which each image has one; raises InputError for a regression."""
    if task != MULTI_LABEL:
        found = f"the classes {format_list(images.class_names)}"
        raise InputError(f"--task {task}: expected columns of numbers, found {found} in {images.name}")
    for split in images.splits.values():
        split.labels = np.eye(len(images.class_names), dtype=np.float32)[split.labels]
    images.task = task


def generate_dataset(num_images: int, image_size: int, seed: int) -> ImageDataset:
    """Generates the built-in dataset: drawn leaves, a fifth of them for validation (`fastvit.data.leaves`)."""

    def split(count: int, seed: int) -> Split:
        images, labels = leaves.draw_leaves(count, image_size=image_size, seed=seed)
        return Split(labels, lambda i: Image.fromarray(images[i]), f"leaves-{count}-{image_size}-{seed}")

    held_out = num_images // 5
    return ImageDataset(
        "generated",
        list(leaves.CLASSES),
        {TRAIN: split(num_images - held_out, seed), VALIDATION: split(held_out, seed + 1)},
    )


def split_stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits off a fraction of every class, at least one image and never all of them: none of a class with one image.

    Args:
        labels: int64 [num_images].
        fraction: The share to hold out, between 0 and 1.
        seed: Seed of the choice.

    Returns:
        Sorted indices of the remaining and of the held-out images.

    Raises:
        InputError: If `fraction` is out of bounds or every class has a single image.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction: expected a number between 0 and 1, got {fraction}")
    generator = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        drawn.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    held_out = np.sort(np.concatenate(drawn))
    if not len(held_out):
        raise InputError(
            "validation: expected a class with at least 2 images, one to train on and one to validate on, found one"
            " image of each; --validation-fraction 0 trains without validation"
        )
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def read_files(files: LabelledFiles, channels: int) -> ImageDataset:
    """Returns the dataset of image files."""

    def build_split(images: list[tuple[str, Any]]) -> Split:
        paths = [path for path, _ in images]

        def load(index: int) -> Image.Image:
            path = paths[index]
            if not os.path.isfile(path):  # noqa: PTH113 (no error for long names; opening a pipe would block)
                raise InputError(
                    f"{escape_unprintable(path)}: expected an image, found a broken link or no regular file"
                )
            return decode_image(path, channels=channels)

        labels = np.array([label for _, label in images], dtype=np.int64 if files.task == SINGLE_LABEL else np.float32)
        return Split(labels, load, compute_fingerprint(paths), paths.__getitem__)

    splits = {name: build_split(images) for name, images in files.splits.items()}
    return ImageDataset(files.name, files.class_names, splits, task=files.task, notes=files.notes)


def read_tables(
    splits: dict[str, Any], image_column: str | None, label_column: str | None, source: str, task: str, channels: int
) -> ImageDataset:
    """Returns the dataset of splits of the `datasets` library, without the images that have no label."""
    import datasets

    features = splits.get(TRAIN, next(iter(splits.values()))).features
    image_column = find_column("image", image_column, features, IMAGE_COLUMNS, datasets.Image, source)
    columns = find_label_columns(label_column, [name for name in features if name != image_column], task) or [
        find_column("label", label_column, features, LABEL_COLUMNS, datasets.ClassLabel, source)
    ]
    rows = {
        name: list(zip(*(split[column][:] for column in columns), strict=True))
        for name, split in splits.items()
        if set(columns) <= set(split.features)
    }
    feature = features[columns[0]]
    task = resolve_task(task, rows, columns, source)
    if task != SINGLE_LABEL:
        item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        targets = read_targets(
            task, rows, columns, source, item.names if isinstance(item, datasets.ClassLabel) else None
        )
        kept_splits = {
            name: build_table_split(splits[name], image_column, kept, channels) for name, kept in targets.kept.items()
        }
        for name, split in kept_splits.items():
            split.labels = targets.values[name]
        return ImageDataset(source, targets.names, kept_splits, task=task, notes=targets.notes)
    values = list_classes(rows, columns, source)
    counted = [values[TRAIN]] if TRAIN in values else values.values()
    class_names, labels = map_labels(feature if len(columns) == 1 else None, chain(*counted), source)
    images, notes = ImageDataset(source, class_names, {}), []
    present: dict[str, list[str]] = {}
    for name, split in splits.items():
        kept = [i for i, value in enumerate(values.get(name, ())) if not is_missing(value, labels)]
        if len(kept) < len(split):
            notes.append(f"{name}: {len(split) - len(kept)} of {len(split)} images have no label and are left out")
        if not kept and name != TRAIN:  # test splits on the hub often have no labels: all are -1
            continue
        found = [values[name][i] for i in kept]
        present[name] = [class_names[labels[v]] if v in labels else format_label(v) for v in dict.fromkeys(found)]
        images.splits[name] = build_table_split(split, image_column, kept, channels)
        images.splits[name].labels = np.array([labels.get(value, -1) for value in found], dtype=np.int64)
    images.notes = notes + check_classes(class_names, present, source)
    return images


def build_table_split(split, image_column: str, kept: list[int], channels: int = 3) -> Split:
    """Returns the images of the rows `kept`, with labels of -1."""
    import datasets

    with wrap_read_errors(f"column {image_column!r}"):
        raw = split.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def load(index: int) -> Image.Image:
        cell = raw[index][image_column]
        if cell is None:
            raise InputError(f"row {index}: expected an image in column {image_column!r}, found an empty cell")
        path = cell["path"]
        return decode_image(cell["bytes"] if cell["bytes"] is not None else path, path or f"image {index}", channels)

    def get_name(index: int) -> str:
        cell = raw[index][image_column]
        path = cell and cell["path"]
        return f"{path} (row {index})" if path else f"row {index}"

    everything = Split(np.full(len(split), -1, dtype=np.int64), load, split._fingerprint, get_name)
    return everything if len(kept) == len(split) else everything.select(np.array(kept, dtype=np.int64))
