"""The model computes the same outputs and gradients as transformers' own from the same weights."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig

import fastvit
from fastvit.models.vit import resample_position_embeddings

BASE = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "num_labels": 5}
SMALL_CONFIGS = {
    "square": {"image_size": 32, "patch_size": 8},
    "odd patches": {"image_size": 42, "patch_size": 14},
    "not square": {"image_size": [24, 40], "patch_size": [8, 4]},
    "one channel": {"image_size": 32, "patch_size": 16, "num_channels": 1},
    "six channels, no qkv bias": {"image_size": 16, "patch_size": 8, "num_channels": 6, "qkv_bias": False},
    "head dim 80": {"image_size": 16, "patch_size": 8, "hidden_size": 160, "num_attention_heads": 2},
    "pixels left over": {"image_size": 37, "patch_size": 8},
    "one patch, one block": {"image_size": 8, "patch_size": 8, "num_hidden_layers": 1},
}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = (ours.double() - theirs.double()).norm()
    return (difference / theirs.double().norm().clamp_min(1e-30)).item()


def randomise(model: nn.Module) -> None:
    """Perturb every parameter: with the initial values (bias 0, gamma 1) many errors would go unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.dim() == 1 else 0.02))


def build_pair(ours_class, tmp_path, *, attn_implementation="sdpa", **config):
    """Build our model and transformers' with the same random weights, passed on through a saved folder."""
    theirs_class = getattr(transformers, ours_class.__name__)
    torch.manual_seed(0)
    theirs = theirs_class(ViTConfig(**{**BASE, **config}, attn_implementation="eager"))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, info = ours_class.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, attn_implementation=attn_implementation
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return ours.train(), theirs.train()


def pixels_for(config: ViTConfig, batch: int = 2) -> torch.Tensor:
    size = config.image_size if isinstance(config.image_size, list | tuple) else (config.image_size, config.image_size)
    return torch.randn(batch, config.num_channels, *size, generator=torch.Generator().manual_seed(1))


def get_gradients_by_hub_name(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients by the hub's names; transformers has other names in memory."""
    renames = (
        ("vit.layers.", "vit.encoder.layer."),
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )
    gradients = {}
    for name, parameter in model.named_parameters():
        for new, hub in renames:
            name = name.replace(new, hub)
        gradients[name] = parameter.grad
    return gradients


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-5) -> None:
    ours_by_name, theirs_by_name = get_gradients_by_hub_name(ours), get_gradients_by_hub_name(theirs)
    assert ours_by_name.keys() == theirs_by_name.keys()
    for name, gradient in theirs_by_name.items():
        if gradient is None or ours_by_name[name] is None:
            assert gradient is None and ours_by_name[name] is None, name
        elif name.endswith("key.bias"):
            # Zero in exact arithmetic (softmax is invariant to a shift), so both are rounding error.
            assert ours_by_name[name].abs().max() < 1e-6 and gradient.abs().max() < 1e-6
        else:
            assert relative_error(ours_by_name[name], gradient) < tolerance, name


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_classifier_equals_transformers(name, attn_implementation, tmp_path):
    ours, theirs = build_pair(
        fastvit.ViTForImageClassification, tmp_path, attn_implementation=attn_implementation, **SMALL_CONFIGS[name]
    )
    pixels, labels = pixels_for(theirs.config), torch.tensor([1, 3])
    expected = theirs(pixels, labels=labels, output_hidden_states=True, output_attentions=True)
    detailed = ours(pixels, labels=labels, output_hidden_states=True, output_attentions=True)
    for field in ("hidden_states", "attentions"):
        assert len(detailed[field]) == len(expected[field])
        for ours_at_depth, theirs_at_depth in zip(detailed[field], expected[field], strict=True):
            assert ours_at_depth.shape == theirs_at_depth.shape
            assert relative_error(ours_at_depth, theirs_at_depth) < 1e-5
    # Without details the last block computes only the class token; the results must be the same.
    short = ours(pixels, labels=labels)
    assert short.hidden_states is None and short.attentions is None
    for outputs in (detailed, short):
        assert relative_error(outputs.logits, expected.logits) < 1e-5
        assert abs(outputs.loss - expected.loss) < 1e-5 * abs(expected.loss)
    expected.loss.backward()
    short.loss.backward()
    assert_same_gradients(ours, theirs)
    ours.zero_grad()
    detailed.loss.backward()
    assert_same_gradients(ours, theirs)


