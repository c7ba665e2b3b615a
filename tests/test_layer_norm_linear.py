"""LayerNorm, linear layer and activation: errors are no larger than PyTorch's, in every variant of the kernels."""

from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvit.ops import reference

pytest.importorskip("triton")
from operations import (
    DEVICE,
    EPS,
    VARIANTS,
    VIEWS,
    assert_close,
    assert_equivalent,
    assert_same,
    check,
    compute_results,
    count_saved_bytes,
    make_view,
    randn,
    use_variants,
)

from fastvit.kernels import layer_norm, linear, operators
from fastvit.kernels import layer_norm_linear as kernels
from fastvit.kernels.layer_norm_linear import add_layer_norm_linear, layer_norm_gelu, layer_norm_linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def make_inputs(
    *shape, units, dtype=torch.float32, residual_dtype=None, norm_dtype=None, bias=True, add=True, scale=1.0, shift=0.0
):
    """Return inputs by name. Affine weights are random; pre-activations are about as large as in a trained model."""
    dim = shape[-1]
    inputs = {
        "x": randn(*shape, dtype=dtype, seed=1, scale=scale, shift=shift),
        "residual": randn(*shape, dtype=residual_dtype or dtype, seed=2, scale=scale),
        "norm_weight": randn(dim, dtype=norm_dtype or dtype, seed=3, scale=0.5, shift=1.0),
        "norm_bias": randn(dim, dtype=norm_dtype or dtype, seed=4),
        "weight": randn(units, dim, dtype=dtype, seed=5, scale=dim**-0.5),
        "bias": randn(units, dtype=dtype, seed=6) if bias else None,
    }
    if not add:
        del inputs["residual"]
    return inputs


def apply_norm(x, norm_weight, norm_bias, dtype):
    """LayerNorm with casts, because PyTorch's LayerNorm and linear layer on CUDA accept a single dtype each."""
    return reference.layer_norm(x, norm_weight.to(x.dtype), norm_bias.to(x.dtype), EPS).to(dtype)


def run_reference(x, norm_weight, norm_bias, weight, bias, residual=None, activation=None):
    summed = x if residual is None else x + residual
    out = torch.nn.functional.linear(apply_norm(summed, norm_weight, norm_bias, weight.dtype), weight, bias)
    out = out if activation is None else reference.ACTIVATIONS[activation](out)
    return out if residual is None else (summed, out)


def run_kernels(x, norm_weight, norm_bias, weight, bias, residual=None, activation=None, candidate=0):
    arguments = (norm_weight, norm_bias, EPS, weight, bias)
    if residual is None:
        if activation is None:
            return layer_norm_linear(x, *arguments, candidate=candidate)
        return layer_norm_gelu(x, *arguments, activation, candidate=candidate)
    if activation is None:
        return add_layer_norm_linear(x, residual, *arguments, candidate=candidate)
    kernels.check_activation(activation)
    return kernels._apply(x, residual, *arguments, activation, candidate)  # the first half of a feed-forward


run_gelu = partial(run_kernels, activation="gelu")


def check_activation(activation, inputs, **options):
    check(partial(run_kernels, activation=activation), partial(run_reference, activation=activation), inputs, **options)


def test_local_baseline_matches_reference():
    inputs = make_inputs(2, 3, 24, units=40, add=False)
    with torch.backends.mkldnn.flags(enabled=False):  # both use the same matmul library
        assert torch.equal(run_reference(**inputs), reference.layer_norm_linear(**inputs, eps=EPS))
        expected = reference.layer_norm_gelu(**inputs, eps=EPS, activation="quick_gelu")
        assert torch.equal(run_reference(**inputs, activation="quick_gelu"), expected)


@EACH_VARIANT
@DTYPES
@pytest.mark.parametrize(("dim", "units"), [(48, 192), (72, 101), (100, 136)])
def test_outputs_and_gradients_match_reference(variant, dtype, dim, units):
    with use_variants(variant):
        check_activation("gelu", make_inputs(2, 17, dim, units=units, dtype=dtype))


