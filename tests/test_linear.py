"""Matmuls with a fused activation: errors against float64 are no larger than PyTorch's, in every variant."""

from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvit.ops import reference

pytest.importorskip("triton")
from accuracy import assert_no_worse_than, poison_memory
from operations import DEVICE, VARIANTS, assert_equivalent, randn, use_variants

from fastvit.kernels import linear as kernels
from fastvit.kernels import tuning
from fastvit.kernels.gelu import compute_activation, compute_activation_gradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANT_NAMES = list(VARIANTS)
ACTIVATIONS = ["gelu", "gelu_new", "quick_gelu"]
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANT_NAMES)


def make_forward_inputs(rows, depth, units, dtype, bias=True, scale=1.0):
    return [
        randn(rows, depth, dtype=dtype, seed=1, scale=scale),
        randn(units, depth, dtype=dtype, seed=2, scale=depth**-0.5),
        randn(units, dtype=dtype, seed=3, scale=scale) if bias else None,
    ]


def make_backward_inputs(rows, depth, units, dtype, scale=1.0):
    return [
        randn(rows, depth, dtype=dtype, seed=4, scale=scale),
        randn(depth, units, dtype=dtype, seed=5, scale=depth**-0.5),
        randn(rows, units, dtype=dtype, seed=6),
    ]


def run_reference_forward(x, weight, bias, activation):
    """Compute pre-activation and output in PyTorch. Like backward, the activation reads the rounded pre-activation."""
    pre = torch.nn.functional.linear(x, weight, bias)
    return pre, pre if activation is None else reference.ACTIVATIONS[activation](pre)


def run_reference_backward(grad_out, weight, pre, activation):
    """Compute the gradients of `pre` and the bias, and the activation, in PyTorch."""
    pre = pre.detach().requires_grad_()
    out = reference.ACTIVATIONS[activation](pre)
    (grad,) = torch.autograd.grad(out, pre, grad_out @ weight)
    return grad, grad.sum(0), out.detach()


def check(ours, theirs, inputs, slack=1.25):
    with poison_memory():
        found = ours(*inputs)
    with torch.backends.mkldnn.flags(enabled=inputs[0].dtype != torch.float32):
        expected = theirs(*inputs)
    exact = theirs(*(None if tensor is None else tensor.double() for tensor in inputs))
    for index, results in enumerate(zip(found, expected, exact, strict=True)):
        assert_no_worse_than(*results, slack=slack, name=str(index))


def check_forward(variant, inputs, activation, slack=1.25):
    def ours(*tensors):
        pre, out = kernels.launch_forward(*tensors, activation, activation is not None, 0)
        return (out if activation is None else pre), out

    with use_variants(variant):
        check(ours, partial(run_reference_forward, activation=activation), inputs, slack)


def check_backward(variant, inputs, activation, slack=1.25):
    ours = partial(kernels.launch_backward, activation=activation, bias_grad=True, with_y=True, candidate=0)
    with use_variants(variant):
        check(ours, partial(run_reference_backward, activation=activation), inputs, slack)


@EACH_VARIANT
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(("rows", "depth", "units"), [(34, 192, 48), (34, 101, 72), (130, 400, 100), (1, 24, 8)])
def test_outputs_and_gradients_match_reference(variant, dtype, rows, depth, units):
    check_forward(variant, make_forward_inputs(rows, depth, units, dtype), "gelu")
    check_backward(variant, make_backward_inputs(rows, depth, units, dtype), "gelu")


@EACH_VARIANT
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_activation(variant, activation, bias):
    check_forward(variant, make_forward_inputs(9, 40, 72, torch.bfloat16, bias), activation)
    if activation is not None:
        check_backward(variant, make_backward_inputs(9, 40, 72, torch.bfloat16), activation)


