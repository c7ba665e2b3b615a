"""The fused feed-forward: errors against float64 are no larger than PyTorch's, and less is saved for backward."""

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

from fastvit.kernels import feed_forward as kernels
from fastvit.kernels import linear, operators, tuning
from fastvit.kernels.feed_forward import add_layer_norm_feed_forward, feed_forward
from fastvit.kernels.layer_norm_linear import layer_norm_linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
KINDS = pytest.mark.parametrize("kind", ["alone", "add"])


def make_inputs(*shape, units, kind="add", dtype=torch.float32, residual_dtype=None, bias=True, scale=1.0, shift=0.0):
    """Return inputs by name. Affine weights are random; pre-activations are about as large as in a trained model."""
    dim = shape[-1]
    norm_dtype = residual_dtype or dtype
    inputs = {"x": randn(*shape, dtype=dtype, seed=1, scale=scale, shift=shift)}
    if kind == "add":
        inputs["residual"] = randn(*shape, dtype=norm_dtype, seed=2, scale=scale)
    if kind != "alone":
        inputs["norm_weight"] = randn(dim, dtype=norm_dtype, seed=3, scale=0.5, shift=1.0)
        inputs["norm_bias"] = randn(dim, dtype=norm_dtype, seed=4)
    return inputs | {
        "weight1": randn(units, dim, dtype=dtype, seed=5, scale=dim**-0.5),
        "bias1": randn(units, dtype=dtype, seed=6) if bias else None,
        "weight2": randn(dim, units, dtype=dtype, seed=7, scale=units**-0.5),
        "bias2": randn(dim, dtype=dtype, seed=8) if bias else None,
    }


def run_kernels(x, residual=None, norm_weight=None, norm_bias=None, activation="gelu", **others):
    if norm_weight is None:
        return feed_forward(x, **others, activation=activation)
    return add_layer_norm_feed_forward(x, residual, norm_weight, norm_bias, EPS, **others, activation=activation)


def run_reference(x, residual=None, norm_weight=None, norm_bias=None, activation="gelu", **layers):
    summed = x if residual is None else x + residual
    normed = summed
    if norm_weight is not None:
        norm_weight, norm_bias = norm_weight.to(summed.dtype), norm_bias.to(summed.dtype)
        normed = reference.layer_norm(summed, norm_weight, norm_bias, EPS).to(layers["weight1"].dtype)
    hidden = torch.nn.functional.linear(normed, layers["weight1"], layers["bias1"])
    out = torch.nn.functional.linear(reference.ACTIVATIONS[activation](hidden), layers["weight2"], layers["bias2"])
    return out if residual is None else (summed, out)


@KINDS
def test_local_baseline_matches_reference(kind):
    inputs = make_inputs(2, 3, 24, units=40, kind=kind)
    function = {
        "alone": reference.feed_forward,
        "add": partial(reference.add_layer_norm_feed_forward, eps=EPS),
    }[kind]
    torch.testing.assert_close(
        function(**inputs, activation="quick_gelu"), run_reference(**inputs, activation="quick_gelu")
    )


@EACH_VARIANT
@DTYPES
@KINDS
def test_outputs_and_gradients_match_reference(variant, dtype, kind):
    with use_variants(variant):
        check(run_kernels, run_reference, make_inputs(2, 17, 48, units=192, kind=kind, dtype=dtype))


@EACH_VARIANT
@pytest.mark.parametrize(("tokens", "dim", "units"), [(1, 72, 288), (50, 100, 101), (197, 24, 96), (257, 24, 40)])
def test_any_number_of_tokens_and_widths(variant, tokens, dim, units):
    with use_variants(variant):
        check(run_kernels, run_reference, make_inputs(1, tokens, dim, units=units, dtype=torch.bfloat16))


@EACH_VARIANT
@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_activation(variant, activation, bias):
    inputs = make_inputs(2, 9, 40, units=72, dtype=torch.bfloat16, bias=bias)
    with use_variants(variant):
        check(partial(run_kernels, activation=activation), partial(run_reference, activation=activation), inputs)


