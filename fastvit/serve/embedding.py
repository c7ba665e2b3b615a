"""Features of images: the class token, the mean of the patch tokens, and what the classifier of the model reads."""

from __future__ import annotations

import base64
import csv
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from fastvit.adapters.backbones import build_classifier
from fastvit.checkpoints.configuration import make_pair
from fastvit.checkpoints.inspection import read_config
from fastvit.models.backbone import CLS, FAMILIES, MEAN, count_prefix_tokens, get_vision_config, pool_tokens
from fastvit.models.loading import explain_load_errors, read_image_settings
from fastvit.serve.output import PARQUET_ROWS, Writers
from fastvit.serve.predictor import Predictor, check_compatibility
from fastvit.serve.preprocessing import Preprocessor, load_preprocessor

POOLED = "pooled"
TEMPERATURE = 0.07  # of the votes of neighbours (Caron et al. 2021, arXiv:2104.14294)


class FeatureModel(nn.Module):
    """A model without its head: `logits` are its features, one kind after the other.

    Args:
        classifier: as `build_classifier` returns it; its classifier is removed.

    Attributes:
        sizes: kind ("cls" where there is a class token, "mean", "pooled") -> number of features.
    """

    def __init__(self, classifier: Any):
        super().__init__()
        self.config = classifier.config
        vision = get_vision_config(self.config)
        family = FAMILIES[vision.model_type]
        size, pooled_size = vision.hidden_size, classifier.classifier.in_features
        self.sizes = {CLS: size} if family.has_class_token else {}
        self.sizes |= {MEAN: size, POOLED: pooled_size}
        classifier.classifier = nn.Identity()
        self.headless = classifier
        backbone = next(child for name, child in classifier.named_children() if name != "classifier")
        self.final_norm = getattr(backbone, family.final_norm) if family.final_norm else nn.Identity()
        self.tokens: list[Tensor] = []
        backbone.register_forward_hook(lambda module, args, outputs: self.tokens.append(outputs.last_hidden_state))

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        pooled = self.headless(pixel_values).logits
        tokens, prefix = self.final_norm(self.tokens.pop()), count_prefix_tokens(self.config)
        parts = [pool_tokens(tokens, kind, prefix) for kind in self.sizes if kind != POOLED]
        return ImageClassifierOutput(logits=torch.cat([*parts, pooled], dim=-1))


class Embedder(Predictor):
    """Computes features of images in the batches and threads of a `Predictor`; results are float32 `[features]`.

    Args:
        model: a folder or hub id of a backbone of any family, with or without a classifier.
        device: default: a GPU if available.
        pool: what "pooled" is: "cls", "mean" or "cls+mean"; the model's usual one if None.
        image_size: height and width in pixels; the image processor's if None.
        max_batch: maximum batch size.
    """

    model: FeatureModel

    def __init__(self, model: str, device: str | None, pool: str | None, image_size: int | None, max_batch: int = 32):
        found, preprocessor = load_feature_model(model, pool, image_size)
        super().__init__(found, device or ("cuda" if torch.cuda.is_available() else "cpu"), max_batch=max_batch,
                         image_processor=preprocessor, top_k=1)  # fmt: skip

    _activation = staticmethod(lambda logits, config: logits)

    def _build_prediction(self, probabilities: np.ndarray, best: np.ndarray) -> Any:
        return probabilities


def load_feature_model(model: str, pool: str | None, image_size: int | None) -> tuple[FeatureModel, Preprocessor]:
    """Load a backbone and its preprocessing: that of its image processor, or of its family without one.

    Raises:
        InputError: it cannot be loaded, or is of no family that is known.
    """
    channels = explain_load_errors(model, lambda: read_config(model)).get("num_channels", 3)
    has_none = channels == 3 and read_image_settings(model) is None
    preprocessor = None if has_none else load_preprocessor(model, channels)
    torch.manual_seed(0)  # of weights that are dropped, or not read
    labels = {"id2label": {0: "0", 1: "1"}, "label2id": {"0": 0, "1": 1}}
    default_size, verbosity = preprocessor.image_size if preprocessor else None, logging.get_verbosity()
    logging.set_verbosity_error()  # the classifier is new, and dropped
    try:
        classifier = build_classifier(model, labels, pool=pool, image_size=image_size, default_image_size=default_size)
    finally:
        logging.set_verbosity(verbosity)
    vision = get_vision_config(classifier.config)
    size = make_pair(vision.image_size)
    if preprocessor is None:
        family = FAMILIES[vision.model_type]
        mean, std = (tuple(values) for values in family.normalization)
        preprocessor = Preprocessor(size, None, Image.Resampling.BILINEAR, mean, std)
        print(f"note: {model} has no image processor; using {family.name}'s mean and deviation", file=sys.stderr)
    elif image_size is not None:
        preprocessor = dataclasses.replace(preprocessor, resize=size, crop=None)
    check_compatibility(classifier, preprocessor)
    return FeatureModel(classifier), preprocessor


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours
# ---------------------------------------------------------------------------------------------------------------------


