"""LayerNorm into a linear layer and its activation: as exact as PyTorch's chain, whichever way it runs."""

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
EVERY_WAY = pytest.mark.parametrize("way", VARIANTS)


def inputs_of(
    *shape, units, dtype=torch.float32, residual_dtype=None, norm_dtype=None, bias=True, add=True, scale=1.0, shift=0.0
):
    """Named inputs with random affine weights; pre-activations are about as large as a trained model's."""
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


def norm_of(x, norm_weight, norm_bias, dtype):
    """LayerNorm itself takes one dtype on CUDA; the linear layer takes one, too."""
    return reference.layer_norm(x, norm_weight.to(x.dtype), norm_bias.to(x.dtype), EPS).to(dtype)


def pytorch(x, norm_weight, norm_bias, weight, bias, residual=None, activation=None):
    summed = x if residual is None else x + residual
    out = torch.nn.functional.linear(norm_of(summed, norm_weight, norm_bias, weight.dtype), weight, bias)
    out = out if activation is None else reference.ACTIVATIONS[activation](out)
    return out if residual is None else (summed, out)


def ours(x, norm_weight, norm_bias, weight, bias, residual=None, activation=None, candidate=0):
    arguments = (norm_weight, norm_bias, EPS, weight, bias)
    if residual is None:
        if activation is None:
            return layer_norm_linear(x, *arguments, candidate=candidate)
        return layer_norm_gelu(x, *arguments, activation, candidate=candidate)
    if activation is None:
        return add_layer_norm_linear(x, residual, *arguments, candidate=candidate)
    kernels.check_activation(activation)
    return kernels._apply(x, residual, *arguments, activation, candidate)  # what a feed-forward begins with


def check_activation(activation, inputs, **options):
    check(partial(ours, activation=activation), partial(pytorch, activation=activation), inputs, **options)


def test_the_definitions_of_the_reference_are_what_is_tested_against():
    inputs = inputs_of(2, 3, 24, units=40, add=False)
    with torch.backends.mkldnn.flags(enabled=False):  # the same library for the products of both
        assert torch.equal(pytorch(**inputs), reference.layer_norm_linear(**inputs, eps=EPS))
        expected = reference.layer_norm_gelu(**inputs, eps=EPS, activation="quick_gelu")
        assert torch.equal(pytorch(**inputs, activation="quick_gelu"), expected)


@EVERY_WAY
@DTYPES
@pytest.mark.parametrize(("dim", "units"), [(48, 192), (72, 101), (100, 136)])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(way, dtype, dim, units):
    with use_variants(way):
        check_activation("gelu", inputs_of(2, 17, dim, units=units, dtype=dtype))


