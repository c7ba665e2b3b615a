"""A linear layer that adds to the residual stream: as exact as PyTorch's against float64, by cuBLAS or our product."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvit import reference

pytest.importorskip("triton")
from operations import DEVICE, VARIANTS, VIEWS, assert_close, assert_same, check, random, results, variant, view_of

from fastvit.kernels import linear as kernels
from fastvit.kernels import tuning
from fastvit.kernels.linear import linear_residual

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
WAYS = ["separate", "fused", "persistent"]
EVERY_WAY = pytest.mark.parametrize("way", WAYS)


def inputs_of(*shape, units, dtype=torch.float32, residual_dtype=None, bias=True, scale=1.0):
    return {
        "x": random(*shape, dtype=dtype, seed=1, scale=scale),
        "weight": random(units, shape[-1], dtype=dtype, seed=2, scale=shape[-1] ** -0.5),
        "bias": random(units, dtype=dtype, seed=3, scale=scale) if bias else None,
        "residual": random(*shape[:-1], units, dtype=residual_dtype or dtype, seed=4, scale=scale),
    }


@EVERY_WAY
@DTYPES
@pytest.mark.parametrize(("dim", "units"), [(192, 48), (101, 72), (400, 100)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_outputs_and_gradients_are_as_exact_as_pytorchs(way, dtype, dim, units, bias):
    with variant(way):
        check(linear_residual, reference.linear_residual, inputs_of(2, 17, dim, units=units, dtype=dtype, bias=bias))


@EVERY_WAY
@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 197, 24), (1, 257, 24), (24,), (3, 24), (2, 3, 2, 24)])
def test_any_leading_shape(way, shape):
    with variant(way):
        check(linear_residual, reference.linear_residual, inputs_of(*shape, units=40, dtype=torch.bfloat16))


@EVERY_WAY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_a_float32_residual_stream_stays_float32(way, dtype, bias):
    inputs = inputs_of(2, 9, 48, units=40, dtype=dtype, residual_dtype=torch.float32, bias=bias)
    with variant(way):
        check(linear_residual, reference.linear_residual, inputs)
        assert linear_residual(**inputs).dtype == torch.float32


@EVERY_WAY
def test_a_residual_in_less_precision(way):
    with variant(way):
        check(linear_residual, reference.linear_residual, inputs_of(2, 9, 48, units=40, residual_dtype=torch.bfloat16))


@EVERY_WAY
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e15), (torch.bfloat16, 1e-15), (torch.float16, 1e3)])
def test_huge_and_tiny_values(way, dtype, scale):
    wanted = ("weight", "residual") if dtype == torch.float16 else None
    with variant(way):
        inputs = inputs_of(2, 9, 48, units=40, dtype=dtype, scale=scale)
        check(linear_residual, reference.linear_residual, inputs, wanted=wanted)


@EVERY_WAY
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "bias", "residual"])
def test_nan_and_infinity_spread_as_in_pytorch(way, bad, where):
    inputs = inputs_of(3, 40, units=24)
    inputs[where].view(-1)[7] = bad
    theirs = results(reference.linear_residual, inputs)
    with variant(way):
        for name, tensor in results(linear_residual, inputs).items():
            assert torch.equal(tensor.isnan(), theirs[name].isnan()), name
            assert torch.equal(tensor.isinf(), theirs[name].isinf()), name


@EVERY_WAY
@pytest.mark.parametrize("kind", VIEWS)
def test_views_give_what_contiguous_tensors_give(way, kind):
    inputs = inputs_of(3, 5, 24, units=40)
    with variant(way):
        expected = results(linear_residual, inputs)
        for name in ("x", "residual"):
            assert_same(results(linear_residual, inputs | {name: view_of(kind, inputs[name])}), expected)
        assert_same(results(linear_residual, inputs | {"weight": inputs["weight"].t().contiguous().t()}), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 80)),
    units=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    residual_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    way=st.sampled_from(WAYS),
    bias=st.booleans(),
)
def test_any_shape_and_dtype(shape, units, dtype, residual_dtype, way, bias):
    inputs = inputs_of(*shape, units=units, dtype=dtype, residual_dtype=residual_dtype, bias=bias)
    with variant(way):
        check(linear_residual, reference.linear_residual, inputs, slack=4)


@EVERY_WAY
def test_an_empty_batch(way):
    with variant(way):
        found = results(linear_residual, inputs_of(0, 5, 24, units=40))
    assert found["output 0"].shape == (0, 5, 40)
    assert found["grad x"].shape == (0, 5, 24)
    assert found["grad weight"].count_nonzero() == found["grad bias"].count_nonzero() == 0


@EVERY_WAY
def test_two_runs_give_the_same_bits_and_the_residual_is_left_alone(way):
    inputs = inputs_of(5, 23, 48, units=72, dtype=torch.bfloat16)
    before = inputs["residual"].clone()
    with variant(way):
        assert_same(results(linear_residual, inputs), results(linear_residual, inputs))
        assert_same(*(results(linear_residual, inputs | {"bias": None}) for _ in range(2)))
    assert torch.equal(inputs["residual"], before)


def test_opcheck():
    for bias in (True, False):
        inputs = inputs_of(2, 3, 16, units=24, bias=bias)
        for tensor in inputs.values():
            if tensor is not None:
                tensor.requires_grad_()
        torch.library.opcheck(kernels._linear_residual.definition, tuple(inputs.values()))


@EVERY_WAY
def test_compiled_without_a_graph_break(way):
    torch._dynamo.reset()
    compiled = torch.compile(linear_residual, fullgraph=True, backend="aot_eager")
    with variant(way):
        for batch in (2, 3):  # the second has a dynamic shape
            inputs = inputs_of(batch, 3, 16, units=24)
            assert_close(results(compiled, inputs), results(linear_residual, inputs))


def test_activation_checkpointing():
    inputs = inputs_of(2, 3, 16, units=24)
    again = results(lambda **named: checkpoint(linear_residual, *named.values(), use_reentrant=False), inputs)
    assert_same(again, results(linear_residual, inputs))


def test_export_with_any_batch_size():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 24, device=DEVICE)

        def forward(self, x, residual):
            return linear_residual(x, self.linear.weight, self.linear.bias, residual)

    layer, batch = Layer(), {0: torch.export.Dim("batch", min=2, max=64)}
    example = (random(2, 3, 16), random(2, 3, 24))
    program = torch.export.export(layer, example, dynamic_shapes=(batch, batch))
    x, residual = random(5, 3, 16, seed=8), random(5, 3, 24, seed=9)
    assert torch.equal(program.module()(x, residual), layer(x, residual))


@EVERY_WAY
def test_autocast_casts_like_a_linear_layer(way):
    inputs = inputs_of(2, 9, 48, units=40)

    def autocast(function):
        def call(**named):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=named["x"].dtype == torch.float32):
                return function(**named)

        return call

    with variant(way):
        check(autocast(linear_residual), autocast(reference.linear_residual), inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(())}, r"x: expected \[..., D\].*got \[\]"),
        ({"x": torch.zeros(2, 3, 16).int()}, "x: expected torch.float32 .*got torch.int32"),
        ({"x": torch.zeros(2, 3, 16).half()}, "x: expected torch.float32, got torch.float16"),
        ({"weight": torch.zeros(24, 15)}, r"weight: expected \[units, 16\], got \[24, 15\]"),
        ({"bias": torch.zeros(24).half()}, "bias: expected torch.float32, got torch.float16"),
        ({"residual": torch.zeros(2, 3, 16)}, r"residual: expected \[2, 3, 24\], got \[2, 3, 16\]"),
        ({"residual": torch.zeros(2, 3, 24, device="meta")}, "residual: expected device .*got meta"),
    ],
)
def test_bad_input_is_named_before_anything_is_launched(changes, message, monkeypatch):
    monkeypatch.setattr(kernels, "_linear_residual", None)
    inputs = {name: tensor.cpu() for name, tensor in inputs_of(2, 3, 16, units=24).items()}
    with pytest.raises(ValueError, match=message):
        linear_residual(**(inputs | changes))


def test_descriptors_are_for_rows_on_16_byte_boundaries():
    choice = VARIANTS["persistent"]
    matrix = torch.zeros(6, 40, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.descriptor_of(choice, matrix, 32, 64).block_shape == [32, 64]
    assert kernels.descriptor_of(VARIANTS["fused"], matrix, 32, 64) is None
    for unfit in (matrix[:, 1:33], matrix[:, ::2], matrix[:, :36].contiguous(), matrix.t()):
        assert kernels.descriptor_of(choice, unfit, 32, 64) is None


@pytest.mark.parametrize("units", [40, 36], ids=["by descriptor", "by address"])
def test_the_persistent_kernels_compute_what_they_can(units):
    inputs = inputs_of(5, 70, 48, units=units, dtype=torch.bfloat16)
    called = []

    class Spy:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            called.append((self.name, grid))
            return self.kernel[grid]

    names = ("_linear_fwd", "_linear_fwd_persistent", "_linear_activation_bwd", "_linear_activation_bwd_persistent")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(kernels, name, Spy(name)))
        stack.enter_context(variant("persistent"))
        linear_residual(**inputs)
        pre, weight = random(350, units, dtype=torch.bfloat16), random(48, units, dtype=torch.bfloat16)
        grad_out = random(350, 48, dtype=torch.bfloat16)
        kernels.linear_activation_backward(grad_out, weight, pre, "gelu", bias_grad=True, with_y=True)
    # Rows of 48 values are on such boundaries either way, those of [48, 36] are not.
    suffix = "_persistent" if units == 40 else ""
    assert [name for name, _ in called] == ["_linear_fwd_persistent", f"_linear_activation_bwd{suffix}"]
    programs = 2 * tuning.describe(inputs["x"].device).multiprocessors
    assert called[0][1] == (min(11, programs),)
