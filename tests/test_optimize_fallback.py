"""Blocks that `fastvit.optimize` leaves unchanged, or that run their own forward, with the reason."""

import copy
import logging

import pytest
import torch
import transformers
from optimized_models import (
    DEVICE,
    IMAGES,
    MODELS,
    SIZES,
    assert_close,
    assert_same_bits,
    build,
    build_timm_model,
    compute_results,
    forbid_fallback,
    get_main_tensor,
    make_pixels,
    run,
)
from test_modeling import randomise, relative_error
from timm_import import import_timm
from torch import nn

import fastvit
from fastvit.ops import block as blocks


@pytest.fixture
def logged(caplog):
    """A function that returns the logged messages about fallbacks."""
    caplog.set_level(logging.INFO, "fastvit")
    blocks._log_fallback.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if "runs its own forward" in record.getMessage()]
    blocks._log_fallback.cache_clear()


def test_model_without_supported_blocks_is_an_error():
    model = nn.Linear(4, 4)
    with pytest.raises(fastvit.InputError, match=r"Linear has no block .* ViT, DeiT, .* DINOv3 ViT"):
        fastvit.optimize(model)
    assert fastvit.restore(model) == 0
    for function in (fastvit.optimize, fastvit.restore):
        with pytest.raises(fastvit.InputError, match=r"model: expected a torch\.nn\.Module, got str"):
            function("google/vit-base-patch16-224")


def test_text_towers_are_not_replaced():
    sizes = {**SIZES, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=sizes, vision_config=IMAGES, projection_dim=16)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).to(DEVICE).eval()
    text = [type(module) for module in model.text_model.modules()]
    tokens = torch.randint(3, 60, (2, 12), device=DEVICE)
    expected = model(tokens, make_pixels())
    report = fastvit.optimize(model)
    assert [type(module) for module in model.text_model.modules()] == text
    assert set(report.replaced) == {f"vision_model.encoder.layers.{index}" for index in range(2)}
    assert report.left == {
        f"text_model.encoder.layers.{index}": "it belongs to a clip_text_model, which is not a vision tower"
        for index in range(2)
    }
    assert str(report).startswith("replaced: 2 blocks of CLIP vision (")
    assert "left: 2 blocks: it belongs to a clip_text_model" in str(report)
    with fastvit.backend("reference"), forbid_fallback(model):
        found = model(tokens, make_pixels())
    assert relative_error(found.logits_per_image, expected.logits_per_image) < 1e-5


def test_blocks_with_lora_run_their_own_forward_until_merged(logged):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = build("ViT", train=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r"layers\.0\.attention\.[qv]_proj", r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator(parameter.device).manual_seed(5))
    expected = compute_results(adapted)
    report = fastvit.optimize(adapted)
    assert [name.endswith("layers.1") for name in report.replaced] == [True]
    (reason,) = report.left.values()
    assert reason.startswith("a linear layer is wrapped, hooked or quantised: peft.tuners.lora")
    with fastvit.backend("reference"):
        for _ in range(2):
            assert_close(compute_results(adapted), expected)
        assert logged() == [f"optimize: a block of ViT runs its own forward: {reason}"]
        merged = adapted.merge_and_unload()
        with forbid_fallback(merged):
            assert relative_error(get_main_tensor(run(merged)), expected["output"]) < 1e-5


def replace_part(layer: nn.Module, name: str, make) -> None:
    """Replace the module at `name` by `make(module)`."""
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, make(getattr(layer.get_submodule(parent), last)))


def do_nothing(*args) -> None:
    """A hook without effect."""


