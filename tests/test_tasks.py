"""Several labels per image, and numbers: how data is read, metrics, training, saved models and commands."""

import csv
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from PIL import Image
from sklearn import metrics as sklearn_metrics
from transformers import ViTConfig

from fastvit import cli
from fastvit.data.datasets import load_images
from fastvit.data.streaming import stream_images
from fastvit.errors import InputError
from fastvit.models.backbone import BackboneConfig, BackboneForImageClassification
from fastvit.models.heads import ViTForImageClassification
from fastvit.report.tasks import TASKS, choose_thresholds
from fastvit.serve.predictor import Predictor
from fastvit.train.finetune import main
from fastvit.train.folds import select_fold
from fastvit.train.objectives import LabelLoss, NumberHead, NumberLoss

pytestmark = pytest.mark.usefixtures("own_folder")

SIZES = ["--from-scratch", "micro", "--image-size", "16", "--patch-size", "8", "--precision", "fp32", "--cpu"]
TINY = [*SIZES, "--eval-steps", "10", "--batch-size", "8", "--no-augment", "--learning-rate", "3e-3"]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "yellow": (200, 200, 30), "dark": (30, 30, 30)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images of one colour, with noise: dark0.png ... yellow7.png."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(8):
            pixels = np.clip(generator.normal(colour, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{name}{number}.png")
    return root


def write_table(file: Path, rows: list[list]) -> Path:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows(rows)
    return file


def list_names(count: int = 8) -> list[str]:
    return [f"{name}{number}.png" for number in range(count) for name in COLOURS]


# --- reading ---------------------------------------------------------------------------------------------------------

FOUR = list_names(1)  # red0, green0, yellow0, dark0
LABELS = [[0, 1], [1, 0], [1, 1], [0, 0]]  # of the labels green and red


def load_four(header: list[str], cells: list, options: dict, photos: Path, file: Path):
    """Load a table of four images and the cells of its label columns."""
    rows = [[name, *(row if isinstance(row, list) else [row])] for name, row in zip(FOUR, cells, strict=True)]
    write_table(file, [["file_name", *header], *rows])
    return load_images(data_dir=photos, labels_file=file, validation_fraction=0, **options)


@pytest.mark.parametrize(
    ("header", "cells", "options", "task", "names", "labels"),
    [
        (["labels"], ['["red"]', "['green']", '["red", "green"]', "[]"], {}, "multi-label", ["green", "red"], LABELS),
        (["labels"], ["red", "green", "red|green", "[]"], {"task": "multi-label"}, "", ["green", "red"], LABELS),
        (["labels"], ["red", "green", "red; green", "[]"], {"task": "multi-label"}, "", ["green", "red"], LABELS),
        (["g", "r"], LABELS, {"label_column": "g,r"}, "multi-label", ["g", "r"], LABELS),
        (["g", "r"], LABELS, {"task": "multi-label"}, "", ["g", "r"], LABELS),
        (["g", "r"], [["False", "True"], *LABELS[1:]], {"task": "multi-label"}, "", ["g", "r"], LABELS),
        (["ill"], [1, 0, 1, 0], {"task": "multi-label"}, "", ["ill"], [[1], [0], [1], [0]]),
        (["label"], [0.5, 1.25, -3, 1e4], {}, "regression", ["label"], [[0.5], [1.25], [-3], [1e4]]),
        (["label"], [1, 2, 3, 4], {"task": "regression"}, "", ["label"], [[1], [2], [3], [4]]),
        (["a", "b"], [[1, 2], [3, 4], [5, 6], [7, 8.5]], {"label_column": "a,b"}, "regression", ["a", "b"], None),
        (["label"], [1, 2, 1, 2], {}, "single-label", ["1", "2"], [0, 1, 0, 1]),
        (["label"], ["a;b", "c", "a;b", "c"], {}, "single-label", ["a;b", "c"], [0, 1, 0, 1]),
        (["label"], ["[a]", "c", "[a]", "c"], {}, "single-label", ["[a]", "c"], [0, 1, 0, 1]),
        (["g", "r"], [[1, 0], [0, 1]] * 2, {"task": "single-label", "label_column": "g,r"}, "", ["g", "r"], [0, 1] * 2),
    ],
)
def test_columns_of_a_table_have_a_task(header, cells, options, task, names, labels, photos, tmp_path):
    images = load_four(header, cells, options, photos, tmp_path / "t.csv")
    assert (images.task, images.class_names) == (task or options["task"], names)
    assert images.splits["train"].labels.tolist() == (labels or cells)
    assert images.splits["train"].load(0).getpixel((0, 0))[0] > 100  # red0


@pytest.mark.parametrize(
    ("header", "cells", "options", "message"),
    [
        (
            ["label"],
            ["red|dark", "red", "x", "y"],
            {},
            r"'red\|dark' may be one class per image \(--task single-label\) or",
        ),
        (["label"], [0.5, 1.5, 0.5, 1.5], {}, r"fractions that repeat.*or numbers \(--task regression\)"),
        (["g", "r"], [[1, 0], [0, 1]] * 2, {"label_column": "g,r"}, r"a single 1 per image.*\(--task multi-label\)"),
        (["label"], ["[0, 1]", "[1, 0]"] * 2, {}, "may be 0 or 1 for each label, or the numbers of labels"),
        (["label"], ["red|x", "red", "", "x"], {"task": "multi-label"}, r"empty cell may be .* write \[\]"),
        (["g", "r"], [[1, 0], [0, 1], [-1, 1], [0, 0]], {"task": "multi-label"}, "'g': expected 0 or 1 .* found '-1'"),
        (["label"], [1, 2, "many", 4], {"task": "regression"}, "column 'label': expected numbers, found 'many'"),
        (["a", "b"], LABELS, {"label_column": "a,c"}, "label_column: expected some of a, b, got c"),
        (["label"], ["[1", "[2]", "[x]", "[3]"], {"task": "multi-label"}, r"expected a list of labels.*found '\[x\]'"),
        (["label"], ["[0.5]", "[1.5]"] * 2, {}, "expected labels, found 0.5"),
    ],
)
def test_columns_with_two_readings_or_wrong_cells_are_an_error(header, cells, options, message, photos, tmp_path):
    with pytest.raises(InputError, match=message):
        load_four(header, cells, options, photos, tmp_path / "t.csv")


@pytest.mark.parametrize("kind", ["names", "numbered", "parquet", "metadata.jsonl", "metadata.csv", "targets"])
def test_datasets_and_metadata_files_have_labels_and_numbers(kind, photos, tmp_path):
    root, labels = tmp_path / "saved", [["red"], ["green"], ["red", "green"], []]
    root.mkdir()
    columns = {"image": [str(photos / name) for name in FOUR]}
    if kind.startswith("metadata"):
        for name in FOUR:
            shutil.copy(photos / name, root)
        if kind == "metadata.csv":
            cells = ["|".join(names) or "[]" for names in labels]
            write_table(root / kind, [["file_name", "labels"], *zip(FOUR, cells, strict=True)])
        else:
            rows = [{"file_name": name, "labels": names} for name, names in zip(FOUR, labels, strict=True)]
            (root / kind).write_text("\n".join(map(json.dumps, rows)))
    elif kind == "targets":
        columns |= {"x": [0.5, 1, 2, 3], "y": [1, 2, None, 4]}
        datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(root)
        images = load_images(data_dir=root, label_column="x,y", validation_fraction=0)
        assert images.task == "regression" and images.splits["train"].labels.tolist() == [[0.5, 1], [1, 2], [3, 4]]
        assert images.notes == ["train: 1 of 4 images have no label and are left out"]
        assert images.splits["train"].get_name(2).endswith("(row 3)")
        return
    else:
        known = ["green", "red", "blue"]
        is_numbered = kind == "numbered"
        item = datasets.ClassLabel(names=known) if is_numbered else datasets.Value("string")
        columns["labels"] = [list(map(known.index, names)) if is_numbered else names for names in labels]
        features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(item)})
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(root / "train.parquet") if kind == "parquet" else data.save_to_disk(root)
    task = "multi-label" if kind == "metadata.csv" else "auto"
    images = load_images(data_dir=root, task=task, validation_fraction=0)
    assert images.task == "multi-label" and images.class_names[:2] == ["green", "red"]
    train = images.splits["train"]
    found = {Path(train.get_name(i).split(" ")[0]).name: train.labels[i, :2].tolist() for i in range(4)}
    assert sorted(found.values()) == sorted(LABELS)
    assert not kind.startswith("metadata") or found == dict(zip(FOUR, LABELS, strict=True))
    assert images.notes == (["no images of 1 declared label(s): blue"] if kind == "numbered" else [])
    if kind != "metadata.csv":
        with pytest.raises(InputError, match="found lists; they are read without --streaming"):
            stream_images(data_dir=root, need_validation=False)


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_labels_equal_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels = (generator.random((60, 4)) < [0.1, 0.5, 0.9, 0.3]).astype(np.float32)
    scores = np.round(generator.random((60, 4)), 1).astype(np.float32)  # with ties
    thresholds = np.array([0.2, 0.5, 0.7, 1.5])  # the last label is never predicted
    found = TASKS["multi-label"].evaluate(labels, scores, list("abcd"), thresholds).metrics
    assert found["map"] == pytest.approx(sklearn_metrics.average_precision_score(labels, scores))
    predicted = scores >= thresholds
    for kind in ("micro", "macro"):
        expected = sklearn_metrics.f1_score(labels, predicted, average=kind, zero_division=0)
        assert found[f"{kind}_f1"] == pytest.approx(expected)
    assert found["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predicted, average=None, zero_division=0))
    for column, threshold in enumerate(choose_thresholds(labels, scores)):
        f1 = [
            sklearn_metrics.f1_score(labels[:, column], scores[:, column] >= t)
            for t in (threshold, *np.arange(0, 1, 0.05))
        ]
        assert f1[0] == pytest.approx(max(f1))
    assert choose_thresholds(np.zeros((3, 1)), np.ones((3, 1))) == [0.5]


def test_metrics_of_numbers_equal_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels = generator.normal(size=(50, 3)) * [1, 100, 0]  # the last is constant
    scores = labels + generator.normal(size=(50, 3)) * [0.1, 50, 1]
    found = TASKS["regression"].evaluate(labels, scores, list("abc"), np.zeros(3))
    for name, function in (
        ("mae", sklearn_metrics.mean_absolute_error),
        ("rmse", sklearn_metrics.root_mean_squared_error),
        ("r2", sklearn_metrics.r2_score),
    ):
        assert found.metrics[f"target_{name}"] == pytest.approx(function(labels, scores, multioutput="raw_values"))
    assert found.metrics["r2"] == pytest.approx(sklearn_metrics.r2_score(labels, scores))


def test_losses_are_those_of_transformers_for_our_model_and_for_any_backbone():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    }
    pixels, targets = torch.randn(4, 3, 16, 16), torch.rand(4, 3)
    for problem_type, labels, expected, loss in (
        ("multi_label_classification", targets.round(), F.binary_cross_entropy_with_logits, LabelLoss()),
        ("regression", targets, F.mse_loss, NumberLoss(np.ones(3))),
    ):
        plain = ViTForImageClassification(ViTConfig(**sizes, num_labels=3, problem_type=problem_type))
        config = BackboneConfig(
            backbone_config=ViTConfig(**sizes), pool="mean", num_labels=3, problem_type=problem_type
        )
        for model in (plain, BackboneForImageClassification(config)):
            outputs = model(pixels, labels=labels)
            torch.testing.assert_close(outputs.loss, expected(outputs.logits, labels))
            torch.testing.assert_close(loss({"logits": outputs.logits}, labels, torch.tensor(12)), outputs.loss)


