"""`fastvit convert` of models that compute a plain ViT: the result equals the original, and others are refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from backbones import CASES, IMAGES, SIZES, save_checkpoint
from test_modeling import relative_error

import fastvit
from fastvit.checkpoints.convert import convert

CLASSIFIER_DROPPED = "the classifier was dropped"
# name -> class of the checkpoint, options of its config, name of the backbone in it
FOLDABLE = {
    "DINOv2": ("Dinov2Model", {"mlp_ratio": 2}, ""),
    "DINOv2 without biases": ("Dinov2Model", {"mlp_ratio": 3, "qkv_bias": False, "layer_norm_eps": 1e-4}, ""),
    "DINOv2 classifier": ("Dinov2ForImageClassification", {"mlp_ratio": 2}, "dinov2"),
    "ViTMAE": ("ViTMAEForPreTraining", {"mask_ratio": 0.0}, "vit"),
    "ViTMAE encoder": ("ViTMAEModel", {"mask_ratio": 0.0}, ""),
    "ViTMSN": ("ViTMSNModel", {}, ""),
    "ViTMSN classifier": ("ViTMSNForImageClassification", {"num_labels": 3}, "vit"),
}


def build(name: str) -> transformers.PreTrainedModel:
    model, options, _ = FOLDABLE[name]
    model_class = getattr(transformers, model)
    torch.manual_seed(0)
    built = model_class(model_class.config_class(**{**SIZES, **IMAGES, **options}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built.eval()


@pytest.mark.parametrize("hub_names", [True, False])
@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_model_equals_the_original(name, hub_names, tmp_path):
    original = build(name)
    original.save_pretrained(tmp_path / "source", save_original_format=hub_names)
    with warnings.catch_warnings():
        ignored = (CLASSIFIER_DROPPED, "neither classifier nor pooler", "no preprocessor_config")
        warnings.filterwarnings("ignore", f".*({'|'.join(ignored)})")
        convert(tmp_path / "source", tmp_path / "vit")
    ours = fastvit.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    backbone = getattr(original, FOLDABLE[name][2]) if FOLDABLE[name][2] else original
    options = {"noise": torch.arange(16.0).expand(2, -1)} if name.startswith("ViTMAE") else {}
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = backbone(pixels, **options).last_hidden_state
        for model in (ours, theirs):
            assert relative_error(model(pixels).last_hidden_state, expected) < 1e-5
        if name == "ViTMSN classifier":
            classifier = fastvit.ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
            assert relative_error(classifier(pixels).logits, original(pixels).logits) < 1e-5


def test_mean_and_size_of_the_image_processor_are_kept(tmp_path):
    save_checkpoint("DINOv2", tmp_path / "source")
    with pytest.warns(UserWarning, match="neither classifier nor pooler"):
        convert(tmp_path / "source", tmp_path / "vit")
    settings = json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == CASES["DINOv2"].processor["image_mean"]
    assert settings["size"] == {"height": 32, "width": 32}


def test_images_of_a_folder_without_an_image_processor_have_the_mean_of_the_family(tmp_path):
    save_checkpoint("DINOv2", tmp_path / "source")
    (tmp_path / "source" / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="no preprocessor_config.json; using ImageNet's mean"):
        convert(tmp_path / "source", tmp_path / "vit")
    settings = json.loads((tmp_path / "vit" / "preprocessor_config.json").read_text())
    assert settings["image_mean"] == [0.485, 0.456, 0.406] and settings["image_std"] == [0.229, 0.224, 0.225]


def test_a_classifier_that_reads_other_tokens_is_dropped_with_a_warning(tmp_path):
    build("DINOv2 classifier").save_pretrained(tmp_path / "source")
    with pytest.warns(UserWarning) as caught:
        convert(tmp_path / "source", tmp_path / "vit")
    assert any(CLASSIFIER_DROPPED in str(each.message) for each in caught)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DeiT", "it has a distillation token"),
        ("BEiT", "its blocks have position biases in attention"),
        ("DINOv2 giant", r"its feed-forward is gated \(SwiGLU\)"),
        ("DINOv2 with registers", "it has register tokens"),
        ("DINOv3 ViT", r"it rotates queries and keys by position \(RoPE\)"),
        ("I-JEPA", "it has no class token"),
        ("CLIP vision", "it has a LayerNorm before the blocks"),
        ("SigLIP", "it has no class token"),
    ],
)
def test_models_that_are_no_vit_are_refused_with_the_reason(name, reason, tmp_path):
    save_checkpoint(name, tmp_path / "source")
    with pytest.raises(fastvit.InputError, match=f"cannot be folded into a ViT: .*{reason}"):
        convert(tmp_path / "source", tmp_path / "vit")
    assert not (tmp_path / "vit").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "tensor encoder.layer.2.layernorm_before.weight is missing"),
        ({"num_hidden_layers": 1, "out_features": ["stem"], "out_indices": [0]}, "tensor encoder.layer.1.* unexpected"),
        ({"hidden_size": 32}, "expected shape"),
        ({"num_hidden_layers": 10**3}, "num_hidden_layers: expected at most"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_that_of_the_weights_is_refused(change, message, tmp_path):
    source: Path = save_checkpoint("DINOv2", tmp_path / "source")
    stored = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(fastvit.InputError, match=message):
        convert(source, tmp_path / "vit")


def test_layer_scale_of_another_shape_is_refused(tmp_path):
    source = save_checkpoint("DINOv2", tmp_path / "source")
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if "layer_scale1" in name)
    save_file({**tensors, name: torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(fastvit.InputError, match=r"LayerScale: expected shape \[64\], found \[1\]"):
        convert(source, tmp_path / "vit")