def add_hook(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(do_nothing)
    return module


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def double(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Doubled
    return linear


def parametrise(linear: nn.Linear) -> nn.Linear:
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Tanh())
    return linear


CHANGES = {
    "another projection": ("attention.o_proj", double, "test_optimize_fallback.Doubled"),
    "a parametrisation": ("mlp.fc1", parametrise, "wrapped, hooked or quantised"),
    "no norm": ("layernorm_after", lambda norm: nn.Identity(), "not a plain LayerNorm"),
    "a norm without bias": ("layernorm_before", lambda norm: nn.LayerNorm(48, bias=False), "not a plain LayerNorm"),
    "a hook": ("attention", add_hook, "there is a hook on transformers.models.vit.modeling_vit.ViTAttention"),
    "another feed-forward": ("mlp", lambda mlp: nn.Sequential(mlp), "its parts are not where they were expected"),
    "another activation": ("mlp.activation_fn", lambda _: nn.Mish(), "no operation for the activation torch.nn"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_block_with_replaced_parts_runs_its_own_forward(change, when, logged):
    name, make, reason = CHANGES[change]
    model = build("ViT")
    if when == "after":
        fastvit.optimize(model)
    replace_part(model.layers[1].to(DEVICE), name, make)
    model.to(DEVICE)
    twin = copy.deepcopy(model)
    fastvit.restore(twin)
    with fastvit.backend("reference"):
        expected = compute_results(twin)
        report = fastvit.optimize(model)
        assert list(report.replaced) == ["layers.0"] and reason in report.left["layers.1"]
        assert_close(compute_results(model), expected)
        assert len(logged()) == 1 and reason in logged()[0]
    assert fastvit.restore(model) == 2


def test_registered_attention_function_of_a_user_is_called(logged):
    calls = []

    def attention(module, query, key, value, mask, **kwargs):
        calls.append(module)
        return (query + key + value).transpose(1, 2), None

    transformers.AttentionInterface.register("sum", attention)
    model = build("ViT")
    model.set_attn_implementation("sum")
    fastvit.optimize(model)
    run(model)
    assert len(calls) == 2 and "its attention is 'sum'" in logged()[0]
    model.set_attn_implementation("eager")
    with fastvit.backend("reference"), forbid_fallback(model), torch.no_grad():
        run(model)


def test_unsupported_arguments_run_the_own_forward(logged):
    model = build("ViT")
    layer, x = model.layers[0], torch.randn(2, 5, 48, device=DEVICE)
    expected = layer(x, is_causal=True)
    fastvit.optimize(model)
    assert torch.equal(layer(x, is_causal=True), expected)
    flat = torch.randn(5, 5, device=DEVICE)
    twin = copy.deepcopy(layer)
    fastvit.restore(twin)
    assert torch.equal(layer(x, flat), twin(x, flat))
    assert [message.partition("forward: ")[2] for message in logged()] == [
        "it is called with is_causal",
        "its mask is not a tensor [B, heads, queries, keys]",
    ]


def test_timm_blocks_with_unsupported_parts_run_their_own_forward():
    layers = import_timm("timm.layers")
    for options, reason in (
        (  # the gate is the second half
            {"mlp_layer": layers.GluMlp, "act_layer": nn.SiLU},
            "it has norms or gates inside attention or feed-forward",
        ),
        ({"qk_norm": True}, "it has norms or gates inside attention or feed-forward"),
        ({"proj_drop_rate": 0.1}, "there is dropout inside the feed-forward"),
    ):
        torch.manual_seed(0)
        model = build_timm_model(**options).to(DEVICE).train()
        expected = compute_results(model)
        assert list(fastvit.optimize(model).left.values()) == [reason] * 2
        assert_same_bits(compute_results(model), expected)


def test_replaced_forward_is_not_touched_and_stops_restore():
    model = build("ViT")
    first = model.layers[0]
    first.forward = first.forward
    report = fastvit.optimize(model)
    assert list(report.replaced) == ["layers.1"]
    assert report.left == {"layers.0": "its forward was replaced (a device map?)"}
    assert not isinstance(first, blocks.FusedModule)
    last = model.layers[1]
    last.forward = last.forward
    with pytest.raises(fastvit.InputError, match=r"layers.1 was wrapped after optimize .*undo that before restore"):
        fastvit.restore(model)
    del last.forward
    kind = type(last)
    last.__class__ = type("FSDPViTLayer", (kind,), {})  # what FSDP2 does
    with fastvit.backend("reference"), forbid_fallback(model):
        run(model)
    with pytest.raises(fastvit.InputError, match=r"layers.1 was wrapped after optimize .*FSDPViTLayer"):
        fastvit.restore(model)
    last.__class__ = kind
    assert fastvit.restore(model) == 1


def test_block_that_runs_its_own_forward_compiles(logged):
    model = build("ViT")
    expected = compute_results(model)
    fastvit.optimize(model)
    add_hook(model.layers[1].attention)
    model.layers[0].mlp = nn.Sequential(model.layers[0].mlp)
    with fastvit.backend("reference"):
        torch._dynamo.reset()
        output = get_main_tensor(run(torch.compile(model, fullgraph=True, backend="aot_eager")))
    assert relative_error(output, expected["output"]) < 1e-5
    assert len(logged()) == 2


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "CLIP", "YOLOS", "DINOv3", "timm"])
def test_second_derivatives_of_eager_attention_are_kept(name):
    model = build(name)
    if name == "timm":
        for block in model.blocks:
            block.attn.fused_attn = False
    else:
        model.set_attn_implementation("eager")
    names = ("fc1.weight", "up_proj.weight", "intermediate.dense.weight")
    weight = next(parameter for name, parameter in model.named_parameters() if name.endswith(names))

    def compute_second_derivative():
        loss = get_main_tensor(run(model)).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    expected = compute_second_derivative()
    report = fastvit.optimize(model)
    assert len(report.left) == MODELS[name][1] and "second derivatives" in str(report)
    with fastvit.backend("reference"):
        assert torch.equal(compute_second_derivative(), expected)


def test_own_model_with_eager_attention_keeps_second_derivatives():
    config = transformers.ViTConfig(**IMAGES, num_labels=3, attn_implementation="eager")
    model = fastvit.ViTForImageClassification(config).to(DEVICE)
    randomise(model)
    weight = model.vit.encoder.layer[0].intermediate.dense.weight
    with fastvit.backend("reference"):
        (gradient,) = torch.autograd.grad(model(make_pixels()).logits.square().sum(), weight, create_graph=True)
        assert torch.autograd.grad(gradient.square().sum(), weight)[0].abs().sum() > 0
