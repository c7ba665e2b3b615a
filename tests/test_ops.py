"""Dispatch: which implementation an operation uses, how to choose it, and that models are the same with each."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_modeling import SMALL_CONFIGS, pixels_for, randomise, relative_error
from transformers import ViTConfig

import fastvit
from fastvit import cli, ops
from fastvit.ops import reference
from fastvit.report import info

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = ops.triton_unavailable_reason() is None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def run_python(code, **environment):
    """Run code in a new process with these environment variables."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def make_norm_inputs(dtype=torch.float32, device=DEVICE):
    return torch.randn(3, 8, device=device, dtype=dtype), torch.ones(8, device=device), torch.zeros(8, device=device)


def test_backend_is_restored_after_an_error():
    assert ops.current_backend() == "auto"
    with pytest.raises(RuntimeError, match="of mine"), fastvit.backend("reference"):
        assert ops.current_backend() == "reference"
        with fastvit.backend("auto"):
            assert ops.current_backend() == "auto"
        assert ops.current_backend() == "reference"
        raise RuntimeError("of mine")
    assert ops.current_backend() == "auto"


def test_unknown_backend_raises():
    with (
        pytest.raises(fastvit.InputError, match="expected one of auto, triton, reference, got 'cuda'"),
        fastvit.backend("cuda"),
    ):
        pass
    done = run_python("from fastvit import cli; raise SystemExit(cli.main(['info']))", FASTVIT_BACKEND="cuda")
    assert done.returncode == 2
    assert done.stderr == "error: FASTVIT_BACKEND: expected one of auto, triton, reference, got 'cuda'\n"


