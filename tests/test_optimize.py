"""fastvit.optimize: models of other libraries compute the same with our operations, and are put back exactly."""

import contextlib
import copy
import logging
import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from test_modeling import randomise, relative_error
from timm_import import import_timm
from torch import nn

import fastvit
from fastvit import ops
from fastvit.adapters.swap import list_families, load_adapters
from fastvit.ops import block as blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64}
IMAGES = {**SIZES, "image_size": 28, "patch_size": 14}
MAE = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
YOLOS = {"image_size": [28, 28], "num_detection_tokens": 3}


def model_of(name: str, config: str, options=None, **more):
    return getattr(transformers, name)(getattr(transformers, config)(**{**IMAGES, **(options or {}), **more}))


def default_model(name: str):
    return getattr(transformers, name)(getattr(transformers, name).config_class())


def timm_model(**options):
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return import_timm().models.vision_transformer.VisionTransformer(**{**sizes, **options})


def timm_giant():
    return timm_model(mlp_layer=import_timm().layers.SwiGLUPacked, act_layer=nn.SiLU, init_values=0.1, mlp_ratio=2.0)


TIMM_DINOV2 = {"init_values": 0.1, "reg_tokens": 2, "no_embed_class": True, "drop_path_rate": 0.4}
TIMM_SIGLIP = {"class_token": False, "global_pool": "map"}

# name -> (family, how many blocks, model)
MODELS = {
    "ViT": ("ViT", 2, partial(model_of, "ViTModel", "ViTConfig", qkv_bias=False)),
    "DeiT": ("DeiT", 2, partial(model_of, "DeiTModel", "DeiTConfig")),
    "ViTMAE": (
        "ViTMAE",
        3,
        partial(
            model_of, "ViTMAEForPreTraining", "ViTMAEConfig", MAE, decoder_intermediate_size=40, norm_pix_loss=True
        ),
    ),
    "ViTMSN": ("ViTMSN", 2, partial(model_of, "ViTMSNModel", "ViTMSNConfig")),
    "I-JEPA": ("I-JEPA", 2, partial(model_of, "IJepaModel", "IJepaConfig", hidden_act="gelu_new")),
    "DINOv2": ("DINOv2", 2, partial(model_of, "Dinov2Model", "Dinov2Config", mlp_ratio=2, drop_path_rate=0.4)),
    "DINOv2 giant": ("DINOv2", 2, partial(model_of, "Dinov2Model", "Dinov2Config", mlp_ratio=2, use_swiglu_ffn=True)),
    "DINOv2 with registers": (
        "DINOv2 with registers",
        2,
        partial(model_of, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", mlp_ratio=2),
    ),
    "CLIP": ("CLIP vision", 2, partial(model_of, "CLIPVisionModel", "CLIPVisionConfig")),
    "SigLIP": ("SigLIP vision", 2, partial(model_of, "SiglipVisionModel", "SiglipVisionConfig")),
    "timm": ("timm VisionTransformer", 2, timm_model),
    "timm DINOv2": ("timm VisionTransformer", 2, partial(timm_model, **TIMM_DINOV2)),
    "timm giant": ("timm VisionTransformer", 2, timm_giant),
    "timm SigLIP": ("timm VisionTransformer", 2, partial(timm_model, act_layer="gelu_tanh", **TIMM_SIGLIP)),
    "YOLOS": ("YOLOS", 2, partial(model_of, "YolosModel", "YolosConfig", YOLOS)),
    "BEiT": ("BEiT", 2, partial(model_of, "BeitModel", "BeitConfig", use_relative_position_bias=True)),
    "BEiT shared bias": (
        "BEiT",
        2,
        partial(
            model_of,
            "BeitModel",
            "BeitConfig",
            use_shared_relative_position_bias=True,
            layer_scale_init_value=0.0,
            drop_path_rate=0.4,
        ),
    ),
    "DINOv3": ("DINOv3 ViT", 2, partial(model_of, "DINOv3ViTModel", "DINOv3ViTConfig")),
    "DINOv3 gated": (
        "DINOv3 ViT",
        2,
        partial(model_of, "DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu"),
    ),
}
# The families in the size that their library has by default.
DEFAULTS = {
    "ViT": partial(default_model, "ViTModel"),
    "DeiT": partial(default_model, "DeiTModel"),
    "ViTMAE": partial(default_model, "ViTMAEForPreTraining"),
    "ViTMSN": partial(default_model, "ViTMSNModel"),
    "I-JEPA": partial(default_model, "IJepaModel"),
    "DINOv2": partial(default_model, "Dinov2Model"),
    "DINOv2 with registers": partial(default_model, "Dinov2WithRegistersModel"),
    "CLIP vision": partial(default_model, "CLIPVisionModel"),
    "SigLIP vision": partial(default_model, "SiglipVisionModel"),
    "YOLOS": partial(default_model, "YolosModel"),
    "BEiT": partial(default_model, "BeitModel"),
    "DINOv3 ViT": partial(default_model, "DINOv3ViTModel"),
    "timm VisionTransformer": lambda: import_timm().models.vision_transformer.VisionTransformer(),
}
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])
EACH = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def backend(request):
    return request.param


