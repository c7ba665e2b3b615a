"""Conversion of checkpoints between the Hugging Face, timm and npz formats: bits, logits and configs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_formats import (
    EXPECTED_WARNINGS,
    GRID,
    HEADS,
    LABELS,
    PATCH,
    WIDTH,
    assert_same_bits,
    load,
    make_npz,
    make_pixels,
    make_timm,
    names_in,
    npz_forward,
    save_hf,
    save_timm_folder,
    timm_forward,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, ViTModel

from fastvit.checkpoints.convert import convert, read_checkpoint
from fastvit.checkpoints.timm import infer_timm_heads
from fastvit.errors import InputError

pytestmark = pytest.mark.filterwarnings(*EXPECTED_WARNINGS)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "hf")


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize(
    ("model_class", "options"),
    [(ViTForImageClassification, {}), (ViTModel, {}), (ViTForImageClassification, {"qkv_bias": False})],
)
def test_hf_round_trip_preserves_every_bit(tmp_path, suffix, model_class, options):
    source = save_hf(tmp_path / "hf", model_class, **options)
    middle = convert(source, tmp_path / ("middle" + suffix), num_heads=HEADS)
    back = convert(middle, tmp_path / "back", num_heads=HEADS)
    assert_same_bits(source / "model.safetensors", back / "model.safetensors")
    before, after = ViTConfig.from_pretrained(source), ViTConfig.from_pretrained(back)
    for option in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
                   "patch_size", "num_channels", "qkv_bias", "layer_norm_eps", "architectures", "dtype"):  # fmt: skip
        assert getattr(before, option) == getattr(after, option), option


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_a_round_trip_through_timm(tmp_path, dtype):
    source = save_hf(tmp_path / "hf", dtype=dtype)
    back = convert(convert(source, tmp_path / "m.safetensors"), tmp_path / "back", num_heads=HEADS)
    assert_same_bits(source / "model.safetensors", back / "model.safetensors")
    assert load(ViTForImageClassification, back).dtype == dtype


def test_bfloat16_becomes_equal_float32_in_npz(tmp_path):
    source = save_hf(tmp_path / "hf", dtype=torch.bfloat16)
    back = convert(convert(source, tmp_path / "m.npz"), tmp_path / "back")
    first, second = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    assert all(torch.equal(first[name].float(), second[name]) for name in first)


def test_timm_round_trip_through_npz_preserves_every_bit(tmp_path):
    save_file(make_timm(), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.npz", num_heads=HEADS)
    convert(tmp_path / "b.npz", tmp_path / "c.safetensors")
    assert_same_bits(tmp_path / "a.safetensors", tmp_path / "c.safetensors")


def test_rectangular_patches_and_one_channel_are_preserved(tmp_path):
    source = save_hf(tmp_path / "hf", patch_size=[4, 2], image_size=[12, 6], num_channels=1)
    for suffix in (".safetensors", ".npz"):
        middle = convert(source, tmp_path / ("m" + suffix))
        checkpoint = read_checkpoint(middle, num_heads=HEADS)
        assert list(checkpoint.config.patch_size) == [4, 2]
        assert list(checkpoint.config.image_size) == [12, 6]
        assert checkpoint.config.num_channels == 1


# --- outputs ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_timm_classifier_computes_the_same_logits_in_transformers(tmp_path, qkv_bias):
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
def test_hf_classifier_computes_the_same_logits_in_timm(tmp_path, hf):
    convert(hf, tmp_path / "m.safetensors")
    logits = timm_forward(load_file(tmp_path / "m.safetensors"), make_pixels())
    expected = load(ViTForImageClassification, hf)(make_pixels()).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_npz_classifier_computes_the_same_logits_in_transformers(tmp_path, prefix):
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
def test_pretraining_npz_becomes_a_model_with_pooler_and_its_head_is_dropped_with_a_warning(tmp_path):
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


# --- contents of folders ---------------------------------------------------------------------------------------------


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


def test_labels_image_settings_and_heads_of_a_timm_folder_are_read(tmp_path):
    labels = ["cat", "dog", "newt", "owl", "yak"]
    pretrained_cfg = {
        "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bicubic", "input_size": [3, 12, 12],
        "crop_pct": 1.0, "label_names": labels,
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


def test_a_crop_of_timm_is_lost_with_a_warning(tmp_path):
    source = save_timm_folder(tmp_path / "timm", make_timm(), pretrained_cfg={"crop_pct": 0.9})
    with pytest.warns(UserWarning, match=r"crop_pct 0.9 cannot be recorded: whole images are resized"):
        read_checkpoint(source, num_heads=HEADS)


def test_timm_labels_of_the_wrong_number_are_ignored_with_a_warning(tmp_path):
    source = save_timm_folder(tmp_path / "timm", make_timm(), label_names=["one", "two"])
    with pytest.warns(UserWarning, match="label_names ignored"):
        checkpoint = read_checkpoint(source, num_heads=HEADS)
    assert checkpoint.config.num_labels == LABELS


def test_timm_file_without_image_settings_warns(tmp_path):
    save_file(make_timm(), tmp_path / "m.safetensors")
    message = "does not record mean and std of its images and how it pools its tokens; assumed: 0.5 and the class token"
    with pytest.warns(UserWarning, match=message):
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


def test_heads_are_those_of_the_timm_model_of_this_size_and_otherwise_required(tmp_path):
    known = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}
    assert {width: infer_timm_heads(width, {}, tmp_path) for width in known} == known
    assert infer_timm_heads(64, {"architecture": "test_vit"}, tmp_path) == 2
    with pytest.raises(InputError, match=r"num_heads.*timm has no model of hidden size 100"):
        infer_timm_heads(100, {}, tmp_path)
    with pytest.raises(InputError, match=r"num_heads.*or 2 if the head dim is the usual 64"):
        infer_timm_heads(128, {}, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("width", [128, 192])  # timm has no model of hidden size 128, and one of 192 with 3 heads
def test_heads_that_are_not_64_wide_survive_a_round_trip_through_timm(tmp_path, width):
    source = save_hf(tmp_path / "hf", hidden_size=width, num_attention_heads=8)
    with pytest.warns(UserWarning, match=f"hidden size {width} with num_heads=8"):
        convert(source, tmp_path / "m.safetensors")
    back = convert(tmp_path / "m.safetensors", tmp_path / "back")
    assert ViTConfig.from_pretrained(back).num_attention_heads == 8
    before, after = (load(ViTForImageClassification, folder)(make_pixels()).logits for folder in (source, back))
    torch.testing.assert_close(before, after)
    with pytest.raises(InputError, match=r"num_heads: .* has 8 heads, got 4"):
        convert(tmp_path / "m.safetensors", tmp_path / "other", num_heads=4)


@pytest.mark.parametrize("heads", ["x", "-1", "0", "9" * 400])
def test_a_damaged_record_of_the_heads_is_ignored(tmp_path, heads):
    save_file(make_timm(), tmp_path / "m.safetensors", metadata={"num_heads": heads})
    assert read_checkpoint(tmp_path / "m.safetensors", num_heads=HEADS).config.num_attention_heads == HEADS


@pytest.mark.parametrize("size", [30, {"height": 30, "width": 30}])
def test_hf_image_settings_survive_a_rewrite(tmp_path, hf, size):
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "size": size}
    (hf / "preprocessor_config.json").write_text(json.dumps(settings))
    written = json.loads((convert(hf, tmp_path / "copy") / "preprocessor_config.json").read_text())
    assert written["size"] == {"height": 30, "width": 30}
    assert {key: written[key] for key in ("image_mean", "image_std", "resample")} == {
        key: settings[key] for key in ("image_mean", "image_std", "resample")
    }


def test_image_settings_come_from_the_config_where_the_folder_has_no_preprocessor(tmp_path, hf):
    config = json.loads((hf / "config.json").read_text())
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}
    (hf / "config.json").write_text(json.dumps(config | settings))
    convert(hf, tmp_path / "dest")
    written = json.loads((tmp_path / "dest" / "preprocessor_config.json").read_text())
    assert {name: written[name] for name in settings} == settings


def test_hf_image_settings_without_normalisation_and_with_a_shortest_edge_are_read(hf):
    (hf / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "size": {"shortest_edge": 30}}))
    checkpoint = read_checkpoint(hf)
    assert (checkpoint.image_mean, checkpoint.image_std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert checkpoint.image_size == (GRID * PATCH, GRID * PATCH)


def test_pooler_of_another_width_is_preserved(tmp_path):
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
