"""attn_implementation="fastvit" in transformers' own models: the same outputs and gradients as its eager attention."""

import pytest
import torch
import transformers
from test_modeling import randomise, relative_error

import fastvit
from fastvit import ops
from fastvit.attention_interface import attention_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
PICTURES = {**SMALL, "image_size": 28, "patch_size": 14}
TEXT = {
    **SMALL,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**PICTURES)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**PICTURES)),
    "DINOv2 with registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**PICTURES)
    ),
    "SigLIP pictures": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**PICTURES)),
    "SigLIP text": lambda: transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXT)),
    "CLIP pictures": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**PICTURES)),
    "CLIP text": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),  # causal
}
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def _registered(backend):
    if backend == "triton" and ops.why_not_triton_anywhere():
        pytest.skip("Triton is not installed")
    fastvit.register_attention()
    with fastvit.backend(backend):
        yield


def inputs_for(name: str, padded: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if "text" not in name:
        return {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator).to(DEVICE)}
    tokens = torch.randint(3, 60, (2, 12), generator=generator)
    tokens[:, -1] = 2
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        tokens[0, 7:], mask[0, 7:] = 0, 0
        tokens[0, 6] = 2
    return {"input_ids": tokens.to(DEVICE), "attention_mask": mask.to(DEVICE)}


def outputs_and_gradients(model, implementation: str, inputs, **options) -> dict[str, torch.Tensor]:
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    outputs = model(**inputs, **options)
    hidden = outputs.last_hidden_state
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(hidden.square().mean(), parameters, allow_unused=True)
    found = {name: grad for name, grad in zip(names, gradients, strict=True) if grad is not None}
    return {"last hidden state": hidden.detach(), **found}


@BACKENDS
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_compute_the_same(name, padded, backend):
    if padded and "text" not in name:
        pytest.skip("pictures have no padding")
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE).eval()
    randomise(model)
    inputs = inputs_for(name, padded)
    expected = outputs_and_gradients(model, "eager", inputs)
    found = outputs_and_gradients(model, "fastvit", inputs)
    assert found.keys() == expected.keys()
    for tensor, result in found.items():
        if not tensor.endswith(("key.bias", "k_proj.bias")):  # its gradient is zero: softmax takes no shift
            assert relative_error(result, expected[tensor]) < 1e-5, tensor


@BACKENDS
def test_a_mask_is_not_dropped(backend):
    """With an attention function alone, and no mask function, transformers would pass no mask at all."""
    torch.manual_seed(0)
    model = MODELS["CLIP text"]().to(DEVICE).eval()
    model.set_attn_implementation("fastvit")
    inputs = inputs_for("CLIP text", padded=False)
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 8] = 5
    before, after = (model(**given).last_hidden_state for given in (inputs, changed))
    assert torch.equal(before[:, :8], after[:, :8])  # causal: no token sees a later one
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@BACKENDS
def test_attention_maps_are_given_when_asked_for(backend):
    torch.manual_seed(0)
    model = MODELS["ViT"]().to(DEVICE).eval()
    inputs = inputs_for("ViT", padded=False)
    maps = {}
    for implementation in ("eager", "fastvit"):
        model.set_attn_implementation(implementation)
        maps[implementation] = model(**inputs, output_attentions=True).attentions
    for ours, theirs in zip(maps["fastvit"], maps["eager"], strict=True):
        torch.testing.assert_close(ours, theirs)


@BACKENDS
def test_grouped_heads_position_bias_and_causality(backend):
    query = torch.randn(2, 4, 6, 16, device=DEVICE)
    key, value = (torch.randn(2, 2, 6, 16, device=DEVICE) for _ in range(2))
    bias, mask = torch.randn(4, 6, 6, device=DEVICE), torch.rand(2, 1, 6, 6, device=DEVICE) < 0.7
    mask[..., 0] = True
    repeated = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    module = torch.nn.Identity()
    for given, expected in (
        ({"attention_mask": None, "is_causal": True}, {"is_causal": True}),
        ({"attention_mask": mask}, {"attn_mask": mask}),
        ({"attention_mask": None, "position_bias": bias}, {"attn_mask": bias}),
        (
            {"attention_mask": mask, "position_bias": bias},
            {"attn_mask": torch.where(mask, bias, torch.tensor(float("-inf"), device=DEVICE))},
        ),
    ):
        found, _ = attention_forward(module, query, key, value, **given)
        theirs = torch.nn.functional.scaled_dot_product_attention(query, *repeated, **expected)
        torch.testing.assert_close(found, theirs.transpose(1, 2), rtol=1e-4, atol=1e-5)


@BACKENDS
def test_what_is_not_supported_is_named(backend):
    tensor = torch.randn(1, 1, 2, 16, device=DEVICE)
    with pytest.raises(fastvit.InputError, match="'fastvit' has no softcap, which Identity asks for"):
        attention_forward(torch.nn.Identity(), tensor, tensor, tensor, None, softcap=30.0)


@BACKENDS
def test_our_own_model_takes_the_name(backend):
    model = fastvit.ViTModel(transformers.ViTConfig(**PICTURES), add_pooling_layer=False).to(DEVICE).eval()
    inputs = inputs_for("ViT", padded=False)
    expected = model(**inputs).last_hidden_state
    model.set_attn_implementation("fastvit")
    assert torch.equal(model(**inputs).last_hidden_state, expected)