@contextlib.contextmanager
def computed_by(backend: str):
    if backend == "triton" and ops.triton_unavailable_reason():
        pytest.skip("Triton is not installed")
    with fastvit.backend(backend):
        yield


def built(name: str, train: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][2]().to(DEVICE).train(train)
    randomise(model)
    return model


@contextlib.contextmanager
def frozen_bias(model: nn.Module, backend: str):
    """Inside, BEiT's position bias has no gradient under "triton": attention's kernel has none of its mask."""
    tables = [p for name, p in model.named_parameters() if "relative_position_bias" in name and backend == "triton"]
    for table in tables:
        table.requires_grad_(False)
    yield
    for table in tables:
        table.requires_grad_(True)


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def called(model: nn.Module, **options):
    """The model's output. The seed fixes what is drawn: MAE's masking, drop path."""
    torch.manual_seed(3)
    given = pixels()
    if type(model).__name__ == "CLIPModel":
        return model.get_image_features(given, **options)
    return model(given, **options)


def main_tensor(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return output.logits if "logits" in output else output.last_hidden_state


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    """The output and every gradient."""
    output = main_tensor(called(model))
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    names = [name for name, parameter in zip(names, parameters, strict=True) if parameter.requires_grad]
    gradients = torch.autograd.grad(output.square().mean(), wanted, allow_unused=True)
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        # A key bias has no gradient but rounding: softmax takes no shift.
        if tensor is not None and not name.endswith(("key.bias", "k_proj.bias")):
            assert relative_error(found[name], tensor) < 1e-5, name


def largest_differences(found: dict, expected: dict) -> dict[str, float]:
    """In parts of the largest value: of the output, and of all gradients together."""
    gradients = [name for name, tensor in expected.items() if name != "output" and tensor is not None]
    parts = {}
    for column, names in (("output", ["output"]), ("gradients", gradients)):
        ours, theirs = (torch.cat([tensors[name].flatten() for name in names]) for tensors in (found, expected))
        parts[column] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return parts


def assert_same_bits(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name] is None if tensor is None else torch.equal(found[name], tensor), name


@contextlib.contextmanager
def only_ours(model: nn.Module):
    """Inside, no block that was optimized may compute itself."""

    def fail(family, reason):
        raise AssertionError(f"a block of {family} computed itself: {reason}")

    assert any(isinstance(module, blocks.FusedModule) for module in model.modules())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "log_fallback", fail)
        yield