@EVERY_WAY
@pytest.mark.parametrize("activation", [None, "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
def test_every_activation_with_and_without_the_residual_add(way, activation, add):
    with use_variants(way):
        check_activation(activation, inputs_of(2, 9, 40, units=72, dtype=torch.bfloat16, add=add))
        check_activation(activation, inputs_of(2, 9, 40, units=72, add=add, bias=False))


@EVERY_WAY
@pytest.mark.parametrize("tokens", [1, 50, 197, 257])
def test_any_number_of_tokens(way, tokens):
    with use_variants(way):
        check_activation("gelu", inputs_of(1, tokens, 24, units=40, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 2, 24)])
def test_any_number_of_dimensions(shape):
    with use_variants("fused"):
        check_activation("gelu", inputs_of(*shape, units=40))


@EVERY_WAY
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
def test_shifted_huge_and_tiny_inputs(way, dtype, scale, shift):
    with use_variants(way):
        check_activation("gelu", inputs_of(2, 9, 96, units=40, dtype=dtype, scale=scale, shift=shift))


@EVERY_WAY
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new"])
@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_huge_and_tiny_pre_activations(way, activation, scale):
    inputs = inputs_of(2, 9, 32, units=40, dtype=torch.bfloat16)
    inputs["weight"] *= scale
    inputs["bias"] *= scale
    with use_variants(way):
        check_activation(activation, inputs)


@EVERY_WAY
def test_rows_of_equal_values_give_the_biases(way):
    inputs = inputs_of(4, 96, units=40, dtype=torch.bfloat16, add=False)
    equal = torch.tensor([0.0, 1.0, -3.0, 1000.0], device=DEVICE, dtype=torch.bfloat16)
    inputs["x"] = equal[:, None].expand(4, 96).contiguous()
    with use_variants(way):
        out = ours(**inputs)
        check_activation("gelu", inputs, grads_for=("norm_weight", "norm_bias", "weight", "bias"))
    assert torch.equal(out, out[:1].expand(4, 40))


@EVERY_WAY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_in_pytorch(way, bad):
    inputs = inputs_of(3, 40, units=24)
    inputs["x"][1, 7] = bad
    theirs = compute_results(partial(pytorch, activation="gelu"), inputs)
    with use_variants(way):
        found = compute_results(partial(ours, activation="gelu"), inputs)
    for name, tensor in found.items():
        assert torch.equal(tensor.isfinite(), theirs[name].isfinite()), name
    inputs = inputs_of(3, 40, units=24, add=False)
    inputs["bias"][5] = bad
    with use_variants(way):
        found = compute_results(partial(ours, activation="gelu"), inputs)
    for name, tensor in compute_results(partial(pytorch, activation="gelu"), inputs).items():
        assert torch.equal(tensor.isfinite(), found[name].isfinite()), name  # GELU(inf) is inf, or NaN on some CPUs


@EVERY_WAY
@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "norm_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),  # autocast
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_mixed_dtypes(way, dtype, residual_dtype, norm_dtype):
    inputs = inputs_of(2, 9, 48, units=40, dtype=dtype, residual_dtype=residual_dtype, norm_dtype=norm_dtype)
    with use_variants(way):
        check_activation("gelu", inputs)
        check_activation(None, inputs)


@EVERY_WAY
@pytest.mark.parametrize("kind", VIEWS)
def test_views_give_what_contiguous_tensors_give(way, kind):
    for add in (False, True):
        inputs = inputs_of(3, 5, 24, units=40, add=add)
        with use_variants(way):
            expected = compute_results(partial(ours, activation="gelu"), inputs)
            strided = compute_results(partial(ours, activation="gelu"), inputs | {"x": make_view(kind, inputs["x"])})
        assert_same(strided, expected)


def test_transposed_and_sliced_weights():
    inputs = inputs_of(3, 5, 24, units=40)
    with use_variants("fused"):
        expected = compute_results(partial(ours, activation="gelu"), inputs)
        changed = inputs | {
            "weight": inputs["weight"].t().contiguous().t(),
            "bias": torch.stack((inputs["bias"], inputs["bias"]), 1)[:, 0],
            "norm_weight": torch.stack((inputs["norm_weight"], inputs["norm_bias"]), 1)[:, 0],
        }
        assert_same(compute_results(partial(ours, activation="gelu"), changed), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(8, 80)),
    units=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    way=st.sampled_from(sorted(VARIANTS)),
    kind=st.sampled_from(("contiguous", *VIEWS)),
    activation=st.sampled_from([None, "gelu", "gelu_new", "quick_gelu"]),
    bias=st.booleans(),
    add=st.booleans(),
)
def test_any_shape_layout_and_dtype(shape, units, dtype, way, kind, activation, bias, add):
    inputs = inputs_of(*shape, units=units, dtype=dtype, bias=bias, add=add)
    if kind != "contiguous" and not inputs["x"].new_empty(shape).transpose(0, 1).is_contiguous():
        view = {"transposed": lambda: inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)}
        inputs["x"] = view.get(kind, lambda: make_view(kind, inputs["x"]))()
    with use_variants(way):
        check_activation(activation, inputs, slack=4)


@EVERY_WAY
@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
def test_an_empty_batch_gives_empty_outputs_and_zero_weight_gradients(way, shape):
    inputs = inputs_of(*shape, units=40)
    with use_variants(way):
        found = compute_results(partial(ours, activation="gelu"), inputs)
    assert found["output 0"].shape == found["grad x"].shape == shape
    assert found["output 1"].shape == (*shape[:-1], 40)
    for name in ("norm_weight", "norm_bias", "weight", "bias"):
        assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[name])), name


@EVERY_WAY
def test_two_runs_give_the_same_bits(way):
    inputs = inputs_of(5, 23, 48, units=72, dtype=torch.bfloat16)
    with use_variants(way):
        first, second = (compute_results(partial(ours, activation="gelu"), inputs) for _ in range(2))
    assert_same(first, second)


@EVERY_WAY
def test_training_and_inference_give_the_same_bits(way):
    inputs = inputs_of(2, 9, 48, units=72, dtype=torch.bfloat16)
    with use_variants(way):
        training = compute_results(partial(ours, activation="gelu"), inputs)
        with torch.no_grad():
            assert_same(
                compute_results(partial(ours, activation="gelu"), inputs, grads_for=()),
                {k: training[k] for k in ("output 0", "output 1")},
            )


