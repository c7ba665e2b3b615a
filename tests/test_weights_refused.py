"""Checkpoints and destinations that a conversion refuses, with nothing left behind."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_formats import (
    DEPTH,
    EXPECTED_WARNINGS,
    HEADS,
    LABELS,
    MLP,
    PATCH,
    WIDTH,
    assert_same_bits,
    make_npz,
    make_timm,
    names_in,
    save_hf,
    save_timm_folder,
)
from safetensors.torch import load_file, save_file
from transformers import ViTForMaskedImageModeling, ViTModel

from fastvit.checkpoints.convert import convert, read_checkpoint
from fastvit.errors import InputError

pytestmark = pytest.mark.filterwarnings(*EXPECTED_WARNINGS)


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "hf")


# --- unsupported models and configs ----------------------------------------------------------------------------------


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
def test_unsupported_timm_features_are_named(tmp_path, name, shape, meaning):
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
        ({"pretrained_cfg": {"mean": [0.5], "std": [0.5]}}, "image_mean: expected 3 finite numbers"),
        ({"pretrained_cfg": {"interpolation": "random"}}, "interpolation"),
        ({"pretrained_cfg": [1]}, "pretrained_cfg"),
    ],
)
def test_unsupported_timm_configs_are_refused(tmp_path, config, message):
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
def test_unsupported_npz_features_are_named(tmp_path, name, meaning):
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
        ({"fc.weight": torch.zeros(2)}, r"patch_embed\.proj\.weight is missing: expected shape \[D, C, h, w\]$"),
        (
            {f"{part}.{name}": tensor.clone() for part in ("student", "teacher") for name, tensor in good.items()},
            r"missing.*, found student\.patch_embed\.proj\.weight, teacher\.patch_embed\.proj\.weight; .* its prefix",
        ),
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
def test_invalid_hf_config_is_refused(hf, change, message):
    config = json.loads((hf / "config.json").read_text()) | change
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        read_checkpoint(hf)


@pytest.mark.parametrize("settings", ['{"image_mean": 3}', '{"size": "big"}', '{"do_rescale": false}', "[]", "{"])
def test_malformed_preprocessor_config_is_refused(hf, settings):
    (hf / "preprocessor_config.json").write_text(settings)
    with pytest.raises(InputError, match="preprocessor_config"):
        read_checkpoint(hf)


def test_number_of_heads_is_checked(tmp_path, hf):
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
def test_activation_missing_in_the_target_format_is_refused(tmp_path, option):
    source = save_hf(tmp_path / "hf", ViTModel, **{option: "relu"})
    for name in ("m.safetensors", "m.npz"):
        with pytest.raises(InputError, match=option):
            convert(source, tmp_path / name)
    assert names_in(tmp_path) == {"hf"}


def test_epsilon_and_gelu_that_the_target_cannot_record_raise_warnings(tmp_path):
    source = save_hf(tmp_path / "hf", layer_norm_eps=1e-12)
    with pytest.warns(UserWarning, match="layer_norm_eps"):
        convert(source, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="hidden_act"):
        convert(source, tmp_path / "m.npz")


# --- broken files ----------------------------------------------------------------------------------------------------


def test_npz_of_integers_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", **(make_npz() | {"cls": np.zeros((1, 1, WIDTH), np.int32)}))
    with pytest.raises(InputError, match="array cls"):
        read_checkpoint(tmp_path / "m.npz")


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz", "m.pth"])
@pytest.mark.parametrize("fraction", [0, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, name, fraction):
    path = tmp_path / name
    if name == "m.npz":
        np.savez(path, **make_npz())
    elif name == "m.pth":
        torch.save(make_timm(), path)
    else:
        save_file(make_timm(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(InputError, match=re.escape(name)):
        convert(path, tmp_path / "out", num_heads=HEADS)
    assert names_in(tmp_path) == {name}


def test_sources_of_unknown_kinds_are_refused(tmp_path, hf):
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


def test_checkpoint_can_be_rewritten_in_place(tmp_path, hf):
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


def test_folder_is_restored_when_the_last_rename_fails(tmp_path, hf, monkeypatch):
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


def test_permissions_of_written_files_follow_the_umask(tmp_path, hf):
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
def test_destinations_that_do_not_match_the_format_are_refused(tmp_path, hf, name, to, message):
    with pytest.raises(InputError, match=message):
        convert(hf, tmp_path / name, to=to)
    assert names_in(tmp_path) == {"hf"}


def test_folder_names_may_have_dots_and_be_relative(tmp_path, hf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert convert("hf", "vit_base_patch16_224.augreg_in21k") == Path("vit_base_patch16_224.augreg_in21k")
    assert (tmp_path / "vit_base_patch16_224.augreg_in21k" / "config.json").is_file()