@EACH
def test_outputs_and_gradients_are_the_same_and_restored_exactly(name):
    family, count, _ = MODELS[name]
    model = built(name)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    for train in (False, True):
        model.train(train)
        expected = results(model)
        report = fastvit.optimize(model)
        assert list(report.replaced.values()) == [family] * count
        assert list(model.state_dict()) == keys
        for backend in ("reference", "triton"):
            with computed_by(backend), only_ours(model), frozen_bias(model, backend):
                found = results(model)
            wanted = {name: tensor for name, tensor in expected.items() if name in found}
            assert_close(found, wanted)
            for column, difference in largest_differences(found, wanted).items():
                assert difference <= 2 * float(told()[family][column]), column
        assert fastvit.restore(model) == count
        assert [type(module) for module in model.modules()] == kinds
        assert_same_bits(results(model), expected)


@EACH
def test_what_goes_on_around_a_model_still_works(name):
    """Copies, pickles, hidden states, hooks, gradient checkpointing, a second optimize."""
    model = built(name, train=True)
    expected = results(model)
    first = fastvit.optimize(model)
    assert fastvit.optimize(model) == first
    with fastvit.backend("reference"):
        ours = results(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with only_ours(twin):
                assert_same_bits(results(twin), ours)
            assert fastvit.restore(twin) == len(first.replaced)
            assert_same_bits(results(twin), expected)
        with only_ours(model):
            assert_same_bits(results(model), ours)  # a restored copy leaves the model optimized
            if name.startswith("timm"):
                model.set_grad_checkpointing()
            else:
                assert_hidden_states_are_ours(model)
                model.gradient_checkpointing_enable()
            computed = []
            before = blocks.compute_block
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(blocks, "compute_block", lambda *args: computed.append(1) or before(*args))
                assert_same_bits(results(model), ours)
            assert len(computed) == 2 * len(first.replaced)  # again in backward


def assert_hidden_states_are_ours(model) -> None:
    """Collecting hidden states leaves hooks on attention behind, which must not turn ours off."""
    asked = called(model, output_hidden_states=True).hidden_states
    assert asked is not None and all(state.shape[-1] in (48, 32) for state in asked)
    watched = [module for module in model.modules() if module._forward_hooks]
    assert watched


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("timm")])  # which return no maps
def test_attention_maps_are_the_models_own(name):
    model = built(name)
    model.set_attn_implementation("eager")
    expected = called(model, output_attentions=True, output_hidden_states=True)
    fastvit.optimize(model)
    with fastvit.backend("reference"):
        found = called(model, output_attentions=True, output_hidden_states=True)
        with only_ours(model):
            called(model)
    for asked in ("attentions", "hidden_states"):
        theirs = getattr(expected, asked)
        assert theirs and len(theirs) == len(getattr(found, asked))
        for ours, its in zip(getattr(found, asked), theirs, strict=True):
            assert torch.equal(ours, its)


