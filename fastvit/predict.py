"""Use a fine-tuned model from the command line: predict, evaluate, attention."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from fastvit import report
from fastvit.datasets import load_images
from fastvit.errors import InputError, printable
from fastvit.images import decode_image
from fastvit.loading import load_image_processor, load_pretrained
from fastvit.modeling import ViTForImageClassification

T = TypeVar("T", bound=Hashable)


def load(model: str, device: str | None) -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    """The model on its device, ready to predict, and its image processor."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: cannot use {device!r} ({str(error).splitlines()[0]})") from None
    classifier = load_pretrained(model).to(device).eval()
    return classifier, load_image_processor(model, classifier.config)


@torch.inference_mode()
def probabilities(model: ViTForImageClassification, processor, images: list[Image.Image]) -> np.ndarray:
    """Class probabilities float32 [B, C] of upright RGB pictures."""
    pixels = processor(images=images, return_tensors="pt").pixel_values.to(model.device)
    return model(pixels).logits.float().softmax(dim=-1).cpu().numpy()


def batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def class_names_of(model: ViTForImageClassification) -> list[str]:
    names = model.config.id2label
    if sorted(names) != list(range(model.num_labels)):
        raise InputError(f"{model.name_or_path}: config.json: id2label: expected names for 0 to {model.num_labels - 1}")
    return [str(names[index]) for index in range(model.num_labels)]


def decode_good(load: Callable[[T], Image.Image], sources: Iterable[T]) -> dict[T, Image.Image]:
    """The pictures that can be decoded, by what they are loaded from; for each of the others a line on stderr."""
    pictures = {}
    for source in sources:
        try:
            pictures[source] = load(source)
        except InputError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
    return pictures


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fastvit {name}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="a fine-tuned model: folder or hub id")
    parser.add_argument("--device", help="where to compute [a GPU if there is one]")
    return parser


def predict(argv: list[str]) -> int:
    """`fastvit predict MODEL IMAGE...`; what cannot be decoded is told and passed over, and the exit code is then 2."""
    parser = _parser("predict", "Name what is in pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object a picture and line")
    options = parser.parse_args(argv)
    if options.top < 1:
        raise InputError(f"--top: expected at least 1, got {options.top}")
    model, processor = load(options.model, options.device)
    names = class_names_of(model)
    bad = 0
    for paths in batches(options.images, options.batch_size):
        images = decode_good(decode_image, paths)
        bad += len(set(paths)) - len(images)
        if not images:
            continue
        for path, row in zip(images, probabilities(model, processor, list(images.values())), strict=True):
            best = row.argsort()[::-1][: options.top]
            if options.json:
                classes = [{"label": names[i], "probability": round(float(row[i]), 6)} for i in best]
                print(json.dumps({"image": path, "classes": classes}, ensure_ascii=not path.isprintable()))
            else:
                print(printable(path))
                for i in best:
                    print(f"  {row[i]:7.2%}  {printable(names[i])}")
    return 2 if bad else 0


def evaluate(argv: list[str]) -> None:
    """`fastvit evaluate MODEL --data-dir FOLDER`"""
    parser = _parser("evaluate", "Measure a model on labelled pictures.")
    parser.add_argument("--dataset", metavar="ID", help="hub data set, 'beans', or 'generated'")
    parser.add_argument("--data-dir", metavar="FOLDER", help="or a folder of pictures: [SPLIT/] CLASS/")
    parser.add_argument("--split", help="train, validation or test [validation, else test, else train]")
    parser.add_argument("--image-column", help="column with the pictures [found by name]")
    parser.add_argument("--label-column", help="column with the classes [found by name]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--skip-bad-images", action="store_true", help="leave out what cannot be decoded, and count it")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    options = parser.parse_args(argv)
    images = load_images(
        options.dataset,
        options.data_dir,
        image_column=options.image_column,
        label_column=options.label_column,
        validation_fraction=0,
    )
    split_name = options.split or next(name for name in ("validation", "test", "train") if name in images.splits)
    if split_name not in images.splits:
        raise InputError(f"--split: expected one of {', '.join(images.splits)}, got {split_name!r}")
    model, processor = load(options.model, options.device)
    names = class_names_of(model)
    unknown = sorted(set(images.class_names) - set(names))
    if unknown:
        raise InputError(f"{images.name}: the model does not know the class(es) {', '.join(unknown[:10])}")

    split = images.splits[split_name]
    labels = np.array([names.index(images.class_names[label]) for label in split.labels])
    measured: list[int] = []
    predictions: list[np.ndarray] = []
    for indices in batches(list(range(len(split))), options.batch_size):
        if options.skip_bad_images:
            pictures = decode_good(split.load, indices)
        else:
            pictures = {index: split.load(index) for index in indices}
        if pictures:
            measured += pictures
            predictions.append(probabilities(model, processor, list(pictures.values())).argmax(-1))
    if not measured:
        raise InputError(f"{images.name}: no picture left in split {split_name!r}")
    confusion = report.confusion_matrix(labels[measured], np.concatenate(predictions), len(names))
    metrics = report.classification_metrics(confusion)
    skipped = len(split) - len(measured)
    if options.json:
        found = {"split": split_name, "class_names": names, "skipped": skipped, **metrics}
        print(json.dumps({**found, "confusion": confusion.tolist()}))
    else:
        print(
            f"{images.name}, {split_name}: accuracy {metrics['accuracy']:.2%} on {len(measured)} pictures"
            + (f", {skipped} skipped\n" if skipped else "\n")
        )
        print(report.format_metrics(confusion, names))


@torch.inference_mode()
def attention(argv: list[str]) -> None:
    """`fastvit attention MODEL IMAGE -o map.png`"""
    parser = _parser("attention", "Draw where the class token looks: per block, and rolled out through all blocks.")
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("-o", "--output", default="attention.png", metavar="FILE", help="picture to write")
    options = parser.parse_args(argv)
    model, processor = load(options.model, options.device)
    image = decode_image(options.image)
    pixels = processor(images=[image], return_tensors="pt").pixel_values.to(model.device)
    maps = torch.cat(model(pixels, output_attentions=True).attentions).float().cpu().numpy()  # [layers, heads, N, N]
    grid = model.vit.embeddings.patch_embeddings.grid(tuple(pixels.shape[2:]))
    report.save_image(report.attention_sheet(image, maps, grid), Path(options.output))
    print(f"written: {options.output}")
