"""Pictures that are read while training goes on, for data larger than memory or disk.

From the hub, from a folder of pictures, or from WebDataset shards (tar files with NAME.jpg and NAME.cls side by side).
The `datasets` library reads, shuffles and splits. Each process gets its own endless `Stream` of decoded pictures: pass
after pass over its part, in an order drawn from the seed and the number of the pass. The n-th picture and its crop
depend on nothing else, so that a resumed run reads past what it has seen and goes on with the same pictures.
"""

from __future__ import annotations

import glob
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

from fastvit.data.datasets import (
    ALIASES,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    TEST,
    TRAIN,
    VALIDATION,
    ImageDataset,
    Split,
    find_column,
    normalize_split_name,
    wrap_read_errors,
)
from fastvit.data.images import Augment, decode_image
from fastvit.errors import InputError, ProcessError


@dataclass
class StreamedDataset(ImageDataset):
    """Validation and test pictures are in `splits`, as elsewhere; the training pictures are in `train`.

    train: a `datasets.IterableDataset` of encoded pictures. image_column, label_column: what to take from its rows.
    labels: the class of each value of the label column. num_train: how many pictures there are, if it is known.
    """

    train: Any
    image_column: str
    label_column: str
    labels: dict[Any, int]
    num_train: int | None

    def read_encoded(self, row: dict[str, Any]) -> tuple[str, bytes]:
        """Name and bytes of a row's picture."""
        from datasets.utils.file_utils import xopen  # a file here, on the hub, or in an archive there

        cell = row[self.image_column]
        if cell is None:
            raise ProcessError(f"{self.name}: expected a picture in column {self.image_column!r}, found a row without")
        name = cell["path"] or "picture"
        if cell["bytes"] is not None:
            return name, cell["bytes"]
        try:
            with xopen(name, "rb") as file:
                return name, file.read()
        except OSError as error:
            raise ProcessError(f"{name}: cannot be read ({error})") from None

    def get_label(self, row: dict[str, Any], name: str) -> int:
        value = row[self.label_column]
        if value not in self.labels:
            raise ProcessError(f"{name}: expected one of {len(self.class_names)} classes, found {value!r}")
        return self.labels[value]

    def load_example_split(self) -> Split:
        split = _read_into_memory(self, itertools.islice(self.train, 256))
        if split is None:
            raise InputError(f"{self.name}: expected labels with the training pictures, found -1")
        return split


def stream_images(
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: str | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    need_length: bool = False,
    need_validation: bool = True,
) -> StreamedDataset:
    """Open `dataset` (a hub id) or `data_dir`: a folder of pictures or of tar shards, or a pattern of tar files.

    class_names: the classes in the order of their numbers, as "a,b,c" or a file with one a line. Without it they are
    the data set's own, or a pass over the training labels collects them. Validation and test pictures, up to
    `max_eval_samples` drawn by `seed`, are read into memory as they are in the files. need_length, need_validation:
    raise InputError where it is not known how many training pictures there are, or where there is no validation split.
    """
    import datasets

    source = ALIASES.get(dataset or "", dataset) or str(data_dir)
    splits = _open_splits(source, data_dir)
    if need_validation and VALIDATION not in splits:
        raise InputError(
            f"{source}: expected a split called 'validation', found {', '.join(splits)}; from a stream none can be set"
            " aside: --validation-fraction 0 trains without one"
        )
    sizes = splits[TRAIN].info.splits or {}
    num_train = sizes[TRAIN].num_examples if TRAIN in sizes else None
    if need_length and not num_train:
        raise InputError(
            f"--max-steps: expected with --streaming, because {source} does not say how many pictures it has"
        )
    features = splits[TRAIN].features
    if features is None:
        raise InputError(f"{source}: expected pictures and labels, found rows whose columns are not declared")
    image_column = find_column("image", image_column, features, IMAGE_COLUMNS, datasets.Image, source)
    label_column = find_column("label", label_column, features, LABEL_COLUMNS, datasets.ClassLabel, source)
    splits = {
        name: split.select_columns([image_column, label_column]).cast_column(image_column, datasets.Image(decode=False))
        for name, split in splits.items()
    }

    names, labels = _resolve_classes(splits[TRAIN], features[label_column], label_column, class_names, source)
    images = StreamedDataset(source, names, {}, splits[TRAIN], image_column, label_column, labels, num_train)
    for name in (VALIDATION, TEST):
        if name not in splits:
            continue
        rows = splits[name]
        if max_eval_samples is not None:
            rows = rows.shuffle(seed=seed, buffer_size=1000).take(max_eval_samples)
        if split := _read_into_memory(images, rows):
            images.splits[name] = split
    return images


def _open_splits(source: str, data_dir: str | Path | None) -> dict[str, Any]:
    """The splits of a hub data set, or of `data_dir`, as iterable data sets by their usual names."""
    import datasets

    shards = None if data_dir is None else _find_tar_shards(str(data_dir))
    with wrap_read_errors(source):
        if data_dir is None:
            loaded = datasets.load_dataset(source, streaming=True)
        elif shards is not None:
            loaded = datasets.load_dataset("webdataset", streaming=True, **shards)
        else:
            loaded = datasets.load_dataset("imagefolder", data_dir=str(data_dir), streaming=True)
    splits = {normalize_split_name(name): split for name, split in loaded.items()}
    if TRAIN not in splits:
        raise InputError(f"{source}: expected a split called 'train', found {', '.join(loaded)}")
    return splits


