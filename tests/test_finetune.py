"""Fine-tuning from the command's options to the files of a run, and its errors."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig

import fastvit
from fastvit import cli
from fastvit.adapters.backbones import compute_depths
from fastvit.data import leaves
from fastvit.report.run_log import RunLog
from fastvit.train.build import load_model
from fastvit.train.finetune import main
from fastvit.train.options import parse_options
from fastvit.train.training import FineTuner

TINY = ["--from-scratch", "micro", "--image-size", "16", "--patch-size", "8", "--precision", "fp32", "--cpu"]
SHORT = [
    "--max-steps",
    "4",
    "--eval-steps",
    "2",
    "--batch-size",
    "4",
    "--logging-steps",
    "1",
    "--learning-rate",
    "1e-3",
]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def make_folder(root: Path, per_class: int = 4, classes=leaves.CLASSES, size: int = 24) -> Path:
    for label in classes:
        (root / label).mkdir(parents=True)
        for seed in range(per_class):
            drawn = label if label in leaves.CLASSES else "healthy"
            leaves.draw_leaf(drawn, seed=seed, size=size).save(root / label / f"{seed}.png")
    return root


def read_log(folder: Path) -> RunLog:
    log = RunLog(folder)
    log.read()
    return log


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """One short run on a folder with validation and test images, shared by several tests."""
    root = tmp_path_factory.mktemp("run")
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        make_folder(root / "images" / split, count)
    options = ["--data-dir", str(root / "images"), "--output-dir", str(root / "out"), *TINY, *SHORT]
    assert main([*options, "--layer-decay", "0.7", "--label-smoothing", "0.1", "--warmup", "1"]) == 0
    return root


def test_run_writes_the_files_of_the_usual_recipe(finished_run):
    out = finished_run / "out"
    train, evaluation, test, state = (
        json.loads((out / name).read_text())
        for name in ("train_results.json", "eval_results.json", "test_results.json", "trainer_state.json")
    )
    assert math.isfinite(train["train_loss"]) and train["train_samples_per_second"] > 0
    assert 0 <= evaluation["eval_accuracy"] <= 1 and 0 <= evaluation["eval_macro_f1"] <= 1
    assert 0 <= test["test_accuracy"] <= 1
    assert state["global_step"] == 4 and len(state["log_history"]) >= 6
    assert state["best_model_checkpoint"] is not None
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert Image.open(out / "examples.png").size[0] > 100
    text = (out / "classification_report.txt").read_text()
    assert "bean_rust" in text and "Confusion matrix" in text and text.count("6 images") == 2
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "trained from scratch on 18 images" in card


def test_best_checkpoint_is_the_model_that_is_saved(finished_run):
    out = finished_run / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    saved = load_file(out / "model.safetensors")
    best = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in saved)


def test_result_is_loaded_by_the_transformers_pipeline(finished_run):
    out, image = finished_run / "out", finished_run / "images" / "test" / "bean_rust" / "0.png"
    pipe = transformers.pipeline("image-classification", str(out), device="cpu")
    answer = {entry["label"]: entry["score"] for entry in pipe(str(image))}
    assert answer.keys() == set(leaves.CLASSES)
    pixels = torch.from_numpy(np.array(Image.open(image).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)))[
        None
    ]
    ours = fastvit.ViTForImageClassification.from_pretrained(out)
    scores = ours(pixels).logits.softmax(-1)[0]  # uint8 pixels, normalised by the model as in training
    for index, name in ours.config.id2label.items():
        assert abs(answer[name] - scores[index].item()) < 1e-4


def test_config_file_of_a_run_repeats_it_bit_for_bit(finished_run, tmp_path):
    assert main(["--config", str(finished_run / "out" / "config.yaml"), "--output-dir", str(tmp_path / "again")]) == 0
    first, again = (load_file(folder / "model.safetensors") for folder in (finished_run / "out", tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_predict_names_the_classes(finished_run, capsys):
    images = [str(finished_run / "images" / "test" / name / "0.png") for name in leaves.CLASSES]
    assert cli.main(["predict", str(finished_run / "out"), *images, "--top", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == images[0] and len(printed) == 9
    assert cli.main(["predict", str(finished_run / "out"), images[0], "--json", "--device", "cpu"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert abs(sum(entry["probability"] for entry in answer["classes"]) - 1) < 1e-4


def test_evaluate_repeats_the_runs_own_metrics(finished_run, capsys):
    folder = str(finished_run / "images")
    assert cli.main(["evaluate", str(finished_run / "out"), "--data-dir", folder, "--json", "--device", "cpu"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    expected = json.loads((finished_run / "out" / "eval_results.json").read_text())
    assert metrics["split"] == "validation"
    assert abs(metrics["accuracy"] - expected["eval_accuracy"]) < 1e-9


def test_attention_draws_a_sheet(finished_run, tmp_path):
    image = str(finished_run / "images" / "test" / "bean_rust" / "0.png")
    sheet = tmp_path / "map.png"
    assert cli.main(["attention", str(finished_run / "out"), image, "-o", str(sheet), "--device", "cpu"]) == 0
    assert min(Image.open(sheet).size) > 100


def test_pretrained_checkpoint_is_fine_tuned_with_a_new_head(tmp_path, capsys):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    backbone = fastvit.ViTModel(config)
    backbone.save_pretrained(tmp_path / "backbone")
    make_folder(tmp_path / "images")
    options = ["--data-dir", "images", "--model", "backbone", "--output-dir", "out", *SHORT, "--cpu"]
    assert main([*options, "--freeze-backbone", "--precision", "fp32", "--gradient-checkpointing"]) == 0
    tuned = load_file(tmp_path / "out" / "model.safetensors")
    assert tuned["classifier.weight"].shape == (3, 32)
    assert tuned["classifier.bias"].abs().sum() > 0
    for name, tensor in backbone.state_dict().items():
        if not name.startswith("pooler."):
            assert torch.equal(tuned[f"vit.{name}"], tensor), name


def test_pretrained_checkpoint_is_fine_tuned_at_another_size(tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    fastvit.ViTModel(config).save_pretrained(tmp_path / "backbone")
    make_folder(tmp_path / "images")
    options = ["--data-dir", "images", "--model", "backbone", "--image-size", "32", "--output-dir", "out"]
    assert main([*options, *SHORT, "--cpu", "--no-augment"]) == 0
    tuned = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert tuned.config.image_size == 32 and tuned.vit.embeddings.position_embeddings.shape == (1, 17, 32)


@pytest.mark.parametrize("start", ["scratch", "ViT", "Dinov2"])
def test_images_that_are_not_square_go_the_whole_way(start, tmp_path, capsys):
    make_folder(tmp_path / "images")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    options = ["--from-scratch", "micro", "--patch-size", "8"]
    if start != "scratch":
        model_class = getattr(transformers, f"{start}Model")
        before = model_class(model_class.config_class(**sizes))
        before.save_pretrained("before")
        options = ["--model", "before"]
    argv = ["--data-dir", "images", *options, "--image-size", "16", "40", "--output-dir", "out", "--cpu", *SHORT]
    if start == "ViT":
        expected = before.embeddings.interpolate_pos_encoding(torch.empty(1, 11, 32), 16, 40)
        found = load_model(parse_options(argv), ["a", "b"]).vit.embeddings.position_embeddings
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert main([*argv, "--precision", "fp32"]) == 0
    assert " images of 16x40, " in capsys.readouterr().out
    assert json.loads(Path("out/preprocessor_config.json").read_text())["size"] == {"height": 16, "width": 40}
    path = str(next(Path("images").rglob("*.png")))
    pixels = np.array(Image.open(path).convert("RGB").resize((40, 16), Image.Resampling.BILINEAR))
    with fastvit.Predictor("out", "cpu") as predictor, torch.no_grad():
        probabilities = predictor.model(torch.from_numpy(pixels)[None]).logits.softmax(-1)[0]
        np.testing.assert_allclose(predictor(path).probabilities, probabilities, atol=1e-5)
    for command in (["evaluate", "out", "--data-dir", "images"], ["attention", "out", path]):
        assert cli.main([*command, "--device", "cpu"]) == 0
    assert main([*argv, "--precision", "fp32", "--max-steps", "6", "--resume"]) == 0
    assert main([*argv, "--image-size", "16", "24", "40", "--overwrite"]) == 2
    assert "expected one number, or height and width, got [16, 24, 40]" in capsys.readouterr().err


def test_resume_continues_where_the_run_stopped(tmp_path):
    make_folder(tmp_path / "images")
    options = ["--data-dir", "images", "--output-dir", "out", *TINY, *SHORT]
    assert main(options) == 0
    assert main([*options, "--max-steps", "6", "--resume"]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    log = read_log(tmp_path / "out")
    assert [step for step, _ in log.get_curve("loss")] == [1, 2, 3, 4, 5, 6] and log.end["outcome"] == "finished"
    assert log.get_curve("eval_accuracy") == [
        (entry["step"], entry["eval_accuracy"]) for entry in state["log_history"] if "eval_accuracy" in entry
    ]


def test_second_run_needs_overwrite_and_then_replaces_the_first(tmp_path, capsys):
    make_folder(tmp_path / "images")
    options = ["--data-dir", "images", "--output-dir", "out", *TINY, *SHORT]
    assert main(options) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert main(options) == 2
    assert "already holds a run; give --overwrite, --resume or another folder" in last_line(capsys)
    is_same = (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert is_same
    assert main([*options, "--overwrite", "--max-steps", "2"]) == 0
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2"}
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    make_folder(tmp_path / "images")
    step = FineTuner.training_step

    def poisoned_from_step_4_on(self, model, *args, **kwargs):
        if self.state.global_step == 3:
            with torch.no_grad():
                model.classifier.bias.fill_(float("nan"))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(FineTuner, "training_step", poisoned_from_step_4_on)
    # The loss is logged every 100 steps, but checked before every save.
    assert main(["--data-dir", "images", "--output-dir", "out", *TINY, *SHORT, "--logging-steps", "100"]) == 2
    message = last_line(capsys)
    assert message.startswith(
        "error: training: the loss is nan at step 4; the last good checkpoint is out/checkpoint-2"
    )
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())
    log = read_log(tmp_path / "out")
    assert log.end["outcome"] == "failed" and "the loss is nan" in log.end["reason"]
    assert log.logs[-1]["step"] == 4 and log.logs[-1]["loss"] is None


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
def test_interrupt_saves_a_checkpoint_and_prints_how_to_continue(tmp_path):
    make_folder(tmp_path / "images")
    command = [sys.executable, "-m", "fastvit.train.finetune", "--data-dir", "images", "--output-dir", "out", *TINY]
    command += ["--max-steps", "100000", "--eval-steps", "100000", "--batch-size", "4", "--logging-steps", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen = ""
        while "loss" not in seen:  # the progress bar shows it after the first step
            seen += process.stderr.read(1) or pytest.fail(f"ended early: {seen}")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "is complete: the same command with --resume continues from it" in out
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "optimizer.pt").exists() and (checkpoint / "model.safetensors").exists()
    log = read_log(tmp_path / "out")
    assert log.end["outcome"] == "interrupted" and log.checkpoints[-1]["checkpoint"] == checkpoint.name


def test_generated_leaves_are_the_offline_default(tmp_path, capsys):
    assert main(["--dataset", "generated", "--generated-images", "30", "--image-size", "16", *SHORT, "--cpu"]) == 0
    assert "healthy" in capsys.readouterr().out
    assert (tmp_path / "runs" / "generated" / "model.safetensors").exists()


def test_layer_decay_lowers_the_learning_rate_with_depth():
    with torch.device("meta"):
        depths = compute_depths(fastvit.ViTForImageClassification(ViTConfig()))
    assert depths["classifier.weight"] == depths["vit.layernorm.bias"] == 0
    assert depths["vit.encoder.layer.11.output.dense.weight"] == 1
    assert depths["vit.encoder.layer.0.output.dense.weight"] == 12
    assert depths["vit.embeddings.patch_embeddings.projection.weight"] == depths["vit.embeddings.cls_token"] == 13


def test_layer_decay_reaches_the_optimizer(finished_run):
    # The scheduler's rates are those of the optimizer's groups, saved in the last checkpoint.
    state = torch.load(finished_run / "out" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    rates = sorted({group["initial_lr"] for group in state["param_groups"]}, reverse=True)
    assert rates == pytest.approx([1e-3 * 0.7**depth for depth in range(6)])


def make_broken_folder(kind: str, root: Path) -> list[str]:
    """Create a folder that is wrong in one way; returns the options that use it."""
    if kind == "empty folder":
        root.mkdir()
    elif kind == "one class":
        make_folder(root, classes=["healthy"])
    elif kind == "more classes in validation":
        make_folder(root / "train", classes=["healthy", "bean_rust"])
        make_folder(root / "validation")
    elif kind == "no classes":
        root.mkdir()
        for seed in range(3):
            leaves.draw_leaf("healthy", seed=seed, size=24).save(root / f"{seed}.png")
    else:
        make_folder(root)
        image = root / "healthy" / "0.png"
        image.write_bytes(b"not an image" if kind == "no image" else image.read_bytes()[:300])
    return ["--data-dir", str(root)]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty folder", "expected images, one folder per class"),
        ("one class", "expected at least 2 classes, found 1: healthy"),
        ("more classes in validation", "no training images for 1 class(es): angular_leaf_spot"),
        ("no classes", "expected every image in the folder of a class, found"),
        ("no image", "0.png: expected an image, found a file in none of these formats"),
        ("truncated", "0.png: cannot be decoded"),
    ],
)
def test_wrong_images_are_one_clear_line_and_leave_nothing(kind, message, tmp_path, capsys):
    options = make_broken_folder(kind, tmp_path / "images")
    assert main([*options, "--output-dir", "out", *TINY, *SHORT]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.strip().splitlines()[-1]
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_bad_images_are_skipped_and_counted_on_request(tmp_path, capsys):
    options = make_broken_folder("no image", tmp_path / "images")
    assert main([*options, "--output-dir", "out", *TINY, *SHORT, "--skip-bad-images"]) == 0
    printed = capsys.readouterr().out
    assert "1 of " in printed and "images skipped" in printed and "0.png" in printed


@pytest.mark.parametrize("offline", [False, True], ids=["unreachable", "offline mode"])
def test_hub_ids_without_a_network_name_the_two_offline_ways(offline, tmp_path):
    make_folder(tmp_path / "images")
    # In a new process, since the hub's address is read at import. Retries do not wait here; nothing listens on port 9.
    program = (
        "import time; time.sleep = lambda seconds: None\n"
        "from fastvit.train.finetune import main\n"
        "codes = main(['--data-dir', 'images', '--model', 'google/vit-base-patch16-224-in21k']), main(['--cpu'])\n"
        "assert codes == (2, 2), codes\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": str(int(offline)), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model, dataset = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "--model FOLDER" in model and "--from-scratch" in model
    assert "--data-dir FOLDER" in dataset and "--dataset generated" in dataset


@pytest.mark.parametrize("kind", ["another architecture", "wrong shape", "no folder", "no weights"])
def test_wrong_checkpoints_are_one_clear_line(kind, tmp_path, capsys):
    make_folder(tmp_path / "images")
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8
    )
    model = fastvit.ViTModel(config)
    if kind != "no folder":
        model.save_pretrained(tmp_path / "model")
        stored = json.loads((tmp_path / "model" / "config.json").read_text())
        if kind == "another architecture":
            stored["model_type"] = "bert"
        elif kind == "wrong shape":
            stored["intermediate_size"] = 48
        else:
            (tmp_path / "model" / "model.safetensors").unlink()
        (tmp_path / "model" / "config.json").write_text(json.dumps(stored))
    assert main(["--data-dir", "images", "--model", "./model", *SHORT, "--cpu"]) == 2
    expected = {
        "another architecture": "SigLIP; found model type 'bert'",
        "wrong shape": "intermediate.dense.",
        "no folder": "found no folder './model'",
        "no weights": "./model: cannot be loaded (",
    }
    line = last_line(capsys)
    assert expected[kind] in line
    if kind == "wrong shape":
        assert "expected shape [48" in line and "found [64" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image-size", "20"], "--image-size: expected a multiple of the patch size 8, got 20"),
        (["--dataset", "beans"], "--data-dir: give a folder or a --dataset, not both"),
        (["--validation-fraction", "1.5"], "validation_fraction: expected a number between 0 and 1, got 1.5"),
        (["--label-column", "colour"], "label_column: expected one of image, label, got 'colour'"),
    ],
)
def test_wrong_options_are_one_clear_line(options, message, tmp_path, capsys):
    make_folder(tmp_path / "images")
    assert main(["--data-dir", "images", "--output-dir", "out", *TINY, *options]) == 2
    assert message in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_random_model_of_every_size_can_be_built():
    with torch.device("meta"):
        for size, parameters in {"tiny": 5.5e6, "small": 21.7e6, "base": 85.8e6, "large": 303.3e6}.items():
            model = load_model(parse_options(["--dataset", "generated", "--from-scratch", size]), ["a", "b"])
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Real photographs
# ---------------------------------------------------------------------------------------------------------------------

BEANS = os.environ.get("FASTVIT_BEANS_DIR")
needs_beans = pytest.mark.skipif(
    not BEANS or not Path(BEANS).is_dir(), reason="FASTVIT_BEANS_DIR does not name the folder of beans photographs"
)


@needs_beans
def test_beans_photographs_train_a_small_vit(tmp_path):
    options = ["--data-dir", BEANS, "--from-scratch", "micro", "--image-size", "64", "--patch-size", "8", "--cpu"]
    options += ["--max-train-samples", "200", "--epochs", "3", "--learning-rate", "1e-3", "--output-dir", "out"]
    assert main(options) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_accuracy"] > 0.4  # chance: 0.33


@needs_beans
@pytest.mark.slow
def test_vit_base_goes_the_whole_way_on_beans_photographs(tmp_path, capsys):
    torch.manual_seed(0)
    fastvit.ViTModel(ViTConfig()).save_pretrained(tmp_path / "in21k-shaped")
    options = ["--data-dir", BEANS, "--model", "./in21k-shaped", "--output-dir", "out", "--cpu", "--batch-size", "4"]
    options += ["--max-steps", "2", "--max-train-samples", "8", "--max-eval-samples", "8", "--keep-checkpoints", "1"]
    started = time.perf_counter()
    assert main(options) == 0
    assert time.perf_counter() - started < 600
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    ours = fastvit.ViTForImageClassification.from_pretrained(tmp_path / "out")
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels).logits, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    image = next((Path(BEANS) / "validation" / "healthy").glob("*.jpg"))
    assert cli.main(["predict", "out", str(image), "--device", "cpu"]) == 0
    assert "healthy" in capsys.readouterr().out