@EACH_VARIANT
@pytest.mark.parametrize("activation", [None, "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
def test_every_activation_with_and_without_residual_add(variant, activation, add):
    with use_variants(variant):
        check_activation(activation, make_inputs(2, 9, 40, units=72, dtype=torch.bfloat16, add=add))
        check_activation(activation, make_inputs(2, 9, 40, units=72, add=add, bias=False))


@EACH_VARIANT
@pytest.mark.parametrize("tokens", [1, 50, 197, 257])
def test_any_number_of_tokens(variant, tokens):
    with use_variants(variant):
        check_activation("gelu", make_inputs(1, tokens, 24, units=40, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 2, 24)])
def test_any_number_of_dimensions(shape):
    with use_variants("fused"):
        check_activation("gelu", make_inputs(*shape, units=40))


@EACH_VARIANT
@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [
        (torch.float32, 1.0, 10.0),  # the mean ten times the standard deviation
        (torch.bfloat16, 1.0, 10.0),
        (torch.float16, 1.0, 10.0),
        (torch.bfloat16, 1.0, 100.0),
        (torch.float32, 1e15, 0.0),
        (torch.float32, 1e-4, 0.0),
        (torch.bfloat16, 1e15, 0.0),
        (torch.bfloat16, 1e-15, 0.0),
        (torch.float16, 1e4, 0.0),
        (torch.float16, 1e-6, 0.0),
    ],
)
def test_shifted_huge_and_tiny_inputs(variant, dtype, scale, shift):
    with use_variants(variant):
        check_activation("gelu", make_inputs(2, 9, 96, units=40, dtype=dtype, scale=scale, shift=shift))


@EACH_VARIANT
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new"])
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_huge_and_tiny_pre_activations(variant, activation, scale):
    inputs = make_inputs(2, 9, 32, units=40, dtype=torch.bfloat16)
    inputs["weight"] *= scale
    inputs["bias"] *= scale
    with use_variants(variant):
        check_activation(activation, inputs)


@EACH_VARIANT
def test_constant_rows_return_the_biases(variant):
    inputs = make_inputs(4, 96, units=40, dtype=torch.bfloat16, add=False)
    equal = torch.tensor([0.0, 1.0, -3.0, 1000.0], device=DEVICE, dtype=torch.bfloat16)
    inputs["x"] = equal[:, None].expand(4, 96).contiguous()
    with use_variants(variant):
        out = run_kernels(**inputs)
        check_activation("gelu", inputs, grads_for=("norm_weight", "norm_bias", "weight", "bias"))
    assert torch.equal(out, out[:1].expand(4, 40))


@EACH_VARIANT
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_as_in_pytorch(variant, bad):
    inputs = make_inputs(3, 40, units=24)
    inputs["x"][1, 7] = bad
    theirs = compute_results(partial(run_reference, activation="gelu"), inputs)
    with use_variants(variant):
        found = compute_results(run_gelu, inputs)
    for name, tensor in found.items():
        assert torch.equal(tensor.isfinite(), theirs[name].isfinite()), name
    inputs = make_inputs(3, 40, units=24, add=False)
    inputs["bias"][5] = bad
    with use_variants(variant):
        found = compute_results(run_gelu, inputs)
    for name, tensor in compute_results(partial(run_reference, activation="gelu"), inputs).items():
        assert torch.equal(tensor.isfinite(), found[name].isfinite()), name  # GELU(inf) is inf, or NaN on some CPUs


@EACH_VARIANT
@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "norm_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),  # autocast
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_mixed_dtypes(variant, dtype, residual_dtype, norm_dtype):
    inputs = make_inputs(2, 9, 48, units=40, dtype=dtype, residual_dtype=residual_dtype, norm_dtype=norm_dtype)
    with use_variants(variant):
        check_activation("gelu", inputs)
        check_activation(None, inputs)


@EACH_VARIANT
@pytest.mark.parametrize("kind", VIEWS)
def test_views_match_contiguous_inputs(variant, kind):
    for add in (False, True):
        inputs = make_inputs(3, 5, 24, units=40, add=add)
        with use_variants(variant):
            expected = compute_results(run_gelu, inputs)
            strided = compute_results(run_gelu, inputs | {"x": make_view(kind, inputs["x"])})
        assert_same(strided, expected)