@EACH_VARIANT
@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [
        (torch.float32, 1.0, 10.0),  # the mean ten times the standard deviation
        (torch.bfloat16, 1.0, 10.0),
        (torch.float16, 1.0, 10.0),
        (torch.bfloat16, 1e15, 0.0),
        (torch.bfloat16, 1e-15, 0.0),
        (torch.float16, 1e4, 0.0),
    ],
)
def test_shifted_huge_and_tiny_inputs(variant, dtype, scale, shift):
    with use_variants(variant):
        check(run_kernels, run_reference, make_inputs(2, 9, 96, units=40, dtype=dtype, scale=scale, shift=shift))


@EACH_VARIANT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_residual_stream_with_half_precision_branch(variant, dtype):
    with use_variants(variant):
        check(run_kernels, run_reference, make_inputs(2, 9, 48, units=40, dtype=dtype, residual_dtype=torch.float32))


@EACH_VARIANT
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_pytorch(variant, bad):
    inputs = make_inputs(3, 40, units=24)
    inputs["x"][1, 7] = bad
    theirs = compute_results(run_reference, inputs)
    with use_variants(variant):
        for name, tensor in compute_results(run_kernels, inputs).items():
            assert torch.equal(tensor.isfinite(), theirs[name].isfinite()), name


@KINDS
@pytest.mark.parametrize("view", VIEWS)
def test_views_match_contiguous_inputs(kind, view):
    inputs = make_inputs(3, 5, 24, units=40, kind=kind)
    with use_variants("fused"):
        expected = compute_results(run_kernels, inputs)
        assert_same(compute_results(run_kernels, inputs | {"x": make_view(view, inputs["x"])}), expected)
        transposed = {name: inputs[name].t().contiguous().t() for name in ("weight1", "weight2")}
        assert_close(compute_results(run_kernels, inputs | transposed), expected)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(8, 80)),
    units=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    variant=st.sampled_from(sorted(VARIANTS)),
    kind=st.sampled_from(["alone", "add"]),
    bias=st.booleans(),
)
def test_any_shape_and_dtype(shape, units, dtype, variant, kind, bias):
    with use_variants(variant):
        check(run_kernels, run_reference, make_inputs(*shape, units=units, kind=kind, dtype=dtype, bias=bias), slack=4)


@EACH_VARIANT
@KINDS
def test_empty_batch_returns_empty_outputs_and_zero_weight_gradients(variant, kind):
    inputs = make_inputs(0, 5, 24, units=40, kind=kind)
    with use_variants(variant):
        found = compute_results(run_kernels, inputs)
    assert found["grad x"].shape == (0, 5, 24)
    for name in inputs:
        if name not in ("x", "residual"):
            assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[name])), name


@EACH_VARIANT
def test_results_are_deterministic_with_and_without_gradients(variant):
    inputs = make_inputs(5, 23, 48, units=72, dtype=torch.bfloat16)
    with use_variants(variant):
        first = compute_results(run_kernels, inputs)
        assert_same(first, compute_results(run_kernels, inputs))
        with torch.no_grad():
            alone = compute_results(run_kernels, inputs, grads_for=())
    assert_same(alone, {name: first[name] for name in alone})


@EACH_VARIANT
@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_with_one_unused_output_match_reference(variant, unused):
    inputs = make_inputs(2, 9, 48, units=40)
    with use_variants(variant):
        check(
            run_kernels,
            run_reference,
            inputs,
            unused=(unused,),
            grads_for=tuple(inputs) if unused == 0 else ("x", "residual"),
        )


@pytest.mark.parametrize(
    ("kind", "requested"),
    [
        *(("alone", name) for name in ("x", "weight1", "bias1", "weight2", "bias2")),
        *(("add", name) for name in ("x", "residual", "norm_weight", "norm_bias", "weight1", "weight2")),
    ],
)
def test_single_gradients_match_full_backward(kind, requested):
    inputs = make_inputs(2, 9, 48, units=40, kind=kind)
    every, alone = compute_results(run_kernels, inputs), compute_results(run_kernels, inputs, grads_for=(requested,))
    assert {name for name in alone if name.startswith("grad")} == {f"grad {requested}"}
    assert_same(alone, {name: every[name] for name in alone})