def test_classifier_of_in21k_shape_equals_transformers(tmp_path):
    shape = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    ours, theirs = build_pair(fastvit.ViTForImageClassification, tmp_path, **shape)
    pixels, labels = pixels_for(theirs.config, batch=1), torch.tensor([2])
    expected, outputs = theirs(pixels, labels=labels), ours(pixels, labels=labels)
    assert relative_error(outputs.logits, expected.logits) < 1e-5
    expected.loss.backward()
    outputs.loss.backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("add_pooling_layer", [True, False])
def test_backbone_equals_transformers(add_pooling_layer, tmp_path):
    torch.manual_seed(0)
    theirs = transformers.ViTModel(ViTConfig(**BASE, image_size=32, patch_size=8), add_pooling_layer=add_pooling_layer)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = fastvit.ViTModel.from_pretrained(tmp_path, add_pooling_layer=add_pooling_layer)
    pixels = pixels_for(theirs.config)
    expected, outputs = theirs.eval()(pixels), ours(pixels)
    assert relative_error(outputs.last_hidden_state, expected.last_hidden_state) < 1e-5
    if add_pooling_layer:
        assert relative_error(outputs.pooler_output, expected.pooler_output) < 1e-5
    else:
        assert outputs.pooler_output is None
    class_token = ours(pixels, class_token_only=True).last_hidden_state
    assert class_token.shape == (2, 1, BASE["hidden_size"])
    assert relative_error(class_token, expected.last_hidden_state[:, :1]) < 1e-5


def test_masked_image_modeling_equals_transformers(tmp_path):
    ours, theirs = build_pair(
        fastvit.ViTForMaskedImageModeling, tmp_path, image_size=32, patch_size=8, encoder_stride=8
    )
    with torch.no_grad():
        for model in (ours, theirs):
            model.vit.embeddings.mask_token.copy_(torch.linspace(-1, 1, BASE["hidden_size"]))
    pixels = pixels_for(theirs.config)
    masked = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    expected, outputs = theirs(pixels, bool_masked_pos=masked), ours(pixels, bool_masked_pos=masked)
    assert relative_error(outputs.reconstruction, expected.reconstruction) < 1e-5
    assert relative_error(outputs.loss, expected.loss) < 1e-5
    expected.loss.backward()
    outputs.loss.backward()
    assert_same_gradients(ours, theirs)


def test_masked_image_modeling_accepts_rectangular_images():
    config = ViTConfig(**BASE, image_size=[16, 32], patch_size=8, encoder_stride=8)
    outputs = fastvit.ViTForMaskedImageModeling(config)(
        torch.randn(2, 3, 16, 32), bool_masked_pos=torch.ones(2, 8, dtype=torch.bool)
    )
    assert outputs.reconstruction.shape == (2, 3, 16, 32)
    assert outputs.loss.isfinite()


