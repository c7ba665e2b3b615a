"""Rows quantised to e4m3, their fused LayerNorm and activation, and the fp8 matmul match their definitions."""

import pytest
import torch
from accuracy import assert_no_worse_than, poison_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modeling import relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvit.ops import reference

pytest.importorskip("triton")
from operations import DEVICE, EPS, VIEWS, make_view, randn

from fastvit.kernels import layer_norm, operators
from fastvit.kernels import quantize as kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
E4M3 = torch.float8_e4m3fn
if DEVICE == "cuda" and (reason := kernels.gpu_unsupported_reason(*torch.cuda.get_device_capability())):
    pytest.skip(reason, allow_module_level=True)


def compute_ordinals(values: Tensor) -> Tensor:
    """Map e4m3 numbers to integers in the same order: neighbours are 1 apart, and both zeros are 0."""
    bits = values.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def assert_same_bits(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        bits = torch.uint8 if mine.dtype == E4M3 else torch.int32
        nan = mine.float().isnan()
        assert torch.equal(nan, other.float().isnan())
        assert torch.equal(mine.view(bits)[~nan], other.view(bits)[~nan])


def assert_nearly_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """Assert that two results agree although they were summed in different orders in float32.

    Scales agree up to float32 rounding. A few values, near the midpoint of two e4m3 numbers, may be neighbours.
    """
    (values, scale), (expected, expected_scale) = ours, theirs
    assert values.dtype == E4M3 and values.shape == expected.shape and values.is_contiguous()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    distances = (compute_ordinals(values) - compute_ordinals(expected)).abs()
    assert distances.max() <= 1
    assert (distances > 0).sum() <= 1 + distances.numel() // 500


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.double()


def make_norm(dim: int, dtype=torch.float32) -> tuple[Tensor, Tensor, float]:
    return randn(dim, dtype=dtype, seed=3, scale=0.5, shift=1.0), randn(dim, dtype=dtype, seed=4), EPS


# ---------------------------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize_rows", [reference.quantize_rows, kernels.quantize_rows], ids=["plain", "kernel"])
def test_values_are_the_nearest_e4m3_numbers_with_ties_to_even(quantize_rows):
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), randn(500).cpu().double() * 100])
    x = torch.cat([x, -x]).clamp(-448, 448).float().to(DEVICE)
    values, scale = quantize_rows(x)
    assert scale.item() == 1  # the largest value is 448
    distance = (x.abs().cpu().double()[:, None] - numbers).abs()
    nearest = distance.min(1, keepdim=True).values
    candidates = (distance == nearest) & (
        (distance == nearest).sum(1, keepdim=True).eq(1) | (torch.arange(127) % 2 == 0)
    )
    expected = numbers[candidates.int().argmax(1)] * x.cpu().double().sign()
    assert torch.equal(values.cpu().double(), expected)


def test_dequantised_rows_are_within_half_a_step():
    x = randn(20, 300, dtype=torch.bfloat16)
    values, scale = reference.quantize_rows(x)
    error = (dequantize(values, scale) - x.double()).abs()
    assert (error <= torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * scale.double()) * (1 + 1e-6)).all()
    assert values.float().abs().amax(-1).eq(448).all()