def test_the_head_of_numbers_saves_a_plain_layer_without_rounding():
    linear, features = torch.nn.Linear(8, 2), torch.randn(5, 8)
    head = NumberHead(linear, np.array([1000.0, 0.01]), np.array([300.0, 0.003]))
    plain = torch.nn.Linear(8, 2)
    plain.load_state_dict(head.state_dict())
    torch.testing.assert_close(plain(features), head(features))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(head(features), plain(features).float(), rtol=0.02, atol=5)
        assert head(features).dtype == torch.float32
    other = NumberHead(torch.nn.Linear(8, 2), np.array([1000.0, 0.01]), np.array([300.0, 0.003]))
    other.load_state_dict(plain.state_dict())
    assert all(map(torch.equal, other.parameters(), head.parameters()))


# --- runs ------------------------------------------------------------------------------------------------------------


def write_runs(folder: Path) -> None:
    """labels.csv: red and green as labels; numbers.csv: mean red x 1000, and share of green."""
    tags = {"red": "red", "green": "green", "yellow": "red|green", "dark": "[]"}
    rows = [(name, name[:-5], "val" if name[-5] in "67" else "train") for name in list_names()]
    write_table(folder / "labels.csv", [["file_name", "labels", "split"], *([n, tags[c], s] for n, c, s in rows)])
    numbers = [[n, 1000 * COLOURS[c][0], COLOURS[c][1] / 255, s] for n, c, s in rows]
    write_table(folder / "numbers.csv", [["file_name", "red", "green", "split"], *numbers])