def test_transposed_and_sliced_weights():
    inputs = make_inputs(3, 5, 24, units=40)
    with use_variants("fused"):
        expected = compute_results(run_gelu, inputs)
        changed = inputs | {
            "weight": inputs["weight"].t().contiguous().t(),
            "bias": torch.stack((inputs["bias"], inputs["bias"]), 1)[:, 0],
            "norm_weight": torch.stack((inputs["norm_weight"], inputs["norm_bias"]), 1)[:, 0],
        }
        assert_same(compute_results(run_gelu, changed), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(8, 80)),
    units=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    variant=st.sampled_from(sorted(VARIANTS)),
    kind=st.sampled_from(("contiguous", *VIEWS)),
    activation=st.sampled_from([None, "gelu", "gelu_new", "quick_gelu"]),
    bias=st.booleans(),
    add=st.booleans(),
)
def test_any_shape_layout_and_dtype(shape, units, dtype, variant, kind, activation, bias, add):
    inputs = make_inputs(*shape, units=units, dtype=dtype, bias=bias, add=add)
    if kind != "contiguous" and not inputs["x"].new_empty(shape).transpose(0, 1).is_contiguous():
        view = {"transposed": lambda: inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)}
        inputs["x"] = view.get(kind, lambda: make_view(kind, inputs["x"]))()
    with use_variants(variant):
        check_activation(activation, inputs, slack=4)


@EACH_VARIANT
@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
def test_empty_batch_returns_empty_outputs_and_zero_weight_gradients(variant, shape):
    inputs = make_inputs(*shape, units=40)
    with use_variants(variant):
        found = compute_results(run_gelu, inputs)
    assert found["output 0"].shape == found["grad x"].shape == shape
    assert found["output 1"].shape == (*shape[:-1], 40)
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[name])), name


@EACH_VARIANT
def test_results_are_deterministic(variant):
    inputs = make_inputs(5, 23, 48, units=72, dtype=torch.bfloat16)
    with use_variants(variant):
        first, second = (compute_results(run_gelu, inputs) for _ in range(2))
    assert_same(first, second)


@EACH_VARIANT
def test_training_and_inference_are_bitwise_equal(variant):
    inputs = make_inputs(2, 9, 48, units=72, dtype=torch.bfloat16)
    with use_variants(variant):
        training = compute_results(run_gelu, inputs)
        with torch.no_grad():
            outputs = {name: training[name] for name in ("output 0", "output 1")}
            assert_same(compute_results(run_gelu, inputs, grads_for=()), outputs)


@EACH_VARIANT
@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_with_one_unused_output_match_reference(variant, unused):
    inputs = make_inputs(2, 9, 48, units=40)
    requested = tuple(inputs) if unused == 0 else ("x", "residual")
    with use_variants(variant):
        check_activation("gelu", inputs, unused=(unused,), grads_for=requested)


@EACH_VARIANT
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    "requested", [("x",), ("residual",), ("norm_bias",), ("weight",), ("bias",), ("residual", "weight"), ("x", "bias")]
)
def test_single_gradients_match_full_backward(variant, activation, requested):
    inputs = make_inputs(2, 9, 48, units=40)
    with use_variants(variant):
        every = compute_results(partial(run_kernels, activation=activation), inputs)
        some = compute_results(partial(run_kernels, activation=activation), inputs, grads_for=requested)
    assert {name for name in some if name.startswith("grad")} == {f"grad {name}" for name in requested}
    assert_same(some, {name: every[name] for name in some})


def test_branch_and_residual_share_one_gradient_tensor():
    grads = compute_results(run_gelu, make_inputs(2, 9, 48, units=40))
    assert grads["grad x"].data_ptr() == grads["grad residual"].data_ptr()


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
def test_opcheck(activation, add):
    inputs = make_inputs(2, 3, 16, units=24, add=add)
    for tensor in inputs.values():
        tensor.requires_grad_()
    norm = (inputs["norm_weight"], inputs["norm_bias"], EPS)
    linear = (inputs["weight"], inputs["bias"])
    arguments = (inputs["x"], inputs.get("residual"), *norm, *linear, activation)
    torch.library.opcheck(kernels._layer_norm_linear, (*arguments, activation is not None, 0))
    pre = randn(6 if activation else 0, 24)
    for requested in ([True, True, True, True], [False, False, True, False], [True, False, False, True]):
        torch.library.opcheck(
            kernels._layer_norm_linear_backward,
            (
                randn(2, 3, 24), inputs["x"].detach() if add else None, inputs["x"].detach(), randn(2, 6), pre,
                *(tensor.detach() for tensor in norm[:2]), linear[0].detach(), EPS, activation, torch.float32,
                torch.float32, requested,
            ),
        )  # fmt: skip