@pytest.mark.parametrize("name", ["square", "head dim 80"])
def test_bfloat16_is_as_accurate_as_transformers(name, tmp_path):
    ours, theirs = build_pair(fastvit.ViTForImageClassification, tmp_path, **SMALL_CONFIGS[name])
    pixels = pixels_for(theirs.config, batch=32)
    exact = copy.deepcopy(theirs).double()(pixels.double()).logits
    our_error = relative_error(ours.bfloat16()(pixels.bfloat16()).logits, exact)
    their_error = relative_error(theirs.bfloat16()(pixels.bfloat16()).logits, exact)
    assert our_error <= 1.25 * their_error


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"])
def test_activations_equal_transformers(activation, tmp_path):
    ours, theirs = build_pair(
        fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8, hidden_act=activation
    )
    pixels = pixels_for(theirs.config) * 3
    expected, outputs = theirs(pixels, labels=torch.tensor([0, 4])), ours(pixels, labels=torch.tensor([0, 4]))
    expected.loss.backward()
    outputs.loss.backward()
    assert_same_gradients(ours, theirs)
    with torch.no_grad():
        assert relative_error(ours(pixels).logits, theirs(pixels).logits) < 1e-5


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("single_label_classification", torch.tensor([1, 4])),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1, 0, 0], [1.0, 0, 0, 0, 1]])),
        ("regression", torch.tensor([[0.1, -1, 2, 0, 3], [1.0, 0, 0.5, 0, 1]])),
    ],
)
def test_losses_equal_transformers(problem_type, labels, tmp_path):
    ours, theirs = build_pair(
        fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8, problem_type=problem_type
    )
    pixels = pixels_for(theirs.config)
    assert relative_error(ours(pixels, labels=labels).loss, theirs(pixels, labels=labels).loss) < 1e-5


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 4], "expected a tensor, got list"),
        (torch.tensor([1, 5]), "expected class indices from 0 to 4, got 5"),
        (torch.tensor([-1, 0]), "expected class indices from 0 to 4, got -1"),
        (torch.tensor([1, 2, 3]), r"expected int64 class indices \[2\], got \[3\] torch.int64"),
        (torch.tensor([1, 2], dtype=torch.int32), "got \\[2\\] torch.int32"),
        (torch.zeros(2, 4), r"expected \[2, 5\] for multi_label, got \[2, 4\] torch.float32"),
    ],
    ids=["list", "too large", "negative", "too many", "int32", "other classes"],
)
def test_wrong_labels_raise_an_error_that_describes_them(labels, message):
    model = fastvit.ViTForImageClassification(ViTConfig(**BASE, image_size=16, patch_size=8))
    with pytest.raises(fastvit.InputError, match=f"labels: {message}" if message[0] == "e" else message):
        model(pixels_for(model.config), labels=labels)
    ignored = model(pixels_for(model.config), labels=torch.tensor([-100, 3])).loss
    assert torch.isfinite(ignored)


def test_interpolated_position_embeddings_equal_transformers(tmp_path):
    ours, theirs = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=32, patch_size=8)
    pixels = torch.randn(2, 3, 48, 64)
    expected = theirs(pixels, interpolate_pos_encoding=True).logits
    assert relative_error(ours(pixels, interpolate_pos_encoding=True).logits, expected) < 1e-5


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_attention_mask_equals_transformers(attn_implementation, tmp_path):
    ours, theirs = build_pair(
        fastvit.ViTForImageClassification,
        tmp_path,
        image_size=32,
        patch_size=8,
        attn_implementation=attn_implementation,
    )
    pixels = pixels_for(theirs.config)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    expected = theirs(pixels, attention_mask=mask).logits
    assert relative_error(ours(pixels, attention_mask=mask).logits, expected) < 1e-5
    assert relative_error(ours(pixels).logits, expected) > 1e-3


