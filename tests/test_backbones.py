"""Fine-tuning of every family of backbones: the result is the same for all that loads it, and every option works."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from backbones import CASES, build_backbone, save_checkpoint
from PIL import Image
from safetensors.torch import load_file

import fastvit
from fastvit import cli
from fastvit.adapters.backbones import build_classifier, compute_depths, find_blocks, load_classifier
from fastvit.checkpoints.configuration import make_pair
from fastvit.data import leaves
from fastvit.models.backbone import accepts_uint8, count_prefix_tokens, get_vision_config
from fastvit.ops.block import FusedModule
from fastvit.serve.attention import classify_with_attention
from fastvit.train.finetune import main

CPU = ["--data-dir", "images", "--precision", "fp32", "--cpu", "--learning-rate", "1e-3", "--output-dir", "out"]
SHORT = ["--max-steps", "4", "--eval-steps", "2", "--batch-size", "4", "--logging-steps", "1"]
LABELS = {"id2label": dict(enumerate("abc")), "label2id": {name: index for index, name in enumerate("abc")}}
EACH = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Drawn leaves, and a checkpoint of every family."""
    root = tmp_path_factory.mktemp("backbones")
    for split, count, first in (("train", 4, 0), ("validation", 3, 10)):
        for label in leaves.CLASSES:
            (root / "images" / split / label).mkdir(parents=True)
            for number in range(first, first + count):
                leaves.draw_leaf(label, seed=number, size=32).save(
                    root / "images" / split / label / f"{number}.png"
                )  # fmt: skip
    for name in CASES:
        save_checkpoint(name, root / name)
    return root


@pytest.fixture(autouse=True)
def _own_folder(own_folder, home, tmp_path):
    (tmp_path / "images").symlink_to(home / "images")


def finetune(home: Path, name: str, *options: str) -> Path:
    """Fine-tune a checkpoint with options; the folder of the run."""
    assert main([*CPU, "--model", str(home / name), *SHORT, *options]) == 0
    return Path("out")


def list_images(home: Path) -> list[str]:
    return [str(path) for path in sorted((home / "images" / "validation").glob("*/*.png"))]