def test_linear_fp8_matches_a_linear_layer_of_dequantised_rows():
    x, weight = reference.quantize_rows(randn(2, 5, 48)), reference.quantize_rows(randn(32, 48, seed=1))
    bias = randn(32, dtype=torch.bfloat16, seed=2)
    exact = dequantize(*x) @ dequantize(*weight).t() + bias.double()
    out = reference.linear_fp8(*x, *weight, bias)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 2**-8
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(reference.linear_fp8(*x, *weight, bias), out)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels
# ---------------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (48,), (3, 1), (7, 72), (2, 5, 101), (1, 2, 3, 256), (2, 3072), (1, 16384)])
def test_quantised_rows_equal_reference_bit_for_bit(dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    with poison_memory():
        ours = kernels.quantize_rows(x)
    assert_same_bits(ours, reference.quantize_rows(x))


@DTYPES
@pytest.mark.parametrize(("tokens", "dim"), [(1, 192), (17, 100), (50, 48), (197, 72), (5, 768), (3, 1280), (2, 8192)])
def test_layer_norm_matches_reference(dtype, tokens, dim):
    x, norm = randn(1, tokens, dim, dtype=dtype, shift=0.3), make_norm(dim, dtype)
    with poison_memory():
        ours = kernels.layer_norm_fp8(x, *norm)
    theirs = reference.layer_norm_fp8(x, *norm)
    assert_nearly_same(ours, theirs)
    exact = reference.layer_norm(x.double(), norm[0].double(), norm[1].double(), EPS)
    assert_no_worse_than(dequantize(*ours), dequantize(*theirs), exact)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "norm_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),  # a float32 model, whose matmul outputs are bfloat16
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_residual_add_is_rounded_before_the_norm(dtype, residual_dtype, norm_dtype):
    x, residual = randn(2, 9, 200, dtype=dtype), randn(2, 9, 200, dtype=residual_dtype, seed=2)
    with poison_memory():
        summed, *ours = kernels.add_layer_norm_fp8(x, residual, *make_norm(200, norm_dtype))
    assert torch.equal(summed, x + residual) and summed.dtype == (x + residual).dtype
    expected, *theirs = reference.add_layer_norm_fp8(x, residual, *make_norm(200, norm_dtype))
    assert torch.equal(summed, expected)
    assert_nearly_same(ours, theirs)


@DTYPES
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_activation_matches_reference(dtype, activation, bias):
    x, bias = randn(2, 7, 300, dtype=dtype, scale=2.0), randn(300, dtype=torch.bfloat16, seed=1) if bias else None
    with poison_memory():
        ours = kernels.bias_gelu_fp8(x, bias, activation)
    theirs = reference.bias_gelu_fp8(x, bias, activation)
    assert_nearly_same(ours, theirs)
    exact = reference.bias_gelu(x.double(), None if bias is None else bias.double(), activation)
    assert_no_worse_than(dequantize(*ours), dequantize(*theirs), exact)


@pytest.mark.parametrize("dim", [3072, 5120])
def test_activation_at_the_widths_of_vit_base_and_huge(dim):
    x, bias = randn(3, dim, dtype=torch.bfloat16), randn(dim, dtype=torch.bfloat16, seed=1)
    assert_nearly_same(kernels.bias_gelu_fp8(x, bias), reference.bias_gelu_fp8(x, bias))


def test_zero_rows_are_zero():
    x = randn(5, 72)
    x[1] = 0
    x[3] = -0.0
    ours = kernels.quantize_rows(x)
    assert_same_bits(ours, reference.quantize_rows(x))
    assert ours[0][[1, 3]].float().eq(0).all() and ours[1].isfinite().all()
    zeros = torch.zeros(4, 48, device=DEVICE)
    bias = randn(48, seed=4)
    values, scale = kernels.layer_norm_fp8(zeros, torch.ones_like(bias), bias, EPS)
    # Constant rows are normalised to the bias.
    assert_same_bits((values[:1], scale[:1]), reference.quantize_rows(bias[None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e38, 1e30, 1e-30, 1e-35, 1e-38, 1e-42])
def test_huge_and_tiny_rows(dtype, scale):
    x = randn(4, 100, scale=1.0).clamp(-3, 3).double().mul(scale).to(dtype)
    ours = kernels.quantize_rows(x)
    if DEVICE == "cpu" or scale > 1e-37:  # a GPU may flush subnormal numbers to zero
        assert_same_bits(ours, reference.quantize_rows(x))
    assert ours[1].isfinite().all() and ours[0].float().isfinite().all()
    if scale > 1e-35:
        assert relative_error(dequantize(*ours), x) < 0.04


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_non_finite_row_has_a_non_finite_scale_and_leaves_other_rows_unchanged(bad):
    x, norm = randn(4, 72), make_norm(72)
    weight = reference.quantize_rows(randn(16, 72, seed=5))
    expected = kernels.quantize_rows(x), kernels.layer_norm_fp8(x, *norm), kernels.bias_gelu_fp8(x)
    x[2, 5] = bad
    x[2, 50] = bad
    functions = [
        (kernels.quantize_rows, reference.quantize_rows, ()),
        (kernels.layer_norm_fp8, reference.layer_norm_fp8, norm),
        (kernels.bias_gelu_fp8, reference.bias_gelu_fp8, ()),
    ]
    others = [0, 1, 3]
    for (ours, theirs, arguments), (values, scale) in zip(functions, expected, strict=True):
        mine, definition = ours(x, *arguments), theirs(x, *arguments)
        assert torch.equal(mine[1].isfinite(), definition[1].isfinite())
        if ours is not kernels.bias_gelu_fp8:  # GELU(inf) is inf, or NaN on some CPUs
            assert torch.equal(mine[1].isnan(), definition[1].isnan())
        assert_same_bits((mine[0][others], mine[1][others]), (values[others], scale[others]))
        if not (ours is kernels.bias_gelu_fp8 and bad == -float("inf")):  # its activation may be 0
            assert not mine[1][2].isfinite()
            assert reference.linear_fp8(*mine, *weight)[2].isnan().all()


@pytest.mark.parametrize("view", VIEWS)
def test_views_match_contiguous_inputs(view):
    x, norm = randn(2, 5, 48, dtype=torch.bfloat16), make_norm(48)
    strided = make_view(view, x)
    assert_same_bits(kernels.quantize_rows(strided), kernels.quantize_rows(x))
    assert_same_bits(kernels.layer_norm_fp8(strided, *norm), kernels.layer_norm_fp8(x, *norm))
    residual = randn(2, 5, 48, seed=2)
    ours = kernels.add_layer_norm_fp8(strided, residual, *norm)
    for mine, other in zip(ours, kernels.add_layer_norm_fp8(x, residual, *norm), strict=True):
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 20), dim=st.integers(1, 400), seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 1.0, 1e6])
)
def test_any_shape(rows, dim, seed, scale):
    x = randn(rows, dim, seed=seed, scale=scale)
    assert_same_bits(kernels.quantize_rows(x), reference.quantize_rows(x))


