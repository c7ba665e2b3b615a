"""Checkpoints between the Hugging Face, timm and npz formats: bits, mathematics, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessorPil,
    ViTModel,
)

from fastvit.checkpoints.convert import convert, read_checkpoint
from fastvit.checkpoints.timm import infer_timm_heads
from fastvit.errors import InputError

WIDTH, HEADS, DEPTH, MLP, PATCH, GRID, LABELS = 32, 4, 2, 48, 4, 3, 5

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not record mean and std", "ignore:.*neither classifier nor pooler", "ignore:.*cannot be recorded"
)


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
    """Every parameter random: with the usual zeros and ones, swapped biases or norms would go unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def save_hf(folder: Path, model_class=ViTForImageClassification, dtype=torch.float32, **options) -> Path:
    randomize(model_class(make_config(**options))).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "hf")


def make_timm(*, head: bool = True, pre_logits: bool = False, qkv_bias: bool = True) -> dict[str, torch.Tensor]:
    """A random timm state dict, written out by hand: the names and shapes are timm's, not this package's."""
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
    """timm's Vision Transformer in plain PyTorch: head or pre_logits output of the class token."""

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
    """The model in transformers, after checking that it found all it looked for and nothing else."""
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


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    ("model_class", "options"),
    [(ViTForImageClassification, {}), (ViTModel, {}), (ViTForImageClassification, {"qkv_bias": False})],
)
def test_hf_there_and_back_keeps_every_bit(tmp_path, suffix, model_class, options):
    source = save_hf(tmp_path / "hf", model_class, **options)
    middle = convert(source, tmp_path / ("middle" + suffix), num_heads=HEADS)
    back = convert(middle, tmp_path / "back", num_heads=HEADS)
    assert_same_bits(source / "model.safetensors", back / "model.safetensors")
    before, after = ViTConfig.from_pretrained(source), ViTConfig.from_pretrained(back)
    for option in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
                   "patch_size", "num_channels", "qkv_bias", "layer_norm_eps", "architectures", "dtype"):  # fmt: skip
        assert getattr(before, option) == getattr(after, option), option


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_timm(tmp_path, dtype):
    source = save_hf(tmp_path / "hf", dtype=dtype)
    back = convert(convert(source, tmp_path / "m.safetensors"), tmp_path / "back", num_heads=HEADS)
    assert_same_bits(source / "model.safetensors", back / "model.safetensors")
    assert load(ViTForImageClassification, back).dtype == dtype


def test_bfloat16_becomes_the_same_float32_in_npz(tmp_path):
    source = save_hf(tmp_path / "hf", dtype=torch.bfloat16)
    back = convert(convert(source, tmp_path / "m.npz"), tmp_path / "back")
    first, second = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(first[name].float(), second[name]) for name in first)