@EVERY_WAY
@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_where_only_one_output_is_used(way, unused):
    inputs = inputs_of(2, 9, 48, units=40)
    wanted = tuple(inputs) if unused == 0 else ("x", "residual")
    with use_variants(way):
        check_activation("gelu", inputs, unused=(unused,), grads_for=wanted)


@EVERY_WAY
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    "wanted", [("x",), ("residual",), ("norm_bias",), ("weight",), ("bias",), ("residual", "weight"), ("x", "bias")]
)
def test_each_gradient_alone_is_what_it_is_among_the_others(way, activation, wanted):
    inputs = inputs_of(2, 9, 48, units=40)
    with use_variants(way):
        every = compute_results(partial(ours, activation=activation), inputs)
        some = compute_results(partial(ours, activation=activation), inputs, grads_for=wanted)
    assert {name for name in some if name.startswith("grad")} == {f"grad {name}" for name in wanted}
    assert_same(some, {name: every[name] for name in some})


def test_the_shared_gradient_of_the_branch_and_the_residual_is_one_tensor():
    grads = compute_results(partial(ours, activation="gelu"), inputs_of(2, 9, 48, units=40))
    assert grads["grad x"].data_ptr() == grads["grad residual"].data_ptr()


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
def test_opcheck(activation, add):
    inputs = inputs_of(2, 3, 16, units=24, add=add)
    for tensor in inputs.values():
        tensor.requires_grad_()
    norm = (inputs["norm_weight"], inputs["norm_bias"], EPS)
    linear = (inputs["weight"], inputs["bias"])
    arguments = (inputs["x"], inputs.get("residual"), *norm, *linear, activation)
    torch.library.opcheck(kernels._layer_norm_linear, (*arguments, activation is not None, 0))
    pre = randn(6 if activation else 0, 24)
    for wanted in ([True, True, True, True], [False, False, True, False], [True, False, False, True]):
        torch.library.opcheck(
            kernels._layer_norm_linear_backward,
            (
                randn(2, 3, 24), inputs["x"].detach() if add else None, inputs["x"].detach(), randn(2, 6), pre,
                *(tensor.detach() for tensor in norm[:2]), linear[0].detach(), EPS, activation, torch.float32,
                torch.float32, wanted,
            ),
        )  # fmt: skip


def two_layers(x, residual, norm_weight, norm_bias, weight, bias):
    summed, hidden = add_layer_norm_linear(x, residual, norm_weight, norm_bias, EPS, weight, bias)
    return summed, layer_norm_gelu(hidden, norm_weight, norm_bias, EPS, weight, bias)


@EVERY_WAY
def test_compiled_without_a_graph_break(way):
    torch._dynamo.reset()
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager")
    with use_variants(way):
        for batch in (2, 3):  # the second has a dynamic shape
            inputs = inputs_of(batch, 3, 16, units=16)
            assert_close(compute_results(compiled, inputs), compute_results(two_layers, inputs))
            with torch.no_grad():
                torch.testing.assert_close(compiled(**inputs), two_layers(**inputs))


def test_activation_checkpointing():
    inputs = inputs_of(2, 3, 16, units=16)
    again = compute_results(lambda **named: checkpoint(two_layers, *named.values(), use_reentrant=False), inputs)
    assert_same(again, compute_results(two_layers, inputs))


def test_export_with_any_batch_size():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            inputs = inputs_of(2, 3, 16, units=16)
            self.parameters_ = torch.nn.ParameterList([t for n, t in inputs.items() if n not in ("x", "residual")])

        def forward(self, x, residual):
            return two_layers(x, residual, *self.parameters_)

    block, batch = Block(), {0: torch.export.Dim("batch", min=2, max=64)}
    example = (randn(2, 3, 16), randn(2, 3, 16, seed=1))
    program = torch.export.export(block, example, dynamic_shapes=(batch, batch))
    x, residual = randn(5, 3, 16, seed=8), randn(5, 3, 16, seed=9)
    for found, expected in zip(program.module()(x, residual), block(x, residual), strict=True):
        assert torch.equal(found, expected)


