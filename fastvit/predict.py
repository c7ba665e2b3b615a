"""Use a fine-tuned model from the command line: predict, evaluate, attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from fastvit import report
from fastvit.calibration import reliability, temperature_of
from fastvit.datasets import load_images
from fastvit.errors import InputError
from fastvit.images import decode_image
from fastvit.loading import load_pretrained
from fastvit.modeling import ViTForImageClassification


def load(model: str, device: str | None) -> tuple[ViTForImageClassification, ViTImageProcessorPil]:
    """The model on its device, ready to predict, and its image processor."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device: cannot use {device!r} ({str(error).splitlines()[0]})") from None
    classifier = load_pretrained(model).to(device).eval()
    try:
        processor = ViTImageProcessorPil.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: expected an image processor (preprocessor_config.json) ({error})") from None
    return classifier, processor


@torch.inference_mode()
def probabilities(
    model: ViTForImageClassification, processor, images: list[Image.Image], flip: bool = False
) -> np.ndarray:
    """Class probabilities float32 [B, C] of upright RGB pictures, calibrated if the model is.

    flip: of the mean of the logits for the picture and for its mirror image.
    """
    pixels = processor(images=images, return_tensors="pt").pixel_values.to(model.device)
    logits = model(pixels).logits.float()
    if flip:
        logits = (logits + model(pixels.flip(-1)).logits.float()) / 2
    return (logits / temperature_of(model.config)).softmax(dim=-1).cpu().numpy()


def batches(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def class_names_of(model: ViTForImageClassification) -> list[str]:
    return [model.config.id2label[index] for index in range(model.config.num_labels)]


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"fastvit {name}", description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="a fine-tuned model: folder or hub id")
    parser.add_argument("--device", help="where to compute [a GPU if there is one]")
    return parser


def _add_flip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flip", action="store_true", help="the mean over each picture and its mirror image")


def predict(argv: list[str]) -> None:
    """`fastvit predict MODEL IMAGE...`"""
    parser = _parser("predict", "Name what is in pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--top", type=int, default=5, help="how many classes to show")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="one JSON object a picture and line")
    _add_flip(parser)
    options = parser.parse_args(argv)
    if options.top < 1:
        raise InputError(f"--top: expected at least 1, got {options.top}")
    model, processor = load(options.model, options.device)
    names = class_names_of(model)
    for paths in batches(options.images, options.batch_size):
        pictures = [decode_image(path) for path in paths]
        for path, row in zip(paths, probabilities(model, processor, pictures, options.flip), strict=True):
            best = row.argsort()[::-1][: options.top]
            if options.json:
                classes = [{"label": names[i], "probability": round(float(row[i]), 6)} for i in best]
                print(json.dumps({"image": path, "classes": classes}, ensure_ascii=False))
            else:
                print(path)
                for i in best:
                    print(f"  {row[i]:7.2%}  {names[i]}")


def evaluate(argv: list[str]) -> None:
    """`fastvit evaluate MODEL --data-dir FOLDER`"""
    parser = _parser("evaluate", "Measure a model on labelled pictures.")
    parser.add_argument("--dataset", metavar="ID", help="hub data set, 'beans', or 'generated'")
    parser.add_argument("--data-dir", metavar="FOLDER", help="or a folder of pictures: [SPLIT/] CLASS/")
    parser.add_argument("--split", help="train, validation or test [validation, else test, else train]")
    parser.add_argument("--image-column", help="column with the pictures [found by name]")
    parser.add_argument("--label-column", help="column with the classes [found by name]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")
    _add_flip(parser)
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
    rows = [
        probabilities(model, processor, [split.load(index) for index in indices], options.flip)
        for indices in batches(list(range(len(split))), options.batch_size)
    ]
    predicted = np.concatenate(rows)
    confusion = report.confusion_matrix(labels, predicted.argmax(-1), len(names))
    error = reliability(predicted, labels).expected_calibration_error
    metrics = {**report.classification_metrics(confusion), "calibration_error": error}
    if options.json:
        print(json.dumps({"split": split_name, "class_names": names, **metrics, "confusion": confusion.tolist()}))
    else:
        print(f"{images.name}, {split_name}: accuracy {metrics['accuracy']:.2%} on {len(split)} pictures")
        print(f"probabilities are off by {error:.2%} (expected calibration error)\n")
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
