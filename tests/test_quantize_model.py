"""Quantised models: the error of fp8 and int8 logits, saving, compilation, and what cannot be quantised."""

import copy
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from test_modeling import pixels_for, randomise, relative_error
from torch import Tensor, nn
from transformers import ViTConfig

import fastvit
from fastvit import ops
from fastvit.ops.block import Fp8Linear
from fastvit.report import info

pytest.importorskip("triton")
from operations import DEVICE
from test_quantize import E4M3, needs_matmul

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "num_labels": 16}
SMALL |= {"image_size": 32, "patch_size": 8}
TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 1000}


def make_model(dtype=torch.float32, **config) -> fastvit.ViTForImageClassification:
    model = fastvit.ViTForImageClassification(ViTConfig(**{**SMALL, **config})).eval()
    randomise(model)
    return model.to(DEVICE, dtype)


def make_pixels(dtype=torch.float32) -> Tensor:
    return pixels_for(ViTConfig(**SMALL)).to(DEVICE, dtype)


def initialise_as_trained(model: nn.Module) -> nn.Module:
    """Set weights as after training: matrices preserve the magnitude of their input, and norm weights differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layernorm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.5 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * (0.1 if parameter.dim() == 1 else 0.02))
    return model.eval()


@pytest.mark.parametrize(("config", "batch"), [(TINY, 4), (BASE, 1)], ids=["tiny", "base"])
def test_logit_error_is_within_sixteen_times_that_of_bfloat16(config, batch):
    """bfloat16 has 8 significant bits and e4m3 has 4, a factor of 16. docs/kernels.md states these errors."""
    model = initialise_as_trained(fastvit.ViTForImageClassification(ViTConfig(**config))).to(DEVICE)
    pixels = pixels_for(model.config, batch).to(DEVICE)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(pixels.double()).logits
        half = copy.deepcopy(model).bfloat16()
        error = relative_error(half(pixels.bfloat16()).logits, exact)
        fp8_error = relative_error(fastvit.quantize(half, "fp8")(pixels.bfloat16()).logits, exact)
        float_error = relative_error(fastvit.quantize(model, "fp8")(pixels).logits, exact)
    print(f"bfloat16 {error:.4f}, fp8 of a bfloat16 model {fp8_error:.4f}, of a float32 model {float_error:.4f}")
    assert error < fp8_error < 16 * error
    assert max(fp8_error, float_error) < 0.1


@needs_matmul
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("option", [{}, {"qkv_bias": False}, {"hidden_act": "quick_gelu"}], ids=str)
def test_kernels_match_reference_in_the_quantised_model(dtype, option):
    model = fastvit.quantize(make_model(dtype, **option), "fp8")
    pixels = make_pixels(dtype)
    with torch.no_grad():
        with fastvit.backend("reference"):
            expected = model(pixels).logits
        with fastvit.backend("triton"):
            found = model(pixels).logits
    # A value near the midpoint of two e4m3 numbers may be rounded to either.
    assert relative_error(found, expected) < 0.02


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_activation_without_a_kernel(activation):
    model = make_model(hidden_act=activation)
    with torch.no_grad():
        exact = model(make_pixels()).logits
        assert relative_error(fastvit.quantize(model, "fp8")(make_pixels()).logits, exact) < 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attentions_and_hidden_states_match_the_model(implementation):
    model = make_model(attn_implementation=implementation)
    pixels = make_pixels()
    with torch.no_grad():
        expected = model.vit(pixels, output_hidden_states=True, output_attentions=True)
        found = fastvit.quantize(model, "fp8").vit(pixels, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 4 and len(found.attentions) == 3
    for ours, theirs in zip((*found.hidden_states, *found.attentions), (*expected.hidden_states, *expected.attentions)):  # noqa: B905
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 0.06


@pytest.mark.parametrize("masked", [False, True])
def test_class_token_only_matches_the_whole_sequence(masked):
    model = fastvit.quantize(make_model(), "fp8").vit
    mask = torch.ones(2, 17, device=DEVICE)
    mask[0, 2:] = 0
    with torch.no_grad():
        whole = model(make_pixels(), attention_mask=mask if masked else None).last_hidden_state
        alone = model(make_pixels(), attention_mask=mask if masked else None, class_token_only=True).last_hidden_state
        unmasked = model(make_pixels(), class_token_only=True).last_hidden_state
    assert alone.shape == (2, 1, 48)
    # The order of summation may depend on the number of rows. A different bfloat16 rounding may change the e4m3 value.
    torch.testing.assert_close(alone, whole[:, :1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(alone[1], unmasked[1], rtol=0.02, atol=0.02)  # its mask hides no token
    assert (relative_error(unmasked[0], alone[0]) > 0.01) == masked


def test_additive_mask_matches_boolean_mask():
    model = fastvit.quantize(make_model(), "fp8").vit
    keep = torch.ones(2, 1, 1, 17, dtype=torch.bool, device=DEVICE)
    keep[0, ..., 5:9] = False
    with torch.no_grad():
        boolean = model(make_pixels(), attention_mask=keep).last_hidden_state
        additive = model(make_pixels(), attention_mask=torch.zeros(keep.shape, device=DEVICE).masked_fill(~keep, -1e9))
    torch.testing.assert_close(additive.last_hidden_state, boolean, rtol=0.02, atol=0.02)


def test_empty_batch_of_images():
    model = fastvit.quantize(make_model(), "fp8")
    assert model(make_pixels()[:0]).logits.shape == (0, 16)


def test_nan_only_reaches_logits_of_its_own_image():
    model = fastvit.quantize(make_model(), "fp8")
    pixels = make_pixels()
    expected = model(pixels).logits
    pixels[0, 0, 3, 3] = float("nan")
    found = model(pixels).logits
    assert found[0].isnan().all() and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_matmul)])
def test_compiles_without_graph_breaks(backend):
    model = fastvit.quantize(make_model(), "fp8")
    with torch.no_grad(), fastvit.backend(backend):
        expected = model(make_pixels()).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(make_pixels()).logits, expected, rtol=0.02, atol=0.02)


def count_bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_take_half_the_memory_of_bfloat16():
    config = ViTConfig(**{**TINY, "num_hidden_layers": 2})
    model = fastvit.ViTForImageClassification(config).bfloat16()
    before = count_bytes(model.vit.encoder.state_dict().values())
    parameters = model.num_parameters()
    fastvit.quantize(model, "fp8")
    assert count_bytes(model.vit.encoder.state_dict().values()) < 0.52 * before
    assert (
        sum(tensor.numel() for name, tensor in model.state_dict().items() if not name.endswith("scale")) == parameters
    )


def test_state_and_model_are_saved_and_loaded(tmp_path):
    model = make_model(torch.bfloat16)
    pixels = make_pixels(torch.bfloat16)
    assert fastvit.quantize(model, "fp8") is model and not model.training
    expected = model(pixels).logits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = fastvit.quantize(fastvit.ViTForImageClassification(model.config).to(DEVICE, torch.bfloat16), "fp8")
    assert not torch.equal(loaded(pixels).logits, expected)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(loaded(pixels).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(whole(pixels).logits, expected)
    assert torch.equal(copy.deepcopy(model)(pixels).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_changes_leave_quantised_weights_unchanged(dtype):
    layer = Fp8Linear(nn.Linear(48, 32).to(DEVICE))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype).to("cpu").to(DEVICE)
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
        "weight": E4M3, "scale": torch.float32, "bias": torch.bfloat16
    }  # fmt: skip
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert layer.to("meta").weight.dtype == E4M3


def test_training_and_input_gradients_raise():
    model = fastvit.quantize(make_model(), "fp8")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(fastvit.InputError, match=r"quantised to fp8, for inference only: call eval\(\)"):
        model.train()(make_pixels())
    model.eval()
    with pytest.raises(fastvit.InputError, match="disable gradients"):
        model(make_pixels().requires_grad_())
    model.classifier.requires_grad_()  # a linear probe needs no gradients of the features
    model(make_pixels()).logits.sum().backward()
    assert model.classifier.weight.grad is not None


def test_unsupported_models_and_kinds_raise():
    with pytest.raises(fastvit.InputError, match="kind: expected one of fp8, int8, got 'int4'"):
        fastvit.quantize(make_model(), "int4")
    with pytest.raises(fastvit.InputError, match="model: expected a Vision Transformer of fastvit, got Linear"):
        fastvit.quantize(nn.Linear(2, 2), "fp8")
    with pytest.raises(
        fastvit.InputError, match=r"config\.intermediate_size: expected a multiple of 16 for fp8, got 100"
    ):
        fastvit.quantize(make_model(intermediate_size=100), "fp8")
    with pytest.raises(
        fastvit.InputError, match=r"expected torch\.bfloat16 or torch\.float32 for fp8, got torch\.float16"
    ):
        fastvit.quantize(make_model(torch.float16), "fp8")
    model = fastvit.quantize(make_model(), "fp8")
    for kind in ("fp8", "int8"):
        with pytest.raises(fastvit.InputError, match="query of block 0 is in fp8"):
            fastvit.quantize(model, kind)


def test_hooked_or_wrapped_layer_raises_and_nothing_is_quantised():
    model = make_model()
    hook = model.vit.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(fastvit.InputError, match=r"output\.dense of block 1 is wrapped, quantised or hooked"):
        fastvit.quantize(model, "fp8")
    hook.remove()
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(fastvit.InputError, match=r"query\S* of block 0 is wrapped"):
        fastvit.quantize(wrapped, "fp8")
    fastvit.quantize(model, "fp8")


def test_hooks_on_norms_of_a_quantised_model_are_called():
    model = fastvit.quantize(make_model(), "fp8")
    expected, seen = model(make_pixels()).logits, []
    for norm in (model.vit.encoder.layer[0].layernorm_before, model.vit.encoder.layer[1].layernorm_after):
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = model(make_pixels()).logits
    assert len(seen) == 2 and relative_error(found, expected) < 0.02


def test_gpus_without_fp8_raise_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    find_reason = ops.kernel_unavailable_reason.__wrapped__
    monkeypatch.setattr(ops, "kernel_unavailable_reason", find_reason)
    for operation in ("linear_fp8", "layer_norm_fp8", "quantize_rows"):
        reason = find_reason(operation, "cuda", 0, torch.float32)
        assert reason == "this GPU (sm_80) has no fp8 matmul; sm_89 and newer have one"
    assert find_reason("layer_norm", "cuda", 0, torch.float32) is None
    assert "an error (this GPU (sm_80)" in info.describe_backend("linear_fp8", torch.device("cuda", 0))
    with pytest.raises(fastvit.InputError, match=r"linear_fp8: this GPU \(sm_80\) has no fp8 .*backend\('reference'\)"):
        ops._choose_implementation("linear_fp8", "auto", "cuda", 0, torch.float32, None, None)
    assert ops._choose_implementation("quantize_rows", "auto", "cuda", 0, torch.float32, None, None) == "default"

    model = make_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    with pytest.raises(fastvit.InputError, match=r"'fp8' cannot run here: this GPU \(sm_80\) has no fp8"):
        fastvit.quantize(model, "fp8")
    with fastvit.backend("reference"):
        fastvit.quantize(model, "fp8")
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        assert find_reason("linear_fp8", "cuda", 0, torch.float32) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in find_reason("linear_fp8", "cuda", 0, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# int8
# ---------------------------------------------------------------------------------------------------------------------


def test_int8_without_torchao_raises(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name))
    with pytest.raises(fastvit.InputError, match="kind: 'int8' needs the package torchao, which is not installed"):
        fastvit.quantize(make_model(), "int8")


def test_int8_quantises_only_the_linear_layers_of_the_blocks(monkeypatch):
    """A fake torchao rounds the weights of the selected layers."""
    quantised = []

    class Int8WeightOnlyConfig:
        pass

    def quantize_(model, config, filter_fn):
        assert isinstance(config, Int8WeightOnlyConfig)
        for name, module in model.named_modules():
            if filter_fn(module, name):
                quantised.append(name)
                scale = module.weight.abs().amax(-1, keepdim=True) / 127
                module.weight = nn.Parameter((module.weight / scale).round() * scale, requires_grad=False)

    package, quantization = ModuleType("torchao"), ModuleType("torchao.quantization")
    package.__spec__ = ModuleSpec("torchao", None)
    quantization.Int8WeightOnlyConfig, quantization.quantize_ = Int8WeightOnlyConfig, quantize_
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    model = make_model()
    with torch.no_grad():
        expected = model(make_pixels()).logits
        found = fastvit.quantize(model, "int8")(make_pixels()).logits
    assert len(quantised) == 3 * 6 and all(".encoder.layer." in name for name in quantised)
    assert 0 < relative_error(found, expected) < 0.03
    assert not model.training


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_int8_with_torchao():
    model = make_model(torch.bfloat16)
    with torch.no_grad():
        expected = model(make_pixels(torch.bfloat16)).logits
        found = fastvit.quantize(model, "int8")(make_pixels(torch.bfloat16)).logits
    assert type(model.vit.encoder.layer[0].output.dense.weight) is not nn.Parameter
    assert type(model.classifier.weight) is nn.Parameter
    assert relative_error(found, expected) < 0.03
    with pytest.raises(fastvit.InputError, match="wrapped, quantised or hooked"):
        fastvit.quantize(model, "fp8")
