"""`fastvit.optimize`: models of other libraries compute the same with fastvit's operations and are restored exactly."""

import contextlib
import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers
from optimized_models import (
    DEFAULTS,
    DEVICE,
    IMAGES,
    MODELS,
    assert_close,
    assert_same_bits,
    build,
    build_model,
    compute_results,
    forbid_fallback,
    freeze_position_bias,
    get_main_tensor,
    make_pixels,
    measure_largest_differences,
    run,
    use_backend,
)
from test_modeling import randomise, relative_error
from torch import nn

import fastvit
from fastvit.adapters.swap import list_families, load_adapters
from fastvit.ops import block as blocks

EACH_MODEL = pytest.mark.parametrize("name", MODELS)
EACH_BACKEND = pytest.mark.parametrize("backend", ["reference", "triton"])


@EACH_MODEL
def test_outputs_and_gradients_are_the_same_and_restored_exactly(name):
    family, count, _ = MODELS[name]
    model = build(name)
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    for train in (False, True):
        model.train(train)
        expected = compute_results(model)
        report = fastvit.optimize(model)
        assert list(report.replaced.values()) == [family] * count
        assert list(model.state_dict()) == keys
        for backend in ("reference", "triton"):
            with use_backend(backend), forbid_fallback(model), freeze_position_bias(model, backend):
                found = compute_results(model)
            shared = {name: tensor for name, tensor in expected.items() if name in found}
            assert_close(found, shared)
            for column, difference in measure_largest_differences(found, shared).items():
                assert difference <= 2 * float(read_table()[family][column]), column
        assert fastvit.restore(model) == count
        assert [type(module) for module in model.modules()] == kinds
        assert_same_bits(compute_results(model), expected)


@EACH_MODEL
def test_copies_pickles_hidden_states_checkpointing_and_a_second_optimize_work(name):
    model = build(name, train=True)
    expected = compute_results(model)
    first = fastvit.optimize(model)
    assert fastvit.optimize(model) == first
    with fastvit.backend("reference"):
        ours = compute_results(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with forbid_fallback(twin):
                assert_same_bits(compute_results(twin), ours)
            assert fastvit.restore(twin) == len(first.replaced)
            assert_same_bits(compute_results(twin), expected)
        with forbid_fallback(model):
            assert_same_bits(compute_results(model), ours)  # a restored copy leaves the model optimized
            if name.startswith("timm"):
                model.set_grad_checkpointing()
            else:
                assert_hidden_states_are_ours(model)
                model.gradient_checkpointing_enable()
            computed = []
            before = blocks.compute_block
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(blocks, "compute_block", lambda *args: computed.append(1) or before(*args))
                assert_same_bits(compute_results(model), ours)
            assert len(computed) == 2 * len(first.replaced)  # once in forward, once in backward


def assert_hidden_states_are_ours(model) -> None:
    """transformers leaves hooks on attention after it has collected hidden states; they must not disable fusion."""
    states = run(model, output_hidden_states=True).hidden_states
    assert states is not None and all(state.shape[-1] in (48, 32) for state in states)
    assert any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith("timm")])  # which return no maps
def test_attention_maps_come_from_the_own_forward(name):
    model = build(name)
    model.set_attn_implementation("eager")
    expected = run(model, output_attentions=True, output_hidden_states=True)
    fastvit.optimize(model)
    with fastvit.backend("reference"):
        found = run(model, output_attentions=True, output_hidden_states=True)
        with forbid_fallback(model), torch.no_grad():
            run(model)
    for field in ("attentions", "hidden_states"):
        assert getattr(expected, field)
        for ours, theirs in zip(getattr(found, field), getattr(expected, field), strict=True):
            assert torch.equal(ours, theirs)