def test_empty_batch_returns_empty_rows():
    x, norm = randn(0, 5, 48), make_norm(48)
    weight = reference.quantize_rows(randn(32, 48))
    for result in (kernels.quantize_rows(x), kernels.layer_norm_fp8(x, *norm), kernels.bias_gelu_fp8(x)):
        assert [tuple(tensor.shape) for tensor in result] == [(0, 5, 48), (0, 5, 1)]
    summed, *_ = kernels.add_layer_norm_fp8(x, x, *norm)
    assert summed.shape == x.shape
    assert reference.linear_fp8(*kernels.quantize_rows(x), *weight).shape == (0, 5, 32)


@DTYPES
def test_fallbacks_match_kernels(dtype, monkeypatch):
    x, residual, norm = randn(2, 5, 48, dtype=dtype), randn(2, 5, 48, seed=2), make_norm(48)
    calls = (
        lambda: kernels.quantize_rows(x),
        lambda: kernels.bias_gelu_fp8(x, norm[1], "gelu_new"),
        lambda: kernels.layer_norm_fp8(x, *norm),
        lambda: kernels.add_layer_norm_fp8(x, residual, *norm),
    )
    expected = [call() for call in calls]
    monkeypatch.setattr(operators, "FALLBACK_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(operators, "failures", failures := {})
    monkeypatch.setattr(kernels, "_activation_e4m3", None)
    monkeypatch.setattr(layer_norm, "_layer_norm_fwd", None)
    for call, (*sums, values, scale) in zip(calls, expected, strict=True):
        *our_sums, our_values, our_scale = call()
        assert_nearly_same((our_values, our_scale), (values, scale))
        assert len(our_sums) == len(sums) and all(map(torch.equal, our_sums, sums))
    assert len(failures) == len(calls)


def test_results_are_deterministic():
    x, norm = randn(3, 50, 100, dtype=torch.bfloat16), make_norm(100)
    for call in (lambda: kernels.layer_norm_fp8(x, *norm), lambda: kernels.bias_gelu_fp8(x)):
        assert_same_bits(call(), call())


def test_operators_pass_opcheck():
    x, residual, norm = randn(2, 5, 48, dtype=torch.bfloat16), randn(2, 5, 48, seed=1), make_norm(48)
    for arguments in ((x, None, *norm, 0), (x, residual, *norm, 0)):
        torch.library.opcheck(torch.ops.fastvit.layer_norm_fp8.default, arguments)
    for arguments in ((x, None, None, 0), (x, norm[1], "gelu", 0)):
        torch.library.opcheck(torch.ops.fastvit.activation_fp8.default, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: kernels.quantize_rows(x[0, 0, 0]), r"x: expected \[..., D\] with D from 1 to 16384, got \[\]"),
        (lambda x: kernels.quantize_rows(x[..., :0]), r"x: expected .*got \[2, 3, 0\]"),
        (lambda x: kernels.quantize_rows(x.double()), "x: expected .*got torch.float64"),
        (lambda x: kernels.quantize_rows(x.new_empty(1, 16385)), r"x: .*16384, got \[1, 16385\]"),
        (lambda x: kernels.bias_gelu_fp8(x, x[0, 0, 1:]), r"bias: expected \[16\], got \[15\]"),
        (lambda x: kernels.bias_gelu_fp8(x, None, "swish"), "activation: expected one of gelu.*got 'swish'"),
        (lambda x: kernels.layer_norm_fp8(x.new_empty(1, 8193), x, x, EPS), r"x: .*8192, got \[1, 8193\]"),
        (lambda x: kernels.layer_norm_fp8(x, x[0, 0, 1:], x[0, 0], EPS), r"weight: expected \[16\], got \[15\]"),
        (lambda x: kernels.layer_norm_fp8(x, x[0, 0], x[0, 0].half(), EPS), "bias: expected torch.float32, got"),
        (lambda x: kernels.add_layer_norm_fp8(x, x[:1], x[0, 0], x[0, 0], EPS), r"residual: expected \[2, 3, 16\]"),
    ],
)
def test_invalid_input_raises_before_launch(call, message, monkeypatch):
    monkeypatch.setattr(kernels, "_activation_fp8", None)
    monkeypatch.setattr(kernels, "_layer_norm_fp8", None)
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 16))


