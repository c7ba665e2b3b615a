"""`--freeze-backbone`: features are computed once, and the classifier on them is the minimum of a convex loss."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from backbones import save_checkpoint
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

import fastvit
from fastvit import cli
from fastvit.adapters.backbones import load_classifier
from fastvit.data import leaves
from fastvit.train import probe
from fastvit.train.finetune import main

RUN = ["--data-dir", "images", "--model", "DINOv2", "--freeze-backbone", "--cpu", "--precision", "fp32"]
RUN += ["--output-dir", "out"]


@pytest.fixture(autouse=True)
def _own_folder(own_folder, tmp_path):
    pass


def draw_images(train: int = 8) -> None:
    for split, count, first in (("train", train, 0), ("validation", 4, 100)):
        for label in leaves.CLASSES:
            Path("images", split, label).mkdir(parents=True)
            for seed in range(first, first + count):
                leaves.draw_leaf(label, seed=seed, size=32).save(f"images/{split}/{label}/{seed}.png")


def make_features(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of very different sizes, one of them constant, that separate three classes with some mistakes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    features = torch.randn(count, 5, generator=generator) + 1.2 * torch.eye(3, 5)[labels]
    return features * torch.tensor([1.0, 100.0, 0.01, 3.0, 0.0]) + torch.tensor([0.0, 50.0, 1.0, 0.0, 7.0]), labels


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
def test_head_is_the_minimum_that_scikit_learn_finds(weights):
    features, labels = make_features()
    head = probe.fit_head(features, labels, 3, class_weights=None if weights is None else torch.tensor(weights))
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    std[std == 0] = 1
    regression = LogisticRegression(
        C=1 / (head.strength * len(labels)), tol=1e-8, max_iter=1000,
        class_weight=None if weights is None else dict(enumerate(weights)),
    ).fit((features.double() - mean) / std, labels)  # fmt: skip
    expected = torch.from_numpy(regression.decision_function((features.double() - mean) / std))
    found = features.double() @ head.weight.double().T + head.bias
    # Adding a constant to all logits changes nothing.
    torch.testing.assert_close(found - found.mean(1, True), expected - expected.mean(1, True), rtol=1e-3, atol=1e-3)


def test_strength_follows_the_noise_of_the_features():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    noise = torch.randn(90, 40, generator=generator)
    clear = probe.fit_head(noise + 6 * torch.eye(3, 40)[labels], labels, 3)
    useless = probe.fit_head(noise, labels, 3)
    assert useless.strength == max(probe.STRENGTHS) > clear.strength
    assert clear.held_out_accuracy > 0.95 and useless.held_out_accuracy < 0.5
    assert useless.held_out_loss == pytest.approx(np.log(3), abs=0.15)


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1], [1] * 4])
def test_few_images_and_absent_classes_are_fitted(labels):
    features = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0)) / 4 + torch.eye(3, 8)[labels]
    head = probe.fit_head(features, torch.tensor(labels), 3)
    assert np.isnan(head.held_out_loss) == (labels == [0, 1])
    assert (features @ head.weight.T + head.bias).argmax(1).tolist() == labels


def test_folds_have_equal_shares_of_every_class():
    labels = torch.tensor([0] * 10 + [1] * 25 + [2] * 5)
    folds = probe.assign_folds(labels, 5, seed=1)
    assert all(np.bincount(labels[folds == fold]).tolist() == [2, 5, 1] for fold in range(5))


def test_features_that_are_not_finite_are_an_error():
    model = torch.nn.Module()
    model.classifier = torch.nn.Linear(2, 2)
    model.device = torch.device("cpu")
    model.forward = lambda pixels: model.classifier(pixels / 0)
    with pytest.raises(fastvit.InputError, match=r"expected finite numbers, .* try --precision fp32"):
        probe.compute_features(model, [{"pixel_values": torch.ones(1, 2), "labels": torch.zeros(1)}])


def test_run_fits_the_classifier_to_features_of_the_saved_backbone(capsys):
    draw_images()
    save_checkpoint("DINOv2", Path("DINOv2"))
    assert main([*RUN, "--class-balanced", "--calibrate", "--flip"]) == 0
    output = capsys.readouterr().out
    assert "classifier fitted to 128 features of 24 images, L2 strength" in output and "step by step" not in output
    options = yaml.safe_load(Path("out/config.yaml").read_text())
    assert options["freeze_backbone"] is True and options["augment"] is False
    before, after = load_file("DINOv2/model.safetensors"), load_file("out/model.safetensors")
    assert all(torch.equal(after[f"dinov2.{name}"], tensor) for name, tensor in before.items())
    state = json.loads(Path("out/trainer_state.json").read_text())
    record = next(one for one in state["log_history"] if "loss" in one)
    assert record["l2_strength"] in probe.STRENGTHS and record["images_per_second"] > 0
    # With its penalty, the loss has no slope at the saved classifier.
    model = load_classifier("out")
    paths = sorted(Path("images/train").glob("*/*.png"))
    processor = transformers.ViTImageProcessorPil.from_pretrained("out")
    with fastvit.Predictor(model, "cpu", image_processor=processor) as predictor:
        features = []
        hook = model.classifier.register_forward_pre_hook(lambda module, args: features.append(args[0]))
        predictor(list(map(str, paths)))
        hook.remove()
    labels = torch.tensor([model.config.label2id[path.parent.name] for path in paths])
    features = torch.cat(features).clone()
    head = probe.fit_head(features, labels, 3, seed=42)
    assert head.strength == record["l2_strength"]
    torch.testing.assert_close(head.weight, model.classifier.weight.detach(), rtol=1e-2, atol=1e-3)
    accuracy = json.loads(Path("out/eval_results.json").read_text())["eval_accuracy"]
    assert cli.main(["evaluate", "out", "--data-dir", "images", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(accuracy, abs=0.09)  # without --flip
    # The file repeats the run, and --resume computes the same again.
    assert main(["--config", "out/config.yaml", "--output-dir", "again"]) == 0
    assert main([*RUN, "--class-balanced", "--calibrate", "--flip", "--resume"]) == 0
    for folder in ("again", "out"):
        assert all(
            torch.equal(after[name], tensor) for name, tensor in load_file(f"{folder}/model.safetensors").items()
        )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--augment", "--max-train-samples", "5"], "--augment"),
        (["--mixup", "0.2", "--ema", "0.9"], "--mixup, --ema"),
        (["--streaming"], "--streaming"),
        ([], "the checkpoint"),
    ],
)
def test_options_that_need_steps_train_step_by_step_and_are_named(flags, reason, capsys):
    draw_images(train=2)
    save_checkpoint("DINOv2", Path("DINOv2"))
    if not flags:
        assert main([*RUN, "--max-steps", "1", "--eval-steps", "1"]) == 0
        flags = ["--resume"]
    else:
        flags = [*flags, "--epochs", "1", "--batch-size", "6"]
    capsys.readouterr()
    assert main([*RUN, *flags]) == 0
    output, card = capsys.readouterr().out, Path("out/README.md").read_text()
    assert f"note: the classifier is trained step by step because of {reason};" in output
    count = "5" if "5" in flags else "streamed" if "--streaming" in flags else "6"
    assert f"training 387 parameters on {count} images of" in output and f" {count} images" in card
    assert list(Path("out").glob("checkpoint-*"))