def test_folder_saved_by_us_loads_in_transformers(tmp_path):
    torch.manual_seed(0)
    ours = fastvit.ViTForImageClassification(ViTConfig(**BASE, image_size=32, patch_size=8)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = pixels_for(ours.config)
    torch.testing.assert_close(theirs(pixels).logits, ours(pixels).logits, rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(back.pop(name), tensor)
    assert not back


def test_parameters_have_the_hubs_names():
    names = fastvit.ViTForImageClassification(ViTConfig(**BASE)).state_dict().keys()
    for name in (
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.encoder.layer.0.attention.attention.query.weight",
        "vit.encoder.layer.0.attention.output.dense.bias",
        "vit.encoder.layer.2.intermediate.dense.weight",
        "vit.encoder.layer.2.output.dense.weight",
        "vit.encoder.layer.1.layernorm_before.weight",
        "vit.layernorm.bias",
        "classifier.weight",
    ):
        assert name in names


def test_classifier_loads_backbone_checkpoint_and_reports_only_the_head(tmp_path):
    torch.manual_seed(0)
    fastvit.ViTModel(ViTConfig(**BASE, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    model, info = fastvit.ViTForImageClassification.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert all("pooler." in key for key in info["unexpected_keys"])
    assert model.classifier.out_features == 3
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.vit.embeddings.cls_token, stored["embeddings.cls_token"])


@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_missing_or_unexpected_backbone_tensor_is_an_error(fault, tmp_path):
    fastvit.ViTForImageClassification(ViTConfig(**BASE, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if fault == "missing":
        del tensors["vit.encoder.layer.1.output.dense.bias"]
    else:
        tensors["vit.encoder.layer.3.output.dense.bias"] = torch.zeros(48)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fastvit.InputError, match=rf"1 {fault} keys: vit\..*\.[13]\."):
        fastvit.ViTForImageClassification.from_pretrained(tmp_path)


def test_checkpoint_of_another_architecture_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(fastvit.InputError, match="expected a checkpoint of model type 'vit', found 'resnet'"):
        fastvit.ViTForImageClassification.from_pretrained(tmp_path)


class Executed:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickle_checkpoint_loads_tensors_and_runs_no_code(tmp_path):
    model = fastvit.ViTForImageClassification(ViTConfig(**BASE, image_size=32, patch_size=8))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = fastvit.ViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    torch.save({**model.state_dict(), "bad": Executed(tmp_path / "executed")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(fastvit.InputError, match="objects that could run code"):
        fastvit.ViTForImageClassification.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("through_config", [True, False])
def test_position_embeddings_are_resampled_on_loading(through_config, tmp_path):
    torch.manual_seed(0)
    model = fastvit.ViTForImageClassification(ViTConfig(**BASE, image_size=32, patch_size=8)).eval()
    model.save_pretrained(tmp_path)
    larger = ViTConfig.from_pretrained(tmp_path, image_size=48)
    arguments = {"config": larger} if through_config else {"image_size": 48}
    resized = fastvit.ViTForImageClassification.from_pretrained(tmp_path, **arguments)
    assert resized.vit.embeddings.position_embeddings.shape == (1, 37, 48)
    assert resized.config.image_size == 48
    assert larger.image_size == 48  # the caller's config is not modified
    pixels = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(resized(pixels).logits, model(pixels, interpolate_pos_encoding=True).logits)
    resized.save_pretrained(tmp_path / "resized")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "resized")
    torch.testing.assert_close(again(pixels).logits, resized(pixels).logits, rtol=1e-5, atol=1e-6)


def test_resampling_preserves_a_smooth_field_and_the_class_token():
    rows = torch.linspace(0, 1, 8).view(1, 8, 1).expand(1, 8, 8).reshape(1, 64, 1)
    embeddings = torch.cat([torch.full((1, 1, 1), 9.0), rows], dim=1)
    resampled = resample_position_embeddings(embeddings, (8, 8), (16, 4))
    assert resampled.shape == (1, 65, 1)
    assert resampled[0, 0] == 9
    field = resampled[0, 1:, 0].view(16, 4)
    assert (field[2:-2].diff(dim=0) > 0).all()
    torch.testing.assert_close(field[:, 0], field[:, 3])


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_uint8_pixels_are_normalised_by_the_model(layout, tmp_path):
    ours, theirs = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=[16, 24], patch_size=8)
    ours.config.image_mean, ours.config.image_std = [0.2, 0.5, 0.7], [0.3, 0.5, 0.25]
    raw = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ours.config.image_mean, ours.config.image_std))
    expected = theirs((raw / 255 - mean) / std).logits
    given = raw if layout == "channels first" else raw.permute(0, 2, 3, 1).contiguous()
    assert relative_error(ours(given).logits, expected) < 1e-5
    normalised = (raw / 255 - mean) / std
    given = normalised if layout == "channels first" else normalised.permute(0, 2, 3, 1)
    assert relative_error(ours(given).logits, expected) < 1e-5


def test_mean_and_std_survive_saving_and_transformers_ignores_them(tmp_path):
    config = ViTConfig(**BASE, image_size=16, patch_size=8, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    fastvit.ViTForImageClassification(config).save_pretrained(tmp_path)
    assert fastvit.ViTForImageClassification.from_pretrained(tmp_path).config.image_mean == [0.1, 0.2, 0.3]
    transformers.ViTForImageClassification.from_pretrained(tmp_path)


def test_gradient_checkpointing_computes_the_same_gradients(tmp_path):
    ours, _ = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8)
    pixels, labels = pixels_for(ours.config), torch.tensor([0, 1])
    checkpointed = copy.deepcopy(ours)
    checkpointed.gradient_checkpointing_enable()
    assert checkpointed.is_gradient_checkpointing
    for model in (ours, checkpointed):
        model(pixels, labels=labels).loss.backward()
    for parameter, expected in zip(checkpointed.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_dropout_acts_in_training_only():
    config = ViTConfig(**BASE, image_size=16, patch_size=8, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model = fastvit.ViTForImageClassification(config)
    pixels = pixels_for(config)
    model.eval()
    assert torch.equal(model(pixels).logits, model(pixels).logits)
    model.train()
    assert not torch.equal(model(pixels).logits, model(pixels).logits)


def test_wrapped_projections_are_called_as_modules(tmp_path):
    from peft import LoraConfig, get_peft_model

    ours, _ = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8)
    pixels = pixels_for(ours.config)
    before = ours.eval()(pixels).logits
    wrapped = get_peft_model(ours, LoraConfig(target_modules=["query", "value", "dense", "projection"], r=4))
    assert torch.allclose(wrapped(pixels).logits, before, atol=1e-6)  # LoRA is initialised as the identity
    wrapped(pixels, labels=torch.tensor([0, 1])).loss.backward()
    adapted = [name for name, p in wrapped.named_parameters() if "lora_B" in name]
    gradients = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(adapted) == 3 * 5 + 1  # query, value and three dense layers of every block, and the patch projection
    assert all(gradients[name] is not None and gradients[name].abs().sum() > 0 for name in adapted)


FUSED_PARTS = (
    "layernorm_before",
    "layernorm_after",
    "attention",
    "attention.attention.query",
    "attention.output",
    "attention.output.dense",
    "intermediate",
    "intermediate.dense",
    "output.dense",
)


@pytest.mark.parametrize("name", FUSED_PARTS)
def test_hooks_on_fused_parts_are_called(name, tmp_path):
    ours, _ = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8)
    pixels = pixels_for(ours.config)
    expected = ours(pixels).logits
    seen = []
    module = ours.get_submodule(f"vit.encoder.layer.1.{name}")
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, expected)
    output = seen[0][0] if name == "attention" else seen[0]  # attention returns (output, maps), as in transformers
    assert len(seen) == 1 and output.shape[:2] == (2, 5)


def test_replaced_norm_is_called(tmp_path):
    ours, _ = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8)
    pixels = pixels_for(ours.config)
    expected = ours(pixels).logits
    for layer in ours.vit.encoder.layer:
        plain = torch.nn.LayerNorm(layer.layernorm_after.normalized_shape, eps=layer.layernorm_after.eps)
        plain.load_state_dict(layer.layernorm_after.state_dict())
        layer.layernorm_after = plain
    torch.testing.assert_close(ours(pixels).logits, expected)