@EACH_MODEL
def test_optimized_model_compiles_without_a_graph_break(name):
    model = build(name)
    fastvit.optimize(model)
    with fastvit.backend("reference"):
        expected = compute_results(model)
        if not name.startswith("timm"):
            assert_hidden_states_are_ours(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with forbid_fallback(model):
            output = get_main_tensor(run(compiled))
        assert relative_error(output, expected["output"]) < 1e-5
        output.square().mean().backward()
        for parameter_name, parameter in model.named_parameters():
            if expected.get(parameter_name) is not None and not parameter_name.endswith(("key.bias", "k_proj.bias")):
                assert relative_error(parameter.grad, expected[parameter_name]) < 1e-5, parameter_name


@EACH_MODEL
def test_a_hook_on_any_part_of_a_block_fires_as_often_as_before(name):
    model = build(name)
    before = count_hook_calls(model)
    expected = compute_results(model)
    report = fastvit.optimize(model)
    assert set(before) == {f"{layer} {part}" for layer in report.replaced for part, _ in list_parts(model, layer)}
    with fastvit.backend("reference"):
        assert count_hook_calls(model, expected) == before


def list_parts(model: nn.Module, layer: str):
    return model.get_submodule(layer).named_modules()


def count_hook_calls(model: nn.Module, expected=None) -> dict[str, int]:
    """Count the calls of a forward hook on each part of each block, one hook at a time, and check the outputs."""
    layers = [name for name, module in model.named_modules() if isinstance(module, list_block_classes())]
    calls = {}
    for layer in layers:
        for part_name, part in list_parts(model, layer):
            name = f"{layer} {part_name}"
            calls[name] = 0

            def count(module, args, output, name=name):
                calls[name] += 1

            handle = part.register_forward_hook(count)
            with torch.no_grad():
                output = get_main_tensor(run(model))
            handle.remove()
            if expected is not None:
                assert relative_error(output, expected["output"]) < 1e-5, name
    return calls


def list_block_classes() -> tuple[type, ...]:
    modules = [(sys.modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in load_adapters()]
    return tuple(getattr(module, name) for module, name in modules if module is not None)


def read_table() -> dict[str, dict[str, str]]:
    """Read the rows of the table in docs/optimize.md, by family."""
    page = (Path(__file__).parent.parent / "docs" / "optimize.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    header, *rows = [[cell.strip() for cell in line] for line in lines if "---" not in line[0]]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_every_family_is_tested_and_documented():
    assert {family for family, *_ in MODELS.values()} == set(list_families()) == set(read_table()) == set(DEFAULTS)


@pytest.mark.parametrize("family", DEFAULTS)
def test_documented_number_of_replaced_parameters_is_right(family):
    with torch.device("meta"):
        model = DEFAULTS[family]()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert read_table()[family]["parameters replaced"] == f"{fastvit.optimize(model).parameters:,} of {count:,}"


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"output_attentions": True}], ids=str)
def test_own_model_is_optimized_when_built_and_plain_when_restored(options):
    torch.manual_seed(0)
    model = fastvit.ViTForImageClassification(transformers.ViTConfig(**IMAGES)).to(DEVICE)
    randomise(model)

    def compute_outcome():
        outputs = model(make_pixels(), **options)
        tensors = [outputs.logits, *(outputs.hidden_states or ()), *(outputs.attentions or ())]
        grads = torch.autograd.grad(sum(tensor.square().mean() for tensor in tensors), list(model.parameters()))
        return [tensor.detach() for tensor in tensors] + list(grads)

    fused = compute_outcome()
    kinds = {type(module) for module in model.modules() if isinstance(module, blocks.FusedModule)}
    assert {kind.__name__ for kind in kinds} == {"ViTEmbeddings", "ViTLayer", "ViTEncoder"}
    assert fastvit.restore(model) == 2
    assert not any(isinstance(module, blocks.FusedModule) for module in model.modules())
    for found, expected in zip(compute_outcome(), fused, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert list(fastvit.optimize(model).replaced.values()) == ["fastvit's ViT"] * 2
    for found, expected in zip(compute_outcome(), fused, strict=True):
        assert torch.equal(found, expected)


@EACH_BACKEND
@pytest.mark.parametrize("kind", ["boolean", "added", "by head"])
def test_masks_are_applied(kind, backend):
    model = build("ViT")
    layer, x = model.layers[0], torch.randn(2, 5, 48, device=DEVICE)
    mask = torch.rand(2, 3 if kind == "by head" else 1, 5, 5, device=DEVICE) < 0.6
    mask[..., 0] = True
    if kind != "boolean":
        mask = torch.where(mask, torch.randn(mask.shape, device=DEVICE), float("-inf"))
    expected = layer(x, mask)
    assert relative_error(layer(x), expected) > 1e-2
    fastvit.optimize(model)
    with use_backend(backend), forbid_fallback(model):
        assert relative_error(layer(x, mask), expected) < 1e-5
        assert relative_error(layer(x, attention_mask=mask), expected) < 1e-5


def test_mask_is_added_to_the_position_bias_of_beit():
    model = build("BEiT")
    layer, x, mask = model.layers[0], torch.randn(2, 5, 48, device=DEVICE), torch.randn(2, 1, 5, 5, device=DEVICE)
    expected = layer(x, mask, resolution=(28, 28))
    assert relative_error(layer(x, resolution=(28, 28)), expected) > 1e-3
    fastvit.optimize(model)
    with fastvit.backend("reference"), forbid_fallback(model):
        assert relative_error(layer(x, mask, resolution=(28, 28)), expected) < 1e-5
        assert relative_error(layer(x, mask, False, (28, 28)), expected) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to run
# ---------------------------------------------------------------------------------------------------------------------


@EACH_BACKEND
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "BEiT", "DINOv3 gated"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_is_as_accurate_as_the_model_itself(name, autocast, backend):
    """Rounding differs, so both are compared with float32."""
    model = build(name, train=name == "DINOv2")
    with freeze_position_bias(model, backend):
        check_half_precision(model, autocast, backend)


def check_half_precision(model, autocast, backend):
    exact = compute_results(model)
    context = torch.autocast(DEVICE, torch.bfloat16) if autocast else contextlib.nullcontext()
    model.to(torch.float32 if autocast else torch.bfloat16)

    def compute_half_results():
        with context:
            torch.manual_seed(3)
            output = get_main_tensor(model(make_pixels() if autocast else make_pixels().bfloat16()))
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)
        return output, torch.cat([gradient.flatten().float() for gradient in gradients if gradient is not None])

    theirs = compute_half_results()
    fastvit.optimize(model)
    with use_backend(backend), forbid_fallback(model):
        ours = compute_half_results()
    exact_gradients = torch.cat(
        [tensor.flatten() for key, tensor in exact.items() if key != "output" and tensor is not None]
    )
    for our_result, their_result, right in zip(ours, theirs, (exact["output"], exact_gradients), strict=True):
        assert our_result.dtype == their_result.dtype
        assert relative_error(our_result, right) < 1.25 * relative_error(their_result, right)