@KINDS
def test_opcheck(kind):
    inputs = make_inputs(2, 3, 16, units=24, kind=kind)
    x, residual, norm_weight, norm_bias = (inputs.get(n) for n in ("x", "residual", "norm_weight", "norm_bias"))
    weight1, bias1, weight2, bias2 = (inputs[name] for name in ("weight1", "bias1", "weight2", "bias2"))
    statistics = randn(2, 6) if norm_weight is not None else randn(0)
    for requested in ([True] * 6, [False, False, True, False, True, True], [True, False, False, True, False, False]):
        torch.library.opcheck(
            kernels._feed_forward_backward,
            (
                randn(2, 3, 16), x if residual is not None else None, x, statistics, randn(6, 24), norm_weight,
                norm_bias, weight1, weight2, EPS, "gelu", torch.float32, torch.float32, requested, 0,
            ),
        )  # fmt: skip
    for tensor in inputs.values():
        tensor.requires_grad_()
    layers = (weight1, bias1, weight2, bias2)
    inputs = (x, residual, norm_weight, norm_bias, EPS, *layers, "gelu", True, 0)
    torch.library.opcheck(kernels._feed_forward, inputs)


@EACH_VARIANT
@KINDS
def test_compiles_without_graph_breaks(variant, kind):
    torch._dynamo.reset()
    compiled = torch.compile(run_kernels, fullgraph=True, backend="aot_eager")
    with use_variants(variant):
        for batch in (2, 3):  # the second has a dynamic shape
            inputs = make_inputs(batch, 3, 16, units=24, kind=kind)
            assert_close(compute_results(compiled, inputs), compute_results(run_kernels, inputs))


def test_activation_checkpointing_matches_plain_backward():
    inputs = make_inputs(2, 3, 16, units=24)

    def run_checkpointed(**named):
        return checkpoint(
            lambda *tensors: run_kernels(**dict(zip(named, tensors, strict=True))), *named.values(), use_reentrant=False
        )

    assert_same(compute_results(run_checkpointed, inputs), compute_results(run_kernels, inputs))


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_exports_with_dynamic_batch_size(grad):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            inputs = make_inputs(2, 3, 16, units=24)
            self.names = [name for name in inputs if name not in ("x", "residual")]
            for name in self.names:
                self.register_parameter(name, torch.nn.Parameter(inputs[name]))

        def forward(self, x, residual):
            return run_kernels(x, residual, **{name: getattr(self, name) for name in self.names})

    block, batch = Block(), {0: torch.export.Dim("batch", min=2, max=64)}
    example = (randn(2, 3, 16), randn(2, 3, 16, seed=1))
    with torch.set_grad_enabled(grad):
        program = torch.export.export(block, example, dynamic_shapes=(batch, batch))
    x, residual = randn(5, 3, 16, seed=8), randn(5, 3, 16, seed=9)
    for found, expected in zip(program.module()(x, residual), block(x, residual), strict=True):
        assert torch.equal(found, expected)


@EACH_VARIANT
@KINDS
def test_autocast_casts_weights_as_in_a_linear_layer(variant, kind):
    inputs = make_inputs(2, 9, 48, units=40, kind=kind)
    layers = ("weight1", "bias1", "weight2", "bias2")

    def autocast(**named):
        with torch.autocast(DEVICE, torch.bfloat16):
            return run_kernels(**named)

    def cast(**named):  # as autocast casts on a GPU, where LayerNorm stays in float32
        halves = layers if kind != "alone" else ("x", *layers)
        if named["x"].dtype == torch.float32:
            named |= {name: named[name].bfloat16() for name in halves}
        return run_reference(**named)

    with use_variants(variant):
        found = compute_results(autocast, inputs)
        assert found["grad weight1"].dtype == found["grad bias2"].dtype == torch.float32
        check(autocast, cast, inputs)


