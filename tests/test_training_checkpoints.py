"""Checkpoints as training scripts write them: averages, options, names of wrappers; and the files that are refused."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import pytest
import torch
from checkpoint_formats import HEADS, make_timm
from timm_import import import_timm

from fastvit.checkpoints.convert import convert, read_checkpoint
from fastvit.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not record mean and std")


def read_norm(path: Path) -> float:
    """The first weight of the final norm: tells which of two state dicts was read."""
    return read_checkpoint(path, num_heads=HEADS).state_dict["vit.layernorm.weight"][0].item()


def fill_norm(value: float, prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = make_timm()
    tensors["norm.weight"].fill_(value)
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_moving_averages_are_read_as_by_timm(tmp_path, key):
    torch.save({"epoch": 3, "state_dict": fill_norm(1.0), key: fill_norm(2.0)}, tmp_path / "last.pth.tar")
    load_state_dict = import_timm("timm.models._helpers").load_state_dict
    with pytest.warns(UserWarning, match=f"read {key}, the moving averages of the weights, as timm does"):
        read = read_norm(tmp_path / "last.pth.tar")
    assert read == load_state_dict(tmp_path / "last.pth.tar")["norm.weight"][0].item() == 2.0


def test_an_empty_moving_average_is_ignored(tmp_path):
    torch.save({"state_dict": fill_norm(1.0), "state_dict_ema": None}, tmp_path / "last.pth")
    assert read_norm(tmp_path / "last.pth") == 1.0


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".pth"])
def test_options_of_the_training_script_do_not_hinder(tmp_path, suffix):
    options = argparse.Namespace(model="vit_mini", lr=1e-3, betas=(0.9, 0.999), resume=None)
    torch.save({"state_dict": fill_norm(1.5), "args": options}, tmp_path / f"m{suffix}")
    assert read_norm(tmp_path / f"m{suffix}") == 1.5


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod."]
)
def test_names_of_wrappers_are_removed(tmp_path, prefix):
    torch.save({"state_dict": fill_norm(1.5, prefix)}, tmp_path / "m.pth")
    assert read_norm(tmp_path / "m.pth") == 1.5


def test_compiled_blocks_and_averaged_models_are_read(tmp_path):
    compiled = {name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in fill_norm(1.5).items()}
    torch.save(compiled, tmp_path / "compiled.pth")
    torch.save({"model_ema": {"n_averaged": torch.tensor(7), **fill_norm(2.5, "module.")}}, tmp_path / "averaged.pth")
    assert read_norm(tmp_path / "compiled.pth") == 1.5
    assert read_norm(tmp_path / "averaged.pth") == 2.5


def test_names_with_and_without_a_wrapper_are_refused(tmp_path):
    tensors = {("module." if name.startswith("blocks.") else "") + name: value for name, value in make_timm().items()}
    torch.save(tensors, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"names begin with 'module.', such as module.blocks.*others do not, such as"):
        read_checkpoint(tmp_path / "m.pth", num_heads=HEADS)
    torch.save(make_timm() | {"_orig_mod.norm.weight": torch.ones(32)}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"two tensors have the same name without '_orig_mod\.'"):
        read_checkpoint(tmp_path / "m.pth", num_heads=HEADS)


def test_objects_in_a_file_are_named_with_the_way_out(tmp_path):
    torch.save({"state_dict": make_timm(), "when": datetime.datetime(2026, 1, 1)}, tmp_path / "m.pth.tar")
    with pytest.raises(InputError, match=r"\(datetime.datetime\). If you trust the file.*weights_only=False") as raised:
        read_checkpoint(tmp_path / "m.pth.tar", num_heads=HEADS)
    assert "torch.load('m.pth.tar'" in str(raised.value)


def test_weights_under_another_key_are_named(tmp_path):
    torch.save({"teacher": make_timm(), "student": make_timm(), "epoch": 3}, tmp_path / "dino.pth")
    with pytest.raises(InputError, match=r"found tensors under \['teacher', 'student'\].*\['teacher'\], 'weights.pth'"):
        read_checkpoint(tmp_path / "dino.pth", num_heads=HEADS)


def test_a_folder_to_write_is_not_called_like_a_checkpoint(tmp_path):
    torch.save(make_timm(), tmp_path / "m.pth")
    with pytest.raises(InputError, match="dest: expected the name of a folder for hf"):
        convert(tmp_path / "m.pth", tmp_path / "out.pth.tar", num_heads=HEADS)
