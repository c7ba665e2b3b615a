"""What users see when a name, an option or a model is not what they meant: one line, at once, with the way out."""

from __future__ import annotations

import importlib.util
import re
import socket
import time

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

import fastvit
from fastvit import cli
from fastvit.benchmarks import command
from fastvit.errors import InputError
from fastvit.models.loading import load_pretrained
from fastvit.report import figures

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
NAMES = ["black rot", "healthy", "rust"]


def save_model(folder, names=NAMES, **options):
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    fastvit.ViTForImageClassification(ViTConfig(**CONFIG, **labels, **options)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "leaf.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def forbid_network(monkeypatch):
    """The hub counts as reachable, and a connection to anything fails the test."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail(*args, **kwargs):
        raise AssertionError(f"connects to {args}")

    monkeypatch.setattr(socket, "create_connection", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)


# --- models that do not exist ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs/leavs", "./runs/leavs", "runs/leavs/", "rnus/leaves", "leavs"])
def test_missing_folder_is_an_error_at_once_that_names_the_nearest(name, tmp_path, monkeypatch, forbid_network, capsys):
    save_model(tmp_path / "runs" / "leaves")
    monkeypatch.chdir(tmp_path)
    if name == "leavs":
        monkeypatch.chdir("runs")
    if name == "rnus/leaves":
        name = "./rnus/leaves"
    capsys.readouterr()
    assert cli.main(["predict", name, "x.jpg"]) == 2
    error = capsys.readouterr().err
    nearest = "leaves" if name == "leavs" else "runs/leaves"
    assert error.startswith("error: model: expected a hub id (owner/name) or a folder, found no folder")
    assert f"did you mean '{nearest}'?" in error and error.count("\n") == 1


def test_a_name_beside_checkpoints_is_a_folder_even_if_none_is_similar(tmp_path, monkeypatch, forbid_network, capsys):
    save_model(tmp_path / "runs" / "leaves")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["predict", "runs/other", "x.jpg"]) == 2
    assert "found no folder 'runs/other'\n" in capsys.readouterr().err


def test_unreachable_hub_is_asked_once_and_no_foreign_options_are_recommended(image, monkeypatch, capsys):
    attempts = []

    def refuse(address, *rest, **options):
        attempts.append(address)
        raise OSError(111, "Connection refused")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    begun = time.monotonic()
    assert cli.main(["predict", "nobody/nothing", str(image)]) == 2
    error = capsys.readouterr().err
    assert time.monotonic() - begun < 15 and len(attempts) <= 2  # huggingface_hub may make one of its own
    assert "found no folder 'nobody/nothing', and cannot get it from the hub" in error
    assert "--model" not in error and "--from-scratch" not in error


def test_finetune_without_a_network_recommends_its_own_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", "--dataset", "generated", "--model", "nobody/nothing", "--cpu"]) == 2
    assert "use --model FOLDER (a checkpoint on this machine) or --from-scratch SIZE" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/no/such/folder", "./leavs", "a/b/c"])
def test_from_pretrained_of_a_missing_folder_speaks_of_folders(name, forbid_network):
    with pytest.raises(InputError, match="found no folder") as raised:
        fastvit.ViTForImageClassification.from_pretrained(name)
    assert isinstance(raised.value, OSError) and "repo" not in str(raised.value).lower()


def test_unfinished_run_names_its_last_checkpoint(image, tmp_path, capsys):
    for step in (5, 10, 9):
        save_model(tmp_path / "run" / f"checkpoint-{step}")
    assert cli.main(["predict", str(tmp_path / "run"), str(image)]) == 2
    assert f"use {tmp_path / 'run' / 'checkpoint-10'}, its last checkpoint" in capsys.readouterr().err


def test_file_as_a_model_is_refused_with_the_command_that_converts_it(image, capsys):
    assert cli.main(["predict", str(image), "x.jpg"]) == 2
    assert "got the file" in capsys.readouterr().err


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("predict m x.jpg --tpo 3", "--top"),
        ("predict m x.jpg --batch_size=3", "--batch-size"),
        ("finetune --data_dir x --lerning-rate 3", "--data-dir, --learning-rate"),
        ("evaluate m --dataste beans", "--dataset"),
        ("convert a b --hedas 3", "--heads"),
        ("benchmark --qick", "--quick"),
    ],
)
def test_misspelt_options_name_the_nearest(arguments, hint, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments.split())
    assert raised.value.code == 2
    assert f"; did you mean {hint}?\n" in capsys.readouterr().err


def test_unknown_option_that_is_similar_to_none_has_no_hint(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "m", "x.jpg", "--zzz"])
    assert "did you mean" not in capsys.readouterr().err


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["multi-label", "one logit", "softmax"])
def test_demo_attention_and_predictor_show_the_same_probabilities(kind, tmp_path, image, capsys, monkeypatch):
    names = NAMES[:1] if kind == "one logit" else NAMES
    options = {"problem_type": "multi_label_classification"} if kind == "multi-label" else {}
    folder = save_model(tmp_path / "model", names, **options)
    from fastvit.serve.attention import classify_with_attention, preprocess_image

    with fastvit.Predictor(folder, "cpu") as predictor:
        expected = predictor(image)
        pixels = preprocess_image(predictor, Image.open(image))
        found = classify_with_attention(predictor.model, pixels).probabilities
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-6)
    assert (abs(found.sum() - 1) < 1e-5) == (kind == "softmax")
    titles = []
    monkeypatch.setattr(figures, "_draw_text", lambda draw, position, text, **options: titles.append(text))
    assert cli.main(["attention", str(folder), str(image), "--device", "cpu", "-o", str(tmp_path / "a.png")]) == 0
    assert titles[0].startswith(f"{expected.label} {expected.score:.2%}")
    assert f"{expected.label} {expected.score:.2%}" in capsys.readouterr().out


def test_attention_sheet_has_a_title_above_everything(image):
    attentions = np.random.default_rng(0).dirichlet(np.ones(5), (2, 2, 5)).astype(np.float32)
    plain, titled = (
        np.asarray(figures.draw_attention_sheet(Image.open(image), attentions, (2, 2), title=title))
        for title in ("", "rust 97.00%")
    )
    added = titled.shape[0] - plain.shape[0]
    assert added > 0 and (titled[:added] < 128).any()
    np.testing.assert_array_equal(titled[added + 8 :], plain[8:])


def test_no_bar_of_loaded_weights_is_shown(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)  # a training run hides all bars
    folder = save_model(tmp_path / "model")
    fastvit.ViTForImageClassification.from_pretrained(folder)
    before = capfd.readouterr().err
    assert "Loading weights" in before
    load_pretrained(str(folder))
    assert "Loading weights" not in capfd.readouterr().err
    fastvit.ViTForImageClassification.from_pretrained(folder)  # a library's user sees transformers' own bar, as before
    assert capfd.readouterr().err.count("Loading weights") == before.count("Loading weights")


def test_benchmark_writes_into_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run_tasks", lambda tasks, settings, save: [])
    monkeypatch.setattr(command, "measure_ceilings", lambda *args: {})
    assert command.main(["kernels", "--quick", "--device", "cpu", "--only", "layer_norm "]) == 0
    folder = re.search(r"results: (\S+)", capsys.readouterr().out)
    assert folder is not None and folder[1].startswith("runs/benchmark/")


# --- quantised models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_quantised_model_is_not_saved_in_a_format_that_cannot_hold_it(kind, tmp_path):
    if kind == "int8" and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    model = fastvit.quantize(fastvit.ViTForImageClassification(ViTConfig(**CONFIG)).eval(), kind)
    with pytest.raises(InputError, match=rf"quantised to {kind}.*save it before fastvit.quantize.*torch\.save"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- attention maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_plain", [False, True], ids=["fused", "plain"])
@pytest.mark.parametrize("is_list", [False, True], ids=["batch", "images of two sizes"])
def test_returned_attention_maps_have_the_gradients_of_eager_attention(is_plain, is_list):
    torch.manual_seed(0)
    model = fastvit.ViTForImageClassification(ViTConfig(**CONFIG))
    if is_plain:
        fastvit.restore(model)
    images = [torch.randn(3, 32, 32), torch.randn(3, 16, 24)] if is_list else torch.randn(2, 3, 32, 32)
    gradients = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        output = model(images, output_attentions=True)
        maps = [each for layer in output.attentions for each in (layer if is_list else [layer])]
        gradients[implementation] = torch.autograd.grad(output.logits[:, 0].sum(), maps)
    for ours, theirs in zip(gradients["sdpa"], gradients["eager"], strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(ours, theirs)


def test_attention_maps_of_registered_attention_have_gradients():
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**CONFIG, attn_implementation="fastvit"))
    output = model(torch.randn(2, 3, 32, 32), output_attentions=True)
    gradients = torch.autograd.grad(output.last_hidden_state[:, 0].square().sum(), output.attentions)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