@EACH
def test_a_compiler_takes_the_whole_model(name):
    model = built(name)
    fastvit.optimize(model)
    with fastvit.backend("reference"):
        expected = results(model)
        if not name.startswith("timm"):
            assert_hidden_states_are_ours(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with only_ours(model):
            output = main_tensor(called(compiled))
        assert relative_error(output, expected["output"]) < 1e-5
        output.square().mean().backward()
        for parameter_name, parameter in model.named_parameters():
            if expected.get(parameter_name) is not None and not parameter_name.endswith(("key.bias", "k_proj.bias")):
                assert relative_error(parameter.grad, expected[parameter_name]) < 1e-5, parameter_name


@EACH
def test_a_hook_on_any_part_of_a_block_fires_as_often_as_before(name):
    model = built(name)
    before = hook_calls(model)
    expected = results(model)
    report = fastvit.optimize(model)
    assert set(before) == {f"{layer} {part}" for layer in report.replaced for part, _ in parts_of(model, layer)}
    with fastvit.backend("reference"):
        assert hook_calls(model, expected) == before


def parts_of(model: nn.Module, layer: str):
    return model.get_submodule(layer).named_modules()


def hook_calls(model: nn.Module, expected=None) -> dict[str, int]:
    """How often a forward hook on each part of each block fires, while it is the only one; outputs are `expected`."""
    layers = [name for name, module in model.named_modules() if isinstance(module, block_classes())]
    calls = {}
    for layer in layers:
        for part_name, part in parts_of(model, layer):
            name = f"{layer} {part_name}"
            calls[name] = 0

            def count(module, args, output, name=name):
                calls[name] += 1

            handle = part.register_forward_hook(count)
            with torch.no_grad():
                output = main_tensor(called(model))
            handle.remove()
            if expected is not None:
                assert relative_error(output, expected["output"]) < 1e-5, name
    return calls


def block_classes() -> tuple[type, ...]:
    modules = [(sys.modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in load_adapters()]
    return tuple(getattr(module, name) for module, name in modules if module is not None)


def told() -> dict[str, dict[str, str]]:
    """The rows of the table in docs/optimize.md, by family."""
    page = (Path(__file__).parent.parent / "docs" / "optimize.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    header, *rows = [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_families_are_all_tested_and_told():
    assert {family for family, *_ in MODELS.values()} == set(list_families()) == set(told()) == set(DEFAULTS)


@pytest.mark.parametrize("family", DEFAULTS)
def test_the_table_says_how_many_parameters_are_replaced(family):
    with torch.device("meta"):
        model = DEFAULTS[family]()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert told()[family]["parameters replaced"] == f"{fastvit.optimize(model).parameters:,} of {count:,}"


# ---------------------------------------------------------------------------------------------------------------------
# Blocks that are left to compute themselves
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    """The reasons that were logged."""
    caplog.set_level(logging.INFO, "fastvit")
    blocks._log_fallback.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if "runs its own forward" in record.getMessage()]
    blocks._log_fallback.cache_clear()


def test_a_model_without_known_blocks_is_an_error():
    model = nn.Linear(4, 4)
    with pytest.raises(fastvit.InputError, match=r"Linear has no block .* ViT, DeiT, .* DINOv3 ViT"):
        fastvit.optimize(model)
    assert fastvit.restore(model) == 0
    for function in (fastvit.optimize, fastvit.restore):
        with pytest.raises(fastvit.InputError, match=r"model: expected a torch\.nn\.Module, got str"):
            function("google/vit-base-patch16-224")


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str)
def test_our_own_model_is_optimized_as_it_is_made_and_plain_when_restored(options):
    torch.manual_seed(0)
    model = fastvit.ViTForImageClassification(transformers.ViTConfig(**IMAGES)).to(DEVICE)
    randomise(model)

    def outcome():
        outputs = model(pixels(), **options)
        tensors = [outputs.logits, *(outputs.hidden_states or ()), *(outputs.attentions or ())]
        grads = torch.autograd.grad(sum(tensor.square().mean() for tensor in tensors), list(model.parameters()))
        return [tensor.detach() for tensor in tensors] + list(grads)

    fused = outcome()
    kinds = {type(module) for module in model.modules() if isinstance(module, blocks.FusedModule)}
    assert {kind.__name__ for kind in kinds} == {"ViTEmbeddings", "ViTLayer", "ViTEncoder"}
    assert fastvit.restore(model) == 2
    assert not any(isinstance(module, blocks.FusedModule) for module in model.modules())
    for found, expected in zip(outcome(), fused, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert list(fastvit.optimize(model).replaced.values()) == ["fastvit's ViT"] * 2
    for found, expected in zip(outcome(), fused, strict=True):
        assert torch.equal(found, expected)


def test_text_towers_are_left():
    sizes = {**SIZES, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=sizes, vision_config=IMAGES, projection_dim=16)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).to(DEVICE).eval()
    text = [type(module) for module in model.text_model.modules()]
    tokens = torch.randint(3, 60, (2, 12), device=DEVICE)
    expected = model(tokens, pixels())
    report = fastvit.optimize(model)
    assert [type(module) for module in model.text_model.modules()] == text
    assert set(report.replaced) == {f"vision_model.encoder.layers.{index}" for index in range(2)}
    assert report.left == {
        f"text_model.encoder.layers.{index}": "it belongs to a clip_text_model, which is not a vision tower"
        for index in range(2)
    }
    assert str(report).startswith("replaced: 2 blocks of CLIP vision (")
    assert "left: 2 blocks: it belongs to a clip_text_model" in str(report)
    with fastvit.backend("reference"), only_ours(model):
        found = model(tokens, pixels())
    assert relative_error(found.logits_per_image, expected.logits_per_image) < 1e-5


def test_lora_computes_itself_and_what_it_does_not_touch_is_ours(said):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = built("ViT", train=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=r"layers\.0\.attention\.[qv]_proj", r=4))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator(parameter.device).manual_seed(5))
    expected = results(adapted)
    report = fastvit.optimize(adapted)
    assert [name.endswith("layers.1") for name in report.replaced] == [True]
    (reason,) = report.left.values()
    assert reason.startswith("a linear layer is wrapped, hooked or quantised: peft.tuners.lora")
    with fastvit.backend("reference"):
        for _ in range(2):
            assert_close(results(adapted), expected)
        assert said() == [f"optimize: a block of ViT runs its own forward: {reason}"]
        merged = adapted.merge_and_unload()
        with only_ours(merged):
            assert relative_error(main_tensor(called(merged)), expected["output"]) < 1e-5