def apply_two_layers(x, residual, norm_weight, norm_bias, weight, bias):
    summed, hidden = add_layer_norm_linear(x, residual, norm_weight, norm_bias, EPS, weight, bias)
    return summed, layer_norm_gelu(hidden, norm_weight, norm_bias, EPS, weight, bias)


@EACH_VARIANT
def test_compiles_without_graph_breaks(variant):
    torch._dynamo.reset()
    compiled = torch.compile(apply_two_layers, fullgraph=True, backend="aot_eager")
    with use_variants(variant):
        for batch in (2, 3):  # the second has a dynamic shape
            inputs = make_inputs(batch, 3, 16, units=16)
            assert_close(compute_results(compiled, inputs), compute_results(apply_two_layers, inputs))
            with torch.no_grad():
                torch.testing.assert_close(compiled(**inputs), apply_two_layers(**inputs))


def test_activation_checkpointing_matches_plain_backward():
    inputs = make_inputs(2, 3, 16, units=16)
    again = compute_results(lambda **named: checkpoint(apply_two_layers, *named.values(), use_reentrant=False), inputs)
    assert_same(again, compute_results(apply_two_layers, inputs))


def test_exports_with_dynamic_batch_size():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            inputs = make_inputs(2, 3, 16, units=16)
            self.parameters_ = torch.nn.ParameterList([t for n, t in inputs.items() if n not in ("x", "residual")])

        def forward(self, x, residual):
            return apply_two_layers(x, residual, *self.parameters_)

    block, batch = Block(), {0: torch.export.Dim("batch", min=2, max=64)}
    example = (randn(2, 3, 16), randn(2, 3, 16, seed=1))
    program = torch.export.export(block, example, dynamic_shapes=(batch, batch))
    x, residual = randn(5, 3, 16, seed=8), randn(5, 3, 16, seed=9)
    for found, expected in zip(program.module()(x, residual), block(x, residual), strict=True):
        assert torch.equal(found, expected)


@EACH_VARIANT
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_autocast_casts_weights_as_in_a_linear_layer(variant, activation):
    inputs = make_inputs(2, 9, 48, units=40)
    inputs["x"] = inputs["x"].bfloat16()  # the output of a linear layer under autocast; the residual stream is float32

    def autocast(function):
        def call(**named):
            with torch.autocast(DEVICE, torch.bfloat16):
                return function(**named, activation=activation)

        return call

    def cast(x, weight, bias, **others):
        half = {"weight": weight.bfloat16(), "bias": bias.bfloat16()} if x.dtype == torch.bfloat16 else {}
        return run_reference(x=x, **({"weight": weight, "bias": bias} | half), **others, activation=activation)

    with use_variants(variant):
        found = compute_results(autocast(run_kernels), inputs)
        assert found["output 0"].dtype == torch.float32
        assert found["output 1"].dtype == torch.bfloat16
        assert found["grad weight"].dtype == found["grad bias"].dtype == torch.float32
        check(autocast(run_kernels), cast, inputs)


@EACH_VARIANT
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_only_sum_statistics_and_pre_activation_are_saved_for_backward(variant, activation):
    rows, dim, units = 2 * 9, 48, 192
    inputs = make_inputs(2, 9, dim, units=units, dtype=torch.bfloat16)
    with use_variants(variant):
        saved_bytes = count_saved_bytes(partial(run_kernels, activation=activation), inputs)
    assert saved_bytes == 2 * rows * dim + 8 * rows + (2 * rows * units if activation else 0)
    assert saved_bytes < count_saved_bytes(partial(run_reference, activation=activation), inputs)


