"""`fastvit embed`: compute features of images, to search, cluster or classify them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvit.cli.parsers import add_source_arguments, build_model_parser, check_counts, find_sources
from fastvit.cli.predict import compute_fingerprint
from fastvit.errors import InputError, escape_unprintable

if TYPE_CHECKING:
    import numpy as np

    from fastvit.serve.embedding import Embedder


class Item(NamedTuple):
    """An image that `Predictor` accepts, its name, and its class and split where they are known."""

    name: str
    image: Any
    label: str | None = None
    split: str | None = None


def build_parser() -> argparse.ArgumentParser:
    parser = build_model_parser("embed")
    add_source_arguments(parser)
    parser.add_argument("--data-dir", metavar="FOLDER", help="or a folder of classes: [SPLIT/] CLASS/")
    parser.add_argument("--labels", metavar="FILE", help="or a table of file names and labels")
    parser.add_argument("--label-column", metavar="NAME", help="column of the classes [found by name]")
    parser.add_argument("--streaming", action="store_true", help="read the dataset while it is downloaded")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="write .parquet, .csv or .jsonl; the same command continues where it was interrupted",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, and do not continue")
    parser.add_argument("--pool", choices=("cls", "mean", "cls+mean"), help="pooled features [the model's usual]")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width [the image processor's]")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per batch")
    parser.add_argument(
        "--knn", type=int, nargs="?", const=20, metavar="K", help="print the accuracy of the K nearest neighbours [20]"
    )
    parser.add_argument("--neighbours", metavar="IMAGE", help="print the images that are most similar to this one")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="number of --neighbours")
    return parser


def main(argv: list[str]) -> int:
    """Compute features, write them, and print what is asked of them; exit code 2 if an image could not be read."""
    options = build_parser().parse_args(argv)
    check_counts(options, "top", "batch_size", "knn", "image_size")
    if options.output is None and options.knn is None and options.neighbours is None:
        raise InputError("--output: expected a FILE for the features, or --knn or --neighbours")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("embed: expected one process; several would compute the same images")
    is_labelled = any((options.dataset, options.data_dir, options.labels))
    if options.knn and not is_labelled:
        raise InputError("--knn: expected images with labels: --data-dir FOLDER, --labels FILE or --dataset ID")
    if bool(options.images) == is_labelled or (options.streaming and not is_labelled):
        raise InputError("IMAGE: expected images, or --dataset, --data-dir or --labels (which --streaming needs)")
    items = list_labelled(options) if is_labelled else [Item(*source) for source in find_sources(options)]

    from fastvit.serve.embedding import Embedder

    settings = {"pool": options.pool, "image_size": options.image_size, "max_batch": options.batch_size}
    embedder = Embedder(options.model, options.device, **settings)
    with embedder, tempfile.TemporaryDirectory() as folder:
        query = embedder(options.neighbours) if options.neighbours else None
        path = options.output or Path(folder, "features.jsonl")
        rows, failed = compute_rows(embedder, items, path, options)
        if options.knn:
            print_accuracy(rows, options.knn)
        if query is not None:
            print_neighbours(rows, query[-embedder.model.sizes["pooled"] :], options)
    return 2 if failed else 0


def list_labelled(options: argparse.Namespace) -> Iterable[Item]:
    """The labelled images of a dataset, a folder or a table, all splits or one."""
    from fastvit.checkpoints.hub import skip_unreachable_hub
    from fastvit.checkpoints.locations import check_location
    from fastvit.data.datasets import load_images
    from fastvit.data.streaming import StreamedDataset, stream_images

    check_location(options.model, has_owner=True)
    where = {"labels_file": options.labels, "image_column": options.image_column, "label_column": options.label_column}
    load: Any = partial(load_images, validation_fraction=0)
    if options.streaming:
        load = partial(stream_images, need_validation=False)
    if options.dataset not in (None, "generated"):
        load = skip_unreachable_hub()(load)
    images = load(options.dataset, options.data_dir, **where)
    for note in images.notes:
        print(f"note: {note}", file=sys.stderr)
    is_streamed = isinstance(images, StreamedDataset)
    splits = [*["train"] * is_streamed, *images.splits]
    if options.split not in (None, *splits):
        raise InputError(f"--split: expected one of {', '.join(splits)}, got {options.split!r}")
    found: list[Item] = []
    for name, split in images.splits.items():
        if options.split in (None, name):
            labels = [images.class_names[label] for label in split.labels]
            is_file = not is_streamed and len(split) and Path(split.get_name(0)).exists()  # else a row
            names = [split.get_name(i) if is_file else f"{name}/{i}" for i in range(len(split))]
            found += [Item(names[i], partial(split.load, i), labels[i], name) for i in range(len(split))]
    return yield_streamed(images, found) if is_streamed and options.split in (None, "train") else found


def yield_streamed(images: Any, others: list[Item]) -> Iterator[Item]:
    """The streamed training images, then those of the other splits."""
    for index, row in enumerate(images.train):
        if images.is_labelled(row):
            name, data = images.read_encoded(row)
            yield Item(f"train/{index}", data, images.class_names[images.get_label(row, name)], "train")
    yield from others


def compute_rows(
    embedder: Embedder, items: Iterable[Item], path: Path, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], int]:
    """Compute the features of the images that the file at `path` does not have yet, and write it.

    Returns:
        The columns of all images that could be read, if --knn or --neighbours need them, and the number of the others.
    """
    from tqdm import tqdm

    from fastvit.serve.embedding import WRITERS, decode_row, encode_features
    from fastvit.serve.output import PredictionFile

    names = ("model", "dataset", "data_dir", "labels", "split", "pool", "image_size")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"sizes": embedder.model.sizes, "weights": compute_fingerprint(embedder.model)}
    failed = 0
    output = PredictionFile(path, settings, options.overwrite, WRITERS)
    with output.open_journal() as journal:
        if before := len(output.done):
            print(f"{before} images were computed before", file=sys.stderr)
        seen, pending = set(output.done), deque[Item]()

        def read_images() -> Iterator[Any]:
            for item in items:
                if item.name not in seen:
                    seen.add(item.name)
                    pending.append(item)
                    yield item.image

        total = len(items) if isinstance(items, list) else None
        for result in tqdm(embedder.stream(read_images()), total=total, initial=before, unit="image", disable=None):
            item = pending.popleft()
            if isinstance(result, InputError):
                failed += 1
                print(f"error: {escape_unprintable(str(result))}", file=sys.stderr)
                output.add(journal, item.name, [], str(result))
            else:
                output.add(journal, item.name, [item.label, item.split, encode_features(result)])
        rows = []
        if options.knn or options.neighbours:
            rows = [decode_row(row, embedder.model.sizes) for row in output.read_rows() if not row["error"]]
    output.merge()
    if options.output is not None:
        kinds = ", ".join(f"{kind} {size}" for kind, size in embedder.model.sizes.items())
        print(f"written: {options.output} ({len(seen)} images; {kinds})")
    return rows, failed


def stack(rows: list[dict[str, Any]], kind: str) -> np.ndarray:
    import numpy as np

    return np.stack([row[kind] for row in rows])


def print_accuracy(rows: list[dict[str, Any]], k: int) -> None:
    """Print the accuracy of the nearest neighbours: of validation images among those for training, or leave-one-out."""
    import numpy as np

    from fastvit.serve.embedding import measure_neighbours

    if len(rows) < 2:
        raise InputError(f"--knn: expected at least 2 images, found {len(rows)}")
    names = sorted({row["label"] for row in rows})
    splits = {name: [row for row in rows if row["split"] == name] for name in ("train", "validation", "test")}
    bank_name, *query_names = [name for name, found in splits.items() if found]
    bank, queries = splits[bank_name], splits[query_names[0]] if query_names else None
    labels, truth = (np.array([names.index(row["label"]) for row in part]) for part in (bank, queries or bank))
    asked = f"{len(truth)} images of {query_names[0]}" if queries else "each image, with the others as neighbours"
    print(f"{k} nearest neighbours among {len(bank)} images of {bank_name}, accuracy on {asked}:")
    for kind in ("cls", "mean", "pooled"):
        if kind in rows[0]:
            found = None if queries is None else stack(queries, kind)
            print(f"  {kind:<8}{measure_neighbours(stack(bank, kind), labels, found, truth, k):.2%}")


def print_neighbours(rows: list[dict[str, Any]], query: np.ndarray, options: argparse.Namespace) -> None:
    """Print the most similar images by their pooled features, without the image itself."""
    from fastvit.serve.embedding import find_neighbours

    others = [row for row in rows if row["image"] != options.neighbours]
    print(f"most similar to {escape_unprintable(options.neighbours)}:")
    for index, similarity in find_neighbours(stack(others, "pooled"), query, options.top):
        row = others[index]
        print(f"  {similarity:.3f}  {escape_unprintable(row['image'])}" + (f"  {row['label']}" if row["label"] else ""))