def copy_classes(photos: Path, *names: str) -> None:
    """Copy four images of each class to a folder `classes` with a folder for each."""
    for name in names:
        Path("classes", name).mkdir(parents=True)
        for number in range(4):
            shutil.copy(photos / f"{name}{number}.png", Path("classes", name))


def run_json(capsys, *command: str):
    capsys.readouterr()
    assert cli.main([*command, "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_multi_label_model_goes_the_whole_way(photos, tmp_path, capsys):
    write_runs(tmp_path)
    data = ["--data-dir", str(photos), "--labels", "labels.csv"]
    assert (
        main([*data, "--task", "multi-label", *TINY, "--epochs", "12", "--ema", "0.5", "--flip", "--output-dir", "out"])
        == 0
    )
    config, results = (
        json.loads(Path("out/config.json").read_text()),
        json.loads(Path("out/eval_results.json").read_text()),
    )
    assert config["problem_type"] == "multi_label_classification" and len(config["label_thresholds"]) == 2
    assert results["eval_map"] > 0.95 and results["eval_micro_f1"] > 0.9
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert state["best_metric"] == max(log["eval_map"] for log in state["log_history"] if "eval_map" in log)
    found = run_json(capsys, "evaluate", "out", *data, "--flip", "--json")
    for name in ("map", "micro_f1", "macro_f1"):
        assert found[name] == pytest.approx(results[f"eval_{name}"])
    assert found["threshold"] == config["label_thresholds"]

    yellow, dark = str(photos / "yellow7.png"), str(photos / "dark7.png")
    with Predictor("out", "cpu") as predictor:
        expected = predictor(yellow).probabilities
    model = transformers.AutoModelForImageClassification.from_pretrained("out")
    assert model.config.problem_type == "multi_label_classification"
    scored = transformers.pipeline("image-classification", "out")(yellow)
    assert {one["label"]: one["score"] for one in scored} == pytest.approx(
        dict(zip(["green", "red"], expected.tolist(), strict=True)), abs=1e-4
    )
    assert {c["label"] for c in run_json(capsys, "predict", "out", yellow, "--json")["classes"]} == {"green", "red"}
    assert run_json(capsys, "predict", "out", dark, "--json")["classes"] == []
    assert cli.main(["predict", "out", dark, "--device", "cpu"]) == 0
    assert "no label reaches its threshold" in capsys.readouterr().out
    assert cli.main(["predict", "out", yellow, dark, "-o", "out.csv", "--device", "cpu"]) == 0
    header, first, second = csv.reader(Path("out.csv").read_text().splitlines())
    assert header[1:-1] == ["label", "probability", "label_2", "probability_2"]
    assert {first[1], first[3]} == {"green", "red"} and second[1:-1] == [""] * 4
    html, card = Path("out/report.html").read_text(), Path("out/README.md").read_text()
    assert (
        "mAP" in html and "threshold" in html and "labels images with any of green, red" in card and "type: map" in card
    )
    copy_classes(photos, "red", "green")
    assert run_json(capsys, "evaluate", "out", "--data-dir", "classes", "--json")["support"] == [4, 4]


def test_a_regression_learns_in_units_of_the_data_and_resumes_with_the_same_bits(photos, tmp_path, capsys):
    write_runs(tmp_path)
    data = ["--data-dir", str(photos), "--labels", "numbers.csv"]
    options = [*data, "--task", "regression", *TINY]
    assert main([*options, "--max-steps", "60", "--output-dir", "out"]) == 0
    results = json.loads(Path("out/eval_results.json").read_text())
    found = run_json(capsys, "evaluate", "out", *data, "--json")
    assert found["target_mae"][0] < 25_000 and found["target_mae"][1] < 0.12 and min(found["target_r2"]) > 0.7
    assert found["mae"] == pytest.approx(results["eval_mae"], rel=1e-3)
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert state["best_metric"] == min(log["eval_loss"] for log in state["log_history"] if "eval_loss" in log)

    image = str(photos / "yellow7.png")
    (last,) = {max(Path("out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))}
    values = run_json(capsys, "predict", "out", image, "--json")["values"]
    assert values["red"] == pytest.approx(200_000, rel=0.25) and values["green"] == pytest.approx(0.78, rel=0.25)
    model = transformers.AutoModelForImageClassification.from_pretrained(last)
    assert model.config.problem_type == "regression" and 100_000 < abs(model.classifier.bias[0] * 2) < 400_000
    for file, read in (
        ("p.csv", lambda path: next(csv.DictReader(path.read_text().splitlines()))),
        ("p.parquet", lambda path: pyarrow.parquet.read_table(path).to_pylist()[0]),
    ):
        assert cli.main(["predict", "out", image, "-o", file, "--device", "cpu"]) == 0
        row = read(Path(file))
        assert list(row) == ["image", "red", "green", "error"]
        assert float(row["red"]) == pytest.approx(values["red"])
    html, card = Path("out/report.html").read_text(), Path("out/README.md").read_text()
    assert html.count("predicted over true values of 8 images") == 2 and "Largest errors" in html
    assert 'function_to_apply="none"' in card and "estimates, from images, red, green" in card

    for folder, steps, more in (("a", "10", []), ("a", "20", ["--resume"]), ("b", "20", [])):
        command = [*options, "--scheduler", "constant", "--max-steps", steps, "--output-dir", folder, *more]
        assert main(command) == 0
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()
    assert main([*options, "--output-dir", "a", "--resume", "--task", "auto"]) == 2


def test_one_logit_is_evaluated_by_its_threshold(photos, tmp_path, capsys):
    copy_classes(photos, "red", "dark")
    rows = [
        [name, int("red" in name), "val" if name[-5] in "67" else "train"] for name in list_names() if name[0] in "rd"
    ]
    write_table(tmp_path / "ill.csv", [["file_name", "red", "split"], *rows])
    data = ["--data-dir", str(photos), "--labels", "ill.csv", "--task", "multi-label"]
    assert main([*data, *TINY, "--max-steps", "20", "--output-dir", "out"]) == 0
    config = json.loads(Path("out/config.json").read_text())
    for problem_type, threshold, f1 in (("multi_label_classification", None, 1.0), (None, 0.0, 2 / 3)):
        changes = {"problem_type": problem_type} | ({} if threshold is None else {"label_thresholds": [threshold]})
        Path("out/config.json").write_text(json.dumps(config | changes))
        found = run_json(capsys, "evaluate", "out", "--data-dir", "classes", "--json")
        assert found["support"] == [4] and found["f1"] == pytest.approx([f1])
    Path("out/config.json").write_text(json.dumps(config | {"label_thresholds": ["high"]}))
    assert cli.main(["evaluate", "out", "--data-dir", "classes", "--device", "cpu"]) == 2
    assert "config.label_thresholds: expected 1 numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            (["--task", task, *option], f"{option[0]}: cannot be used with --task {task}")
            for task in ("multi-label", "regression")
            for option in (["--label-smoothing", "0.1"], ["--mixup", "1"], ["--class-balanced"], ["--calibrate"])
        ],
        (["--task", "regression", "--streaming"], "--streaming: cannot be used with --task regression"),
        (["--label-column", "red,green", "--mixup", "1"], "--mixup: cannot be used with --task regression, got 1.0"),
    ],
)
def test_options_without_a_meaning_for_the_task_are_one_clear_line(options, message, photos, tmp_path, capsys):
    write_runs(tmp_path)
    assert main(["--data-dir", str(photos), "--labels", "numbers.csv", *options, *TINY, "--output-dir", "out"]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


def test_folds_and_sweeps_of_other_tasks(photos, tmp_path, capsys):
    write_runs(tmp_path)
    images = load_images(data_dir=photos, labels_file="numbers.csv", task="regression")
    folds = [select_fold(images, 4, fold, 0).splits["validation"].labels for fold in (1, 2, 3, 4)]
    assert [len(fold) for fold in folds] == [8] * 4
    assert sorted(np.concatenate(folds)[:, 0]) == sorted(
        np.concatenate([s.labels for s in images.splits.values()])[:, 0]
    )
    Path("sweep.yaml").write_text(
        yaml.safe_dump({"data-dir": str(photos), "labels": "numbers.csv", "task": "regression"})
    )
    assert cli.main(["sweep", "--config", "sweep.yaml", *TINY, "--trials", "1"]) == 2
    assert "expected one class per image, found --task regression" in capsys.readouterr().err