def test_second_derivatives_of_the_feed_forward_match_finite_differences():
    """The feed-forward has a backward of its own."""
    from fastvit.ops.reference import feed_forward

    torch.manual_seed(0)
    shapes = [(2, 3, 4), (6, 4), (6,), (4, 6), (4,)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for activation in ("gelu", "gelu_new", "quick_gelu"):
        assert torch.autograd.gradcheck(lambda *t, a=activation: feed_forward(*t, a), tensors)
        assert torch.autograd.gradgradcheck(lambda *t, a=activation: feed_forward(*t, a), tensors)


def test_torch_func_transforms_work_on_the_model():
    """Per-image gradients by vmap, and directional derivatives by jvp and by forward-mode AD."""
    torch.manual_seed(0)
    config = ViTConfig(**BASE, **SMALL_CONFIGS["square"], attn_implementation="eager")
    model = fastvit.ViTForImageClassification(config).eval()
    randomise(model)
    pixels, labels = pixels_for(config, 3), torch.tensor([2, 0, 1])
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, image, label):
        logits = torch.func.functional_call(model, parameters, (image[None],)).logits
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, pixels, labels)
    for index in range(3):
        model.zero_grad()
        F.cross_entropy(model(pixels[index : index + 1]).logits, labels[index : index + 1]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][index], parameter.grad, rtol=1e-4, atol=1e-5)

    direction = torch.randn_like(pixels)
    _, found = torch.func.jvp(lambda pixels: model(pixels).logits, (pixels,), (direction,))
    with fwAD.dual_level():
        same = fwAD.unpack_dual(model(fwAD.make_dual(pixels, direction)).logits).tangent
    step = 1e-3
    with torch.no_grad():
        expected = (model(pixels + step * direction).logits - model(pixels - step * direction).logits) / (2 * step)
    torch.testing.assert_close(found, same)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_training_saves_less_for_backward_than_transformers(tmp_path):
    ours, theirs = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=32, patch_size=8)
    saved_bytes = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.set_attn_implementation("sdpa")
        storages: dict[int, int] = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(pixels_for(model.config, batch=32), labels=torch.zeros(32, dtype=torch.long))
        saved_bytes[name] = sum(size for pointer, size in storages.items() if pointer not in weights)
    assert saved_bytes["ours"] < 0.85 * saved_bytes["theirs"]