@EACH_VARIANT
def test_backward_under_autocast_uses_the_dtypes_of_forward(variant):
    inputs = {name: tensor.requires_grad_() for name, tensor in make_inputs(2, 9, 48, units=40).items()}
    with use_variants(variant):
        summed, out = run_kernels(**inputs)
        outside = torch.autograd.grad(summed.sum() + out.sum(), list(inputs.values()), retain_graph=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            inside = torch.autograd.grad(summed.sum() + out.sum(), list(inputs.values()))
    for first, second in zip(inside, outside, strict=True):
        assert torch.equal(first, second)


@EACH_VARIANT
@pytest.mark.parametrize("kind", ["add", "alone"])
def test_only_sum_statistics_and_pre_activation_are_saved_for_backward(variant, kind):
    rows, dim, units = 2 * 9, 48, 192
    inputs = make_inputs(2, 9, dim, units=units, kind=kind, dtype=torch.bfloat16)
    with use_variants(variant):
        saved_bytes = count_saved_bytes(run_kernels, inputs)
    expected = {"add": 2 * rows * dim + 8 * rows, "alone": 0}[kind] + 2 * rows * units
    assert saved_bytes == expected
    if kind == "add":  # PyTorch also saves the normalised rows and the activation; its statistics may be smaller
        assert count_saved_bytes(run_reference, inputs) - saved_bytes >= 2 * rows * dim + 2 * rows * units - 8 * rows


def test_block_saves_ten_widths_per_token_and_pytorch_sixteen():
    """Two blocks minus one block: residual', query, key, value, attention output, residual', pre-activation."""
    batch, tokens, dim = 2, 17, 48
    parameters = make_inputs(batch, tokens, dim, units=4 * dim, dtype=torch.bfloat16)
    x, _ = parameters.pop("x"), parameters.pop("residual")
    packed = {"weight": randn(3 * dim, dim, dtype=torch.bfloat16), "bias": randn(3 * dim, dtype=torch.bfloat16)}

    def attend(qkv):
        query, key, value = qkv.unflatten(-1, (3, 3, dim // 3)).unbind(2)
        return reference.attention(query, key, value)

    def our_block(x, weight, bias, norm_weight, norm_bias, **layers):
        qkv = layer_norm_linear(x, norm_weight, norm_bias, EPS, weight, bias)
        summed, out = run_kernels(attend(qkv), x, norm_weight, norm_bias, **layers)
        return summed + out

    def their_block(x, weight, bias, norm_weight, norm_bias, **layers):
        normed = reference.layer_norm(x, norm_weight, norm_bias, EPS)
        qkv = torch.nn.functional.linear(normed, weight, bias)
        summed, out = run_reference(attend(qkv), x, norm_weight, norm_bias, **layers)
        return summed + out

    def count_saved_widths(block):
        one = count_saved_bytes(block, {"x": x} | packed | parameters)
        two = count_saved_bytes(lambda x, **rest: block(block(x, **rest), **rest), {"x": x} | packed | parameters)
        return (two - one) / (batch * tokens * dim * x.itemsize)

    small = 0.5  # a few numbers per row: mean and rstd of the norms, the softmax sums
    assert 10 <= count_saved_widths(our_block) < 10 + small
    assert 16 <= count_saved_widths(their_block) < 16 + small


def test_nothing_is_saved_without_gradients():
    inputs = make_inputs(2, 9, 48, units=192)
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        assert not any(output.requires_grad for output in run_kernels(**tensors))
    layers = [inputs[name] for name in ("weight1", "bias1", "weight2", "bias2")]
    _, statistics, pre, _ = kernels._feed_forward(inputs["x"], None, None, None, 0.0, *layers, "gelu", False, 0)
    assert pre.numel() == statistics.numel() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 0)}, r"x: expected \[..., D\].*got \[2, 0\]"),
        ({"x": torch.zeros(2, 3, 16).double()}, "x: expected torch.float32 .*got torch.float64"),
        ({"residual": torch.zeros(1, 3, 16)}, r"residual: expected \[2, 3, 16\], got \[1, 3, 16\]"),
        ({"norm_weight": torch.zeros(15)}, r"norm_weight: expected \[16\], got \[15\]"),
        ({"weight1": torch.zeros(24, 15)}, r"weight1: expected \[units, 16\], got \[24, 15\]"),
        ({"bias1": torch.zeros(16)}, r"bias1: expected \[24\], got \[16\]"),
        ({"weight2": torch.zeros(16, 16)}, r"weight2: expected \[units, 24\], got \[16, 16\]"),
        ({"weight2": torch.zeros(16, 24).half()}, "weight2: expected torch.float32, got torch.float16"),
        ({"bias2": torch.zeros(24)}, r"bias2: expected \[16\], got \[24\]"),
        ({"x": [1.0]}, "x: expected a tensor, got list"),
        ({"bias2": [1.0]}, "bias2: expected a tensor, got list"),
        ({"activation": "relu"}, "activation: expected one of gelu.*got 'relu'"),
    ],
)
def test_invalid_input_raises_before_launch(changes, message, monkeypatch):
    monkeypatch.setattr(kernels, "_feed_forward", None)
    inputs = {name: tensor.cpu() for name, tensor in make_inputs(2, 3, 16, units=24).items()}
    with pytest.raises(ValueError, match=message):
        run_kernels(**(inputs | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu"])
@KINDS
def test_fallbacks_match_launchers(dtype, activation, kind):
    residual_dtype = torch.float32 if kind == "add" else None
    inputs = make_inputs(3, 5, 24, units=40, kind=kind, dtype=dtype, residual_dtype=residual_dtype)
    norm = (inputs.get("norm_weight"), inputs.get("norm_bias"))
    layers = [inputs[name] for name in ("weight1", "bias1", "weight2", "bias2")]
    arguments = (inputs["x"], inputs.get("residual"), *norm, EPS, *layers, activation, True, 0)
    outputs = kernels._feed_forward(*arguments)
    assert_equivalent(kernels._forward_fallback(*arguments), outputs)
    summed, statistics, pre, out = outputs
    grad_sum, rows = (randn(3, 5, 24, seed=9), summed) if kind == "add" else (None, inputs["x"])
    grad_out = randn(*out.shape, dtype=dtype, seed=10).mul(0.1)
    saved = (grad_sum, rows, statistics, pre, *norm, layers[0], layers[2], EPS, activation, dtype, rows.dtype)
    some = [False, kind == "add", True, True, False, True]
    for requested in ([True] * 6, [True, False, False, False, True, False], some):
        backward = (grad_out, *saved, requested, 0)
        assert_equivalent(kernels._backward_fallback(*backward), kernels._feed_forward_backward(*backward))


@KINDS
def test_fallback_replaces_failing_kernels(kind, monkeypatch):
    monkeypatch.setattr(operators, "FALLBACK_DEVICES", (DEVICE,))
    monkeypatch.setattr(operators, "failures", {})
    for name in ("launch_forward", "launch_backward"):
        monkeypatch.setattr(linear, name, mock.Mock(side_effect=RuntimeError("no such instruction")))
    check(run_kernels, run_reference, make_inputs(2, 9, 40, units=24, kind=kind))
    assert [failure.operator for failure in operators.failures.values()] == ["feed_forward", "feed_forward_backward"]


@KINDS
@pytest.mark.parametrize("candidate", [0, 1, 2])
def test_candidate_selects_both_matmul_kernels(kind, candidate):
    variants = tuple(VARIANTS)
    inputs = make_inputs(2, 9, 48, units=40, kind=kind, dtype=torch.bfloat16)
    with use_variants(variants[candidate]):
        expected = compute_results(run_kernels, inputs)
    seen = []

    def spy(operation, *case):
        seen.append((operation, case[-1]))
        return select(operation, *case)

    select = tuning.select
    with use_variants(*variants), mock.patch.object(tuning, "select", spy):
        found = compute_results(partial(run_kernels, candidate=candidate), inputs)
    assert_same(found, expected)
    assert [case for case in seen if case[0].startswith("linear")] == [
        ("linear_forward", candidate),
        ("linear_backward", candidate),
    ]