@EACH_MODEL
def test_attention_dropout_rate_is_read_from_the_model(name):
    """A rate of one drops all of attention, so the result is deterministic."""
    model = build(name, train=True)
    without = compute_results(model)
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
    expected, evaluated = compute_results(model), compute_results(model.eval())
    assert relative_error(expected["output"], without["output"]) > 1e-3
    fastvit.optimize(model)
    with fastvit.backend("reference"), forbid_fallback(model):
        assert_close(compute_results(model), evaluated)
        assert relative_error(compute_results(model.train())["output"], expected["output"]) < 1e-5


def test_dropout_acts_in_training_only():
    options = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    model = build_model("ViTModel", "ViTConfig", options).to(DEVICE)
    fastvit.optimize(model)
    with fastvit.backend("reference"), forbid_fallback(model):
        evaluated = [get_main_tensor(run(model.eval())) for _ in range(2)]
        trained = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            trained.append(get_main_tensor(model.train()(make_pixels())))
    assert torch.equal(*evaluated)
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


@pytest.mark.parametrize("name", ["DINOv2", "BEiT shared bias", "timm DINOv2"])
def test_drop_path_drops_the_same_images(name):
    model = build(name, train=True)
    images = torch.randn(16, 3, 28, 28, device=DEVICE)

    def output(train=True):
        torch.manual_seed(5)
        return get_main_tensor(model.train(train)(images))

    expected, undropped = output(), output(train=False)
    assert relative_error(expected, undropped) > 1e-2
    fastvit.optimize(model)
    for backend in ("reference", "triton"):
        with use_backend(backend), forbid_fallback(model), freeze_position_bias(model, backend):
            assert relative_error(output(), expected) < 1e-5


def test_exported_program_accepts_other_batch_sizes():
    model = build("ViT")
    fastvit.optimize(model)
    with fastvit.backend("reference"), forbid_fallback(model):
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (make_pixels(),), dynamic_shapes={"pixel_values": batch}, strict=False)
        more = torch.cat([make_pixels(), make_pixels().flip(0), make_pixels()])
        found = program.module()(more)
        assert relative_error(found.last_hidden_state, model(more).last_hidden_state) < 1e-5


def test_saved_model_loads_as_the_original_class(tmp_path):
    model = build("DINOv2")
    expected = get_main_tensor(run(model))
    fastvit.optimize(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path).to(DEVICE)
    assert not any(isinstance(module, blocks.FusedModule) for module in loaded.modules())
    assert torch.equal(get_main_tensor(run(loaded)), expected)


def test_backbone_inside_another_model_is_found():
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
    expected = model(make_pixels()).predicted_depth
    assert set(fastvit.optimize(model).replaced.values()) == {"DINOv2"}
    with fastvit.backend("reference"), forbid_fallback(model):
        assert relative_error(model(make_pixels()).predicted_depth, expected) < 1e-5
