"""Implementations without kernels: oneDNN's float32 GEMM computes PyTorch's results and gradients, where it applies."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import measure_errors

from fastvit.ops import eager, reference

pytestmark = pytest.mark.skipif(not eager.is_onednn_available(), reason="oneDNN has no float32 GEMM here")


@pytest.fixture
def any_size(monkeypatch):
    """Use oneDNN also for GEMMs that are too small to profit."""
    monkeypatch.setattr(eager, "MIN_WEIGHTS", 0)


def make_operands(rows=(2, 7), depth=24, units=40, bias=True, grad=True):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((*rows, depth), (units, depth), (units,))]
    tensors = [tensor.requires_grad_(grad) for tensor in tensors]
    return tensors if bias else [*tensors[:2], None]


def compute_outputs_and_gradients(function, tensors):
    """Return the output and the gradients, for one random gradient of the output."""
    output = function(*tensors)
    given = [tensor for tensor in tensors if tensor is not None]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, given, grad)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 7), (2, 3, 4)], ids=str)
@pytest.mark.parametrize(("depth", "units"), [(24, 40), (1, 1), (33, 7), (192, 768)])
def test_output_and_gradients_are_as_accurate_as_pytorch(any_size, rows, depth, units, bias):
    tensors = make_operands(rows, depth, units, bias)
    assert eager.prefers_onednn(tensors[0], tensors[1])
    ours, theirs = (
        compute_outputs_and_gradients(eager.linear, tensors),
        compute_outputs_and_gradients(F.linear, tensors),
    )
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]
    for found, expected, exact in zip(ours, theirs, compute_outputs_and_gradients(F.linear, wide), strict=True):
        assert found.shape == exact.shape
        assert measure_errors(found, exact)[0] <= max(2 * measure_errors(expected, exact)[0], 4e-7)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_fused_gelu_equals_gelu_after_the_gemm(form):
    x, weight, bias = make_operands(grad=False)
    expected = F.gelu(F.linear(x, weight, bias), approximate=form)
    torch.testing.assert_close(eager.onednn_linear(x, weight, bias, approximate=form), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu", "relu"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_feed_forward_equals_the_reference(any_size, activation, grad):
    x, weight1, bias1 = make_operands(grad=grad)
    weight2, bias2 = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in ((24, 40), (24,)))
    arguments = (x, weight1, bias1, weight2.requires_grad_(grad), bias2.requires_grad_(grad), activation)
    found = eager.feed_forward(*arguments)
    expected = reference.feed_forward(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.requires_grad == grad


@pytest.mark.parametrize("autocast", [False, True])
def test_mismatched_shapes_raise_the_error_of_pytorch(any_size, autocast):
    x, weight, bias = make_operands()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(RuntimeError, match="cannot be mult"):
        eager.linear(x[..., :12], weight, bias)


def test_non_contiguous_views_are_accepted(any_size):
    x, weight, bias = make_operands((6,), grad=False)
    wide = torch.zeros(12, 48)
    wide[::2, ::2] = x
    torch.testing.assert_close(
        eager.linear(wide[::2, ::2], weight.t().contiguous().t(), bias), F.linear(x, weight, bias)
    )


def test_second_derivatives_equal_pytorch(any_size):
    tensors = [tensor.detach()[..., :4].clone().requires_grad_() for tensor in make_operands((3,), 4, 5)]
    tensors[2] = torch.randn(5, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def penalty(function):
        (grad,) = torch.autograd.grad(function(*tensors).square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), tensors)

    for found, expected in zip(penalty(eager.linear), penalty(F.linear), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_small_gemms_use_pytorch():
    weight = torch.randn(256, 256)
    assert eager.prefers_onednn(torch.randn(256, 256), weight)
    assert not eager.prefers_onednn(torch.randn(255, 256), weight)
    assert eager.prefers_onednn(torch.randn(1, 256), torch.randn(1024, 256))


def test_unsupported_inputs_use_pytorch(any_size):
    x, weight, bias = make_operands(grad=False)
    assert not eager.prefers_onednn(x.bfloat16(), weight.bfloat16())
    assert not eager.prefers_onednn(x.double(), weight.double())
    assert not eager.prefers_onednn(x[:0], weight)
    assert not eager.prefers_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not eager.prefers_onednn(x, weight)
        assert eager.linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not eager.prefers_onednn(x, weight)
    assert eager.linear(x[:0], weight, bias).shape == (0, 7, 40)
    compiled = torch.compile(lambda *tensors: eager.linear(*tensors), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