def measure_neighbours(
    bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray | None, query_labels: np.ndarray, k: int
) -> float:
    """Accuracy of the weighted vote of the k nearest neighbours by cosine similarity, as DINO measures it.

    Args:
        bank: features `[N, D]`.
        bank_labels: int `[N]`.
        queries: `[M, D]`; None: each image of the bank, with the others as neighbours.
        query_labels: int `[M]`.
        k: number of neighbours; fewer if the bank is smaller.
    """
    own = queries is None
    reference = nn.functional.normalize(torch.from_numpy(bank), dim=-1)
    asked = reference if queries is None else nn.functional.normalize(torch.from_numpy(queries), dim=-1)
    labels, truth = torch.from_numpy(bank_labels), torch.from_numpy(query_labels)
    right = 0
    for start in range(0, len(asked), 1024):
        similarity = asked[start : start + 1024] @ reference.T
        if own:
            similarity.diagonal(start).fill_(-1e4)
        nearest, indices = similarity.topk(min(k, len(reference) - own))
        votes = torch.zeros(len(similarity), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[indices], (nearest / TEMPERATURE).exp())
        right += int((votes.argmax(-1) == truth[start : start + 1024]).sum())
    return right / len(asked)


def find_neighbours(bank: np.ndarray, query: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The rows of `bank` `[N, D]` of the largest cosine similarity to `query` `[D]`, with it."""
    similarity = torch.cosine_similarity(torch.from_numpy(bank), torch.from_numpy(query)[None])
    values, indices = similarity.topk(min(count, len(bank)))
    return list(zip(indices.tolist(), values.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Files, written from the rows of a journal: `classes` is [label, split, features in base64], or empty after an error
# ---------------------------------------------------------------------------------------------------------------------


def encode_features(features: np.ndarray) -> str:
    return base64.b64encode(features.astype(np.float32).tobytes()).decode()


def decode_row(row: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The columns of a row; the features of an image that could not be read are None."""
    label, split, encoded = row["classes"] or (None, None, None)
    image = row["image"].encode("utf-8", "backslashreplace").decode()
    parts: list[Any] = [None] * len(sizes)
    if encoded is not None:
        features = np.frombuffer(base64.b64decode(encoded), dtype=np.float32)
        parts = np.split(features, np.cumsum(list(sizes.values()))[:-1])
    vectors = dict(zip(sizes, parts, strict=True))
    return {"image": image, "label": label, "split": split, **vectors, "error": row["error"] or None}


def write_csv(path: Path, rows: Iterator[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the columns image, label, split, cls_0, cls_1, ..., error."""
    numbered = [f"{kind}_{index}" for kind, size in settings["sizes"].items() for index in range(size)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "split", *numbered, "error"])
        for row in rows:
            image, label, split, *parts, error = decode_row(row, settings["sizes"]).values()
            cells = [""] * len(numbered) if error else np.concatenate(parts).tolist()
            writer.writerow([image, label, split, *cells, error])


def write_jsonl(path: Path, rows: Iterator[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the columns that an image has, the features as lists."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            columns = {name: value for name, value in decode_row(row, settings["sizes"]).items() if value is not None}
            file.write(json.dumps(columns, default=np.ndarray.tolist) + "\n")


def write_parquet(path: Path, rows: Iterator[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Write the columns image, label, split, one list of fixed size for each kind of features, and error."""
    import pyarrow
    import pyarrow.parquet

    text, sizes = pyarrow.string(), settings["sizes"]
    vectors = [(kind, pyarrow.list_(pyarrow.float32(), size)) for kind, size in sizes.items()]
    schema = pyarrow.schema([("image", text), ("label", text), ("split", text), *vectors, ("error", text)])
    decoded = (decode_row(row, sizes) for row in rows)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(decoded, PARQUET_ROWS // 10)):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))


WRITERS: Writers = {".csv": write_csv, ".jsonl": write_jsonl, ".parquet": write_parquet}