def test_unavailable_triton_raises_with_the_reason():
    code = "import fastvit\nwith fastvit.backend('triton'): pass"
    assert "'triton' cannot run here: there is no GPU" in run_python(code, CUDA_VISIBLE_DEVICES="").stderr
    call = (
        "import torch\nfrom fastvit import ops\nops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.zeros(8), 1e-6)"
    )
    done = run_python(call, FASTVIT_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    assert "'triton' cannot compute layer_norm: there is no GPU" in done.stderr


@needs_triton
def test_unsupported_dtype_raises_under_triton_and_runs_in_pytorch():
    x, weight, bias = make_norm_inputs(torch.float64)
    with (
        fastvit.backend("triton"),
        pytest.raises(fastvit.InputError, match=r"cannot compute layer_norm: the kernel has no torch\.float64"),
    ):
        ops.layer_norm(x, weight.double(), bias.double(), 1e-6)
    assert ops.layer_norm(x, weight.double(), bias.double(), 1e-6).dtype == torch.float64  # plain PyTorch


@needs_triton
def test_torch_func_transforms_run_in_pytorch():
    """The transforms of torch.func cannot see into kernels: grad would fail, and jvp would silently return 0."""
    x, weight, bias = make_norm_inputs()

    def total(x):
        return ops.layer_norm(x, weight, bias, 1e-6).square().sum()

    for transform in (
        lambda: torch.func.grad(total)(x),
        lambda: torch.func.vmap(total)(x),
        lambda: torch.func.jvp(total, (x,), (x,)),
        lambda: torch.func.vmap(torch.func.grad(total))(x),
    ):
        with (
            fastvit.backend("triton"),
            pytest.raises(fastvit.InputError, match=r"cannot compute layer_norm: torch\.func"),
        ):
            transform()
        transform()  # plain PyTorch


def test_pytorch_is_used_if_triton_is_not_installed():
    code = (
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "import torch\nfrom fastvit import ops\n"
        "print(ops.kernel_unavailable_reason('layer_norm', 'cuda', 0, torch.float32))\n"
        "print(ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.zeros(8), 1e-6).sum().item())\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


def test_reason_for_gpus_and_dtypes_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    find_reason = ops.kernel_unavailable_reason.__wrapped__
    for capability, dtype, expected in (
        ((7, 0), torch.float16, "this GPU (sm_70) is older than sm_80"),
        ((7, 5), torch.float32, "this GPU (sm_75) is older than sm_80"),
        ((8, 0), torch.float64, "the kernel has no torch.float64"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        assert expected in find_reason("layer_norm", "cuda", 0, dtype)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert find_reason("layer_norm", "cuda", 0, torch.bfloat16) is None
    assert "kernels run on GPUs" in find_reason("layer_norm", "mps", 0, torch.float32)


def test_automatic_choice_is_logged_once(caplog):
    ops._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "fastvit"):
        for _ in range(3):
            ops.layer_norm(*make_norm_inputs(), 1e-6)
    messages = [record.getMessage() for record in caplog.records if record.name == "fastvit"]
    expected = "our Triton kernel" if DEVICE == "cuda" else "plain PyTorch ("
    assert len(messages) == 1
    assert messages[0].startswith(f"layer_norm on {DEVICE} is computed by {expected}")


def test_unsupported_attention_options_have_a_reason():
    tensor, flat = torch.empty(2, 5, 3, 16), torch.empty(2, 5, 144)
    bias = torch.zeros(1, 3, 5, 5, requires_grad=True)
    for options, reason in (
        ({"dropout_p": 0.0, "mask": bias.detach()}, None),
        ({"mask": torch.ones(5, 5, dtype=torch.bool)}, None),
        ({"dropout_p": 0.1}, "the kernel has no dropout, and dropout_p is 0.1"),
        ({"mask": bias}, "the kernel has no gradient of an additive mask, and mask requires one"),
    ):
        assert ops._unsupported_attention(tensor, tensor, tensor, **options) == reason
        assert ops._unsupported_packed_attention(flat, num_heads=3, **options) == reason
    with torch.no_grad():
        assert ops._unsupported_attention(tensor, tensor, tensor, mask=bias) is None
    assert "head dim 48" not in (ops._unsupported_packed_attention(flat, num_heads=3) or "")
    assert "no head dim 144" in ops._unsupported_packed_attention(torch.empty(2, 5, 3, 1, 144))


@needs_triton
def test_attention_dropout_runs_in_pytorch_or_raises_under_triton():
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3, 3, 16, device=DEVICE)
    torch.manual_seed(1)
    expected = ops.reference.attention_packed(qkv, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(ops.attention_packed(qkv, dropout_p=0.5), expected)
    with fastvit.backend("triton"):
        with pytest.raises(
            fastvit.InputError, match="'triton' cannot compute attention_packed: the kernel has no dropout"
        ):
            ops.attention_packed(qkv, dropout_p=0.5)
        torch.testing.assert_close(ops.attention_packed(qkv, dropout_p=0.0), ops.reference.attention_packed(qkv))
        query = qkv[:, :, 0]
        bias = torch.zeros(5, 5, device=DEVICE, requires_grad=True)
        with pytest.raises(fastvit.InputError, match="no gradient of an additive mask"):
            ops.attention(query, query, query, mask=bias, dropout_p=0.0)
        with torch.no_grad():
            ops.attention(query, query, query, mask=bias)


@needs_triton
@pytest.mark.parametrize("name", ["separate", "fused", "persistent"])
def test_model_matches_reference_in_every_matmul_variant(name):
    from operations import use_variants

    model, pixels = make_model()
    with use_variants(name):
        assert_same_model(model, pixel_values=pixels, labels=torch.tensor([0, 1], device=DEVICE))


@needs_triton
def test_activation_without_a_kernel_runs_in_pytorch():
    from fastvit.kernels.gelu import FORMULAS

    assert set(ops.ACTIVATIONS_WITH_KERNELS) == set(FORMULAS)
    operands = [torch.randn(2, 8, device=DEVICE), *[torch.randn(8, 8, device=DEVICE), None] * 2]
    with (
        fastvit.backend("triton"),
        pytest.raises(fastvit.InputError, match="cannot compute feed_forward: the kernel has no activation 'relu'"),
    ):
        ops.feed_forward(*operands, "relu")
    torch.testing.assert_close(ops.feed_forward(*operands, "relu"), reference.feed_forward(*operands, "relu"))


def test_operations_have_the_docstrings_of_the_reference():
    for operation in ops.KERNEL_MODULES:
        assert getattr(ops, operation).__doc__ == getattr(reference, operation).__doc__


def test_info_lists_the_implementation_of_each_operation(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    for operation in ops.KERNEL_MODULES:
        assert operation in printed
    assert ("Triton kernel" if DEVICE == "cuda" else "plain PyTorch (") in printed
    with fastvit.backend("reference"):
        assert info.describe_backend("layer_norm", torch.device("cuda")) == "plain PyTorch (backend is 'reference')"


def compute_logits_and_gradients(model, **inputs):
    output = model(**inputs)
    result = (
        output.logits if "logits" in output else output.last_hidden_state if "pooler_output" in output else output[1]
    )
    loss = output.loss if output.get("loss") is not None else result.square().mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {"result": result.detach(), **dict(zip(names, gradients, strict=True))}


def assert_same_model(model, **inputs):
    """Compare outputs and all gradients between Triton kernels and plain PyTorch."""
    with fastvit.backend("reference"):
        expected = compute_logits_and_gradients(model, **inputs)
    with fastvit.backend("triton"):
        found = compute_logits_and_gradients(model, **inputs)
    for name, tensor in expected.items():
        assert (found[name] is None) == (tensor is None), name
        if tensor is not None and not name.endswith("key.bias"):  # its gradient is zero: softmax is invariant to it
            assert relative_error(found[name], tensor) < 1e-5, name


@needs_triton
@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS)
def test_model_with_kernels_matches_reference(config):
    torch.manual_seed(0)
    base = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = ViTConfig(**{**base, **config}, num_labels=5)
    model = fastvit.ViTForImageClassification(config).to(DEVICE)
    randomise(model)
    pixels = pixels_for(config).to(DEVICE)
    assert_same_model(model, pixel_values=pixels, labels=torch.tensor([1, 3], device=DEVICE))
    uint8_pixels = ((pixels * 40 + 128).clamp(0, 255).to(torch.uint8)).permute(0, 2, 3, 1)
    assert_same_model(model, pixel_values=uint8_pixels, labels=torch.tensor([1, 3], device=DEVICE))


@needs_triton
def test_masked_image_modelling_with_kernels_matches_reference():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        encoder_stride=8,
    )  # fmt: skip
    model = fastvit.ViTForMaskedImageModeling(config).to(DEVICE)
    randomise(model)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    assert_same_model(model, pixel_values=pixels_for(config).to(DEVICE), bool_masked_pos=mask.to(DEVICE))


def make_model():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=16, patch_size=8
    )
    model = fastvit.ViTForImageClassification(config).to(DEVICE)
    randomise(model)
    return model, pixels_for(config).to(DEVICE)


@pytest.mark.parametrize("name", [pytest.param("triton", marks=needs_triton), "reference"])
def test_model_compiles_without_graph_breaks(name):
    model, pixels = make_model()
    with fastvit.backend(name):
        expected = compute_logits_and_gradients(model, pixel_values=pixels)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compute_logits_and_gradients(compiled, pixel_values=pixels)
    for (first, tensor), other in zip(expected.items(), found.values(), strict=True):
        if not first.endswith("key.bias"):
            assert relative_error(other, tensor) < 1e-5, first


@needs_triton
def test_activation_is_a_positional_or_keyword_argument():
    x, square, vector = (
        torch.randn(2, 32, device=DEVICE),
        torch.randn(32, 32, device=DEVICE),
        torch.randn(32, device=DEVICE),
    )
    block = (x, x, vector, vector, 1e-6, square, vector, square, vector)
    with fastvit.backend("triton"):
        _, plain = ops.add_layer_norm_feed_forward(*block)
        _, named = ops.add_layer_norm_feed_forward(*block, activation="gelu")
        with pytest.raises(fastvit.InputError, match="the kernel has no activation 'relu'"):
            ops.add_layer_norm_feed_forward(*block, activation="relu")
    assert torch.equal(plain, named)


@needs_triton
def test_model_compiles_without_graph_breaks_before_kernels_are_imported():
    code = """
import torch, fastvit
from transformers import ViTConfig
config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                   patch_size=8)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = fastvit.ViTForImageClassification(config).to(device)
with fastvit.backend("triton"):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.zeros(1, 3, 16, 16, device=device), labels=torch.tensor([0], device=device)).loss.backward()
"""
    if DEVICE == "cpu":  # with the fixed interpreter, as in conftest.py
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import interpreter\n" + code
        code = code.replace("import torch, fastvit\n", "interpreter.install(); import torch, fastvit\n")
    done = run_python(code, TRITON_INTERPRET="0" if DEVICE == "cuda" else "1")
    assert done.returncode == 0, done.stderr[-2000:]


def test_compiled_model_follows_a_change_of_backend():
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    graphs = []

    def count(graph, inputs):
        graphs.append({node.target for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(lambda x, w, b: ops.layer_norm(x, w, b, 1e-6), backend=count, fullgraph=True)
    inputs = make_norm_inputs()
    for name in ("reference", "triton", "reference"):
        with fastvit.backend(name):
            compiled(*inputs)
    assert len(graphs) == 2
    assert torch.ops.fastvit.layer_norm.default not in graphs[0]
    assert torch.ops.fastvit.layer_norm.default in graphs[1]


@needs_triton
def test_compiled_attention_accepts_any_number_of_tokens():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q: ops.attention(q, q, q), backend=count, fullgraph=True, dynamic=True)
    with fastvit.backend("triton"):
        for tokens in (5, 9, 20):
            query = torch.randn(2, tokens, 2, 16, device=DEVICE)
            torch.testing.assert_close(compiled(query), ops.attention(query, query, query))
    assert len(graphs) == 1


@needs_triton
def test_model_exports_with_kernels_and_dynamic_batch_size():
    model, pixels = make_model()
    model.eval()
    with fastvit.backend("triton"):
        program = torch.export.export(
            model, (), {"pixel_values": pixels}, dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", max=64)}}
        )
        assert torch.ops.fastvit.patch_embed.default in {node.target for node in program.graph.nodes}
        more = torch.cat([pixels, pixels.flip(0), pixels])
        torch.testing.assert_close(program.module()(pixel_values=more).logits, model(more).logits)


@needs_triton
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the method is renamed in transformers 5.2x
def test_gradient_checkpointing_matches_plain_backward():
    model, pixels = make_model()
    with fastvit.backend("triton"):
        expected = compute_logits_and_gradients(model.train(), pixel_values=pixels)
        model.gradient_checkpointing_enable()
        found = compute_logits_and_gradients(model, pixel_values=pixels)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


def test_forward_hooks_on_blocks_see_the_hidden_states():
    """Without hooks, the residual add is fused into the next block; with hooks, every block returns its sum."""
    model, pixels = make_model()
    model.eval()
    seen = []
    plain = model(pixels).logits
    hook = model.vit.encoder.layer[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    hooked = model(pixels).logits
    hook.remove()
    states = model(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hooked, plain)
    torch.testing.assert_close(seen[0], states[1])


@needs_triton
def test_autocast_error_is_no_larger_than_with_pytorch():
    model, pixels = make_model()
    exact = model.double()(pixels.double()).logits
    model.float()
    errors = {}
    for name in ("reference", "triton"):
        with fastvit.backend(name), torch.autocast(DEVICE, torch.bfloat16):
            output = model(pixels, labels=torch.tensor([0, 1], device=DEVICE))
        output.loss.backward()
        errors[name] = relative_error(output.logits, exact)
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters()), name
    assert errors["triton"] < max(1.5 * errors["reference"], 1e-2)


needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@needs_gpu
def test_training_step_replays_from_a_cuda_graph():
    model, pixels = make_model()
    expected = compute_logits_and_gradients(model, pixel_values=pixels)
    static = torch.zeros_like(pixels)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            compute_logits_and_gradients(model, pixel_values=static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute_logits_and_gradients(model, pixel_values=static)
    static.copy_(pixels)
    graph.replay()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_model_compiles_for_the_gpu(mode):
    model, pixels = make_model()
    expected = compute_logits_and_gradients(model, pixel_values=pixels)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):  # graphs are recorded at the second call and replayed from the third on
        torch.compiler.cudagraph_mark_step_begin()
        found = compute_logits_and_gradients(compiled, pixel_values=pixels)
    for (name, tensor), other in zip(expected.items(), found.values(), strict=True):
        if not name.endswith("key.bias"):
            assert relative_error(other, tensor) < 1e-4, name