# ---------------------------------------------------------------------------------------------------------------------
# The matmul
# ---------------------------------------------------------------------------------------------------------------------


def has_matmul() -> bool:
    """Whether PyTorch has a row-scaled e4m3 matmul on this device; on CPUs the oldest supported PyTorch has none."""
    try:
        kernels.linear_fp8(*make_matmul_inputs(2, 16, units=16))
    except (RuntimeError, ValueError):
        return DEVICE == "cuda"  # on a GPU the tests report the error
    return True


def make_matmul_inputs(*shape: int, units: int) -> tuple[Tensor, ...]:
    x, weight = randn(*shape, scale=2.0), randn(units, shape[-1], seed=1, scale=0.1)
    return *reference.quantize_rows(x), *reference.quantize_rows(weight)


needs_matmul = pytest.mark.skipif(not has_matmul(), reason="this PyTorch has no row-scaled e4m3 matmul on CPUs")


@needs_matmul
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(("shape", "units"), [((2, 17, 48), 144), ((1, 768), 32), ((3, 1, 64), 16), ((0, 5, 48), 32)])
def test_matmul_matches_reference(shape, units, bias):
    inputs = make_matmul_inputs(*shape, units=units)
    bias = randn(units, dtype=torch.bfloat16, seed=2) if bias else None
    ours = kernels.linear_fp8(*inputs, bias)
    exact = dequantize(*inputs[:2]) @ dequantize(*inputs[2:]).t()
    exact = exact if bias is None else exact + bias.double()
    assert_no_worse_than(ours, reference.linear_fp8(*inputs, bias), exact)


@needs_matmul
def test_matmul_of_slices_of_rows_and_units():
    values, scale, weight, weight_scale = make_matmul_inputs(2, 5, 48, units=96)
    whole = reference.linear_fp8(values, scale, weight, weight_scale)
    part = kernels.linear_fp8(values[:, :1], scale[:, :1], weight[32:64], weight_scale[32:64])
    torch.testing.assert_close(part, whole[:, :1, 32:64], rtol=2**-7, atol=1e-3)


def test_cuda_accepts_the_layout_of_the_operands(monkeypatch):
    """PyTorch's checks of memory layout and sizes for CUDA tensors also run on fake tensors, without a GPU."""
    scaled_matmul, seen = kernels.scaled_matmul, []
    monkeypatch.setattr(kernels, "scaled_matmul", lambda *operands: seen.append(operands) or torch.zeros(2, 96))
    values, scale, weight, weight_scale = make_matmul_inputs(2, 5, 48, units=96)
    bias = randn(96, dtype=torch.bfloat16)
    views = values[:, :1], scale[:, :1], weight, weight_scale, bias  # the class token of each image
    kernels.linear_fp8(*views)
    kernels.linear_fp8(views[0], views[1], weight.t().contiguous().t(), weight_scale, None)
    for operands in seen:
        with FakeTensorMode():
            on_gpu = [
                None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                for t in operands
            ]
            out = scaled_matmul(*on_gpu)
        assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.bfloat16, (2, 96))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros((), dtype=E4M3)}, r"values: expected \[..., K\], got \[\]"),
        ({"values": torch.zeros(2, 3, 48)}, "values: expected torch.float8_e4m3fn, got torch.float32"),
        ({"scale": torch.zeros(2, 3)}, r"scale: expected \[2, 3, 1\], got \[2, 3\]"),
        ({"weight": torch.zeros(32, 40, dtype=E4M3)}, r"weight: expected \[units, 48\], got \[32, 40\]"),
        ({"weight": torch.zeros(33, 48, dtype=E4M3)}, r"weight: expected .*multiples of 16, got \[33, 48\]"),
        ({"weight_scale": torch.zeros(1, 32)}, r"weight_scale: expected \[32, 1\], got \[1, 32\]"),
        ({"bias": torch.zeros(32)}, "bias: expected torch.bfloat16, got torch.float32"),
        ({"bias": torch.zeros(31).bfloat16()}, r"bias: expected \[32\], got \[31\]"),
    ],
)
def test_invalid_operands_raise(changes, message):
    names = ("values", "scale", "weight", "weight_scale")
    inputs = dict(zip(names, (tensor.cpu() for tensor in make_matmul_inputs(2, 3, 48, units=32)), strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.linear_fp8(**{**inputs, **changes})