@EVERY_WAY
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_autocast_casts_the_weights_like_a_linear_layers(way, activation):
    inputs = inputs_of(2, 9, 48, units=40)
    inputs["x"] = inputs["x"].bfloat16()  # the branch comes out of a linear layer, the residual stream is float32

    def autocast(function):
        def call(**named):
            with torch.autocast(DEVICE, torch.bfloat16):
                return function(**named, activation=activation)

        return call

    def cast(x, weight, bias, **others):
        half = {"weight": weight.bfloat16(), "bias": bias.bfloat16()} if x.dtype == torch.bfloat16 else {}
        return pytorch(x=x, **({"weight": weight, "bias": bias} | half), **others, activation=activation)

    with use_variants(way):
        found = compute_results(autocast(ours), inputs)
        assert found["output 0"].dtype == torch.float32
        assert found["output 1"].dtype == torch.bfloat16
        assert found["grad weight"].dtype == found["grad bias"].dtype == torch.float32
        check(autocast(ours), cast, inputs)


@EVERY_WAY
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_backward_keeps_the_sum_the_statistics_and_the_pre_activation(way, activation):
    rows, dim, units = 2 * 9, 48, 192
    inputs = inputs_of(2, 9, dim, units=units, dtype=torch.bfloat16)
    with use_variants(way):
        kept = count_saved_bytes(partial(ours, activation=activation), inputs)
    assert kept == 2 * rows * dim + 8 * rows + (2 * rows * units if activation else 0)
    assert kept < count_saved_bytes(partial(pytorch, activation=activation), inputs)


def test_without_gradients_nothing_is_kept_and_no_pre_activation_is_returned():
    inputs = inputs_of(2, 9, 48, units=192)
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
def test_bad_input_is_named_before_anything_is_launched(changes, message, monkeypatch):
    monkeypatch.setattr(kernels, "_layer_norm_linear", None)
    inputs = {name: tensor.cpu() for name, tensor in inputs_of(2, 3, 16, units=24).items()}
    with pytest.raises(ValueError, match=message):
        ours(**({"activation": "gelu"} | inputs | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_new", "quick_gelu"])
def test_the_fallbacks_are_the_operators_in_plain_pytorch(dtype, add, activation):
    residual_dtype = torch.float32 if add else None
    inputs = inputs_of(3, 5, 24, units=40, dtype=dtype, residual_dtype=residual_dtype, norm_dtype=torch.float32)
    x, residual = make_view("tokens", inputs["x"]), inputs["residual"] if add else None
    norm, weight = (inputs["norm_weight"], inputs["norm_bias"]), inputs["weight"].t().contiguous().t()
    arguments = (x, residual, *norm, EPS, weight, inputs["bias"], activation, activation is not None, 0)
    outputs = kernels.launch_forward(*arguments)
    assert_equivalent(kernels.forward_fallback(*arguments), outputs)
    summed, statistics, pre, out = outputs
    grad_sum, rows = (randn(3, 5, 24, seed=7), summed) if add else (None, x)
    grad_out = randn(*out.shape, dtype=dtype, seed=8).mul(0.1)
    for wanted in ([True] * 4, [True, False, False, False], [False, True, True, False], [False, False, True, True]):
        saved = (rows, statistics, pre, *norm, weight, EPS, activation, dtype, rows.dtype)
        backward = (grad_out, grad_sum, *saved, wanted)
        assert_equivalent(kernels.backward_fallback(*backward), kernels.launch_backward(*backward), dtype)


def test_the_fallback_takes_over(monkeypatch):
    monkeypatch.setattr(operators, "FALLBACK_DEVICES", (DEVICE,))
    monkeypatch.setattr(operators, "failures", {})
    monkeypatch.setattr(layer_norm, "launch_forward", mock.Mock(side_effect=RuntimeError("no such instruction")))
    monkeypatch.setattr(layer_norm, "launch_backward", mock.Mock(side_effect=RuntimeError("no such instruction")))
    check_activation("gelu", inputs_of(2, 9, 40, units=24))
    assert {failure.operator for failure in operators.failures.values()} == {
        "layer_norm_linear",
        "layer_norm_linear_backward",
    }


@pytest.mark.parametrize("candidate", [0, 1, 2])
def test_the_candidate_says_how_the_product_is_computed(candidate, monkeypatch):
    ways = ("separate", "fused", "persistent")
    inputs = inputs_of(2, 9, 48, units=40, dtype=torch.bfloat16)
    with use_variants(ways[candidate]):
        expected = compute_results(partial(ours, activation="gelu"), inputs)
    with use_variants(*ways):
        assert_same(compute_results(partial(ours, activation="gelu", candidate=candidate), inputs), expected)
        monkeypatch.setattr(linear, "_linear", spy := mock.MagicMock())
        ours(**inputs, activation="gelu", candidate=candidate)
    called = [call.kwargs["PERSISTENT"] for call in spy.__getitem__.return_value.call_args_list]
    assert called == [[], [False], [True]][candidate]