def test_nothing_is_saved_without_gradients():
    inputs = make_inputs(2, 9, 48, units=192)
    arguments = [inputs[n] for n in ("x", "residual", "norm_weight", "norm_bias")], inputs["weight"], inputs["bias"]
    _, _, pre, _ = kernels._layer_norm_linear(*arguments[0], EPS, *arguments[1:], "gelu", False, 0)
    assert pre.numel() == 0
    assert not layer_norm_gelu(
        *(inputs[n] for n in ("x", "norm_weight", "norm_bias")), EPS, *arguments[1:]
    ).requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected \[..., D\].*got \[\]"),
        ({"x": torch.zeros(2, 0)}, r"x: expected \[..., D\].*got \[2, 0\]"),
        ({"x": torch.zeros(2, 3, 16).double()}, "x: expected torch.float32 .*got torch.float64"),
        ({"x": torch.zeros(2, 8193), "weight": torch.zeros(24, 8193)}, r"x: .*8192, got \[2, 8193\]"),
        ({"residual": torch.zeros(1, 3, 16)}, r"residual: expected \[2, 3, 16\], got \[1, 3, 16\]"),
        ({"norm_weight": torch.zeros(15)}, r"norm_weight: expected \[16\], got \[15\]"),
        ({"norm_bias": torch.zeros(16).half()}, "norm_bias: expected torch.float32, got torch.float16"),
        ({"weight": torch.zeros(24, 15)}, r"weight: expected \[units, 16\], got \[24, 15\]"),
        ({"weight": torch.zeros(24, 16, device="meta")}, "weight: expected device .*got meta"),
        ({"bias": torch.zeros(16)}, r"bias: expected \[24\], got \[16\]"),
        ({"bias": torch.zeros(24).half()}, "bias: expected torch.float32, got torch.float16"),
        ({"x": [1.0]}, "x: expected a tensor, got list"),
        ({"weight": None}, "weight: expected a tensor, got NoneType"),
        ({"activation": "swish"}, "activation: expected one of gelu.*got 'swish'"),
    ],
)
def test_invalid_input_raises_before_launch(changes, message, monkeypatch):
    monkeypatch.setattr(kernels, "_layer_norm_linear", None)
    inputs = {name: tensor.cpu() for name, tensor in make_inputs(2, 3, 16, units=24).items()}
    with pytest.raises(ValueError, match=message):
        run_kernels(**({"activation": "gelu"} | inputs | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "quick_gelu"])
def test_fallbacks_match_launchers(dtype, add, activation):
    residual_dtype = torch.float32 if add else None
    inputs = make_inputs(3, 5, 24, units=40, dtype=dtype, residual_dtype=residual_dtype, norm_dtype=torch.float32)
    x, residual = make_view("tokens", inputs["x"]), inputs["residual"] if add else None
    norm, weight = (inputs["norm_weight"], inputs["norm_bias"]), inputs["weight"].t().contiguous().t()
    arguments = (x, residual, *norm, EPS, weight, inputs["bias"], activation, activation is not None, 0)
    outputs = kernels.launch_forward(*arguments)
    assert_equivalent(kernels.forward_fallback(*arguments), outputs)
    summed, statistics, pre, out = outputs
    grad_sum, rows = (randn(3, 5, 24, seed=7), summed) if add else (None, x)
    grad_out = randn(*out.shape, dtype=dtype, seed=8).mul(0.1)
    for requested in ([True] * 4, [True, False, False, False], [False, True, True, False], [False, False, True, True]):
        saved = (rows, statistics, pre, *norm, weight, EPS, activation, dtype, rows.dtype)
        backward = (grad_out, grad_sum, *saved, requested)
        assert_equivalent(kernels.backward_fallback(*backward), kernels.launch_backward(*backward), dtype)


def test_fallback_replaces_failing_kernels(monkeypatch):
    monkeypatch.setattr(operators, "FALLBACK_DEVICES", (DEVICE,))
    monkeypatch.setattr(operators, "failures", {})
    monkeypatch.setattr(layer_norm, "launch_forward", mock.Mock(side_effect=RuntimeError("no such instruction")))
    monkeypatch.setattr(layer_norm, "launch_backward", mock.Mock(side_effect=RuntimeError("no such instruction")))
    check_activation("gelu", make_inputs(2, 9, 40, units=24))
    assert {failure.operator for failure in operators.failures.values()} == {
        "layer_norm_linear",
        "layer_norm_linear_backward",
    }


@pytest.mark.parametrize("candidate", [0, 1, 2])
def test_candidate_selects_the_matmul_kernel(candidate, monkeypatch):
    variants = ("separate", "fused", "persistent")
    inputs = make_inputs(2, 9, 48, units=40, dtype=torch.bfloat16)
    with use_variants(variants[candidate]):
        expected = compute_results(run_gelu, inputs)
    with use_variants(*variants):
        assert_same(compute_results(partial(run_kernels, activation="gelu", candidate=candidate), inputs), expected)
        monkeypatch.setattr(linear, "_linear", spy := mock.MagicMock())
        run_kernels(**inputs, activation="gelu", candidate=candidate)
    called = [call.kwargs["PERSISTENT"] for call in spy.__getitem__.return_value.call_args_list]
    assert called == [[], [False], [True]][candidate]