def compute_probabilities(model, out: Path, images: list[str]) -> np.ndarray:
    """What transformers' image processor and a model make of images."""
    processor = transformers.ViTImageProcessorPil.from_pretrained(out)
    pixels = processor([Image.open(path).convert("RGB") for path in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.eval()(pixels).logits.softmax(-1).numpy()


@EACH
def test_result_is_the_same_for_all_that_load_it(name, home, capsys):
    case = CASES[name]
    out = finetune(home, name)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == case.model_type
    settings, before = json.loads((out / "preprocessor_config.json").read_text()), case.processor
    if "image_mean" in before:
        assert (settings["image_mean"], settings["image_std"]) == (before["image_mean"], before["image_std"])
    accuracy = json.loads((out / "eval_results.json").read_text())["eval_accuracy"]
    capsys.readouterr()
    assert cli.main(["evaluate", "out", "--data-dir", "images", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy
    images = list_images(home)
    assert cli.main(["predict", "out", *images, "--json", "--device", "cpu"]) == 0
    labels = [json.loads(line)["classes"][0]["label"] for line in capsys.readouterr().out.splitlines()]
    truth = [Path(image).parent.name for image in images]
    assert np.mean([label == true for label, true in zip(labels, truth, strict=True)]) == pytest.approx(accuracy)
    with fastvit.Predictor(str(out), "cpu") as predictor:
        assert accepts_uint8(predictor.model) or name == "ViT"
        assert all(isinstance(block, FusedModule) for block in find_blocks(predictor.model).values())
        ours = np.stack([prediction.probabilities for prediction in predictor(images)])
    if case.result:
        theirs = transformers.AutoModelForImageClassification.from_pretrained(out)
        assert type(theirs) is getattr(transformers, case.result)
    else:
        with pytest.raises(ValueError, match="fastvit-classifier"):
            transformers.AutoModelForImageClassification.from_pretrained(out)
        fastvit.register()
        try:
            theirs = transformers.AutoModelForImageClassification.from_pretrained(out)
        finally:
            fastvit.unregister()
        assert type(theirs).__name__ == "BackboneForImageClassification"
    np.testing.assert_allclose(compute_probabilities(theirs, out, images), ours, atol=2e-5)


@EACH
def test_attention_maps_are_drawn(name, home):
    model = build_classifier(str(home / name), LABELS).eval()
    implementation = get_vision_config(model.config)._attn_implementation
    result = classify_with_attention(model, torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert result.grid == (4, 4) and result.num_prefix == count_prefix_tokens(model.config) == CASES[name].prefix
    assert result.maps.shape == (2, 2, 16 + CASES[name].prefix, 16 + CASES[name].prefix)
    np.testing.assert_allclose(result.maps.sum(-1), 1, rtol=1e-4)
    assert get_vision_config(model.config)._attn_implementation == implementation


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
@EACH
def test_pools_read_the_tokens_they_name(name, pool, home):
    """Each logit is a sum of features: with one weight set to one, it is the feature of the backbone's tokens."""
    case = CASES[name]
    if case.prefix == 0 and pool != "mean":
        with pytest.raises(fastvit.InputError, match=r"--pool: expected mean for .*, which has no class token"):
            build_classifier(str(home / name), LABELS, pool=pool)
        return
    model = build_classifier(str(home / name), LABELS, pool=pool).train()
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    model(pixels).logits.square().sum().backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not unused  # distributed training would wait for them
    model.eval()
    expected = 128 if pool == "cls+mean" else 64
    assert model.classifier.weight.shape == (3, expected)
    features = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    fastvit.restore(model)
    with torch.no_grad():
        model(pixels)
    handle.remove()
    parts = {"cls": features[0][:, :64], "mean": features[0][:, -64:]}
    tokens = compute_tokens(model, pixels, pool)
    if "cls" in pool:
        torch.testing.assert_close(parts["cls"], tokens[:, 0], rtol=1e-4, atol=1e-5)
    if "mean" in pool:
        mean = tokens[:, case.prefix :].mean(1)
        if name.startswith("BEiT") and pool == "mean":
            mean = model.beit.pooler.layernorm(mean)
        torch.testing.assert_close(parts["mean"], mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def compute_tokens(model, pixels, pool) -> torch.Tensor:
    """The tokens of the backbone, after its final norm."""
    backbone = next(child for child_name, child in model.named_children() if child_name != "classifier")
    inputs = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    tokens = backbone(inputs).last_hidden_state
    if hasattr(backbone, "pre_layrnorm") and pool != "mean":  # CLIP
        tokens = backbone.post_layernorm(tokens)
    return tokens


@EACH
@pytest.mark.parametrize("size", [48, [24, 96]], ids=["square", "oblong"])
def test_other_image_sizes_interpolate_positions_as_the_model_does(name, size, home):
    if size != 48 and CASES[name].model_type in ("beit", "clip", "siglip"):
        with pytest.raises(fastvit.InputError, match=r"--image-size: expected a square for \w+, got \(24, 96\)"):
            build_classifier(str(home / name), LABELS, image_size=size)
        return
    model = build_classifier(str(home / name), LABELS, image_size=size).eval()
    height, width = make_pair(size)
    # DINO's embeddings stay those of its own size, which it interpolates at every call.
    own_size = 32 if size != 48 and "DINO" in name else size
    assert get_vision_config(model.config).image_size == own_size
    backbone = next(child for child_name, child in model.named_children() if child_name != "classifier")
    original, options = build_backbone(name)
    pixels = torch.randn(1, 3, height, width)
    with torch.no_grad():
        expected, found = original(pixels, **options).last_hidden_state, backbone(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def find_changes(home: Path, name: str, out: Path) -> set[str]:
    """The parameters of the result that are not those of the checkpoint, whose loading is tested above."""
    torch.manual_seed(0)
    before = build_classifier(str(home / name), LABELS).state_dict()
    after = load_classifier(str(out)).state_dict()
    assert before.keys() == after.keys()
    return {key for key in after if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("name", ["DINOv2", "CLIP", "DINOv3 ViT"])
def test_frozen_backbone_stays_as_it_is(name, home):
    changed = find_changes(home, name, finetune(home, name, "--freeze-backbone"))
    assert changed == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("name", ["BEiT", "DINOv3 ViT", "SigLIP", "ViTMAE"])
def test_layer_decay_reaches_the_optimizer(name, home):
    out = finetune(home, name, "--layer-decay", "0.5")
    state = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)
    rates = {group["initial_lr"] for group in state["param_groups"]}
    assert sorted(rates, reverse=True) == pytest.approx([1e-3 * 0.5**depth for depth in range(4)])


@EACH
def test_depths_follow_the_order_of_computation(name, home):
    model = build_classifier(str(home / name), LABELS)
    depths = compute_depths(model)
    for key, depth in depths.items():
        is_embedding = "embeddings" in key or "pre_layrnorm" in key
        block = next((index for index, block in enumerate(find_blocks(model)) if key.startswith(f"{block}.")), None)
        is_shared_bias = block is None and "relative_position_bias" in key
        assert depth == (3 if is_embedding or is_shared_bias else 2 - block if block is not None else 0), key


@pytest.mark.parametrize("name", ["DINOv2", "SigLIP vision", "ViTMAE"])
def test_lora_adapts_query_and_value_and_is_merged(name, home):
    out = finetune(home, name, "--lora", "4")
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    parts = {key.rpartition(".")[0].rpartition(".")[2] for key in find_changes(home, name, out)}
    assert parts in ({"classifier", "query", "value"}, {"classifier", "q_proj", "v_proj"})


@pytest.mark.parametrize("name", ["DINOv2 with registers", "CLIP vision"])
def test_moving_average_is_the_model_that_is_saved(name, home):
    out = finetune(home, name, "--ema", "0.9")
    best = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    average = torch.load(Path(best) / "average.pt", weights_only=True)
    saved = load_classifier(str(out)).state_dict()
    assert all(torch.equal(average[f"module.{key}"], tensor) for key, tensor in saved.items())


@pytest.mark.parametrize("name", ["DINOv2", "BEiT", "DINOv3 ViT", "ViTMAE"])
def test_drop_path_is_set_where_the_family_has_it(name, home):
    finetune(home, name, "--drop-path", "0.3")
    model = load_classifier("out").train()
    assert get_vision_config(model.config).drop_path_rate == 0.3
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32).repeat(16, 1, 1, 1)
    assert model(pixels).logits.detach().std(0).max() > 0


@pytest.mark.parametrize("name", ["DeiT", "CLIP", "SigLIP", "I-JEPA", "ViTMSN"])
def test_drop_path_is_refused_elsewhere(name, home, capsys):
    assert main([*CPU, "--model", str(home / name), *SHORT, "--drop-path", "0.1"]) == 2
    assert "--drop-path: expected 0 for" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "DINOv3 ViT"])
def test_dropout_is_refused_where_the_family_has_none(name, home):
    with pytest.raises(fastvit.InputError, match="--hidden-dropout: expected 0 for"):
        build_classifier(str(home / name), LABELS, hidden_dropout=0.1)
    model = build_classifier(str(home / name), LABELS, attention_dropout=0.1)
    assert get_vision_config(model.config).attention_dropout == 0.1


@pytest.mark.parametrize("name", ["DINOv2", "I-JEPA", "CLIP", "DINOv3 ViT"])
def test_gradient_checkpointing_changes_nothing_but_memory(name, home):
    plain = load_file(finetune(home, name) / "model.safetensors")
    again = load_file(finetune(home, name, "--gradient-checkpointing", "--overwrite") / "model.safetensors")
    assert all(torch.allclose(plain[key], again[key], rtol=1e-4, atol=1e-6) for key in plain)


@pytest.mark.parametrize("name", ["DINOv2", "BEiT", "DINOv3 ViT", "CLIP", "ViTMAE"])
def test_resumed_run_has_the_same_bits(name, home):
    options = ["--keep-checkpoints", "0", "--ema", "0.9", "--warmup", "1"]
    out = finetune(home, name, *options)
    files = [out / "model.safetensors", out / "checkpoint-4" / "model.safetensors"]
    expected = [load_file(path) for path in files]
    shutil.rmtree(out / "checkpoint-4")
    for path in out.iterdir():
        if path.is_file() and path.name != "config.yaml":
            path.unlink()
    finetune(home, name, *options, "--resume")
    for before, after in zip(expected, map(load_file, files), strict=True):
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["DINOv2", "ViTMSN", "DINOv3 ViT"])
def test_best_checkpoint_is_the_model_that_is_saved(name, home):
    out = finetune(home, name)
    best = json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"]
    saved, kept = load_file(out / "model.safetensors"), load_file(Path(best) / "model.safetensors")
    assert saved.keys() == kept.keys() and all(torch.equal(saved[key], kept[key]) for key in saved)


@pytest.mark.parametrize("name", ["DINOv2", "CLIP vision"])
def test_folds_and_report(name, home):
    out = finetune(home, name, "--folds", "2")
    assert set(json.loads((out / "folds.json").read_text())) >= {"eval_accuracy"}
    page = (out / "fold-1" / "report.html").read_text()
    family = name.removesuffix(" vision")
    assert f"A {family} model of 2 blocks of hidden size 64" in page and page.count("data:image") > 2
    assert f"A {family} model that classifies images" in (out / "fold-1" / "README.md").read_text()


@pytest.mark.parametrize("name", ["DINOv2", "SigLIP"])
def test_sweep_searches_with_any_backbone(name, home):
    options = ["--trials", "2", "--search", "learning-rate=1e-5:1e-3", "--epochs", "1", "--batch-size", "4"]
    assert cli.main(["sweep", *CPU, "--model", str(home / name), *options]) == 0
    assert len((Path("out") / "trials.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["BEiT", "CLIP"])
def test_accumulated_gradients_are_those_of_one_batch(name, home):
    """transformers' own losses of these families are means over a batch, not over a step."""
    options = ["--max-steps", "2", "--eval-steps", "2", "--freeze-backbone", "--no-augment"]
    one = load_file(finetune(home, name, *options, "--batch-size", "4") / "model.safetensors")
    split = ["--batch-size", "2", "--gradient-accumulation", "2", "--overwrite"]
    two = load_file(finetune(home, name, *options, *split) / "model.safetensors")
    logs = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    assert all(log["loss"] < 2.5 for log in logs if "loss" in log)
    torch.testing.assert_close(one["classifier.weight"], two["classifier.weight"], rtol=1e-4, atol=1e-6)


def test_a_pool_without_a_class_in_transformers_trains_and_loads(home):
    out = finetune(home, "DINOv2", "--pool", "cls")
    assert json.loads((out / "config.json").read_text())["pool"] == "cls"
    with fastvit.Predictor(str(out), "cpu") as predictor:
        assert len(predictor(list_images(home))) == 9
    assert cli.main(["attention", "out", list_images(home)[0], "--device", "cpu"]) == 0
    assert Image.open("attention.png").size[0] > 100
    assert main([*CPU, "--model", "out", *SHORT, "--output-dir", "next"]) == 0  # from our own folder
    assert main([*CPU, "--model", "out", *SHORT, "--output-dir", "again", "--pool", "mean"]) == 2


def test_images_have_the_size_of_the_image_processor(home):
    """DINOv2's config has the size of its pre-training, 518, and its image processor that of use, 224."""
    folder = Path("dino")
    save_checkpoint("DINOv2", folder)
    processor = {**CASES["DINOv2"].processor, "crop_size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert main([*CPU, "--model", "dino", *SHORT]) == 0
    assert json.loads(Path("out/config.json").read_text())["image_size"] == 24
    assert json.loads(Path("out/preprocessor_config.json").read_text())["size"] == {"height": 24, "width": 24}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "swin"},
            "expected a checkpoint of ViT, DeiT, BEiT, DINOv2, DINOv2 with registers, DINOv3 ViT,",
        ),
        ({"architecture": "vit_tiny_patch16_224"}, "a timm checkpoint; convert it first: fastvit convert other FOLDER"),
        ({"model_type": "yolos"}, "CLIP, SigLIP; found model type 'yolos': YOLOS is trained for detection"),
        ({"model_type": "siglip2"}, "SigLIP2 for images of variable size (NaFlex) is not supported"),
        ({"model_type": ["dinov2"]}, "found model type ['dinov2']"),
        ({"model_type": "dinov2", "hidden_size": 10**9}, "hidden_size: expected a whole number from 1 to 65,536"),
        ({"model_type": "clip", "vision_config": 7}, "vision_config: expected an object, got 7"),
        ({"model_type": "dinov2", "num_hidden_layers": 500}, "config.json describes a model of"),
        ({"model_type": "dinov2", "from_pretrained": "x"}, "expected a setting of"),
        ({"model_type": "fastvit-classifier"}, "backbone_config: expected an object, got None"),
        ({"model_type": "fastvit-classifier", "backbone_config": {"model_type": "bert"}}, "found model type 'bert'"),
    ],
)
def test_unsupported_models_are_one_clear_line(config, message, home, capsys):
    save_checkpoint("DINOv2", Path("other"))
    stored = json.loads(Path("other/config.json").read_text())
    if "num_hidden_layers" not in config and "hidden_size" not in config and "from_pretrained" not in config:
        stored = {}
    Path("other/config.json").write_text(json.dumps({**stored, **config}))
    assert main([*CPU, "--model", "other", *SHORT]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not Path("out").exists()


def test_a_checkpoint_that_lacks_blocks_is_refused(home, capsys):
    save_checkpoint("DINOv2", Path("other"))
    stored = json.loads(Path("other/config.json").read_text())
    stages = {"out_features": ["stage1"], "out_indices": [1]}
    for blocks, message in ((3, "missing keys"), (1, "unexpected keys")):
        Path("other/config.json").write_text(json.dumps({**stored, **stages, "num_hidden_layers": blocks}))
        assert main([*CPU, "--model", "other", *SHORT]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_backbone_without_a_classifier_is_refused_where_one_is_needed(home, capsys):
    for name in ("DINOv2", "DINOv3 ViT", "CLIP"):
        assert cli.main(["predict", str(home / name), list_images(home)[0], "--device", "cpu"]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "missing keys: classifier" in line or "expected a classifier" in line


@pytest.mark.parametrize("name", ["CLIP", "DeiT", "I-JEPA", "ViTMAE", "DINOv2", "BEiT"])
def test_images_of_another_size_than_the_models_are_refused_where_it_has_one(name, home):
    build_classifier(str(home / name), LABELS).save_pretrained("out")
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 48, "width": 48}}
    Path("out/preprocessor_config.json").write_text(json.dumps(settings))
    if name in ("DINOv2", "BEiT"):
        with fastvit.Predictor("out", "cpu") as predictor:
            assert predictor(list_images(home)[0]).label in "abc"
        return
    with pytest.raises(fastvit.InputError, match=r"image processor: expected images of \(32, 32\)"):
        fastvit.Predictor("out", "cpu")


@pytest.mark.parametrize(
    ("name", "mean"), [("DINOv2", 0.485), ("ViTMAE", 0.485), ("CLIP", 0.48145466), ("SigLIP", 0.5)]
)
def test_without_an_image_processor_the_family_has_the_normalization(name, mean, home, capsys):
    shutil.copytree(home / name, "bare")
    Path("bare/preprocessor_config.json").unlink()
    assert main([*CPU, "--model", "./bare", *SHORT, "--max-steps", "1"]) == 0
    assert "note: ./bare has no image processor" in capsys.readouterr().out
    assert json.loads(Path("out/preprocessor_config.json").read_text())["image_mean"][0] == mean
