"""Checkpoints in the Hugging Face, timm and npz formats, and their models in plain PyTorch and NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

EXPECTED_WARNINGS = (  # filters for conversions that lose what the target format cannot record
    "ignore:.*does not record mean and std",
    "ignore:.*neither classifier nor pooler",
    "ignore:.*cannot be recorded",
    "ignore:timm does not read the number of heads",
)
WIDTH, HEADS, DEPTH, MLP, PATCH, GRID, LABELS = 32, 4, 2, 48, 4, 3, 5


def make_config(**options) -> ViTConfig:
    defaults = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "image_size": GRID * PATCH,
        "patch_size": PATCH,
        "num_labels": LABELS,
        "layer_norm_eps": 1e-6,
    }
    return ViTConfig(**(defaults | options))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Randomizes every parameter: with the usual zeros and ones, swapped biases or norms would pass."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def save_hf(folder: Path, model_class=ViTForImageClassification, dtype=torch.float32, **options) -> Path:
    randomize(model_class(make_config(**options))).to(dtype).save_pretrained(folder)
    return folder


def save_timm_folder(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_mini_patch4_12", **config}))
    return folder


def make_timm(*, head: bool = True, pre_logits: bool = False, qkv_bias: bool = True) -> dict[str, torch.Tensor]:
    """A random timm state dict, with names and shapes written out by hand rather than taken from this package."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + GRID * GRID, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    linears = {}
    for layer in range(DEPTH):
        block = f"blocks.{layer}."
        shapes |= {f"{block}norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
        linears |= {block + "attn.qkv": (3 * WIDTH, WIDTH), block + "attn.proj": (WIDTH, WIDTH)}
        linears |= {block + "mlp.fc1": (MLP, WIDTH), block + "mlp.fc2": (WIDTH, MLP)}
    if head:
        linears["head"] = (LABELS, WIDTH)
    if pre_logits:
        linears["pre_logits.fc"] = (WIDTH, WIDTH)
    for name, shape in linears.items():
        shapes[name + ".weight"] = shape
        if qkv_bias or not name.endswith("qkv"):
            shapes[name + ".bias"] = shape[:1]
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def timm_forward(tensors: dict[str, torch.Tensor], pixels: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """timm's Vision Transformer in plain PyTorch; returns the head or pre_logits output of the class token."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, tensors[name + ".weight"], tensors.get(name + ".bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), tensors[name + ".weight"], tensors[name + ".bias"], eps=1e-6)

    x = F.conv2d(pixels, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], dim=1) + tensors["pos_embed"]
    batch, tokens, width = x.shape
    for layer in range(DEPTH):
        block = f"blocks.{layer}."
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv")
        query, key, value = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // heads)
        context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        x = x + linear(context, block + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    x = norm(x, "norm")[:, 0]
    return torch.tanh(linear(x, "pre_logits.fc")) if "pre_logits.fc.weight" in tensors else linear(x, "head")


def make_npz(*, head: bool = True, pre_logits: bool = False) -> dict[str, np.ndarray]:
    """Random arrays under the names and in the layouts of the JAX Vision Transformer."""
    head_dim = WIDTH // HEADS
    shapes = {
        "cls": (1, 1, WIDTH),
        "embedding/kernel": (PATCH, PATCH, 3, WIDTH),
        "embedding/bias": (WIDTH,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + GRID * GRID, WIDTH),
        "Transformer/encoder_norm/scale": (WIDTH,),
        "Transformer/encoder_norm/bias": (WIDTH,),
    }
    for layer in range(DEPTH):
        block = f"Transformer/encoderblock_{layer}/"
        shapes |= {f"{block}LayerNorm_{n}/{kind}": (WIDTH,) for n in (0, 2) for kind in ("scale", "bias")}
        for name in ("query", "key", "value"):
            shapes[f"{block}MultiHeadDotProductAttention_1/{name}/kernel"] = (WIDTH, HEADS, head_dim)
            shapes[f"{block}MultiHeadDotProductAttention_1/{name}/bias"] = (HEADS, head_dim)
        shapes[f"{block}MultiHeadDotProductAttention_1/out/kernel"] = (HEADS, head_dim, WIDTH)
        shapes[f"{block}MultiHeadDotProductAttention_1/out/bias"] = (WIDTH,)
        shapes |= {f"{block}MlpBlock_3/Dense_0/kernel": (WIDTH, MLP), f"{block}MlpBlock_3/Dense_0/bias": (MLP,)}
        shapes |= {f"{block}MlpBlock_3/Dense_1/kernel": (MLP, WIDTH), f"{block}MlpBlock_3/Dense_1/bias": (WIDTH,)}
    if head:
        shapes |= {"head/kernel": (WIDTH, LABELS), "head/bias": (LABELS,)}
    if pre_logits:
        shapes |= {"pre_logits/kernel": (WIDTH, WIDTH), "pre_logits/bias": (WIDTH,)}
    generator = np.random.default_rng(2)
    return {name: (generator.standard_normal(shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}


def npz_forward(arrays: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """The JAX Vision Transformer in numpy, float64, channels last."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return np.einsum("...i,io->...o", x, arrays[name + "/kernel"]) + arrays[name + "/bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * arrays[name + "/scale"] + arrays[name + "/bias"]

    def gelu(x: np.ndarray) -> np.ndarray:  # flax's default, the tanh approximation
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    batch = len(pixels)
    patches = pixels.reshape(batch, GRID, PATCH, GRID, PATCH, 3)
    x = np.einsum("brhcwi,hwio->brco", patches, arrays["embedding/kernel"]) + arrays["embedding/bias"]
    x = np.concatenate([np.repeat(arrays["cls"], batch, 0), x.reshape(batch, GRID * GRID, WIDTH)], axis=1)
    x = x + arrays["Transformer/posembed_input/pos_embedding"]
    for layer in range(DEPTH):
        block = f"Transformer/encoderblock_{layer}/"
        attention = block + "MultiHeadDotProductAttention_1/"
        y = norm(x, block + "LayerNorm_0")
        query, key, value = (
            np.einsum("bnd,dhk->bnhk", y, arrays[f"{attention}{name}/kernel"]) + arrays[f"{attention}{name}/bias"]
            for name in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("bqhk,bnhk->bhqn", query / math.sqrt(WIDTH // HEADS), key))
        context = np.einsum("bhqn,bnhk->bqhk", scores / scores.sum(-1, keepdims=True), value)
        x = x + np.einsum("bqhk,hkd->bqd", context, arrays[attention + "out/kernel"]) + arrays[attention + "out/bias"]
        y = gelu(dense(norm(x, block + "LayerNorm_2"), block + "MlpBlock_3/Dense_0"))
        x = x + dense(y, block + "MlpBlock_3/Dense_1")
    x = norm(x, "Transformer/encoder_norm")[:, 0]
    return np.tanh(dense(x, "pre_logits")) if "pre_logits/kernel" in arrays else dense(x, "head")


def make_pixels() -> torch.Tensor:
    size = GRID * PATCH
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def load(model_class, folder: Path):
    """Loads a model in transformers and checks that the file holds exactly its parameters."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def assert_same_bits(left: Path, right: Path) -> None:
    first, second = load_file(left), load_file(right)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