@EACH_VARIANT
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e15), (torch.bfloat16, 1e-15), (torch.float16, 1e3)])
def test_huge_and_tiny_values(variant, dtype, scale):
    check_forward(variant, make_forward_inputs(9, 48, 40, dtype, scale=scale), "gelu")
    check_backward(variant, make_backward_inputs(9, 48, 40, dtype, scale=min(scale, 10.0)), "gelu")


@EACH_VARIANT
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_pytorch(variant, bad):
    for where in range(3):
        inputs = make_forward_inputs(3, 40, 24, torch.float32)
        inputs[where].view(-1)[7] = bad
        with use_variants(variant):
            pre, out = kernels.launch_forward(*inputs, "gelu", True, 0)
        for found, expected in zip((pre, out), run_reference_forward(*inputs, "gelu"), strict=True):
            assert torch.equal(found.isfinite(), expected.isfinite())
        inputs = make_backward_inputs(3, 40, 24, torch.float32)
        inputs[where].view(-1)[7] = bad
        with use_variants(variant):
            grads = kernels.launch_backward(*inputs, "gelu", bias_grad=True, with_y=True, candidate=0)
        for found, expected in zip(grads, run_reference_backward(*inputs, "gelu"), strict=True):
            assert torch.equal(found.isfinite(), expected.isfinite())


@EACH_VARIANT
def test_strided_rows_match_contiguous_rows(variant):
    x, weight, bias = make_forward_inputs(5, 24, 40, torch.bfloat16)
    grad_out, back, pre = make_backward_inputs(5, 24, 40, torch.bfloat16)
    options = {"activation": "gelu", "bias_grad": True, "with_y": True, "candidate": 0}
    views = {
        "a slice": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
        "not on 16 bytes": lambda t: torch.cat((t, t), 1)[:, 1 : t.shape[1] + 1].copy_(t),
        "every other row": lambda t: torch.stack((t, t), 1).flatten(0, 1)[::2],
    }
    with use_variants(variant):
        expected = (
            *kernels.launch_forward(x, weight, bias, "gelu", True, 0),
            *kernels.launch_backward(grad_out, back, pre, **options),
        )
        for name, view in views.items():
            found = (
                *kernels.launch_forward(view(x), weight, bias, "gelu", True, 0),
                *kernels.launch_backward(view(grad_out), back, pre, **options),
            )
            for one, other in zip(found, expected, strict=True):
                assert torch.equal(one, other), name


@EACH_VARIANT
def test_expanded_row_matches_a_single_row(variant):
    """A stride of 0, for example of the gradient of a sum over rows, is not supported by the GPU's copy engine."""
    inputs = make_forward_inputs(1, 24, 40, torch.bfloat16)
    with use_variants(variant):
        one = kernels.launch_forward(*inputs, "gelu", False, 0)[1]
        all_rows = kernels.launch_forward(inputs[0].expand(37, 24), *inputs[1:], "gelu", False, 0)[1]
    torch.testing.assert_close(all_rows, one.expand(37, 40))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 80), st.integers(1, 140)),
    dtype=st.sampled_from(DTYPES),
    variant=st.sampled_from(VARIANT_NAMES),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
def test_any_shape_and_dtype(shape, dtype, variant, activation, bias):
    check_forward(variant, make_forward_inputs(*shape, dtype, bias), activation, slack=4)
    check_backward(variant, make_backward_inputs(*shape, dtype), activation, slack=4)


@EACH_VARIANT
def test_empty_batch_returns_empty_outputs_and_zero_bias_gradient(variant):
    with use_variants(variant):
        pre, out = kernels.launch_forward(*make_forward_inputs(0, 24, 40, torch.float32), "gelu", True, 0)
        inputs = make_backward_inputs(0, 24, 40, torch.float32)
        grad_pre, grad_bias, y = kernels.launch_backward(*inputs, "gelu", bias_grad=True, with_y=True, candidate=0)
    assert pre.shape == out.shape == grad_pre.shape == y.shape == (0, 40)
    assert torch.equal(grad_bias, torch.zeros_like(grad_bias)) and grad_bias.shape == (40,)