def test_timm_to_npz_and_back_keeps_every_bit(tmp_path):
    save_file(make_timm(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.npz", num_heads=HEADS)
    convert(tmp_path / "b.npz", tmp_path / "c.safetensors")
    assert_same_bits(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


def test_rectangular_patches_and_one_channel_are_kept(tmp_path):
    source = save_hf(tmp_path / "hf", patch_size=[4, 2], image_size=[12, 6], num_channels=1)
    for suffix in (".safetensors", ".npz"):
        middle = convert(source, tmp_path / ("m" + suffix))
        checkpoint = read_checkpoint(middle, num_heads=HEADS)
        assert list(checkpoint.config.patch_size) == [4, 2]
        assert list(checkpoint.config.image_size) == [12, 6]
        assert checkpoint.config.num_channels == 1


# --- the mathematics -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_timm_classifier_gives_the_same_logits_in_transformers(tmp_path, qkv_bias):
    tensors = make_timm(qkv_bias=qkv_bias)
    save_file(tensors, tmp_path / "m.safetensors")
    model = load(ViTForImageClassification, convert(tmp_path / "m.safetensors", tmp_path / "hf", num_heads=HEADS))
    logits = model(make_pixels()).logits
    torch.testing.assert_close(logits, timm_forward(tensors, make_pixels()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, timm_forward(tensors, make_pixels(), heads=HEADS // 2), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_timm_pre_logits_is_the_pooler_of_transformers(tmp_path):
    tensors = make_timm(head=False, pre_logits=True)
    save_file(tensors, tmp_path / "m.safetensors")
    model = load(ViTModel, convert(tmp_path / "m.safetensors", tmp_path / "hf", num_heads=HEADS))
    expected = timm_forward(tensors, make_pixels())
    torch.testing.assert_close(model(make_pixels()).pooler_output, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hf_gives_the_same_logits_in_timm(tmp_path, hf):
    convert(hf, tmp_path / "m.safetensors")
    logits = timm_forward(load_file(tmp_path / "m.safetensors"), make_pixels())
    expected = load(ViTForImageClassification, hf)(make_pixels()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_npz_classifier_gives_the_same_logits_in_transformers(tmp_path, prefix):
    arrays = make_npz()
    stored = {prefix + name: array for name, array in arrays.items()}
    if prefix:
        stored["opt/state/step"] = np.array(7)
    np.savez(tmp_path / "m.npz", **stored)
    model = load(ViTForImageClassification, convert(tmp_path / "m.npz", tmp_path / "hf"))
    assert model.config.num_attention_heads == HEADS
    expected = npz_forward(arrays, make_pixels().permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(model(make_pixels()).logits.numpy(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_npz_of_pretraining_becomes_a_model_with_its_pooler_and_says_that_the_head_is_dropped(tmp_path):
    arrays = make_npz(head=True, pre_logits=True)
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.warns(UserWarning, match="dropped head/kernel and head/bias"):
        convert(tmp_path / "m.npz", tmp_path / "hf")
    output = load(ViTModel, tmp_path / "hf")(make_pixels())
    expected = npz_forward(arrays, make_pixels().permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(output.pooler_output.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_model_without_head_and_pooler_is_written_with_a_warning(tmp_path):
    save_file(make_timm(head=False), tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="add_pooling_layer=False"):
        convert(tmp_path / "m.safetensors", tmp_path / "hf", num_heads=HEADS)
    model, info = ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False, output_loading_info=True)
    assert model.pooler is None
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


# --- what a folder says ----------------------------------------------------------------------------------------------


def test_hf_folder_has_hub_names_and_pytorch_metadata(tmp_path):
    np.savez(tmp_path / "m.npz", **make_npz())
    convert(tmp_path / "m.npz", tmp_path / "hf")
    assert names_in(tmp_path / "hf") == {"config.json", "model.safetensors", "preprocessor_config.json"}
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "vit.encoder.layer.1.attention.attention.query.weight" in file.keys()  # noqa: SIM118
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["ViTForImageClassification"]
    assert config["layer_norm_eps"] == 1e-6
    assert config["encoder_stride"] == PATCH


def save_timm_folder(folder: Path, tensors: dict[str, torch.Tensor], **config) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_mini_patch4_12", **config}))
    return folder


def test_timm_folder_carries_labels_images_and_heads(tmp_path):
    labels = ["cat", "dog", "newt", "owl", "yak"]
    pretrained_cfg = {
        "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bicubic", "input_size": [3, 12, 12],
        "crop_pct": 0.9, "label_names": labels,
    }  # fmt: skip
    source = save_timm_folder(
        tmp_path / "timm", make_timm(), num_classes=LABELS, pretrained_cfg=pretrained_cfg,
        model_args={"num_heads": HEADS}, global_pool="token",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(source, tmp_path / "hf")
    config = ViTConfig.from_pretrained(tmp_path / "hf")
    assert config.num_attention_heads == HEADS
    assert config.id2label == dict(enumerate(labels))
    assert config.label2id == {label: index for index, label in enumerate(labels)}
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "hf")
    assert type(processor).__name__.startswith("ViTImageProcessor")
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]
    assert list(processor.image_std) == [0.1, 0.2, 0.3]
    assert int(processor.resample) == 3
    assert (processor.size["height"], processor.size["width"]) == (12, 12)
    image = np.full((30, 20, 3), 51, np.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 12, 12)
    np.testing.assert_allclose(pixels[0, :, 5, 5], [(0.2 - 0.4) / 0.1, (0.2 - 0.5) / 0.2, (0.2 - 0.6) / 0.3], rtol=1e-5)


def test_timm_labels_of_another_number_are_ignored_with_a_warning(tmp_path):
    source = save_timm_folder(tmp_path / "timm", make_timm(), label_names=["one", "two"])
    with pytest.warns(UserWarning, match="label_names ignored"):
        checkpoint = read_checkpoint(source, num_heads=HEADS)
    assert checkpoint.config.num_labels == LABELS


def test_timm_file_without_image_settings_warns(tmp_path):
    save_file(make_timm(), tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="does not record mean and std"):
        checkpoint = read_checkpoint(tmp_path / "m.safetensors", num_heads=HEADS)
    assert checkpoint.image_mean == checkpoint.image_std == (0.5, 0.5, 0.5)
    assert checkpoint.source_format == "timm"


@pytest.mark.parametrize("wrap", [lambda t: {"model": t, "epoch": 3}, lambda t: {"state_dict": t}, lambda t: t])
def test_torch_files_are_unwrapped(tmp_path, wrap):
    tensors = make_timm()
    torch.save(wrap({"module." + name: tensor for name, tensor in tensors.items()}), tmp_path / "m.pth")
    save_file(tensors, tmp_path / "m.safetensors")
    first, second = (read_checkpoint(tmp_path / name, num_heads=HEADS) for name in ("m.pth", "m.safetensors"))
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(first.state_dict[name], second.state_dict[name]) for name in first.state_dict)


def test_heads_are_64_wide_unless_the_model_is_known(tmp_path):
    for options, width, heads in [({}, 192, 3), ({}, 1280, 16), ({}, 1408, 16), ({"architecture": "test_vit"}, 64, 2)]:
        assert infer_timm_heads(width, options, tmp_path) == heads
    with pytest.raises(InputError, match="num_heads"):
        infer_timm_heads(100, {}, tmp_path)


@pytest.mark.parametrize("size", [30, {"height": 30, "width": 30}])
def test_hf_image_settings_survive_a_rewrite(tmp_path, hf, size):
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "size": size}
    (hf / "preprocessor_config.json").write_text(json.dumps(settings))
    written = json.loads((convert(hf, tmp_path / "copy") / "preprocessor_config.json").read_text())
    assert written["size"] == {"height": 30, "width": 30}
    assert {key: written[key] for key in ("image_mean", "image_std", "resample")} == {
        key: settings[key] for key in ("image_mean", "image_std", "resample")
    }


def test_hf_images_that_are_not_normalised_or_sized_by_an_edge_are_understood(hf):
    (hf / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "size": {"shortest_edge": 30}}))
    checkpoint = read_checkpoint(hf)
    assert (checkpoint.image_mean, checkpoint.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert checkpoint.image_size == (GRID * PATCH, GRID * PATCH)


def test_pooler_of_another_width_is_kept(tmp_path):
    source = save_hf(tmp_path / "hf", ViTModel, pooler_output_size=WIDTH // 2)
    for suffix in (".safetensors", ".npz"):
        middle = convert(source, tmp_path / ("m" + suffix))
        back = convert(middle, tmp_path / f"back_{suffix[1:4]}", num_heads=HEADS)
        assert_same_bits(source / "model.safetensors", back / "model.safetensors")
        assert load(ViTModel, back).config.pooler_output_size == WIDTH // 2


def test_sharded_and_torch_hf_folders_are_read(tmp_path, hf):
    expected = load_file(hf / "model.safetensors")
    model = ViTForImageClassification.from_pretrained(hf)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    (tmp_path / "bin").mkdir()
    torch.save(expected, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "config.json").write_text((hf / "config.json").read_text())
    for folder in ("sharded", "bin"):
        convert(tmp_path / folder, tmp_path / f"{folder}_out")
        assert_same_bits(hf / "model.safetensors", tmp_path / f"{folder}_out" / "model.safetensors")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "meaning"),
    [
        ("blocks.0.ls1.gamma", (WIDTH,), "LayerScale"),
        ("blocks.1.attn.q_norm.weight", (WIDTH // HEADS,), "query and key normalisation"),
        ("blocks.1.attn.k_norm.weight", (WIDTH // HEADS,), "query and key normalisation"),
        ("fc_norm.weight", (WIDTH,), "global pooling"),
        ("reg_token", (1, 4, WIDTH), "register tokens"),
        ("dist_token", (1, 1, WIDTH), "distillation token"),
        ("head_dist.weight", (LABELS, WIDTH), "distillation token"),
        ("norm_pre.weight", (WIDTH,), "pre-norm"),
        ("blocks.0.mlp.fc1_g.weight", (MLP, WIDTH), "SwiGLU"),
        ("attn_pool.latent", (1, 1, WIDTH), "attention pooling"),
    ],
)
def test_timm_features_that_cannot_be_expressed_are_named(tmp_path, name, shape, meaning):
    save_file(make_timm() | {name: torch.zeros(shape)}, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=f"{re.escape(name)}.*{meaning}"):
        read_checkpoint(tmp_path / "m.safetensors", num_heads=HEADS)


def test_packed_swiglu_is_named(tmp_path):
    tensors = make_timm()
    for layer in range(DEPTH):
        tensors[f"blocks.{layer}.mlp.fc2.weight"] = torch.zeros(WIDTH, MLP // 2)
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="SwiGLU"):
        read_checkpoint(tmp_path / "m.safetensors", num_heads=HEADS)


def test_models_without_class_token_are_refused(tmp_path):
    tensors, arrays = make_timm(), make_npz()
    del tensors["cls_token"], arrays["cls"]
    save_file(tensors, tmp_path / "m.safetensors")
    np.savez(tmp_path / "m.npz", **arrays)
    for name in ("m.safetensors", "m.npz"):
        with pytest.raises(InputError, match="class token"):
            read_checkpoint(tmp_path / name, num_heads=HEADS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"global_pool": "avg"}, "global_pool"),
        ({"model_args": {"act_layer": "quick_gelu"}}, "act_layer"),
        ({"model_args": {"no_embed_class": True}}, "no_embed_class"),
        ({"num_classes": LABELS + 1}, "head.weight"),
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}, "image_mean: expected 3 values"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "interpolation"),
        ({"pretrained_cfg": [1]}, "pretrained_cfg"),
    ],
)
def test_timm_configs_that_cannot_be_followed_are_refused(tmp_path, config, message):
    source = save_timm_folder(tmp_path / "timm", make_timm(), **config)
    with pytest.raises(InputError, match=message):
        read_checkpoint(source, num_heads=HEADS)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("conv_root/kernel", "convolutional stem"),
        ("MAPHead_0/probe", "attention pooling"),
        ("Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias", "big_vision"),
    ],
)
def test_npz_features_that_cannot_be_expressed_are_named(tmp_path, name, meaning):
    np.savez(tmp_path / "m.npz", **make_npz(), **{name: np.zeros(3, np.float32)})
    with pytest.raises(InputError, match=f"{name}.*{meaning}"):
        read_checkpoint(tmp_path / "m.npz")


def test_missing_unexpected_and_misshapen_tensors_are_named_with_shapes(tmp_path):
    good = make_timm()
    missing = {name: tensor for name, tensor in good.items() if name != "blocks.1.attn.qkv.bias"}
    cases = [
        (missing, r"blocks\.1\.attn\.qkv\.bias is missing: expected shape \[96\]"),
        (good | {"extra": torch.zeros(7)}, r"extra of shape \[7\] is unexpected"),
        (good | {"norm.bias": torch.zeros(9)}, r"norm\.bias: expected shape \[32\], found \[9\]"),
        (
            good | {"pos_embed": torch.zeros(1, 9, 32)},
            r"pos_embed: expected 1 \+ a square number of positions, found 9",
        ),
        (good | {"norm.bias": torch.zeros(32, dtype=torch.int8)}, r"norm\.bias: expected floating point"),
        ({"fc.weight": torch.zeros(2)}, r"patch_embed\.proj\.weight is missing"),
    ]
    for tensors, message in cases:
        save_file(tensors, tmp_path / "m.safetensors")
        with pytest.raises(InputError, match=message):
            read_checkpoint(tmp_path / "m.safetensors", num_heads=HEADS)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
@pytest.mark.parametrize("kind", ["hf", "npz"])
def test_every_tensor_of_hf_and_npz_is_accounted_for(tmp_path, hf, kind, change):
    if kind == "hf":
        source, tensors, name = hf, load_file(hf / "model.safetensors"), "vit.encoder.layer.1.output.dense.weight"
    else:
        source, tensors = tmp_path / "m.npz", make_npz()
        name = "Transformer/encoderblock_1/MlpBlock_3/Dense_1/kernel"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        name = "surplus"
        tensors[name] = next(iter(tensors.values()))
    else:
        tensors[name] = tensors[name][:-1]
    if kind == "hf":
        save_file({key: value.clone() for key, value in tensors.items()}, hf / "model.safetensors")
    else:
        np.savez(source, **tensors)
    with pytest.raises(InputError, match=re.escape(name)):
        read_checkpoint(source)


def test_masked_image_model_is_refused_by_its_mask_token(tmp_path):
    source = save_hf(tmp_path / "hf", ViTForMaskedImageModeling, encoder_stride=PATCH)
    with pytest.raises(InputError, match="unexpected"):
        read_checkpoint(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "swin"}, "model_type"),
        ({"hidden_size": "wide"}, "hidden_size: expected a whole number"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"patch_size": 0}, "patch_size: expected a whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"intermediate_size": MLP + 1}, "intermediate.dense.weight"),
    ],
)
def test_hf_config_that_does_not_fit_is_refused(hf, change, message):
    config = json.loads((hf / "config.json").read_text()) | change
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        read_checkpoint(hf)


@pytest.mark.parametrize("settings", ['{"image_mean": 3}', '{"size": "big"}', '{"do_rescale": false}', "[]", "{"])
def test_malformed_preprocessor_config_is_refused(hf, settings):
    (hf / "preprocessor_config.json").write_text(settings)
    with pytest.raises(InputError, match="preprocessor_config"):
        read_checkpoint(hf)


def test_number_of_heads_must_fit(tmp_path, hf):
    save_file(make_timm(), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="num_heads"):
        read_checkpoint(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="divisor"):
        read_checkpoint(tmp_path / "m.safetensors", num_heads=5)
    with pytest.raises(InputError, match="has 4 heads, got 8"):
        read_checkpoint(hf, num_heads=8)


def test_npz_heads_that_do_not_fill_the_hidden_size_are_refused(tmp_path):
    arrays = make_npz()
    for name in arrays:
        if "MultiHeadDotProductAttention_1" in name:
            arrays[name] = np.repeat(arrays[name], 2, axis=[0, 1][arrays[name].ndim == 3 and "out" not in name])
    for layer in range(DEPTH):
        name = f"Transformer/encoderblock_{layer}/MultiHeadDotProductAttention_1/out/bias"
        arrays[name] = arrays[name][:WIDTH]
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(InputError, match="found 8 x 8 and 32"):
        read_checkpoint(tmp_path / "m.npz")


@pytest.mark.parametrize("option", ["hidden_act", "pooler_act"])
def test_activation_that_the_target_does_not_have_is_refused(tmp_path, option):
    source = save_hf(tmp_path / "hf", ViTModel, **{option: "relu"})
    for name in ("m.safetensors", "m.npz"):
        with pytest.raises(InputError, match=option):
            convert(source, tmp_path / name)
    assert names_in(tmp_path) == {"hf"}


def test_epsilon_and_gelu_that_the_target_cannot_record_are_told(tmp_path):
    source = save_hf(tmp_path / "hf", layer_norm_eps=1e-12)
    with pytest.warns(UserWarning, match="layer_norm_eps"):
        convert(source, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="hidden_act"):
        convert(source, tmp_path / "m.npz")


# --- hostile and broken files ----------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_with_code_is_refused_and_not_run(tmp_path, hf):
    torch.save({"cls_token": RunsCode(tmp_path / "ran")}, tmp_path / "m.bin")
    with pytest.raises(InputError, match=r"m\.bin"):
        read_checkpoint(tmp_path / "m.bin")
    (hf / "model.safetensors").unlink()
    (tmp_path / "m.bin").rename(hf / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        read_checkpoint(hf)
    assert not (tmp_path / "ran").exists()


def test_npz_with_objects_is_refused_and_not_run(tmp_path):
    np.savez(tmp_path / "m.npz", **make_npz(), extra=np.array([RunsCode(tmp_path / "ran")], dtype=object))
    with pytest.raises(InputError, match=r"m\.npz"):
        read_checkpoint(tmp_path / "m.npz")
    assert not (tmp_path / "ran").exists()


def test_npz_of_integers_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", **(make_npz() | {"cls": np.zeros((1, 1, WIDTH), np.int32)}))
    with pytest.raises(InputError, match="array cls"):
        read_checkpoint(tmp_path / "m.npz")


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz", "m.pth"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, name, kept):
    path = tmp_path / name
    if name == "m.npz":
        np.savez(path, **make_npz())
    elif name == "m.pth":
        torch.save(make_timm(), path)
    else:
        save_file(make_timm(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError, match=re.escape(name)):
        convert(path, tmp_path / "out", num_heads=HEADS)
    assert names_in(tmp_path) == {name}


def test_shard_outside_the_folder_is_refused(tmp_path, hf):
    (hf / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"weight_map": {"vit.embeddings.cls_token": "../secret.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="secret"):
        read_checkpoint(hf)


def test_sources_of_no_known_kind_are_refused(tmp_path, hf):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("nowhere", "notes.txt", "empty", "list.pth"):
        with pytest.raises(InputError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(InputError, match=r"config\.json"):
        read_checkpoint(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    with pytest.raises(InputError, match="found none"):
        read_checkpoint(hf)


# --- the destination -------------------------------------------------------------------------------------------------


def test_existing_destination_is_refused_and_untouched(tmp_path, hf):
    (tmp_path / "m.npz").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    for name in ("m.npz", "folder"):
        with pytest.raises(InputError, match="exists already"):
            convert(hf, tmp_path / name)
    with pytest.raises(InputError, match="not overwritten"):
        convert(hf, tmp_path / "folder", overwrite=True)
    (hf / "runs").mkdir()
    with pytest.raises(InputError, match="not overwritten"):
        convert(hf, hf, overwrite=True)
    assert (tmp_path / "m.npz").read_text() == (tmp_path / "folder" / "mine").read_text() == "mine"
    assert names_in(tmp_path) == {"hf", "m.npz", "folder"}


def test_overwrite_replaces_files_and_checkpoint_folders_whole(tmp_path, hf):
    (tmp_path / "m.npz").write_text("old")
    old = save_hf(tmp_path / "old", intermediate_size=8)
    (old / "pytorch_model.bin").write_text("stale")
    convert(hf, tmp_path / "m.npz", overwrite=True)
    convert(tmp_path / "m.npz", old, overwrite=True)
    assert_same_bits(hf / "model.safetensors", old / "model.safetensors")
    assert names_in(old) == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert names_in(tmp_path) == {"hf", "m.npz", "old"}


def test_checkpoint_can_be_rewritten_in_its_own_place(tmp_path, hf):
    before = load_file(hf / "model.safetensors")
    convert(hf, hf, overwrite=True)
    after = load_file(hf / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.npz"])
@pytest.mark.parametrize("exists", [False, True])
def test_failure_midway_leaves_nothing_behind(tmp_path, hf, monkeypatch, name, exists):
    dest = tmp_path / name
    if exists:
        convert(hf, dest)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*arguments, **options):
        Path(arguments[1] if "safetensors" in str(arguments[1:2]) else arguments[0]).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("fastvit.checkpoints.tensors.save_file", fail)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(hf, dest, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names_in(tmp_path) == {"hf", name} if exists else {"hf"}


def test_folder_comes_back_when_the_last_rename_fails(tmp_path, hf, monkeypatch):
    dest = convert(hf, tmp_path / "out")
    before = (dest / "config.json").read_bytes()
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError("interrupted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="interrupted"):
        convert(hf, dest, overwrite=True)
    assert (dest / "config.json").read_bytes() == before
    assert names_in(tmp_path) == {"hf", "out"}


def test_written_files_have_the_users_permissions(tmp_path, hf):
    folder = convert(hf, tmp_path / "out")
    file = convert(hf, tmp_path / "out.npz")
    umask = os.umask(0)
    os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in (file, *folder.iterdir()):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("m.npz", "timm", r"ending in \.safetensors"),
        ("m", "npz", r"ending in \.npz"),
        ("m.safetensors", "hf", "name of a folder"),
        ("m.pth", None, "name of a folder"),
        ("m", "onnx", "expected hf, timm or npz"),
        ("missing/m", None, "no such folder"),
    ],
)
def test_destinations_that_do_not_suit_the_format_are_refused(tmp_path, hf, name, to, message):
    with pytest.raises(InputError, match=message):
        convert(hf, tmp_path / name, to=to)
    assert names_in(tmp_path) == {"hf"}


def test_folder_names_may_have_dots_and_be_relative(tmp_path, hf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert("hf", "vit_base_patch16_224.augreg_in21k") == Path("vit_base_patch16_224.augreg_in21k")
    assert (tmp_path / "vit_base_patch16_224.augreg_in21k" / "config.json").is_file()