def test_compiles_without_a_graph_break(tmp_path):
    ours, _ = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8)
    pixels, labels = pixels_for(ours.config), torch.tensor([0, 1])
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    for model in (ours, compiled):
        model(pixels, labels=labels).loss.backward()
    for parameter, expected in zip(compiled.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_returns_tuples_and_switches_attention_implementation(tmp_path):
    ours, _ = build_pair(fastvit.ViTForImageClassification, tmp_path, image_size=16, patch_size=8)
    pixels = pixels_for(ours.config)
    loss, logits = ours(pixels, labels=torch.tensor([0, 1]), return_dict=False)
    assert loss.dim() == 0 and logits.shape == (2, 5)
    before = ours(pixels).logits
    ours.set_attn_implementation("eager")
    assert ours.config._attn_implementation == "eager"
    torch.testing.assert_close(ours(pixels).logits, before)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "pixel_values: expected images, got None"),
        (torch.zeros(3, 16, 16), r"pixel_values: expected \[batch, 3, height, width\].*got \[3, 16, 16\]"),
        (torch.zeros(1, 4, 16, 16), "config.num_channels is 3"),
        (torch.zeros(1, 3, 24, 16), r"expected images of \(16, 16\) \(height, width\), got \(24, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.int64), "expected floating or uint8 pixels, got torch.int64"),
    ],
)
def test_wrong_pixels_raise_an_error_that_describes_them(pixels, message):
    model = fastvit.ViTForImageClassification(ViTConfig(**BASE, image_size=16, patch_size=8))
    with pytest.raises(ValueError, match=message):
        model(pixels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 50}, "config.hidden_size: expected a multiple of num_attention_heads"),
        ({"hidden_act": "swish2"}, "config.hidden_act: expected one of .*gelu"),
        ({"image_size": 4, "patch_size": 8}, "config.image_size: expected room for one patch"),
    ],
)
def test_wrong_configs_raise_an_error_that_names_the_option(config, message):
    with pytest.raises(fastvit.InputError, match=message):
        fastvit.ViTModel(ViTConfig(**{**BASE, **config}))


def test_import_loads_no_heavy_package():
    code = (
        "import sys, fastvit; assert fastvit.__version__; "
        "heavy = {'torch', 'transformers', 'datasets', 'triton', 'accelerate'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "fastvit.ViTForImageClassification; "
        "heavy = {'transformers.trainer', 'datasets', 'fastvit.train.finetune'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