@EACH_VARIANT
def test_results_are_deterministic_and_unrequested_ones_are_empty(variant):
    x, weight, bias = make_forward_inputs(115, 48, 72, torch.bfloat16)
    inputs = make_backward_inputs(115, 48, 72, torch.bfloat16)
    with use_variants(variant):
        every = kernels.launch_forward(x, weight, bias, "gelu", True, 0)
        again = kernels.launch_forward(x, weight, bias, "gelu", False, 0)
        assert torch.equal(every[1], again[1]) and again[0].numel() == 0
        every = kernels.launch_backward(*inputs, "gelu", bias_grad=True, with_y=True, candidate=0)
        again = kernels.launch_backward(*inputs, "gelu", bias_grad=True, with_y=True, candidate=0)
        assert all(torch.equal(one, other) for one, other in zip(every, again, strict=True))
        grad_pre, grad_bias, y = kernels.launch_backward(*inputs, "gelu", bias_grad=False, with_y=False, candidate=0)
    assert torch.equal(grad_pre, every[0]) and grad_bias.numel() == y.numel() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_of_the_fallback_matches_pytorch(activation):
    x = randn(40, 8, scale=3.0).double().requires_grad_()
    expected = reference.ACTIVATIONS[activation](x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    found = (
        compute_activation(x.detach(), activation),
        compute_activation_gradient(torch.ones_like(x), x.detach(), activation),
    )
    assert_equivalent(found, (expected.detach(), slope))


def test_descriptors_require_aligned_rows_without_overlap():
    choice = VARIANTS["persistent"]
    matrix = torch.zeros(6, 40, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.make_descriptor(choice, matrix, 32, 64).block_shape == [32, 64]
    assert kernels.make_descriptor(VARIANTS["fused"], matrix, 32, 64) is None
    odd = (matrix[:, 1:33], matrix[:, ::2], matrix[:, :36].contiguous(), matrix.t())
    for unfit in (*odd, matrix[:1].expand(6, 40), matrix.as_strided((6, 40), (8, 1))):
        assert kernels.make_descriptor(choice, unfit, 32, 64) is None


@pytest.mark.parametrize("units", [40, 36], ids=["by descriptor", "by address"])
def test_persistent_kernel_runs_where_operands_have_descriptors(units):
    x, weight, bias = make_forward_inputs(350, 48, units, torch.bfloat16)
    called, kernel = [], kernels._linear

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                called.append((options["BACKWARD"], options["PERSISTENT"], grid))
                return kernel[grid](*args, **options)

            return launch

    with mock.patch.object(kernels, "_linear", Spy()), use_variants("persistent"):
        kernels.launch_forward(x, weight, bias, "gelu", False, 0)
        inputs = make_backward_inputs(350, 48, units, torch.bfloat16)
        kernels.launch_backward(*inputs, "gelu", bias_grad=True, with_y=True, candidate=0)
    # Rows of 48 values are always aligned; the rows of a [48, 36] matrix are not.
    assert [kinds for *kinds, _ in called] == [[False, True], [True, units == 40]]
    programs = 2 * tuning.describe_device(x.device).multiprocessors
    assert called[0][2] == (min(11, programs),)


def test_table_lists_cublas_first_then_the_kernels_that_the_gpu_supports(monkeypatch):
    expected = {"sm_90": ["plain", "persistent"], "sm_100": ["plain", "persistent"], "interpreter": []}
    for architecture in ("interpreter", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"):
        monkeypatch.setattr(tuning, "describe_device", lambda device, a=architecture: tuning.Device("some GPU", a, 132))
        for operation in ("linear_forward", "linear_backward"):
            for dtype in DTYPES:
                first, *fused = tuning.find_candidates(operation, "768 to 3072", dtype, torch.device(DEVICE))
                assert first == {"fused": 0}
                kinds = ["persistent" if choice.get("persistent") else "plain" for choice in fused]
                assert kinds == ([] if dtype == torch.float32 else expected.get(architecture, ["plain"]))
