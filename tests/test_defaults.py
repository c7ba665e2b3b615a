"""The defaults of `fastvit finetune` that depend on the model's family, and their precedence."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from backbones import save_checkpoint

from fastvit import cli
from fastvit.data import leaves
from fastvit.models.backbone import FAMILIES
from fastvit.train.build import choose_precision
from fastvit.train.defaults import FAMILY_RECIPES, PLAIN, RECIPES, resolve_recipe
from fastvit.train.finetune import main
from fastvit.train.options import FinetuneOptions, parse_options

pytestmark = pytest.mark.usefixtures("own_folder")

SEED = dict(epochs=4, learning_rate=2e-4, weight_decay=0, warmup=0, scheduler="linear", layer_decay=1)  # noqa: C408
CPU = ["--data-dir", "images", "--output-dir", "out", "--precision", "fp32", "--cpu"]


def resolve(*argv: str) -> FinetuneOptions:
    return resolve_recipe(parse_options(list(argv)))


def read_values(options: FinetuneOptions) -> dict:
    return {name: getattr(options, name) for name in PLAIN}


def write_model(**config) -> list[str]:
    """The option for a folder with this config.json."""
    Path("model").mkdir(exist_ok=True)
    Path("model/config.json").write_text(json.dumps(config))
    return ["--model", "model"]


def test_plain_recipe_has_the_settings_of_the_beans_recipe():
    for argv in ([], ["--recipe", "plain"], ["--recipe", "plain", "--batch-size", "64"], ["--from-scratch", "tiny"]):
        options = resolve(*argv)
        assert read_values(options) == SEED and options.recipe == "plain"
    others = dataclasses.replace(resolve("--recipe", "plain"), recipe=None, **dict.fromkeys(SEED))
    assert others == FinetuneOptions()  # and nothing else changes
    assert read_values(resolve("--recipe", "plain", *write_model(model_type="dinov2"))) == SEED


@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [("dinov2", "dinov2"), ("dinov3_vit", "dinov2"), ("vit_mae", "mae"), ("siglip", "clip"), ("vit", "plain")],
)
def test_recipe_is_that_of_the_family(model_type, recipe):
    for config in ({"model_type": model_type}, {"model_type": "x", "backbone_config": {"model_type": model_type}}):
        options = resolve(*write_model(**config))
        assert options.recipe == recipe and read_values(options) == RECIPES[recipe]
    assert resolve(*write_model(model_type=model_type), "--recipe", "mae").recipe == "mae"


def test_recipes_name_families_that_exist():
    assert FAMILIES.keys() - FAMILY_RECIPES.keys() == {"vit", "deit"} and FAMILY_RECIPES.keys() <= FAMILIES.keys()
    assert {*FAMILY_RECIPES.values(), "plain"} == RECIPES.keys() and all(
        PLAIN.keys() == r.keys() for r in RECIPES.values()
    )


def test_options_that_are_given_take_precedence():
    Path("options.yaml").write_text("warmup: 0\nscheduler: constant\n")
    given = ["--config", "options.yaml", "--layer-decay", "1", "--weight-decay", "0", "--epochs", "1"]
    options = resolve(*write_model(model_type="dinov2"), *given)
    expected = {"warmup": 0, "scheduler": "constant", "layer_decay": 1, "weight_decay": 0, "epochs": 1}
    assert read_values(options) == RECIPES["dinov2"] | expected


@pytest.mark.parametrize(
    ("batch", "batches", "processes", "rate"),
    [("16", "1", "1", 1e-4), ("64", "1", "1", 2e-4), ("16", "4", "4", 4e-4), ("8", "1", "1", 7.1e-5)],
)
def test_learning_rate_grows_with_the_square_root_of_the_images_per_step(batch, batches, processes, rate, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    argv = [*write_model(model_type="dinov2"), "--batch-size", batch, "--gradient-accumulation", batches]
    assert resolve(*argv).learning_rate == rate
    assert resolve(*argv, "--learning-rate", "3e-5").learning_rate == 3e-5


@pytest.mark.parametrize("folder", ["out", "out/fold-1"])
def test_resumed_run_keeps_its_values(folder):
    argv = [*write_model(model_type="dinov2"), "--output-dir", "out", "--resume"]
    assert read_values(resolve(*argv)) == RECIPES["dinov2"]  # there is no run yet
    Path(folder).mkdir(parents=True)
    older = {**SEED, "learning_rate": 3e-5, "layer_decay": 0.9}  # of a version without recipes
    Path(folder, "config.yaml").write_text(yaml.safe_dump({"model": "model", **older}))
    options = resolve(*argv, "--epochs", "7")
    assert (options.recipe, read_values(options)) == ("plain", {**older, "epochs": 7})
    assert read_values(resolve(*argv, "--recipe", "dinov2")) == RECIPES["dinov2"]


def test_values_are_printed_written_and_kept(capsys):
    for label in leaves.CLASSES:
        Path("images", label).mkdir(parents=True)
        for seed in range(4):
            leaves.draw_leaf(label, seed=seed, size=32).save(f"images/{label}/{seed}.png")
    save_checkpoint("DINOv2", Path("model"))
    argv = ["--model", "model", *CPU, "--max-steps", "2", "--eval-steps", "1", "--batch-size", "4"]
    assert main(argv) == 0
    line = "recipe dinov2: epochs 5.0, learning rate 5e-05, weight decay 0.05, warmup 0.1, scheduler cosine, layer"
    assert line in capsys.readouterr().out
    stored = yaml.safe_load(Path("out/config.yaml").read_text())
    assert stored["recipe"] == "dinov2"
    assert {name: stored[name] for name in PLAIN} == RECIPES["dinov2"] | {"learning_rate": 5e-5}
    assert main([*argv, "--resume", "--max-steps", "3"]) == 0
    notes = [text for text in capsys.readouterr().out.splitlines() if " before" in text]
    assert notes == ["note: max_steps is 3; the run had 2 before"]
    assert main([*argv, "--folds", "2", "--overwrite"]) == 0
    for folder in ("out", "out/fold-2"):
        assert yaml.safe_load(Path(folder, "config.yaml").read_text())["layer_decay"] == 0.75
    assert cli.main(["sweep", "--model", "model", *CPU, "--trials", "1", "--search", "warmup", "--max-steps", "1"]) in (
        0,
        None,
    )
    best = yaml.safe_load(Path("out/config.yaml").read_text())
    assert (best["recipe"], best["layer_decay"]) == ("dinov2", 0.75) and best["warmup"] != 0.1


def test_docs_have_the_values_and_every_family_a_recipe():
    page = Path(__file__).parents[1].joinpath("docs/recipes.md").read_text(encoding="utf-8")
    assert FAMILIES.keys() - FAMILY_RECIPES.keys() == {"vit", "deit"} and FAMILY_RECIPES.keys() <= FAMILIES.keys()
    for name, recipe in RECIPES.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        epochs, rate, layer_decay, weight_decay, warmup, scheduler = (cell.strip() for cell in row.split("|")[3:9])
        numbers = [float(cell) for cell in (epochs, rate.partition(" ")[0], layer_decay, weight_decay, warmup)]
        options = ("epochs", "learning_rate", "layer_decay", "weight_decay", "warmup")
        assert numbers == [recipe[option] for option in options] and scheduler == recipe["scheduler"]
        assert ("images" in rate) == (name != "plain")


@pytest.mark.parametrize(("capability", "hidden_size", "expected"), [
    ("amx_bf16", 384, "bf16"), ("avx512_bf16", 384, "bf16"), ("avx512_bf16", 96, "fp32"), ("avx2", 384, "fp32"),
])  # fmt: skip
def test_precision_is_bf16_where_the_processor_has_it(capability, hidden_size, expected, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {capability: True})
    assert choose_precision(parse_options(["--cpu"]), hidden_size) == expected
    assert choose_precision(parse_options(["--cpu", "--precision", "fp16"]), hidden_size) == "fp16"
