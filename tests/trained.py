"""The trained DINOv2-small of `real_weights` on photographs of leaves: models, features, activations, a probe."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from real_weights import FOLDER, find_missing_reason
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Model, ViTConfig

import fastvit
from fastvit.data.images import decode_image
from fastvit.ops import reference

BEANS = os.environ.get("FASTVIT_BEANS_DIR")
CLASSES = ("angular_leaf_spot", "bean_rust", "healthy")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # DINOv2's
EPS, HEADS = 1e-6, 6

# A layer's name in transformers' DINOv2 checkpoints, and in its ViT checkpoints.
VIT_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
SCALES = {"attention.output.dense": "layer_scale1", "mlp.fc2": "layer_scale2"}


def find_skip_reason() -> str | None:
    """Why the photographs or the weights are missing, or None."""
    if not BEANS or not Path(BEANS).is_dir():
        return "FASTVIT_BEANS_DIR does not name the folder of beans photographs"
    return find_missing_reason()


def list_photographs(split: str, per_class: int | None = None) -> tuple[list[Path], list[int]]:
    """Files and labels of evenly spaced photographs of each class, or of all."""
    chosen, labels = [], []
    for label, name in enumerate(CLASSES):
        files = sorted(Path(BEANS or "", split, name).glob("*.jpg"))
        indices = np.linspace(0, len(files) - 1, per_class or len(files)).round().astype(int)
        chosen += [files[index] for index in indices]
        labels += [label] * len(indices)
    return chosen, labels


def read_photographs(
    split: str, per_class: int | None = None, size: tuple[int, int] = (224, 224)
) -> tuple[Tensor, Tensor]:
    """Photographs as uint8 pixels [B, H, W, 3], stretched to size (height, width), and labels int64 [B]."""
    files, labels = list_photographs(split, per_class)
    images = [decode_image(file).resize(size[::-1], Image.Resampling.BICUBIC) for file in files]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])), torch.tensor(labels)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], as other implementations accept it."""
    return (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load_dinov2() -> Dinov2Model:
    return Dinov2Model.from_pretrained(FOLDER).eval()


def fold_layer_scale() -> dict[str, Tensor]:
    """The weights of a plain ViT with the same outputs.

    LayerScale multiplies what a linear layer returns: scale * (W x + b) is the linear layer of scale * W and scale * b.
    """
    weights, folded = load_file(FOLDER / "model.safetensors"), {}
    for name, tensor in weights.items():
        for part, scale in SCALES.items():
            layer, found, kind = name.partition(f".{part}.")
            if found:
                factor = weights[f"{layer}.{scale}.lambda1"].double()
                tensor = (tensor.double() * (factor[:, None] if kind == "weight" else factor)).float()
        for part, vit in VIT_NAMES.items():
            name = name.replace(f".{part}.", f".{vit}.")
        if "layer_scale" not in name and "mask_token" not in name:
            folded[name] = tensor
    return folded


def load_vit(attn_implementation: str = "sdpa") -> fastvit.ViTModel:
    """fastvit's model of the folded weights. It normalises uint8 pixels itself."""
    config = ViTConfig(
        hidden_size=384,
        num_attention_heads=HEADS,
        intermediate_size=1536,
        image_size=518,
        patch_size=14,
        layer_norm_eps=EPS,
        image_mean=MEAN,
        image_std=STD,
        attn_implementation=attn_implementation,
    )
    model = fastvit.ViTModel(config, add_pooling_layer=False)
    model.load_state_dict(fold_layer_scale())
    return model.eval()


def set_precision(model: fastvit.ViTModel, precision: str) -> fastvit.ViTModel:
    """The float32 model in another precision, in place; both 8-bit kinds quantise a bfloat16 model, as GPUs run it."""
    if precision in ("fp8", "int8"):
        return fastvit.quantize(model.to(torch.bfloat16), precision)
    return model.to(getattr(torch, precision))


def relative_error(result: Tensor, exact: Tensor) -> float:
    """In the Euclidean norm."""
    return ((result.double() - exact.double()).norm() / exact.double().norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Features and what they are good for
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compute_features(model: fastvit.ViTModel, pixels: Tensor, batch_size: int = 16) -> Tensor:
    """The class token and the mean patch token of each image, float32 [B, 768]."""
    features = [model.forward_features(batch) for batch in pixels.split(batch_size)]
    return torch.cat([torch.cat([part.cls_token, part.mean], dim=-1).float() for part in features])


def fit_probe(features: Tensor, labels: Tensor, ridge: float = 1.0) -> tuple[Tensor, Tensor]:
    """A linear classifier by ridge regression on one-hot labels: deterministic, no steps. Returns weight and bias."""
    features, targets = features.double(), F.one_hot(labels, len(CLASSES)).double()
    mean, target_mean = features.mean(0), targets.mean(0)
    centred = features - mean
    scale = ridge * centred.square().mean() * len(features)
    gram = centred.t() @ centred + scale * torch.eye(features.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.t() @ (targets - target_mean))
    return weight, target_mean - mean @ weight


def predict_by_probe(probe: tuple[Tensor, Tensor], features: Tensor) -> Tensor:
    weight, bias = probe
    return (features.double() @ weight + bias).argmax(-1)


def predict_by_neighbours(train: Tensor, labels: Tensor, features: Tensor, count: int = 5) -> Tensor:
    """The most frequent class of the nearest training images by cosine similarity."""
    similarity = F.normalize(features, dim=-1) @ F.normalize(train, dim=-1).t()
    return labels[similarity.topk(count).indices].mode(-1).values


# ---------------------------------------------------------------------------------------------------------------------
# Activations of a block
# ---------------------------------------------------------------------------------------------------------------------


def compute_block(weights: dict[str, Tensor], index: int, x: Tensor) -> dict[str, Tensor]:
    """Every activation and parameter of a pre-LayerNorm block by name, from hidden states x [B, N, D], in x's dtype."""

    def affine(layer: str) -> tuple[Tensor, Tensor]:
        prefix = f"encoder.layer.{index}.{layer}"
        return weights[f"{prefix}.weight"].to(x.dtype), weights[f"{prefix}.bias"].to(x.dtype)

    norm1, norm2 = affine("layernorm_before"), affine("layernorm_after")
    normed1 = reference.layer_norm(x, *norm1, EPS)
    projections = [affine(f"attention.attention.{name}") for name in ("query", "key", "value")]
    query, key, value = (F.linear(normed1, *layer).unflatten(-1, (HEADS, -1)) for layer in projections)
    context = reference.attention(query, key, value)
    branch1 = F.linear(context, *affine("attention.output.dense"))
    residual = x + branch1
    normed2 = reference.layer_norm(residual, *norm2, EPS)
    first, second = affine("intermediate.dense"), affine("output.dense")
    pre = F.linear(normed2, *first)
    activated = F.gelu(pre)
    return {
        "x": x,
        "norm1": norm1,
        "normed1": normed1,
        "joined": tuple(map(torch.cat, zip(*projections, strict=True))),
        "query": query,
        "key": key,
        "value": value,
        "context": context,
        "branch1": branch1,
        "residual": residual,
        "norm2": norm2,
        "normed2": normed2,
        "first": first,
        "pre": pre,
        "activated": activated,
        "second": second,
        "out": residual + F.linear(activated, *second),
    }