def _resolve_classes(
    train, feature, label_column: str, class_names: str | None, source: str
) -> tuple[list[str], dict[Any, int]]:
    """The names of the classes, and the class of each value of the label column; arguments as in `stream_images`."""
    import datasets

    labels: dict[Any, int]
    if class_names is not None:
        names = _read_class_names(class_names)
        numbered = isinstance(feature, datasets.ClassLabel) or "int" in getattr(feature, "dtype", "")
        labels = {value: label for label, value in enumerate(range(len(names)) if numbered else names)}
    elif isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        labels = {label: label for label in range(len(names))}
    else:
        values = _collect_labels(train, label_column, source)
        names = [str(value) for value in values]
        labels = {value: label for label, value in enumerate(values)}
    if len(names) < 2:
        raise InputError(f"{source}: expected at least 2 classes, found {len(names)}: {', '.join(names)}")
    return names, labels


def _find_tar_shards(data_dir: str) -> dict[str, Any] | None:
    """Where tar files are, for the `datasets` library: those of a folder, split by their names, or of a pattern."""
    if Path(data_dir).is_dir():
        return {"data_dir": data_dir} if any(Path(data_dir).rglob("*.tar")) else None
    files = sorted(glob.glob(data_dir, recursive=True))  # noqa: PTH207 (the pattern is a whole path)
    if not files or not all(file.endswith(".tar") for file in files):
        raise InputError(f"data_dir: expected a folder, or a pattern that names .tar files, got {data_dir}")
    return {"data_files": {TRAIN: files}}


def _read_class_names(given: str) -> list[str]:
    names = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else given.split(",")
    names = [name.strip() for name in names if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--class-names: expected each class once, got {', '.join(twice)} twice")
    return names


def _collect_labels(train, label_column: str, source: str) -> list[Any]:
    """All values of the label column, sorted. The first process reads; the others are told."""
    values: list[Any] = []
    if PartialState().is_main_process:
        print(f"{source}: reading all of it for the names of its classes; --class-names makes that unnecessary")
        found = {row[label_column] for row in train.select_columns([label_column])}
        values = sorted(found, key=None if all(isinstance(value, int) for value in found) else str)
    return broadcast_object_list([values])[0]


def _read_into_memory(images: StreamedDataset, rows) -> Split | None:
    """A split of encoded pictures that are held in memory; None without labels, which test splits have as -1."""
    digest, encoded, labels = hashlib.sha256(), [], []
    for row in rows:
        if row[images.label_column] == -1:
            return None
        name, data = images.read_encoded(row)
        digest.update(data)
        encoded.append((name, data))
        labels.append(images.get_label(row, name))

    def load(index: int) -> Image.Image:
        name, data = encoded[index]
        return decode_image(data, name)

    return Split(np.array(labels, dtype=np.int64), load, digest.hexdigest())


class Stream(torch.utils.data.IterableDataset):
    """Training pictures without end, as a Trainer reads them: {"pixel_values": uint8 [H, W, 3], "labels": int}.

    decode_size: (height, width) that pictures are resized to before `augment`. rank, world_size: which process's part.
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
        """The first `batches` will be thrown away: Trainer skips what was trained on. They need not be decoded."""
        self.skipped = (batches, batch_size)

    def iterate_rows(self) -> Iterator[dict[str, Any]]:
        """Rows of this process, and in a worker of this worker, pass after pass."""
        from datasets.distributed import split_dataset_by_node

        for number in itertools.count():
            shuffled = self.images.train.shuffle(seed=self.seed + number, buffer_size=self.shuffle_buffer)
            row = None
            try:
                for row in split_dataset_by_node(shuffled, self.rank, self.world_size):
                    yield row
            except Exception as error:  # whatever a file system, a network or an archive may raise
                raise ProcessError(
                    f"{self.images.name}: cannot be read on ({type(error).__name__}: {error})"
                ) from error
            if row is None:
                raise ProcessError(f"{self.images.name}: found no training pictures for process {self.rank}")

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | int]]:
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        batches, batch_size = self.skipped
        unseen = len(range(worker_id, batches, num_workers)) * batch_size  # workers take turns, batch by batch
        number = 0
        for row in self.iterate_rows():
            # With skip_bad only decoding tells which rows count.
            if number < unseen and not self.skip_bad:
                yield self.make_placeholder()
                number += 1
                continue
            name, data = self.images.read_encoded(row)
            label = self.images.get_label(row, name)
            try:
                pixels = np.asarray(decode_image(data, name).resize(self.decode_size[::-1], self.resample))
            except InputError as error:
                if not self.skip_bad:
                    raise ProcessError(str(error)) from None
                print(f"skipped: {error}", file=sys.stderr)
                continue
            if self.augment is not None:
                # Drawn from the picture's number, not from the generator that dropout shares.
                with torch.random.fork_rng(devices=[]):
                    key = np.random.SeedSequence((self.seed, self.rank, worker_id, number))
                    torch.default_generator.manual_seed(int(key.generate_state(1, np.uint64)[0]))
                    pixels = self.augment(pixels)
            yield {"pixel_values": torch.from_numpy(np.array(pixels)), "labels": label}
            number += 1

    def make_placeholder(self) -> dict[str, torch.Tensor | int]:
        """In place of a picture that is thrown away. Its class does not exist: it cannot be trained on unnoticed."""
        size = self.augment.image_size if isinstance(self.augment, Augment) else self.decode_size
        return {"pixel_values": torch.zeros(*size, 3, dtype=torch.uint8), "labels": -1}


def build_stream_loader(stream: Stream, batch_size: int, args: TrainingArguments, collate: Callable):
    """Batches of this process's part. (accelerate's own way would have every process read everything.)"""
    loader = torch.utils.data.DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=collate,
        # A worker without a shard would have nothing to do.
        num_workers=min(args.dataloader_num_workers, max(1, stream.images.train.num_shards // stream.world_size)),
        pin_memory=args.dataloader_pin_memory,
    )
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )
