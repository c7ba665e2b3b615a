"""Every file of examples/ runs as a user runs it, with small models and synthetic leaves in place of the hub's.

Each runs in its own process, forked from one server process that has imported the libraries.
"""

import multiprocessing
import re
import socket
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fastvit.data.leaves import CLASSES, draw_leaf

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory):
    environment = {"HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets"))}
    with forked.serve(environment, "datasets", "fastvit.models.heads", "peft", "transformers.trainer"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Save a ViT and a DINOv2 as on the hub, and images: per class 12 for training and 4 for validation."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    vit = transformers.ViTConfig(image_size=32, patch_size=8, intermediate_size=48, **SIZES)
    transformers.ViTForImageClassification(vit).save_pretrained(folder / "vit")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    dinov2 = transformers.Dinov2Config(image_size=28, patch_size=14, mlp_ratio=2, **SIZES)
    transformers.Dinov2Model(dinov2).save_pretrained(folder / "dinov2")
    processor = transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder / "dinov2")
    for split, seeds in (("train", range(12)), ("validation", range(12, 16))):
        for name in CLASSES:
            (folder / "leaves" / split / name).mkdir(parents=True)
            for seed in seeds:
                draw_leaf(name, seed=seed, size=32).save(folder / "leaves" / split / name / f"{seed}.png")
    return {name: folder / name for name in ("vit", "dinov2", "leaves")}


def start(script: str, *arguments: object, **options) -> multiprocessing.Process:
    return forked.start(str(EXAMPLES / f"{script}.py"), *arguments, **options)


@pytest.fixture
def run(tmp_path):
    return lambda *arguments, **more: forked.finish(start(*arguments, log=tmp_path / "log", **more), tmp_path / "log")


def load_validation(folders) -> tuple[torch.Tensor, np.ndarray]:
    files = sorted((folders["leaves"] / "validation").glob("*/*.png"))
    processor = transformers.ViTImageProcessorPil.from_pretrained(folders["vit"])
    pixels = processor([Image.open(file) for file in files], return_tensors="pt").pixel_values
    return pixels, np.array([CLASSES.index(file.parent.name) for file in files])


def read_accuracy(output: str) -> float:
    return float(re.findall(r"validation accuracy:? ([\d.]+)%", output)[-1])


def read_difference(output: str, after: str = "") -> float:
    return float(re.search(rf"{after}.*largest difference (\S+)", output).group(1))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_docstring_and_the_defaults(script, run):
    output = run(script, "--help")
    docstring = (EXAMPLES / f"{script}.py").read_text(encoding="utf-8").split('"""')[1]
    assert docstring in output
    assert re.search(r"--model MODEL\s+hub id or folder \([a-z]+/[\w-]+\)", output)
    assert f"({script}.py)" in (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_swapped_import_trains_as_transformers_does(run, folders, tmp_path):
    """The script with and without the swapped import has the same losses, and transformers loads the saved model."""
    given = ("--model", folders["vit"], "--data-dir", folders["leaves"], "--epochs", 3, "--batch-size", 6)
    given += ("--learning-rate", 3e-3)
    output = run("swap_import", *given, "--output-dir", tmp_path / "out")
    script = (EXAMPLES / "swap_import.py").read_text(encoding="utf-8")
    swapped = re.search(r"^from fastvit import .*  # was: (from transformers import .*)$", script, re.MULTILINE)
    (tmp_path / "original.py").write_text(script.replace(swapped[0], swapped[1]), encoding="utf-8")
    expected = run(tmp_path / "original", *given, "--output-dir", tmp_path / "expected")

    losses, expected_losses = (
        [float(loss) for loss in re.findall(r"'eval_loss': '([\d.]+)'", printed)] for printed in (output, expected)
    )
    assert losses == pytest.approx(expected_losses, abs=2e-3)  # printed with three decimals
    assert len(losses) == 3 and losses[2] < losses[0] - 0.02

    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert model.config.id2label == dict(enumerate(CLASSES))
    pixels, labels = load_validation(folders)
    right = model(pixels).logits.argmax(-1).numpy() == labels
    assert read_accuracy(output) == pytest.approx(100 * right.mean(), abs=0.1)
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"height": 32, "width": 32}


def test_lora_trains_only_adapters_and_classifier(run, folders, tmp_path):
    from peft import PeftModel

    import fastvit

    arguments = ("--data-dir", folders["leaves"] / "train", "--output-dir", tmp_path / "out", "--epochs", 1)
    output = run("lora", "--model", folders["vit"], *arguments, "--rank", 4)  # validation is drawn from train
    assert "trainable params: 1,123 || all params:" in output  # 2 blocks, 2 layers, 2 of 4 by 32; 3 by 32 and 3
    base = fastvit.ViTForImageClassification.from_pretrained(folders["vit"], num_labels=3, ignore_mismatched_sizes=True)
    frozen = {name: parameter.clone() for name, parameter in base.named_parameters()}
    pixels, _ = load_validation(folders)
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out" / "merged").eval()
    logits = adapted(pixels).logits
    torch.testing.assert_close(merged(pixels).logits, logits, rtol=1e-4, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(pixels).logits, logits)
    ours = fastvit.ViTForImageClassification.from_pretrained(tmp_path / "out" / "merged")
    moved = {name for name, parameter in ours.named_parameters() if not torch.equal(parameter, frozen[name])}
    assert {name.split(".")[-2] for name in moved} == {"query", "value", "classifier"}


def test_two_processes_train_the_same_model_as_one(run, folders, tmp_path):
    """Each step uses all 30 images, so that their order does not matter."""
    given = ("--model", folders["vit"], "--data-dir", folders["leaves"], "--epochs", 2)
    alone = run("ddp", *given, "--batch-size", 30, "--output-dir", tmp_path / "one")
    assert re.search(r"epoch 2: validation accuracy [\d.]+% of 6 images", alone)
    assert f"saved: {tmp_path / 'one'} (trained by 1 processes)" in alone

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    processes = [
        start(
            "ddp", *given, "--batch-size", 15, "--output-dir", tmp_path / "two",
            log=log, environment={**torchrun, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    together, silent = (forked.finish(process, log) for process, log in zip(processes, logs, strict=True))
    assert "(trained by 2 processes)" in together and "saved:" not in silent
    assert re.findall("validation accuracy.*", together) == re.findall("validation accuracy.*", alone)
    one, two = (
        transformers.ViTForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")
    )
    for name, tensor in one.items():
        if not name.endswith("k_proj.bias"):  # its gradient is only rounding error, which Adam scales up
            torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_compiled_model_computes_the_same_and_is_timed(run, folders):
    output = run("compile", "--model", folders["vit"], "--batch-size", 2, "--repeats", 1, "--compiler", "aot_eager")
    assert read_difference(output, "logits: ") < 1e-5
    for name in ("inference", "training step"):
        assert re.search(rf"^ *{name} +\d+\.\d+ uncompiled +\d+\.\d+ compiled$", output, re.MULTILINE)


@pytest.mark.parametrize("given", ["a synthetic leaf", "files"])
def test_optimized_dinov2_has_the_same_features(given, run, folders):
    files = sorted((folders["leaves"] / "validation").glob("*/12.png")) if given == "files" else []
    output = run("optimize_dinov2", *files, "--model", folders["dinov2"], "--repeats", 1)
    assert "replaced: 2 blocks of DINOv2 (17,216 parameters)" in output
    assert f"features: [{len(files) or 1}, 5, 32]" in output and read_difference(output, "features: ") < 1e-5
    assert re.search(r"milliseconds on cpu: \d+\.\d+ before, \d+\.\d+ after", output)
    assert "restored: the same bits as before" in output
