"""The recipes of `fastvit finetune`: each computes its definition and survives a resume."""

import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig

import fastvit
from fastvit import cli
from fastvit.data import leaves
from fastvit.data.datasets import TRAIN, VALIDATION, ImageDataset, Split
from fastvit.data.images import Augment, ImageCache, ImageSet
from fastvit.models import calibration
from fastvit.models.vit import compute_drop_path_rates
from fastvit.ops.varlen import pack
from fastvit.serve.predictor import Predictor
from fastvit.train import recipes
from fastvit.train.build import build_loss
from fastvit.train.finetune import main
from fastvit.train.folds import select_fold
from fastvit.train.options import FinetuneOptions, parse_options
from fastvit.train.recipes import (
    AverageUpdater,
    ImageMixer,
    RandAugment,
    RecipeTuner,
    TargetLoss,
    compute_class_weights,
)
from fastvit.train.run_folder import remove_run

CPU = ["--data-dir", "images", "--image-size", "16", "--precision", "fp32", "--cpu", "--learning-rate", "1e-3"]
SCRATCH = [*CPU, "--from-scratch", "micro", "--patch-size", "8"]
SHORT = ["--max-steps", "4", "--eval-steps", "2", "--batch-size", "4", "--logging-steps", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Drawn leaves: 6 of each class to train on, 3 to validate and 2 to test."""
    root = tmp_path_factory.mktemp("leaves") / "images"
    for split, count, first in (("train", 6, 0), ("validation", 3, 10), ("test", 2, 20)):
        for label in leaves.CLASSES:
            (root / split / label).mkdir(parents=True)
            for number in range(first, first + count):
                leaves.draw_leaf(label, seed=number, size=24).save(root / split / label / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch, images):
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("images").symlink_to(images)


def read(path: str):
    return json.loads(Path(path).read_text())


def same_tensors(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------------------
# Drop path
# ---------------------------------------------------------------------------------------------------------------------


def small_config(layers: int, drop_path_rate: float = 0.0) -> ViTConfig:
    return ViTConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=8, num_labels=3, drop_path_rate=drop_path_rate,
    )  # fmt: skip


def small_model(drop_path_rate: float = 0.0, layers: int = 4) -> fastvit.ViTForImageClassification:
    torch.manual_seed(0)
    model = fastvit.ViTForImageClassification(small_config(layers, drop_path_rate))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double()


def plain_logits(model, pixels: torch.Tensor) -> torch.Tensor:
    """The model with drop path as in the paper: each branch of a block is multiplied by 0 or 1 / (1 - rate)."""
    hidden = model.vit.embeddings(pixels)
    for layer, rate in zip(model.vit.encoder.layer, compute_drop_path_rates(model.config), strict=True):
        for norm, branch in (
            (layer.layernorm_before, lambda x, layer=layer: layer.attention(x)[0]),
            (layer.layernorm_after, lambda x, layer=layer: layer.output(layer.intermediate(x))),
        ):
            factor = 1.0
            if rate:
                kept = torch.empty(len(pixels), 1, 1, dtype=pixels.dtype).bernoulli_(1 - rate)
                factor = kept / (1 - rate)
            hidden = hidden + factor * branch(norm(hidden))
    return model.classifier(model.vit.layernorm(hidden)[:, 0])


@pytest.mark.parametrize("path", ["fused", "in parts", "hidden states", "hooked", "checkpointed"])
def test_drop_path_equals_its_definition_and_so_do_gradients(path, monkeypatch):
    if path == "fused":  # the path of the kernels, computed by the reference operations
        monkeypatch.setattr("fastvit.ops.uses_kernels", lambda tensor: True)
    model = small_model(0.6).train()
    reference = small_model(0.6).train()
    if path == "hooked":
        for layer in model.vit.encoder.layer:
            layer.attention.register_forward_hook(lambda module, args, output: None)
    if path == "checkpointed":
        model.gradient_checkpointing_enable()
    pixels = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    labels = torch.arange(6) % 3
    torch.manual_seed(1)
    loss = model(pixels, labels=labels, output_hidden_states=path == "hidden states").loss
    loss.backward()
    torch.manual_seed(1)
    expected = F.cross_entropy(plain_logits(reference, pixels), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_drop_path_keeps_the_expectation():
    layer = small_model(0.25, layers=1).vit.encoder.layer[0].train()
    branch = torch.ones(20000, 2, 3, dtype=torch.bfloat16)
    torch.manual_seed(0)
    dropped = layer.drop_path(branch, None).float()
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(4 / 3).bfloat16().item()}
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))  # whole images
    assert abs(dropped.mean().item() - 1) < 4 * (0.25 / 0.75 / 20000) ** 0.5 + 2**-8  # 4 sigma, and bfloat16's rounding


def test_drop_path_drops_whole_images_of_a_packed_sequence():
    layer = small_model(0.5, layers=1).vit.encoder.layer[0].train()
    packing = pack([2, 5, 3] * 20, torch.device("cpu"))
    torch.manual_seed(0)
    dropped = layer.drop_path(torch.ones(1, 200, 4), packing)
    images = [image.unique().tolist() for image in dropped[0].split(packing.lengths)]
    assert all(values in ([0.0], [2.0]) for values in images) and images.count([0.0]) in range(10, 51)
    assert len(layer.drop_path(torch.ones(60, 1, 4), packing).unique()) == 2  # the class tokens alone


def test_without_drop_path_nothing_changes_and_no_random_number_is_drawn():
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert compute_drop_path_rates(small_model(0.3).config) == pytest.approx([0, 0.1, 0.2, 0.3])
    plain, evaluated = small_model().train(), small_model(0.3).eval()
    state = torch.get_rng_state()
    assert torch.equal(plain(pixels).logits, evaluated(pixels).logits)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(fastvit.InputError, match=r"config.drop_path_rate: expected 0 or more and below 1, got 1.0"):
        small_model(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def image_set(count: int = 6, **options) -> ImageSet:
    images = np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    return ImageSet(ImageCache(images, {}), [index % 3 for index in range(count)], **options)


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    train = image_set(augment=RandAugment(2, 9, first=Augment((16, 16))), seed=5)
    first = [train[index]["pixel_values"] for index in range(6)]
    assert all(image.shape == (16, 16, 3) and image.dtype == torch.uint8 for image in first)
    state = torch.get_rng_state()
    torch.rand(1)
    assert all(torch.equal(train[index]["pixel_values"], first[index]) for index in reversed(range(6)))
    torch.set_rng_state(state)
    train[0]
    assert torch.equal(state, torch.get_rng_state())
    train.set_epoch(1)
    assert not torch.equal(train[0]["pixel_values"], first[0])
    other = image_set(augment=RandAugment(2, 9, first=Augment((16, 16))), seed=6)
    assert not torch.equal(other[0]["pixel_values"], first[0])


def test_randaugment_changes_images_more_with_its_magnitude():
    image = np.asarray(leaves.draw_leaf("healthy", seed=0, size=32))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255
    kornia = pytest.importorskip("kornia.augmentation.auto")
    for weak, strong in zip(recipes.build_policy(5), recipes.build_policy(25), strict=True):
        torch.manual_seed(0)
        distances = [
            (kornia.RandAugment(1, magnitude, [operation])(pixels) - pixels).abs().mean().item()
            for magnitude, operation in ((5, weak), (25, strong))
        ]
        if weak[0][0] in ("auto_contrast", "equalize", "invert"):
            assert distances[0] == distances[1] > 0
        else:
            assert distances[0] < distances[1], weak
    changed = np.stack([RandAugment(2, 9)(image) for _ in range(10)])
    assert changed.dtype == np.uint8 and changed.shape == (10, 32, 32, 3)
    assert len({image.tobytes() for image in changed}) > 5


def entries(count: int = 8, seeded: bool = True) -> list[dict]:
    """Images of one value each, 20 times their number, so that a mixture reveals its parts."""
    return [
        {"pixel_values": torch.full((10, 10, 3), 20 * index, dtype=torch.uint8), "labels": index}
        | ({"seed": index} if seeded else {})
        for index in range(count)
    ]


def test_mixup_blends_images_as_their_labels_say():
    mix = ImageMixer(8, mixup=0.8)
    batch = mix(entries())
    labels = batch["labels"]
    torch.testing.assert_close(labels.sum(1), torch.ones(8))
    expected = (labels @ torch.arange(0.0, 160, 20)).round()
    assert (labels.max() < 1) and torch.equal(batch["pixel_values"].amin((1, 2, 3)).float(), expected)
    assert torch.equal(batch["pixel_values"].amax((1, 2, 3)).float(), expected)
    again = mix(entries())
    assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_cutmix_pastes_as_many_pixels_as_its_labels_say():
    batch = ImageMixer(8, cutmix=1.0)(entries())
    assert batch["pixel_values"].dtype == torch.uint8
    for index, (image, label) in enumerate(zip(batch["pixel_values"], batch["labels"], strict=True)):
        shares = torch.stack([(image[..., 0] == 20 * other).float().mean() for other in range(8)])
        torch.testing.assert_close(shares, label)
        assert label[index] > 0 or label.max() == 1
    assert ((batch["labels"] > 0).sum(1) == 2).any()


def test_mixup_and_cutmix_alternate_at_random_and_images_without_a_seed_stay():
    mix = ImageMixer(8, mixup=0.8, cutmix=1.0)
    kinds = set()
    for start in range(0, 160, 8):
        batch = mix([{**entry, "seed": start + index} for index, entry in enumerate(entries())])
        kinds.add(bool((batch["pixel_values"] % 20 == 0).all()))
    assert kinds == {True, False}
    plain = mix(entries(seeded=False))
    assert torch.equal(plain["labels"], torch.arange(8))
    assert torch.equal(plain["pixel_values"][:, 0, 0, 0], 20 * torch.arange(8).to(torch.uint8))


# ---------------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------------


def test_loss_is_weight_times_smoothed_target_times_log_probability():
    torch.manual_seed(0)
    logits, weights = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0])
    labels = torch.tensor([0, 1, 2, 2, 1])
    soft = torch.rand(5, 3).softmax(1)
    for targets, given in ((F.one_hot(labels, 3).double(), labels), (soft.double(), soft)):
        smoothed = 0.9 * targets + 0.1 / 3
        expected = -(weights * smoothed * logits.log_softmax(1)).sum(1)
        loss = TargetLoss(weights, 0.1)
        torch.testing.assert_close(loss.compute_losses(logits, given).double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(loss({"logits": logits}, given).double(), expected.mean(), rtol=1e-6, atol=1e-6)
        # Two batches of one step, of different size: Trainer counts the numbers in the labels of both.
        parts = [
            loss({"logits": logits[part]}, given[part], num_items_in_batch=torch.tensor(given.numel()))
            for part in (slice(0, 2), slice(2, 5))
        ]
        torch.testing.assert_close(sum(parts).double(), expected.mean(), rtol=1e-6, atol=1e-6)
    plain = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
    torch.testing.assert_close(TargetLoss(None, 0.1)({"logits": logits}, labels), plain)


def test_loss_is_the_models_own_without_mixing_and_class_weights():
    assert build_loss(FinetuneOptions(), image_set(), 3) is None
    assert build_loss(FinetuneOptions(class_balanced=0.9), image_set(), 3).class_weights.tolist() == [1, 1, 1]
    assert build_loss(FinetuneOptions(mixup=1.0, label_smoothing=0.1), image_set(), 3).label_smoothing == 0.1


def test_class_weights_are_one_over_the_effective_number():
    counts = np.array([100, 10, 1])
    torch.testing.assert_close(compute_class_weights(counts, 0), torch.ones(3))
    torch.testing.assert_close(compute_class_weights(counts, 1), torch.tensor([111 / 300, 111 / 30, 111 / 3]))
    weights = compute_class_weights(counts, 0.99)
    effective = torch.tensor([(1 - 0.99**n) / 0.01 for n in counts])
    torch.testing.assert_close(weights * effective, (weights * effective)[:1].expand(3))
    torch.testing.assert_close((weights * torch.tensor(counts)).sum() / 111, torch.tensor(1.0), check_dtype=False)
    assert compute_class_weights(np.array([5, 0]), 0.99).tolist() == pytest.approx([1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


def test_average_is_evaluated_and_saved(monkeypatch):
    averages, weights, evaluated = {}, {}, {}
    update, evaluate = AverageUpdater.on_step_end, RecipeTuner.evaluation_loop

    def recorded_update(self, args, state, control, **kwargs):
        update(self, args, state, control, **kwargs)
        now = {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}
        before = averages.get(state.global_step - 1, now)
        averages[state.global_step] = {name: 0.6 * before[name] + 0.4 * now[name] for name in now}
        weights[state.global_step] = now

    def recorded_evaluation(self, *args, **kwargs):
        evaluated[self.state.global_step] = {name: t.clone() for name, t in self.model.state_dict().items()}
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(AverageUpdater, "on_step_end", recorded_update)
    monkeypatch.setattr(RecipeTuner, "evaluation_loop", recorded_evaluation)
    assert main([*SCRATCH, *SHORT, "--output-dir", "out", "--ema", "0.6"]) == 0
    best = int(read("out/trainer_state.json")["best_model_checkpoint"].split("-")[-1])
    saved = load_file("out/model.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, averages[best][name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(evaluated[2][name], averages[2][name], rtol=1e-5, atol=1e-6)
    assert same_tensors(load_file("out/checkpoint-4/model.safetensors"), weights[4])
    assert not same_tensors(saved, weights[best])


EVERYTHING = ["--randaugment", "2", "9", "--mixup", "0.8", "--cutmix", "1.0", "--drop-path", "0.3", "--ema", "0.7"]
EVERYTHING += ["--class-balanced", "--hidden-dropout", "0.1", "--label-smoothing", "0.1", "--layer-decay", "0.8"]
EVERYTHING += ["--flip", "--calibrate", "--early-stopping", "9"]


def test_resume_with_every_recipe_gives_the_same_bits():
    # 18 images in batches of 3, two batches per step: three steps per epoch. Resumed within an epoch and at its end.
    options = [*SCRATCH, "--output-dir", "out", *EVERYTHING, "--max-steps", "5", "--batch-size", "3"]
    options += ["--gradient-accumulation", "2", "--eval-steps", "1", "--keep-checkpoints", "9", "--logging-steps", "1"]
    assert main(options) == 0
    shutil.copytree("out", "whole")
    state = read("whole/trainer_state.json")
    for start in (2, 3):
        for step in range(start + 1, 6):
            shutil.rmtree(f"out/checkpoint-{step}")
        Path("out/model.safetensors").unlink()
        assert main([*options, "--resume"]) == 0
        for name in ("model.safetensors", "checkpoint-5/model.safetensors"):
            assert same_tensors(load_file(f"whole/{name}"), load_file(f"out/{name}")), (start, name)
        for name in ("average.pt", "optimizer.pt"):
            whole, resumed = (torch.load(f"{run}/checkpoint-5/{name}", weights_only=True) for run in ("whole", "out"))
            assert str(whole) == str(resumed), (start, name)
        losses = [[e["loss"] for e in s["log_history"] if "loss" in e] for s in (state, read("out/trainer_state.json"))]
        assert losses[0] == losses[1]
        assert read("whole/config.json") == read("out/config.json")  # the temperature
    assert main(["--config", "whole/config.yaml", "--output-dir", "again"]) == 0
    assert same_tensors(load_file("whole/model.safetensors"), load_file("again/model.safetensors"))


def test_early_stopping_keeps_its_count_after_a_resume():
    options = [*SCRATCH, "--output-dir", "out", "--batch-size", "4", "--eval-steps", "1", "--early-stopping", "3"]
    options += ["--learning-rate", "1e-12"]  # the first evaluation stays the best
    assert main([*options, "--max-steps", "2"]) == 0
    assert main([*options, "--max-steps", "20", "--resume"]) == 0
    assert read("out/trainer_state.json")["global_step"] == 4


def test_resume_from_a_checkpoint_without_an_average_is_refused(capsys):
    options = [*SCRATCH, "--output-dir", "out", "--batch-size", "4", "--eval-steps", "1", "--ema", "0.9"]
    assert main([*options, "--max-steps", "1"]) == 0
    Path("out/checkpoint-1/average.pt").unlink()
    assert main([*options, "--max-steps", "2", "--resume"]) == 2
    assert "--ema: expected a checkpoint with average.pt, found none in out/checkpoint-1" in capsys.readouterr().err


def test_predict_and_evaluate_use_flip_and_temperature(images, capsys):
    assert main([*SCRATCH, *SHORT, "--output-dir", "out", "--flip", "--calibrate", "--no-augment"]) == 0
    metrics, temperature = read("out/eval_results.json"), read("out/config.json")["calibration_temperature"]
    capsys.readouterr()
    predictor = Predictor("out", "cpu", flip=True)
    model = predictor.model
    images = [Image.open(path).convert("RGB") for path in sorted((images / "validation").glob("*/*.png"))]
    pixels = torch.stack([torch.from_numpy(np.array(image.resize((16, 16), 2))) for image in images])
    with torch.no_grad():
        logits = (model(pixels).logits + model(pixels.flip(2)).logits) / 2
    expected = (logits / temperature).softmax(1).numpy()
    for answer, row in zip(predictor(images), expected, strict=True):
        np.testing.assert_allclose(answer.probabilities, row, atol=1e-5)
    labels = torch.arange(3).repeat_interleave(3)
    assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())

    arguments = ["evaluate", "out", "--data-dir", "images", "--device", "cpu", "--json"]
    assert cli.main([*arguments, "--flip"]) == 0
    flipped = json.loads(capsys.readouterr().out)
    assert flipped["accuracy"] == pytest.approx(metrics["eval_accuracy"])
    assert flipped["calibration_error"] == pytest.approx(metrics["eval_calibration_error_after"], abs=1e-5)
    assert cli.main(["predict", "out", "images/test/healthy/20.png", "--json", "--flip", "--device", "cpu"]) == 0
    answer = {e["label"]: e["probability"] for e in json.loads(capsys.readouterr().out)["classes"]}
    shown = predictor("images/test/healthy/20.png")
    assert answer["healthy"] == pytest.approx(shown.probabilities[2], abs=1e-5)
    predictor.close()
    for split in ("validation", "test"):
        assert Image.open(f"out/reliability_{split}.png").size[0] > 600


def test_temperature_is_found_and_repairs_overconfidence():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20000, 4))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (chances.cumsum(1) < generator.random((20000, 1))).sum(1)
    temperature = calibration.fit_temperature(3 * logits, labels)
    assert temperature == pytest.approx(3, rel=0.05)
    before, after = (
        calibration.compute_reliability(calibration.softmax(3 * logits, divisor), labels).expected_calibration_error
        for divisor in (1.0, temperature)
    )
    assert before > 0.2 and after < 0.02
    assert calibration.fit_temperature(np.eye(3), np.arange(3)) == pytest.approx(0.01)  # no minimum: all are right


def test_calibration_error_by_hand():
    # Two images near 0.95, one right; two near 0.55, both right: gaps of 0.45 and 0.45.
    chances = np.array([[0.95, 0.05], [0.95, 0.05], [0.55, 0.45], [0.55, 0.45]])
    diagram = calibration.compute_reliability(chances, np.array([0, 1, 0, 0]), bins=10)
    assert diagram.counts.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert diagram.expected_calibration_error == pytest.approx(0.45)
    certain = calibration.compute_reliability(np.array([[1.0, 0.0]]), np.array([0]))
    assert certain.counts[-1] == 1 and certain.expected_calibration_error == 0
    sheet = calibration.plot_reliability({"before": diagram, "after": certain})
    colours = {colour for _, colour in sheet.getcolors(1 << 16)}
    assert (70, 110, 170) in colours and (226, 140, 90) in colours


# ---------------------------------------------------------------------------------------------------------------------
# Folds, adapters, sweep
# ---------------------------------------------------------------------------------------------------------------------


def test_folds_use_every_image_once_and_keep_the_classes_even():
    labels = np.repeat([0, 1], [14, 7])
    # The red value of an image is its number, so that the images of a split can be identified.
    splits = [
        Split(labels[part], lambda i, start=part.start: Image.new("RGB", (1, 1), (start + i, 0, 0)), str(part.start))
        for part in (slice(0, 10), slice(10, 21))
    ]
    images = ImageDataset("numbers", ["a", "b"], dict(zip((TRAIN, VALIDATION), splits, strict=True)))
    seen = []
    for fold in range(1, 8):
        parts = select_fold(images, 7, fold, seed=0).splits
        numbers = {
            name: [split.load(index).getpixel((0, 0))[0] for index in range(len(split))]
            for name, split in parts.items()
        }
        assert not set(numbers[TRAIN]) & set(numbers[VALIDATION])
        assert all((labels[numbers[name]] == split.labels).all() for name, split in parts.items())
        assert np.bincount(parts[VALIDATION].labels).tolist() == [2, 1]
        seen += numbers[VALIDATION]
    assert sorted(seen) == list(range(21))
    with pytest.raises(fastvit.InputError, match=r"at least 8 images of every class, .* found 7 of 'b'"):
        select_fold(images, 8, 1, seed=0)


def test_folds_are_trained_in_their_folders_and_resumed(capsys):
    options = [*SCRATCH, *SHORT, "--folds", "2", "--output-dir", "out"]
    assert main(options) == 0
    assert "mean ± standard deviation" in capsys.readouterr().out
    summary = read("out/folds.json")
    values = [read(f"out/fold-{fold}/eval_results.json")["eval_accuracy"] for fold in (1, 2)]
    assert summary["eval_accuracy"]["folds"] == values and "test_accuracy" in summary
    assert summary["eval_accuracy"]["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    first = Path("out/fold-1/model.safetensors")
    kept, second = first.stat().st_mtime_ns, load_file("out/fold-2/model.safetensors")
    for name in ("README.md", "model.safetensors", "all_results.json"):
        Path("out/fold-2", name).unlink()
    shutil.rmtree("out/fold-2/checkpoint-4")
    assert main([*options, "--resume"]) == 0
    assert first.stat().st_mtime_ns == kept
    assert same_tensors(second, load_file("out/fold-2/model.safetensors")) and read("out/folds.json") == summary
    assert main(["--config", "out/fold-1/config.yaml", "--output-dir", "again"]) == 0
    assert same_tensors(load_file(first), load_file("again/model.safetensors"))
    for name in ("config.yaml", "folds.json"):  # as if stopped in the first fold
        Path("out", name).unlink()
    assert main(options) == 2
    remove_run(Path("out"))
    assert not any(Path("out").iterdir())


def test_adapters_are_trained_alone_kept_and_merged(capsys):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    fastvit.ViTForImageClassification(small_config(2)).save_pretrained("base")
    options = [*CPU, *SHORT, "--model", "base", "--output-dir", "out", "--lora", "4", "--ema", "0.5", "--overwrite"]
    assert main(options) == 0
    base, tuned = load_file("base/model.safetensors"), load_file("out/model.safetensors")
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed == {
        *(f"vit.encoder.layer.{i}.attention.attention.{part}.weight" for i in (0, 1) for part in ("query", "value")),
        "classifier.weight",
        "classifier.bias",
    }
    pixels = torch.randn(2, 3, 16, 16)
    model = fastvit.ViTForImageClassification.from_pretrained("base")
    adapted = peft.PeftModel.from_pretrained(model, "out/adapter").eval()
    merged = fastvit.ViTForImageClassification.from_pretrained("out").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(pixels).logits, merged(pixels).logits, rtol=1e-4, atol=1e-5)
    shutil.rmtree("out/checkpoint-4")
    assert main([*options[:-1], "--resume"]) == 0
    assert same_tensors(tuned, load_file("out/model.safetensors"))
    assert main([*SCRATCH, "--output-dir", "new", "--lora", "4"]) == 2
    assert "--lora: expected a pretrained --model" in capsys.readouterr().err


def test_sweep_trains_with_its_proposals_and_continues(monkeypatch, capsys):
    used = []
    create = RecipeTuner.create_optimizer

    def recorded(self, *args, **kwargs):
        optimizer = create(self, *args, **kwargs)
        arguments = [max(group["lr"] for group in optimizer.param_groups), self.args.weight_decay, self.layer_decay]
        used.append([*arguments, self.compute_loss_func.label_smoothing, self.model.config.drop_path_rate])
        return optimizer

    monkeypatch.setattr(RecipeTuner, "create_optimizer", recorded)
    names = ["learning-rate", "weight-decay", "layer-decay", "label-smoothing", "drop-path=0.1:0.2"]
    command = ["sweep", *SCRATCH, "--output-dir", "out", "--epochs", "1", "--batch-size", "6", "--search", *names]
    assert cli.main([*command, "--trials", "2"]) == 0
    assert cli.main([*command, "--trials", "3"]) == 0
    assert cli.main([*command, "--trials", "3"]) == 0  # nothing left to do
    assert "3 trials are finished" in capsys.readouterr().out
    with Path("out/trials.csv").open() as file:
        rows = {int(row["trial"]): row for row in csv.DictReader(file)}
    assert len(rows) == len(used) == 3
    columns = [name.partition("=")[0].replace("-", "_") for name in names]
    for number, values in enumerate(used):
        assert [float(rows[number][column]) for column in columns] == pytest.approx(values)
        assert 0.1 <= values[-1] <= 0.2
    best = max(rows.values(), key=lambda row: float(row["accuracy"]))
    options = parse_options(["--config", "out/config.yaml", "--output-dir", "best"])
    assert options.learning_rate == pytest.approx(float(best["learning_rate"]))
    assert {path.name for path in Path("out").iterdir()} == {"study.sqlite", "trials.csv", "config.yaml"}
    assert cli.main([*command, "--trials", "3", "--epochs", "2"]) == 2
    assert "out holds a search with other options" in capsys.readouterr().err


def test_sweep_prunes_a_trial_whose_loss_explodes(monkeypatch, capsys):
    step = RecipeTuner.training_step

    def poisoned(self, model, *args, **kwargs):
        if self._trial.number == 0:
            with torch.no_grad():
                model.classifier.bias.fill_(float("nan"))
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(RecipeTuner, "training_step", poisoned)
    command = ["sweep", *SCRATCH, "--output-dir", "out", "--epochs", "1", "--logging-steps", "1", "--trials"]
    assert cli.main([*command, "1"]) == 2
    assert "no trial was completed" in capsys.readouterr().err
    assert cli.main([*command, "2"]) == 0
    with Path("out/trials.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["complete", "pruned"]


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def test_too_few_images_for_the_folds_are_one_clear_line(capsys):
    for label in "ab":
        Path("few", label).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16)).save(f"few/{label}/{number}.png")
    assert main([*SCRATCH, *SHORT, "--output-dir", "out", "--folds", "7", "--data-dir", "few"]) == 2
    assert "--folds: expected at least 7 images of every class" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("library", "options", "message"),
    [
        ("kornia.augmentation.auto", ["--randaugment", "2", "9"], "pip install 'fastvit[augment]'"),
        ("kornia.augmentation", ["--cutmix", "1"], "pip install 'fastvit[augment]'"),
        ("sklearn.model_selection", ["--folds", "2"], "pip install 'fastvit[folds]'"),
        ("optuna", None, "pip install 'fastvit[sweep]'"),
    ],
)
def test_missing_libraries_are_named_with_the_way_to_get_them(library, options, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    command = [*SCRATCH, *SHORT, "--output-dir", "out"]
    assert (cli.main(["sweep", *command]) if options is None else main([*command, *options])) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()


@pytest.mark.parametrize("options", [["--early-stopping", "2"], ["--calibrate"]])
def test_recipes_that_need_validation_are_refused_without(options, images, capsys):
    command = [*SCRATCH, *SHORT, "--output-dir", "out", "--validation-fraction", "0", *options]
    assert main([*command, "--data-dir", "images/train"]) == 2
    assert f"{options[0]}: expected a validation split" in capsys.readouterr().err
    assert not Path("out").exists()
