"""Bias and activation, alone and after LayerNorm: errors against float64 are no larger than PyTorch's."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastvit.ops import reference

pytest.importorskip("triton")
import triton
import triton.language as tl
from operations import DEVICE, EPS, VIEWS, assert_close, assert_same, check, compute_results, make_view, randn

from fastvit.kernels import gelu as kernels
from fastvit.kernels import layer_norm, operators
from fastvit.kernels.gelu import FORMULAS, bias_gelu, swiglu
from fastvit.kernels.layer_norm import layer_norm_act

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
ACTIVATIONS = pytest.mark.parametrize("activation", (*FORMULAS, "swiglu"))


def run_kernels(x, bias=None, activation="gelu"):
    return swiglu(x, bias) if activation == "swiglu" else bias_gelu(x, bias, activation)


def run_reference(x, bias=None, activation="gelu"):
    if bias is not None:
        bias = bias.to(x.dtype)
    return reference.swiglu(x, bias) if activation == "swiglu" else reference.bias_gelu(x, bias, activation)


def run_norm_kernels(x, weight, bias, activation="gelu"):
    return layer_norm_act(x, weight, bias, EPS, activation)


def run_norm_reference(x, weight, bias, activation="gelu"):
    return reference.layer_norm_act(x, weight.to(x.dtype), bias.to(x.dtype), EPS, activation)


def make_inputs(*shape, dtype=torch.float32, bias_dtype=None, scale=1.0, shift=0.0, bias=True):
    inputs = {"x": randn(*shape, dtype=dtype, seed=1, scale=2 * scale, shift=shift)}
    if bias:
        inputs["bias"] = randn(shape[-1], dtype=bias_dtype or dtype, seed=2, scale=scale)
    return inputs


def make_norm_inputs(*shape, dtype=torch.float32, weight_dtype=None, **options):
    inputs = make_inputs(*shape, dtype=dtype, bias_dtype=weight_dtype, **options)
    return inputs | {"weight": randn(shape[-1], dtype=weight_dtype or dtype, seed=3, scale=0.5, shift=1.0)}


def check_activation(activation, inputs, **options):
    check(partial(run_kernels, activation=activation), partial(run_reference, activation=activation), inputs, **options)


def check_norm_activation(activation, inputs, **options):
    norm_kernels = partial(run_norm_kernels, activation=activation)
    check(norm_kernels, partial(run_norm_reference, activation=activation), inputs, **options)


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_outputs_and_gradients_match_reference(dtype, activation, bias):
    for dim in (2, 100, 384):
        check_activation(activation, make_inputs(3, 17, dim, dtype=dtype, bias=bias))


@DTYPES
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("dim", [1, 5, 72, 300, 768])
def test_layer_norm_act_matches_reference(dtype, activation, dim):
    check_norm_activation(activation, make_norm_inputs(2, 17, dim, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 50, 197, 257])
def test_any_number_of_tokens(tokens):
    check(run_kernels, run_reference, make_inputs(1, tokens, 24, dtype=torch.bfloat16))
    check(run_norm_kernels, run_norm_reference, make_norm_inputs(1, tokens, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 2, 6), (1, 1, 2)])
def test_any_number_of_dimensions(shape):
    check(run_kernels, run_reference, make_inputs(*shape))
    check_activation("swiglu", make_inputs(*shape))
    check(run_norm_kernels, run_norm_reference, make_norm_inputs(*shape))


def test_widest_supported_rows_match_reference():
    check(run_norm_kernels, run_norm_reference, make_norm_inputs(3, layer_norm.MAX_DIM, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_mixed_dtypes(dtype, bias_dtype):
    check(run_kernels, run_reference, make_inputs(2, 9, 48, dtype=dtype, bias_dtype=bias_dtype))
    check(run_norm_kernels, run_norm_reference, make_norm_inputs(2, 9, 48, dtype=dtype, weight_dtype=bias_dtype))


@ACTIVATIONS
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e-15),
        (torch.bfloat16, 1e15),
        (torch.float16, 100.0),
        (torch.float16, 1e-6),
    ],
)
def test_huge_and_tiny_values(activation, dtype, scale):
    inputs = make_inputs(3, 40, dtype=dtype, scale=scale)
    grads_for = () if activation == "swiglu" and scale == 100.0 else None  # its gradients exceed float16's range
    check_activation(activation, inputs, grads_for=grads_for)


@pytest.mark.parametrize("activation", FORMULAS)
def test_activations_match_reference_at_every_magnitude(activation):
    """Single columns, because a sum over rows could hide a bad element."""
    inputs = {"x": torch.linspace(-12, 12, 4001, device=DEVICE)[:, None]}
    check_activation(activation, inputs)


def compute_ulp_error(result, exact, dtype):
    """Return the error of float32 results in units in the last place of the half-precision `dtype`."""
    digits, smallest = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    exponent = torch.frexp(exact)[1].clamp(min=smallest + 1)
    return (result.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - digits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_gelu_of_every_half_precision_number_is_within_a_tenth_of_an_ulp(dtype):
    """Before rounding, value and derivative are within 0.08 units in the last place at all finite numbers.

    This includes results near 1e-38 and arguments near the zero of the derivative.
    """
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    values, slopes = (torch.full(x.shape, torch.nan, device=DEVICE) for _ in range(2))
    padded = x.to(DEVICE)
    _gelu_with_slope[(triton.cdiv(len(x), 4096),)](padded, values, slopes, len(x), BLOCK=4096)
    exact_x = x.double()
    cdf = torch.special.log_ndtr(exact_x).exp()
    density = (-exact_x.square() / 2).exp() / (2 * torch.pi) ** 0.5
    for found, exact in ((values, exact_x * cdf), (slopes, cdf + exact_x * density)):
        error = compute_ulp_error(found.cpu(), exact, dtype)
        assert error.max() < 0.08, (x[error.argmax()], error.max())
    y = torch.randn_like(values)
    _gelu[(triton.cdiv(len(x), 4096),)](padded, y, len(x), BLOCK=4096)
    assert torch.equal(y, values)  # the forward kernel is bitwise equal


@triton.jit
def _gelu(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, index < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, kernels.activate(x, "gelu_half"), index < size)


@triton.jit
def _gelu_with_slope(x_ptr, y_ptr, slope_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, index < size, other=0.0).to(tl.float32)
    y, slope = kernels.activate_with_slope(x, "gelu_half")
    tl.store(y_ptr + index, y, index < size)
    tl.store(slope_ptr + index, slope, index < size)


@pytest.mark.parametrize(
    ("dtype", "scale", "shift"),
    [(torch.float32, 1e15, 0.0), (torch.bfloat16, 1e-15, 0.0), (torch.bfloat16, 1.0, 20.0), (torch.float16, 1.0, 20.0)],
)
def test_layer_norm_act_of_huge_tiny_and_shifted_values(dtype, scale, shift):
    inputs = make_norm_inputs(2, 17, 96, dtype=dtype, shift=shift)
    inputs["x"] *= scale
    check(run_norm_kernels, run_norm_reference, inputs)


@ACTIVATIONS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_propagate_as_in_pytorch(activation, bad):
    inputs = make_inputs(3, 40)
    inputs["x"][1, 7] = bad
    expected = compute_results(partial(run_reference, activation=activation), inputs)
    for name, tensor in compute_results(partial(run_kernels, activation=activation), inputs).items():
        assert torch.equal(tensor.isfinite(), expected[name].isfinite()), name
    if activation != "swiglu":
        inputs = make_norm_inputs(3, 40)
        inputs["x"][1, 7] = bad
        expected = compute_results(partial(run_norm_reference, activation=activation), inputs)
        for name, tensor in compute_results(partial(run_norm_kernels, activation=activation), inputs).items():
            assert torch.equal(tensor.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_views_match_contiguous_inputs(activation):
    inputs = make_inputs(3, 5, 24)
    expected = compute_results(partial(run_kernels, activation=activation), inputs)
    for view in (make_view(kind, inputs["x"]) for kind in VIEWS):
        assert_same(compute_results(partial(run_kernels, activation=activation), inputs | {"x": view}), expected)


def test_layer_norm_act_of_views_matches_contiguous_inputs():
    inputs = make_norm_inputs(3, 5, 24)
    expected = compute_results(run_norm_kernels, inputs)
    for view in (make_view(kind, inputs["x"]) for kind in VIEWS):
        assert_same(compute_results(run_norm_kernels, inputs | {"x": view}), expected)


def test_expanded_output_gradients_match_contiguous():
    for function, inputs in ((run_kernels, make_inputs(2, 3, 16)), (run_norm_kernels, make_norm_inputs(2, 3, 16))):
        grads = []
        for one in (torch.ones((), device=DEVICE).expand(2, 3, 16), torch.ones(2, 3, 16, device=DEVICE)):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
            grads.append(torch.autograd.grad(function(**leaves), list(leaves.values()), one))
        for first, second in zip(*grads, strict=True):
            assert torch.equal(first, second)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 150)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from([*FORMULAS, "swiglu"]),
    bias=st.booleans(),
)
def test_any_shape_and_dtype(shape, dtype, bias_dtype, activation, bias):
    if activation == "swiglu":
        shape = (*shape[:2], 2 * shape[2])
    inputs = make_inputs(*shape, dtype=dtype, bias_dtype=bias_dtype, bias=bias)
    check_activation(activation, inputs, slack=4)
    if activation != "swiglu":
        inputs = make_norm_inputs(*shape, dtype=dtype, weight_dtype=bias_dtype)
        check_norm_activation(activation, inputs, slack=4)


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)])
def test_empty_batch_returns_empty_outputs_and_zero_weight_gradients(shape):
    for function, inputs in (
        (run_kernels, make_inputs(*shape)),
        (partial(run_kernels, activation="swiglu"), make_inputs(*shape)),
        (run_norm_kernels, make_norm_inputs(*shape)),
    ):
        found = compute_results(function, inputs)
        assert found["grad x"].shape == shape
        assert found["grad bias"].count_nonzero() == 0
        if "weight" in inputs:
            assert found["grad weight"].count_nonzero() == 0


@DTYPES
@ACTIVATIONS
def test_fallbacks_match_kernels(dtype, activation, monkeypatch):
    """The operators run with failing kernels, so autograd and the shapes and dtypes of the fakes are tested too."""
    calls = [(run_kernels, make_inputs(2, 5, 24, dtype=dtype)), (run_kernels, make_inputs(2, 5, 24, bias=False))]
    if activation != "swiglu":
        calls.append((run_norm_kernels, make_norm_inputs(2, 5, 24, dtype=dtype)))
    expected = [compute_results(partial(function, activation=activation), inputs) for function, inputs in calls]
    monkeypatch.setattr(operators, "FALLBACK_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(operators, "failures", failures := {})
    for name in ("_activation_fwd", "_activation_bwd"):
        monkeypatch.setattr(kernels, name, None)
    for name in ("_layer_norm_fwd", "_layer_norm_bwd"):
        monkeypatch.setattr(layer_norm, name, None)
    for (function, inputs), kernel_results in zip(calls, expected, strict=True):
        assert_close(compute_results(partial(function, activation=activation), inputs), kernel_results)
    assert len(failures) == 2 * len(calls)


def test_results_are_deterministic():
    for function, inputs in (
        (run_kernels, make_inputs(5, 23, 300, dtype=torch.bfloat16)),
        (partial(run_kernels, activation="swiglu"), make_inputs(5, 23, 300, dtype=torch.bfloat16)),
        (run_norm_kernels, make_norm_inputs(5, 23, 300, dtype=torch.bfloat16)),
    ):
        assert_same(compute_results(function, inputs), compute_results(function, inputs))


def test_only_requested_gradients_are_computed(monkeypatch):
    parameter_grads = []

    def record_grads(launch, index):
        def spy(*args, **kwargs):
            grads = launch(*args, **kwargs)
            parameter_grads.append(grads[index])
            return grads

        return spy

    monkeypatch.setattr(kernels, "launch_backward", record_grads(kernels.launch_backward, 1))
    monkeypatch.setattr(layer_norm, "_layer_norm_backward", record_grads(layer_norm._layer_norm_backward, 2))
    assert set(compute_results(run_kernels, make_inputs(2, 9, 48), grads_for=("x",))) == {"output 0", "grad x"}
    assert set(compute_results(run_norm_kernels, make_norm_inputs(2, 9, 48), grads_for=("x",))) == {
        "output 0",
        "grad x",
    }
    assert [grads.numel() for grads in parameter_grads] == [0, 0]


def test_in_place_and_out_of_place_are_bitwise_equal():
    """The feed-forward overwrites the gradient, and the pre-activation if it is not saved for backward."""
    x, grad = randn(40, 72, seed=1), randn(40, 72, seed=2)
    expected = kernels.launch_forward(x, None, "gelu")
    grads = kernels.launch_backward(grad, x, None, "gelu", bias_grad=True, with_y=True)
    in_place = kernels.launch_backward(grad, x, None, "gelu", bias_grad=True, with_y=True, grad_x=grad)
    assert in_place[0].data_ptr() == grad.data_ptr()
    for first, second in zip(grads, in_place, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(grads[2], expected)
    assert torch.equal(kernels.launch_forward(x, None, "gelu", out=x), expected)


def test_rows_beyond_int32_offsets_are_addressed():
    storage = torch.UntypedStorage(2**32 + 2**12, device=DEVICE)  # untouched pages take no physical memory
    far = torch.empty(0, dtype=torch.float16, device=DEVICE).set_(storage).as_strided((2, 8), (2**31, 1))
    far.copy_(randn(2, 8))
    near = far.contiguous()
    weight, bias = randn(8, seed=1), randn(8, seed=2)
    assert torch.equal(bias_gelu(far), bias_gelu(near))
    assert torch.equal(layer_norm_act(far, weight, bias, EPS), layer_norm_act(near, weight, bias, EPS))


def test_opcheck():
    for activation, bias in (("gelu", randn(16)), ("swiglu", randn(16)), ("gelu", None)):
        x = randn(2, 3, 16, seed=1)
        grad = randn(2, 3, 8 if activation == "swiglu" else 16, seed=2)
        torch.library.opcheck(kernels._activation_backward, (grad, x, bias, activation, bias is not None, 0))
        for tensor in (x, bias):
            if tensor is not None:
                tensor.requires_grad_()
        torch.library.opcheck(kernels._activation, (x, bias, activation, 0))
    x, weight, bias = randn(2, 3, 16), randn(16, seed=1), randn(16, seed=2)
    for parameter_grads in (False, True):
        options = (x.dtype, x.dtype, parameter_grads, None, "gelu", 0)
        inputs = (x, None, x, None, weight, bias, None, None, randn(2, 6), *options)
        torch.library.opcheck(layer_norm._layer_norm_backward, inputs)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    torch.library.opcheck(layer_norm._layer_norm, (x, None, weight, bias, None, None, EPS, None, "gelu", 0))


def apply_neck(x, weight, bias):
    return swiglu(bias_gelu(layer_norm_act(x, weight, bias, EPS), bias))


def test_compiles_without_graph_breaks():
    compiled = torch.compile(apply_neck, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):  # the second has a dynamic shape
        inputs = make_norm_inputs(batch, 3, 16)
        expected = compute_results(apply_neck, inputs)
        for name, tensor in compute_results(compiled, inputs).items():
            torch.testing.assert_close(tensor, expected[name])


def test_activation_checkpointing_matches_plain_backward():
    inputs = make_norm_inputs(2, 3, 16)
    assert_same(
        compute_results(lambda x, weight, bias: checkpoint(apply_neck, x, weight, bias, use_reentrant=False), inputs),
        compute_results(apply_neck, inputs),
    )


def test_exports_with_dynamic_batch_size():
    class Neck(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(randn(16, seed=3))
            self.bias = torch.nn.Parameter(randn(16, seed=4))

        def forward(self, x):
            return apply_neck(x, self.weight, self.bias)

    module = Neck()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(module, (randn(2, 3, 16),), dynamic_shapes=shapes)
    x = randn(5, 3, 16, seed=8)
    assert torch.equal(program.module()(x), module(x))


def test_autocast_changes_neither_dtype_nor_values():
    inputs = make_norm_inputs(2, 3, 16)
    expected = apply_neck(**inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = apply_neck(**inputs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (bias_gelu, (torch.zeros(()),), r"x: expected \[..., F\].*got \[\]"),
        (bias_gelu, (torch.zeros(3, 4).int(),), "x: expected torch.float32 .*got torch.int32"),
        (bias_gelu, (torch.zeros(3, 4), torch.zeros(3)), r"bias: expected \[4\], got \[3\]"),
        (bias_gelu, (torch.zeros(3, 4), torch.zeros(4, device="meta")), "bias: expected device cpu .*got meta"),
        (bias_gelu, (torch.zeros(3, 4), None, "relu"), "activation: expected one of gelu, .*got 'relu'"),
        (swiglu, (torch.zeros(3, 5),), r"x: expected an even last dimension.*got \[3, 5\]"),
        (swiglu, (torch.zeros(3, 4), torch.zeros(2)), r"bias: expected \[4\], got \[2\]"),
        (layer_norm_act, (torch.zeros(3, 0), torch.zeros(0), torch.zeros(0), EPS), r"x: .*got \[3, 0\]"),
        (
            layer_norm_act,
            (torch.zeros(3, 4), torch.zeros(3), torch.zeros(4), EPS),
            r"weight: expected \[4\], got \[3\]",
        ),
        (
            layer_norm_act,
            (torch.zeros(3, 4), torch.zeros(4), torch.zeros(4).half(), EPS),
            "bias: expected torch.float32, got torch.float16",
        ),
        (layer_norm_act, (torch.zeros(3, 4), torch.zeros(4), torch.zeros(4), EPS, "swiglu"), "activation: expected"),
    ],
)
def test_invalid_input_raises_before_launch(function, arguments, message, monkeypatch):
    monkeypatch.setattr(kernels, "_activation", None)
    monkeypatch.setattr(layer_norm, "_layer_norm", None)
    with pytest.raises(ValueError, match=message):
        function(*arguments)