def swap(layer: nn.Module, name: str, make) -> None:
    """Put another module, made from the one there, at `name`."""
    parent, _, last = name.rpartition(".")
    setattr(layer.get_submodule(parent), last, make(getattr(layer.get_submodule(parent), last)))


def nothing(*args) -> None:
    """A hook."""


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(nothing)
    return module


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Doubled
    return linear


def parametrized(linear: nn.Linear) -> nn.Linear:
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Tanh())
    return linear


CHANGES = {
    "another projection": ("attention.o_proj", doubled, "test_optimize.Doubled"),
    "a parametrisation": ("mlp.fc1", parametrized, "wrapped, hooked or quantised"),
    "no norm": ("layernorm_after", lambda norm: nn.Identity(), "no plain LayerNorm"),
    "a norm without bias": ("layernorm_before", lambda norm: nn.LayerNorm(48, bias=False), "no plain LayerNorm"),
    "a hook": ("attention", hooked, "there is a hook on transformers.models.vit.modeling_vit.ViTAttention"),
    "another feed-forward": ("mlp", lambda mlp: nn.Sequential(mlp), "its parts are not where they were expected"),
    "another activation": ("mlp.activation_fn", lambda _: nn.Mish(), "no operation for the activation torch.nn"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_block_with_other_parts_computes_itself(change, when, said):
    name, make, reason = CHANGES[change]
    model = built("ViT")
    if when == "after":
        fastvit.optimize(model)
    swap(model.layers[1].to(DEVICE), name, make)
    model.to(DEVICE)
    twin = copy.deepcopy(model)
    fastvit.restore(twin)
    with fastvit.backend("reference"):
        expected = results(twin)
        report = fastvit.optimize(model)
        assert list(report.replaced) == ["layers.0"] and reason in report.left["layers.1"]
        assert_close(results(model), expected)
        assert len(said()) == 1 and reason in said()[0]
    assert fastvit.restore(model) == 2


def test_an_attention_function_of_somebody_elses_is_called(said):
    calls = []

    def attention(module, query, key, value, mask, **kwargs):
        calls.append(module)
        return (query + key + value).transpose(1, 2), None

    transformers.AttentionInterface.register("sum", attention)
    model = built("ViT")
    model.set_attn_implementation("sum")
    fastvit.optimize(model)
    called(model)
    assert len(calls) == 2 and "its attention is 'sum'" in said()[0]
    model.set_attn_implementation("eager")
    with fastvit.backend("reference"), only_ours(model):
        called(model)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["boolean", "added", "by head"])
def test_masks(kind, backend):
    model = built("ViT")
    layer, x = model.layers[0], torch.randn(2, 5, 48, device=DEVICE)
    mask = torch.rand(2, 3 if kind == "by head" else 1, 5, 5, device=DEVICE) < 0.6
    mask[..., 0] = True
    if kind != "boolean":
        mask = torch.where(mask, torch.randn(mask.shape, device=DEVICE), float("-inf"))
    expected = layer(x, mask)
    assert relative_error(layer(x), expected) > 1e-2
    fastvit.optimize(model)
    with computed_by(backend), only_ours(model):
        assert relative_error(layer(x, mask), expected) < 1e-5
        assert relative_error(layer(x, attention_mask=mask), expected) < 1e-5


def test_a_mask_is_added_to_beits_bias():
    model = built("BEiT")
    layer, x, mask = model.layers[0], torch.randn(2, 5, 48, device=DEVICE), torch.randn(2, 1, 5, 5, device=DEVICE)
    expected = layer(x, mask, resolution=(28, 28))
    assert relative_error(layer(x, resolution=(28, 28)), expected) > 1e-3
    fastvit.optimize(model)
    with fastvit.backend("reference"), only_ours(model):
        assert relative_error(layer(x, mask, resolution=(28, 28)), expected) < 1e-5
        assert relative_error(layer(x, mask, False, (28, 28)), expected) < 1e-5


def test_calls_that_ask_for_more_are_the_blocks_own(said):
    model = built("ViT")
    layer, x = model.layers[0], torch.randn(2, 5, 48, device=DEVICE)
    expected = layer(x, is_causal=True)
    fastvit.optimize(model)
    assert torch.equal(layer(x, is_causal=True), expected)
    flat = torch.randn(5, 5, device=DEVICE)
    twin = copy.deepcopy(layer)
    fastvit.restore(twin)
    assert torch.equal(layer(x, flat), twin(x, flat))
    assert [message.partition("forward: ")[2] for message in said()] == [
        "it is called with is_causal",
        "its mask is not a tensor [B, heads, queries, keys]",
    ]


def test_timm_blocks_with_other_insides_compute_themselves():
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
        model = timm_model(**options).to(DEVICE).train()
        expected = results(model)
        assert list(fastvit.optimize(model).left.values()) == [reason] * 2
        assert_same_bits(results(model), expected)


def test_a_replaced_forward_is_left_and_stops_restore():
    model = built("ViT")
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
    with fastvit.backend("reference"), only_ours(model):
        called(model)
    with pytest.raises(fastvit.InputError, match=r"layers.1 was wrapped after optimize .*FSDPViTLayer"):
        fastvit.restore(model)
    last.__class__ = kind
    assert fastvit.restore(model) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "BEiT", "DINOv3 gated"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision(name, autocast, backend):
    """Rounding differs; so the measure is float32, and how far the model itself is from it."""
    model = built(name, train=name == "DINOv2")
    with frozen_bias(model, backend):
        _half_precision(model, autocast, backend)


def _half_precision(model, autocast, backend):
    exact = results(model)
    context = torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()
    model.to(torch.float32 if autocast else torch.bfloat16)

    def half_results():
        with context:
            torch.manual_seed(3)
            output = main_tensor(model(pixels() if autocast else pixels().bfloat16()))
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(output.float().square().mean(), wanted, allow_unused=True)
        return output, torch.cat([gradient.flatten().float() for gradient in gradients if gradient is not None])

    theirs = half_results()
    fastvit.optimize(model)
    with computed_by(backend), only_ours(model):
        ours = half_results()
    exact_gradients = torch.cat(
        [tensor.flatten() for key, tensor in exact.items() if key != "output" and tensor is not None]
    )
    for our_result, their_result, right in zip(ours, theirs, (exact["output"], exact_gradients), strict=True):
        assert our_result.dtype == their_result.dtype
        assert relative_error(our_result, right) < 1.25 * relative_error(their_result, right)


@EACH
def test_attention_dropout_is_the_models(name):
    """With a rate of one nothing is left to chance, and nothing of attention."""
    model = built(name, train=True)
    without = results(model)
    found = 0
    for module in model.modules():
        for attribute in ("attention_dropout", "dropout_prob", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 1.0)
                found += 1
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 1.0
            found += 1
    assert found >= MODELS[name][1]
    expected, evaluated = results(model), results(model.eval())
    assert relative_error(expected["output"], without["output"]) > 1e-3
    fastvit.optimize(model)
    with fastvit.backend("reference"), only_ours(model):
        assert_close(results(model), evaluated)
        assert relative_error(results(model.train())["output"], expected["output"]) < 1e-5


def test_dropout_is_drawn_in_training_alone():
    options = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = model_of("ViTModel", "ViTConfig", options).to(DEVICE)
    fastvit.optimize(model)
    with fastvit.backend("reference"), only_ours(model):
        evaluated = [main_tensor(called(model.eval())) for _ in range(2)]
        trained = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            trained.append(main_tensor(model.train()(pixels())))
    assert torch.equal(*evaluated)
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


@pytest.mark.parametrize("name", ["DINOv2", "BEiT shared bias", "timm DINOv2"])
def test_drop_path_draws_what_the_model_drew(name):
    model = built(name, train=True)
    images = torch.randn(16, 3, 28, 28, device=DEVICE)

    def output(train=True):
        torch.manual_seed(5)
        return main_tensor(model.train(train)(images))

    expected, undropped = output(), output(train=False)
    assert relative_error(expected, undropped) > 1e-2
    fastvit.optimize(model)
    for backend in ("reference", "triton"):
        with computed_by(backend), only_ours(model), frozen_bias(model, backend):
            assert relative_error(output(), expected) < 1e-5


def test_a_compiler_takes_a_block_that_computes_itself(said):
    model = built("ViT")
    expected = results(model)
    fastvit.optimize(model)
    hooked(model.layers[1].attention)
    model.layers[0].mlp = nn.Sequential(model.layers[0].mlp)
    with fastvit.backend("reference"):
        torch._dynamo.reset()
        output = main_tensor(called(torch.compile(model, fullgraph=True, backend="aot_eager")))
    assert relative_error(output, expected["output"]) < 1e-5
    assert len(said()) == 2


def test_export():
    model = built("ViT")
    fastvit.optimize(model)
    with fastvit.backend("reference"), only_ours(model):
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (pixels(),), dynamic_shapes={"pixel_values": batch}, strict=False)
        more = torch.cat([pixels(), pixels().flip(0), pixels()])
        found = program.module()(more)
        assert relative_error(found.last_hidden_state, model(more).last_hidden_state) < 1e-5


def test_a_saved_model_is_loaded_by_its_own_class(tmp_path):
    model = built("DINOv2")
    expected = main_tensor(called(model))
    fastvit.optimize(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).to(DEVICE)
    assert not any(isinstance(module, blocks.FusedModule) for module in loaded.modules())
    assert torch.equal(main_tensor(called(loaded)), expected)


def test_backbones_and_heads_are_known_by_their_blocks():
    dinov2 = transformers.Dinov2Config(
        **IMAGES, mlp_ratio=2, out_features=["stage1", "stage2"], reshape_hidden_states=False
    )
    depth = transformers.DepthAnythingConfig(
        backbone_config=dinov2,
        reassemble_hidden_size=48,
        patch_size=14,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    torch.manual_seed(0)
    model = transformers.DepthAnythingForDepthEstimation(depth).to(DEVICE).eval()
    expected = model(pixels()).predicted_depth
    assert set(fastvit.optimize(model).replaced.values()) == {"DINOv2"}
    with fastvit.backend("reference"), only_ours(model):
        assert relative_error(model(pixels()).predicted_depth, expected) < 1e-5
