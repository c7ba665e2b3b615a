"""Labelled images from the hub, from an image folder, or drawn by code.

Every source becomes an `ImageDataset`: class names, and for each split the labels and a function that loads one image.
The `datasets` library reads and caches datasets of the hub.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from fastvit.data import leaves
from fastvit.data.folders import Classes, compute_fingerprint, has_metadata, list_images
from fastvit.data.images import decode_image
from fastvit.errors import InputError, escape_unprintable

# Short names of datasets on the hub.
ALIASES = {"beans": "AI-Lab-Makerere/beans"}
IMAGE_COLUMNS = ("image", "img", "images", "picture")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label", "cls")
TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass
class Split:
    """Labels and images of one split.

    Attributes:
        labels: int64 [num_images].
        load: Index -> upright RGB image. Raises InputError if the image cannot be decoded.
        key: A fingerprint that changes whenever the images do.
    """

    labels: np.ndarray
    load: Callable[[int], Image.Image]
    key: str

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: np.ndarray) -> Split:
        """Returns the split of the images at `indices`, in that order."""
        return Split(self.labels[indices], lambda i: self.load(int(indices[i])), f"{self.key}{indices.tolist()}")


@dataclass
class ImageDataset:
    """A dataset in memory or on disk: its name, class names, and splits by name."""

    name: str
    class_names: list[str]
    splits: dict[str, Split]

    def count_labels(self) -> dict[str, np.ndarray]:
        """Counts the images of each class, [num_classes], by split."""
        return {name: np.bincount(split.labels, minlength=len(self.class_names)) for name, split in self.splits.items()}

    def sample_examples(self, num_classes: int, per_class: int, side: int) -> dict[str, list[Image.Image]]:
        """Returns the first decodable training images of the first classes.

        Args:
            num_classes: The number of classes.
            per_class: The largest number of images of a class.
            side: The largest height and width in pixels: full-size images of many classes could exhaust memory.

        Returns:
            The images by class name.
        """
        train, found = self.load_example_split(), {}
        for label, name in enumerate(self.class_names[:num_classes]):
            found[name] = list(islice(_make_thumbnails(train, np.flatnonzero(train.labels == label), side), per_class))
        return found

    def load_example_split(self) -> Split:
        """Returns the split that examples are taken from."""
        return self.splits[TRAIN]


def _make_thumbnails(split: Split, indices: np.ndarray, side: int) -> Iterator[Image.Image]:
    for index in indices:
        with contextlib.suppress(InputError):
            image = split.load(int(index))
            image.thumbnail((side, side))
            yield image


def load_images(
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.15,
    seed: int = 0,
    image_size: int = 64,
    generated_images: int = 2000,
) -> ImageDataset:
    """Loads a dataset of the hub, an image folder or the generated dataset.

    Args:
        dataset: A hub id, or "generated".
        data_dir: An image folder; either this or `dataset`.
        image_column: The column with the images [found by name or type].
        label_column: The column with the labels [found by name or type].
        validation_fraction: The share of the training images of each class that becomes the validation split if there
            is none; 0 for no such split.
        seed: Seed of that choice and of the generated images.
        image_size: Height and width of the generated images.
        generated_images: Number of generated images.

    Returns:
        The dataset, with a training split.

    Raises:
        InputError: If the dataset cannot be read, or lacks training images, labels or classes.
    """
    if (dataset is None) == (data_dir is None):
        raise InputError("dataset: expected either a dataset or an image folder (data_dir), got both or neither")
    if dataset == "generated":
        images = generate_dataset(generated_images, image_size, seed)
    elif data_dir is not None and not has_metadata(_check_folder(data_dir)):
        images = _read_folder(Path(data_dir), image_column, label_column)
    else:
        images = _read_with_datasets(ALIASES.get(dataset or "", dataset), data_dir, image_column, label_column)
    if VALIDATION not in images.splits and validation_fraction:
        train = images.splits.pop(TRAIN)
        kept, held_out = split_stratified(train.labels, validation_fraction, seed, images.class_names)
        images.splits = {TRAIN: train.select(kept), VALIDATION: train.select(held_out), **images.splits}
    return images


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


def split_stratified(
    labels: np.ndarray, fraction: float, seed: int, class_names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Splits off a fraction of every class, at least one image and never all of them.

    Args:
        labels: int64 [num_images].
        fraction: The share to hold out, between 0 and 1.
        seed: Seed of the choice.
        class_names: For error messages.

    Returns:
        Sorted indices of the remaining and of the held-out images.

    Raises:
        InputError: If `fraction` is out of bounds or a class has a single image.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction: expected a number between 0 and 1, got {fraction}")
    generator = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise InputError(
                f"class {class_names[label]!r}: expected at least 2 images, one to train on and one to validate on,"
                f" found {len(members)}"
            )
        drawn.append(members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    held_out = np.sort(np.concatenate(drawn))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _check_folder(data_dir: str | Path) -> Path:
    if not Path(data_dir).is_dir():
        raise InputError(f"data_dir: expected a folder of images, found none at {data_dir}")
    return Path(data_dir)


def _read_folder(root: Path, image_column: str | None, label_column: str | None) -> ImageDataset:
    """Reads a folder with one sub-folder per class (`fastvit.data.folders`)."""
    for kind, given in (("image", image_column), ("label", label_column)):
        if given not in (None, kind):
            raise InputError(f"{kind}_column: expected one of image, label, got {given!r}")
    splits = list_images(root)
    if TRAIN not in splits:
        raise InputError(f"{root}: expected a split called 'train', found {', '.join(splits)}")
    class_names = sorted({name for classes in splits.values() for name in classes})
    _check_classes(class_names, set(splits[TRAIN]), str(root))

    def build_split(classes: Classes) -> Split:
        images = [(path, class_names.index(name)) for name, paths in sorted(classes.items()) for path in paths]
        paths = [path for path, _ in images]

        def load(index: int) -> Image.Image:
            path = Path(paths[index])
            if not path.is_file():  # opening a pipe would block
                raise InputError(
                    f"{escape_unprintable(str(path))}: expected an image, found a broken link or no regular file"
                )
            return decode_image(path)

        return Split(np.array([label for _, label in images], dtype=np.int64), load, compute_fingerprint(paths))

    return ImageDataset(str(root), class_names, {name: build_split(classes) for name, classes in splits.items()})


def _check_classes(names: list[str], trained: set[str], source: str) -> None:
    """Raises InputError unless there are at least two classes with training images of each."""
    untrained = [name for name in names if name not in trained]
    if untrained:
        raise InputError(f"{source}: no training images for {len(untrained)} class(es): {', '.join(untrained[:10])}")
    if len(names) < 2:
        raise InputError(f"{source}: expected at least 2 classes, found {len(names)}: {', '.join(names)}")


@contextlib.contextmanager
def wrap_read_errors(source: str) -> Iterator[None]:
    """Turns errors of the `datasets` library for a missing or broken dataset into an InputError of one line."""
    import datasets

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # five retries, ten lines
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise InputError(f"dataset: there is no {source!r} on the hub, or it is private ({error})") from None
    except ConnectionError:
        raise InputError(
            f"dataset: cannot reach the hub for {source!r}; without a network use --data-dir FOLDER (a folder of"
            " images, one sub-folder per class) or --dataset generated"
        ) from None
    except (datasets.exceptions.DatasetGenerationError, ValueError, FileNotFoundError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{source}: expected images, one folder per class ({reason})") from None


def _read_with_datasets(
    hub_id: str | None, data_dir: str | Path | None, image_column: str | None, label_column: str | None
) -> ImageDataset:
    """Reads a dataset of the hub, or an image folder with a metadata file, with the `datasets` library."""
    import datasets

    source = hub_id or str(data_dir)
    with wrap_read_errors(source):
        if data_dir is not None:
            loaded = datasets.load_dataset("imagefolder", data_dir=str(data_dir))
        else:
            loaded = datasets.load_dataset(hub_id)

    splits = {normalize_split_name(name): split for name, split in loaded.items()}
    if TRAIN not in splits:
        raise InputError(f"{source}: expected a split called 'train', found {', '.join(loaded)}")
    features = splits[TRAIN].features
    image_column = find_column("image", image_column, features, IMAGE_COLUMNS, datasets.Image, source)
    label_column = find_column("label", label_column, features, LABEL_COLUMNS, datasets.ClassLabel, source)
    # Test splits on the hub often have no labels: all are -1.
    splits = {name: split for name, split in splits.items() if -1 not in split[label_column][:]}
    class_names = _list_class_names(splits, label_column, source)
    return ImageDataset(
        source,
        class_names,
        {name: _build_split(split, image_column, label_column, class_names) for name, split in splits.items()},
    )


def normalize_split_name(name: str) -> str:
    """Maps the usual names of a validation split to "validation"."""
    return VALIDATION if name in ("val", "valid", "dev", "eval") else name


def find_column(kind: str, given: str | None, features, usual: tuple[str, ...], feature_type: type, source: str) -> str:
    """Returns the column of images or labels: the given one, else the first with a usual name, else one of the type."""
    if given is not None:
        if given not in features:
            raise InputError(f"{kind}_column: expected one of {', '.join(features)}, got {given!r}")
        return given
    for name in [n for n in usual if n in features] + [n for n, f in features.items() if isinstance(f, feature_type)]:
        return name
    raise InputError(
        f"{source}: found no {kind} column among {', '.join(features)}; name it with --{kind}-column"
        + (" (in a folder, each class is a sub-folder; at least 2 are needed)" if kind == "label" else "")
    )


def _list_class_names(splits, label_column: str, source: str) -> list[str]:
    """Returns the class names in the order of their labels; raises InputError if one has no training images."""
    import datasets

    feature = splits[TRAIN].features[label_column]
    values = {name: np.unique(split[label_column][:]) for name, split in splits.items()}
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    else:
        names = [str(value) for value in np.unique(np.concatenate(list(values.values())))]
    trained = {names[v] if isinstance(feature, datasets.ClassLabel) else str(v) for v in values[TRAIN]}
    _check_classes(names, trained, source)
    return names


def _build_split(split, image_column: str, label_column: str, class_names: list[str]) -> Split:
    import datasets

    labels = split[label_column][:]
    if not isinstance(split.features[label_column], datasets.ClassLabel):
        labels = [class_names.index(str(label)) for label in labels]
    raw = split.cast_column(image_column, datasets.Image(decode=False))

    def load(index: int) -> Image.Image:
        cell = raw[index][image_column]
        path = cell["path"]
        return decode_image(cell["bytes"] if cell["bytes"] is not None else path, path or f"image {index}")

    return Split(np.asarray(labels, dtype=np.int64), load, split._fingerprint)
