"""Images that are read during training, for datasets larger than memory or disk.

Sources are the hub, image folders and WebDataset shards (tar files with NAME.jpg and NAME.cls side by side). The
`datasets` library reads, shuffles and splits them. Each process has its own endless `Stream` of decoded images: pass
after pass over its part, in an order that depends on the seed and the number of the pass. The n-th image and its crop
depend on nothing else, so that a resumed run skips the images it has seen and continues with the same ones.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from PIL import Image
from transformers import TrainingArguments

from fastvit.data.datasets import ImageDataset, Split
from fastvit.data.images import Augment, decode_image
from fastvit.data.sources import (
    ALIASES,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    TEST,
    TRAIN,
    VALIDATION,
    LabelledFiles,
    check_training_split,
    find_column,
    find_values,
    format_label,
    is_absent,
    is_missing,
    open_source,
)
from fastvit.data.targets import REGRESSION, SINGLE_LABEL
from fastvit.errors import InputError, ProcessError

MAX_FILE_SHARDS = 1024  # lists of image files; with 200,000 `datasets` shuffles for 40 s


@dataclass
class StreamedDataset(ImageDataset):
    """A dataset whose training images are streamed; `splits` holds the validation and test images.

    Attributes:
        train: A `datasets.IterableDataset` of encoded images.
        image_column: The column with the images.
        label_column: The column with the labels.
        labels: Value of the label column -> class.
        num_train: The number of training images; None if unknown.
        channels: The number of channels of the images.
    """

    train: Any
    image_column: str
    label_column: str
    labels: dict[Any, int]
    num_train: int | None
    channels: int = 3
    has_noted_missing: bool = False

    def read_encoded(self, row: dict[str, Any]) -> tuple[str, bytes]:
        """Returns the name and the bytes of the image in a row; raises ProcessError if it cannot be read."""
        from datasets.utils.file_utils import xopen  # opens local files, files on the hub and members of archives

        cell = row[self.image_column]
        if cell is None:
            raise ProcessError(f"{self.name}: expected an image in column {self.image_column!r}, found an empty row")
        name = cell["path"] or "image"
        if cell["bytes"] is not None:
            return name, cell["bytes"]
        try:
            with xopen(name, "rb") as file:
                return name, file.read()
        except OSError as error:
            raise ProcessError(f"{name}: cannot be read ({error})") from None

    def is_labelled(self, row: dict[str, Any]) -> bool:
        """Whether a row has a label; prints a note about the first one without."""
        if not is_missing(row[self.label_column], self.labels):
            return True
        if not self.has_noted_missing:
            self.has_noted_missing = True
            print(f"note: {self.name}: images without a label are left out", file=sys.stderr)
        return False

    def get_label(self, row: dict[str, Any], name: str) -> int:
        """Returns the class of a row; `name` is the image in the error message."""
        value = row[self.label_column]
        if value not in self.labels:
            raise ProcessError(f"{name}: expected one of {len(self.class_names)} classes, found {value!r}")
        return self.labels[value]

    def load_example_split(self) -> Split:
        split, _ = _read_into_memory(self, itertools.islice(self.train, 256))
        if split is None:
            raise InputError(f"{self.name}: expected labels of the training images, found none")
        return split


def stream_images(
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    *,
    labels_file: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: str | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    need_length: bool = False,
    need_validation: bool = True,
    channels: int = 3,
) -> StreamedDataset:
    """Opens a dataset for streaming; its encoded validation and test images are read into memory.

    Args:
        dataset: A hub id.
        data_dir: A folder as in `load_images` or of tar shards, or a glob pattern of tar files; either this or
            `dataset`.
        labels_file: A table of file names, relative to `data_dir` or to the table's folder, and labels.
        image_column: The column with the images [found by name or type].
        label_column: The column with the labels [found by name or type].
        class_names: The classes in the order of their numbers, as "a,b,c" or a file with one per line. By default they
            are those of the dataset, or are collected by a pass over the training labels.
        max_eval_samples: The largest number of validation and of test images, drawn with `seed`.
        seed: Seed of that choice.
        need_length: Whether to raise InputError if the number of training images is unknown.
        need_validation: Whether to raise InputError if there is no validation split.
        channels: The number of channels of the images (`decode_image`).

    Returns:
        The dataset.

    Raises:
        InputError: If the dataset cannot be read, or lacks training images, labels or classes.
    """
    import datasets

    source = ALIASES.get(dataset or "", dataset) or str(labels_file or data_dir)
    splits, num_train, notes = _open_splits(dataset, data_dir, labels_file, image_column, label_column, source)
    if labels_file is not None:
        image_column = label_column = None
    if need_validation and VALIDATION not in splits:
        raise InputError(
            f"{source}: expected a split called 'validation', found {', '.join(splits)}; a stream cannot be split:"
            " --validation-fraction 0 trains without one"
        )
    if need_length and not num_train:
        raise InputError(
            f"--max-steps: expected with --streaming, because {source} does not record how many images it has"
        )
    features = splits[TRAIN].features
    if features is None:
        raise InputError(f"{source}: expected images and labels, found rows whose columns are not declared")
    image_column = find_column("image", image_column, features, IMAGE_COLUMNS, datasets.Image, source)
    label_column = find_column("label", label_column, features, LABEL_COLUMNS, datasets.ClassLabel, source)
    if "List" in type(features[label_column]).__name__ or isinstance(features[label_column], list):
        raise InputError(f"{source}: expected one label per image, found lists; they are read without --streaming")
    for name in [name for name, split in splits.items() if label_column not in (split.features or features)]:
        notes.append(f"{name}: its images have no labels and are left out")
        del splits[name]
    splits = {
        name: split.select_columns([image_column, label_column]).cast_column(image_column, datasets.Image(decode=False))
        for name, split in splits.items()
    }

    names, labels = _resolve_classes(splits[TRAIN], features[label_column], label_column, class_names, source)
    images = StreamedDataset(
        source, names, {}, splits[TRAIN], image_column, label_column, labels, num_train, channels, notes=notes
    )
    for name in (VALIDATION, TEST):
        if name not in splits:
            continue
        rows = splits[name]
        if max_eval_samples is not None:
            rows = rows.shuffle(seed=seed, buffer_size=1000).take(max_eval_samples)
        split, num_missing = _read_into_memory(images, rows)
        if num_missing:
            notes.append(f"{name}: {num_missing} of its images have no label and are left out")
        if split is not None:
            images.splits[name] = split
        elif name == VALIDATION and need_validation:
            raise InputError(f"{source}: expected labels of the validation images, found none")
    return images


def _open_splits(
    dataset: str | None,
    data_dir: str | Path | None,
    labels_file: str | Path | None,
    image_column: str | None,
    label_column: str | None,
    source: str,
) -> tuple[dict[str, Any], int | None, list[str]]:
    """Opens a source as iterable datasets; arguments as in `stream_images`.

    Returns:
        The splits by their normalized names, the number of training images if known, and notes on what was left out.
    """
    import datasets

    opened = open_source(dataset, data_dir, labels_file, image_column, label_column, streaming=True)
    check_training_split(opened.splits if isinstance(opened, LabelledFiles) else opened, source)
    if isinstance(opened, LabelledFiles):
        if opened.task != SINGLE_LABEL:
            found = "numbers" if opened.task == REGRESSION else "lists"
            raise InputError(
                f"{source}: expected one label per image, found {found}; they are read without --streaming"
            )
        features = datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=opened.class_names)}
        )
        splits = {}
        for name, files in opened.splits.items():
            if name == TRAIN:  # sorted by class: the buffer for shuffling would hold few of them
                files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
            parts = [files[start::MAX_FILE_SHARDS] for start in range(min(len(files), MAX_FILE_SHARDS))]
            splits[name] = datasets.IterableDataset.from_generator(_yield_rows, features, gen_kwargs={"shards": parts})
        return splits, len(opened.splits[TRAIN]), opened.notes
    if isinstance(opened[TRAIN], datasets.Dataset):  # from `save_to_disk`
        splits = {name: rows.to_iterable_dataset(num_shards=min(len(rows), 64)) for name, rows in opened.items()}
        return splits, len(opened[TRAIN]), []
    sizes = opened[TRAIN].info.splits or {}
    return opened, sizes[TRAIN].num_examples if TRAIN in sizes else None, []


def _yield_rows(shards: list[list[tuple[str, int]]]) -> Iterator[dict[str, Any]]:
    """Yields rows of image files. `datasets` divides the list of shards."""
    for files in shards:
        for path, label in files:
            yield {"image": {"path": path, "bytes": None}, "label": label}


def _resolve_classes(
    train, feature, label_column: str, class_names: str | None, source: str
) -> tuple[list[str], dict[Any, int]]:
    """Returns the class names, and the class of each value of the label column; arguments as in `stream_images`."""
    import datasets

    labels: dict[Any, int]
    if class_names is not None:
        names = _read_class_names(class_names)
        declared = feature.names if isinstance(feature, datasets.ClassLabel) else []
        if set(names) == set(declared):
            labels = {declared.index(name): label for label, name in enumerate(names)}
        else:
            is_numbered = bool(declared) or any(kind in getattr(feature, "dtype", "") for kind in ("int", "float"))
            labels = {value: label for label, value in enumerate(range(len(names)) if is_numbered else names)}
    elif isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        labels = {label: label for label in range(len(names))}
    else:
        values = _collect_labels(train, label_column, source)
        names = [format_label(value) for value in values]
        labels = {value: label for label, value in enumerate(values)}
    if len(names) < 2:
        raise InputError(f"{source}: expected at least 2 classes, found {len(names)}: {', '.join(names)}")
    return names, labels


def _read_class_names(given: str) -> list[str]:
    names = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else given.split(",")
    names = [name.strip() for name in names if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--class-names: expected each class once, got {', '.join(twice)} twice")
    return names


def _collect_labels(train, label_column: str, source: str) -> list[Any]:
    """Collects the sorted values of the label column. The first process reads and broadcasts them."""
    found: set[Any] = set()
    total = 0
    if PartialState().is_main_process:
        print(f"{source}: reading all of it for its class names; --class-names makes that unnecessary")
        for row in train.select_columns([label_column]):
            value = row[label_column]
            if not is_absent(value):
                found.add(tuple(value) if isinstance(value, (list, dict)) else value)
                total += 1
    found, total = broadcast_object_list([found, total])
    return find_values(found, source, total)  # every process raises the same error


def _read_into_memory(images: StreamedDataset, rows) -> tuple[Split | None, int]:
    """Reads the encoded images of a split into memory.

    Returns:
        The images with labels, None if there are none, and the number of the others.
    """
    digest, encoded, labels, num_missing = hashlib.sha256(), [], [], 0
    for row in rows:
        if is_missing(row[images.label_column], images.labels):
            num_missing += 1
            continue
        name, data = images.read_encoded(row)
        digest.update(data)
        encoded.append((name, data))
        labels.append(images.get_label(row, name))

    def load(index: int) -> Image.Image:
        name, data = encoded[index]
        return decode_image(data, name, images.channels)

    split = Split(np.array(labels, dtype=np.int64), load, digest.hexdigest(), lambda index: encoded[index][0])
    return split if encoded else None, num_missing


class Stream(torch.utils.data.IterableDataset):
    """Endless training images for a Trainer: {"pixel_values": uint8 [height, width, 3], "labels": int}.

    Args:
        images: The dataset.
        decode_size: (height, width) to which images are resized before `augment`.
        augment: uint8 [h, w, 3] -> uint8 [height, width, 3], with random numbers of torch's generator.
        resample: The filter.
        seed: Seed of the order and of the augmentation.
        shuffle_buffer: The number of images among which the order is random.
        skip_bad: Whether to skip images that cannot be decoded instead of raising ProcessError.
        rank: The process, whose part of the images this is.
        world_size: The number of processes.
    """

    def __init__(
        self,
        images: StreamedDataset,
        decode_size: tuple[int, int],
        augment: Callable[[np.ndarray], np.ndarray] | None,
        *,
        resample: int = Image.Resampling.BILINEAR,
        seed: int = 0,
        shuffle_buffer: int = 1000,
        skip_bad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images = images
        self.decode_size = decode_size
        self.augment = augment
        self.resample = resample
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.skip_bad = skip_bad
        self.rank, self.world_size = rank, world_size
        self.skipped = (0, 0)

    def resume_after(self, batches: int, batch_size: int) -> None:
        """Marks the first `batches` as seen: a resumed Trainer discards them, so they are not decoded."""
        self.skipped = (batches, batch_size)

    def iterate_rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of this process, or of this worker of a DataLoader, pass after pass."""
        from datasets.distributed import split_dataset_by_node

        for number in itertools.count():
            shuffled = self.images.train.shuffle(seed=self.seed + number, buffer_size=self.shuffle_buffer)
            found = False
            try:
                for row in split_dataset_by_node(shuffled, self.rank, self.world_size):
                    if self.images.is_labelled(row):
                        found = True
                        yield row
            except Exception as error:  # file systems, networks and archives have no common class
                raise ProcessError(
                    f"{self.images.name}: cannot be read further ({type(error).__name__}: {error})"
                ) from error
            if not found:
                raise ProcessError(f"{self.images.name}: found no training images for process {self.rank}")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int]]:
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        batches, batch_size = self.skipped
        unseen = len(range(worker_id, batches, num_workers)) * batch_size  # workers alternate, one batch each
        number = 0
        for row in self.iterate_rows():
            # With skip_bad, only decoding determines which rows count.
            if number < unseen and not self.skip_bad:
                yield self.make_placeholder()
                number += 1
                continue
            name, data = self.images.read_encoded(row)
            label = self.images.get_label(row, name)
            try:
                image = decode_image(data, name, self.images.channels)
                pixels = np.asarray(image.resize(self.decode_size[::-1], self.resample))
            except InputError as error:
                if not self.skip_bad:
                    raise ProcessError(str(error)) from None
                print(f"skipped: {error}", file=sys.stderr)
                continue
            if self.augment is not None:
                # Seeded with the image's number: the global generator is shared with dropout.
                with torch.random.fork_rng(devices=[]):
                    key = np.random.SeedSequence((self.seed, self.rank, worker_id, number))
                    torch.default_generator.manual_seed(int(key.generate_state(1, np.uint64)[0]))
                    pixels = self.augment(pixels)
            yield {"pixel_values": torch.from_numpy(np.array(pixels)), "labels": label}
            number += 1

    def make_placeholder(self) -> dict[str, torch.Tensor | int]:
        """Builds an item to be discarded. Its label, -1, is no class, so that training on it raises an error."""
        size = self.augment.image_size if isinstance(self.augment, Augment) else self.decode_size
        return {"pixel_values": torch.zeros(*size, self.images.channels, dtype=torch.uint8), "labels": -1}


def build_stream_loader(stream: Stream, batch_size: int, args: TrainingArguments, collate: Callable):
    """Builds a loader of this process's part. (By default accelerate would have every process read everything.)"""
    loader = torch.utils.data.DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=collate,
        # A worker without a shard would be idle.
        num_workers=min(args.dataloader_num_workers, max(1, stream.images.train.num_shards // stream.world_size)),
        pin_memory=args.dataloader_pin_memory,
    )
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
