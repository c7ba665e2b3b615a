"""Rows in e4m3 are what their definition says, and a quantised model is as near the exact one as its bits allow."""

import copy
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from accuracy import assert_no_worse_than, poison_memory
from hypothesis import given, settings
from hypothesis import strategies as st
from test_modeling import pixels_for, randomise, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import ViTConfig

import fastvit
from fastvit import ops
from fastvit.ops import reference
from fastvit.ops.block import Fp8Linear
from fastvit.report import info

pytest.importorskip("triton")
from operations import DEVICE, EPS, VIEWS, make_view, randn

from fastvit.kernels import layer_norm, operators
from fastvit.kernels import quantize as kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
E4M3 = torch.float8_e4m3fn
if DEVICE == "cuda" and (reason := kernels.gpu_unsupported_reason(*torch.cuda.get_device_capability())):
    pytest.skip(reason, allow_module_level=True)


def ordinal(values: Tensor) -> Tensor:
    """e4m3 numbers as integers in their order, one apart where no number lies between; both zeros are 0."""
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
    """Both round what they computed in float32 in another order: scales agree to float32 rounding, and the few values
    that lie on the border between two e4m3 numbers may be one step apart."""
    (values, scale), (expected, expected_scale) = ours, theirs
    assert values.dtype == E4M3 and values.shape == expected.shape and values.is_contiguous()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    steps = (ordinal(values) - ordinal(expected)).abs()
    assert steps.max() <= 1
    assert (steps > 0).sum() <= 1 + steps.numel() // 500


def multiplied_out(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.double()


def norm_of(dim: int, dtype=torch.float32) -> tuple[Tensor, Tensor, float]:
    return randn(dim, dtype=dtype, seed=3, scale=0.5, shift=1.0), randn(dim, dtype=dtype, seed=4), EPS


# ---------------------------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize_rows", [reference.quantize_rows, kernels.quantize_rows], ids=["plain", "kernel"])
def test_values_are_the_nearest_numbers_of_e4m3_and_ties_are_even(quantize_rows):
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).double()  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), randn(500).cpu().double() * 100])
    x = torch.cat([x, -x]).clamp(-448, 448).float().to(DEVICE)
    values, scale = quantize_rows(x)
    assert scale.item() == 1  # the largest is 448
    distance = (x.abs().cpu().double()[:, None] - numbers).abs()
    nearest = distance.min(1, keepdim=True).values
    candidates = (distance == nearest) & (
        (distance == nearest).sum(1, keepdim=True).eq(1) | (torch.arange(127) % 2 == 0)
    )
    expected = numbers[candidates.int().argmax(1)] * x.cpu().double().sign()
    assert torch.equal(values.cpu().double(), expected)


def test_multiplied_out_a_row_is_itself_up_to_half_a_step():
    x = randn(20, 300, dtype=torch.bfloat16)
    values, scale = reference.quantize_rows(x)
    error = (multiplied_out(values, scale) - x.double()).abs()
    assert (error <= torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * scale.double()) * (1 + 1e-6)).all()
    assert values.float().abs().amax(-1).eq(448).all()


def test_linear_fp8_is_a_linear_layer_of_what_the_rows_multiply_out_to():
    x, weight = reference.quantize_rows(randn(2, 5, 48)), reference.quantize_rows(randn(32, 48, seed=1))
    bias = randn(32, dtype=torch.bfloat16, seed=2)
    exact = multiplied_out(*x) @ multiplied_out(*weight).t() + bias.double()
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
def test_rows_are_quantised_to_the_bit(dtype, shape):
    x = randn(*shape, dtype=dtype, scale=3.0)
    with poison_memory():
        ours = kernels.quantize_rows(x)
    assert_same_bits(ours, reference.quantize_rows(x))


@DTYPES
@pytest.mark.parametrize(("tokens", "dim"), [(1, 192), (17, 100), (50, 48), (197, 72), (5, 768), (3, 1280), (2, 8192)])
def test_layer_norm_is_the_definitions(dtype, tokens, dim):
    x, norm = randn(1, tokens, dim, dtype=dtype, shift=0.3), norm_of(dim, dtype)
    with poison_memory():
        ours = kernels.layer_norm_fp8(x, *norm)
    theirs = reference.layer_norm_fp8(x, *norm)
    assert_nearly_same(ours, theirs)
    exact = reference.layer_norm(x.double(), norm[0].double(), norm[1].double(), EPS)
    assert_no_worse_than(multiplied_out(*ours), multiplied_out(*theirs), exact)


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "norm_dtype"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),  # a float32 model: products are bfloat16, the rest is not
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_the_residual_add_before_it_is_rounded_first(dtype, residual_dtype, norm_dtype):
    x, residual = randn(2, 9, 200, dtype=dtype), randn(2, 9, 200, dtype=residual_dtype, seed=2)
    with poison_memory():
        summed, *ours = kernels.add_layer_norm_fp8(x, residual, *norm_of(200, norm_dtype))
    assert torch.equal(summed, x + residual) and summed.dtype == (x + residual).dtype
    expected, *theirs = reference.add_layer_norm_fp8(x, residual, *norm_of(200, norm_dtype))
    assert torch.equal(summed, expected)
    assert_nearly_same(ours, theirs)


@DTYPES
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_activation_is_the_definitions(dtype, activation, bias):
    x, bias = randn(2, 7, 300, dtype=dtype, scale=2.0), randn(300, dtype=torch.bfloat16, seed=1) if bias else None
    with poison_memory():
        ours = kernels.bias_gelu_fp8(x, bias, activation)
    theirs = reference.bias_gelu_fp8(x, bias, activation)
    assert_nearly_same(ours, theirs)
    exact = reference.bias_gelu(x.double(), None if bias is None else bias.double(), activation)
    assert_no_worse_than(multiplied_out(*ours), multiplied_out(*theirs), exact)


@pytest.mark.parametrize("dim", [3072, 5120])
def test_activation_of_the_widths_of_vit_base_and_huge(dim):
    x, bias = randn(3, dim, dtype=torch.bfloat16), randn(dim, dtype=torch.bfloat16, seed=1)
    assert_nearly_same(kernels.bias_gelu_fp8(x, bias), reference.bias_gelu_fp8(x, bias))


def test_rows_of_zeros_are_zeros():
    x = randn(5, 72)
    x[1] = 0
    x[3] = -0.0
    ours = kernels.quantize_rows(x)
    assert_same_bits(ours, reference.quantize_rows(x))
    assert ours[0][[1, 3]].float().eq(0).all() and ours[1].isfinite().all()
    zeros = torch.zeros(4, 48, device=DEVICE)
    bias = randn(48, seed=4)
    values, scale = kernels.layer_norm_fp8(zeros, torch.ones_like(bias), bias, EPS)  # rows of equal values: the bias
    assert_same_bits((values[:1], scale[:1]), reference.quantize_rows(bias[None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e38, 1e30, 1e-30, 1e-35, 1e-38, 1e-42])
def test_huge_and_tiny_rows(dtype, scale):
    x = randn(4, 100, scale=1.0).clamp(-3, 3).double().mul(scale).to(dtype)
    ours = kernels.quantize_rows(x)
    if DEVICE == "cpu" or scale > 1e-37:  # a GPU may read subnormal numbers as zeros
        assert_same_bits(ours, reference.quantize_rows(x))
    assert ours[1].isfinite().all() and ours[0].float().isfinite().all()
    if scale > 1e-35:
        assert relative_error(multiplied_out(*ours), x) < 0.04


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_infinity_has_such_a_scale_and_the_others_are_as_before(bad):
    x, norm = randn(4, 72), norm_of(72)
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
        if not (ours is kernels.bias_gelu_fp8 and bad == -float("inf")):  # whose activation may be 0
            assert not mine[1][2].isfinite()
            assert reference.linear_fp8(*mine, *weight)[2].isnan().all()


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_where_they_lie(view):
    x, norm = randn(2, 5, 48, dtype=torch.bfloat16), norm_of(48)
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


def test_an_empty_batch_gives_empty_rows():
    x, norm = randn(0, 5, 48), norm_of(48)
    weight = reference.quantize_rows(randn(32, 48))
    for result in (kernels.quantize_rows(x), kernels.layer_norm_fp8(x, *norm), kernels.bias_gelu_fp8(x)):
        assert [tuple(tensor.shape) for tensor in result] == [(0, 5, 48), (0, 5, 1)]
    summed, *_ = kernels.add_layer_norm_fp8(x, x, *norm)
    assert summed.shape == x.shape
    assert reference.linear_fp8(*kernels.quantize_rows(x), *weight).shape == (0, 5, 32)


@DTYPES
def test_fallbacks_give_what_the_kernels_give(dtype, monkeypatch):
    x, residual, norm = randn(2, 5, 48, dtype=dtype), randn(2, 5, 48, seed=2), norm_of(48)
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


def test_two_runs_give_the_same_bits():
    x, norm = randn(3, 50, 100, dtype=torch.bfloat16), norm_of(100)
    for call in (lambda: kernels.layer_norm_fp8(x, *norm), lambda: kernels.bias_gelu_fp8(x)):
        assert_same_bits(call(), call())


def test_operators_are_registered_as_pytorch_wants_them():
    x, residual, norm = randn(2, 5, 48, dtype=torch.bfloat16), randn(2, 5, 48, seed=1), norm_of(48)
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
def test_bad_input_is_named_before_anything_is_launched(call, message, monkeypatch):
    monkeypatch.setattr(kernels, "_activation_fp8", None)
    monkeypatch.setattr(kernels, "_layer_norm_fp8", None)
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 16))


# ---------------------------------------------------------------------------------------------------------------------
# The product
# ---------------------------------------------------------------------------------------------------------------------


def has_product() -> bool:
    """Whether PyTorch has the product by rows for this device: a CPU's is newer than the oldest PyTorch of ours."""
    try:
        kernels.linear_fp8(*product_inputs(2, 16, units=16))
    except (RuntimeError, ValueError):
        return DEVICE == "cuda"  # and there the tests say what is wrong
    return True


def product_inputs(*shape: int, units: int) -> tuple[Tensor, ...]:
    x, weight = randn(*shape, scale=2.0), randn(units, shape[-1], seed=1, scale=0.1)
    return *reference.quantize_rows(x), *reference.quantize_rows(weight)


needs_product = pytest.mark.skipif(not has_product(), reason="this PyTorch has no e4m3 product by rows for CPUs")


@needs_product
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(("shape", "units"), [((2, 17, 48), 144), ((1, 768), 32), ((3, 1, 64), 16), ((0, 5, 48), 32)])
def test_the_product_is_the_definitions(shape, units, bias):
    inputs = product_inputs(*shape, units=units)
    bias = randn(units, dtype=torch.bfloat16, seed=2) if bias else None
    ours = kernels.linear_fp8(*inputs, bias)
    exact = multiplied_out(*inputs[:2]) @ multiplied_out(*inputs[2:]).t()
    exact = exact if bias is None else exact + bias.double()
    assert_no_worse_than(ours, reference.linear_fp8(*inputs, bias), exact)


@needs_product
def test_the_product_of_a_slice_of_rows_and_of_units():
    values, scale, weight, weight_scale = product_inputs(2, 5, 48, units=96)
    whole = reference.linear_fp8(values, scale, weight, weight_scale)
    part = kernels.linear_fp8(values[:, :1], scale[:, :1], weight[32:64], weight_scale[32:64])
    torch.testing.assert_close(part, whole[:, :1, 32:64], rtol=2**-7, atol=1e-3)


def test_cuda_accepts_the_operands_as_they_are_handed_over(monkeypatch):
    """PyTorch's own checks for tensors on a GPU, which need none: operands in rows and columns, multiples of 16."""
    product, seen = kernels.scaled_matmul, []
    monkeypatch.setattr(kernels, "scaled_matmul", lambda *operands: seen.append(operands) or torch.zeros(2, 96))
    values, scale, weight, weight_scale = product_inputs(2, 5, 48, units=96)
    bias = randn(96, dtype=torch.bfloat16)
    views = values[:, :1], scale[:, :1], weight, weight_scale, bias  # the class token of each picture
    kernels.linear_fp8(*views)
    kernels.linear_fp8(views[0], views[1], weight.t().contiguous().t(), weight_scale, None)
    for operands in seen:
        with FakeTensorMode():
            on_gpu = [
                None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                for t in operands
            ]
            out = product(*on_gpu)
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
def test_bad_operands_are_named(changes, message):
    names = ("values", "scale", "weight", "weight_scale")
    inputs = dict(zip(names, (tensor.cpu() for tensor in product_inputs(2, 3, 48, units=32)), strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.linear_fp8(**{**inputs, **changes})


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96, "num_labels": 16}
SMALL |= {"image_size": 32, "patch_size": 8}
TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_labels": 1000}
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_labels": 1000}


def small_model(dtype=torch.float32, **config) -> fastvit.ViTForImageClassification:
    model = fastvit.ViTForImageClassification(ViTConfig(**{**SMALL, **config})).eval()
    randomise(model)
    return model.to(DEVICE, dtype)


def small_pixels(dtype=torch.float32) -> Tensor:
    return pixels_for(ViTConfig(**SMALL)).to(DEVICE, dtype)


def with_trained_size(model: nn.Module) -> nn.Module:
    """Matrices that keep the size of what they multiply, and norms whose factors differ, as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layernorm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.5 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * (0.1 if parameter.dim() == 1 else 0.02))
    return model.eval()


@pytest.mark.parametrize(("config", "batch"), [(TINY, 4), (BASE, 1)], ids=["tiny", "base"])
def test_the_error_of_the_logits_is_that_of_four_bits_beside_bfloat16s_eight(config, batch):
    """docs/kernels.md states these errors. 16: bfloat16 has 8 significant bits, e4m3 has 4."""
    model = with_trained_size(fastvit.ViTForImageClassification(ViTConfig(**config))).to(DEVICE)
    pixels = pixels_for(model.config, batch).to(DEVICE)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(pixels.double()).logits
        half = copy.deepcopy(model).bfloat16()
        error = relative_error(half(pixels.bfloat16()).logits, exact)
        fp8_error = relative_error(fastvit.quantize(half, "fp8")(pixels.bfloat16()).logits, exact)
        float_error = relative_error(fastvit.quantize(model, "fp8")(pixels).logits, exact)
    print(f"bfloat16 {error:.4f}, fp8 of a bfloat16 model {fp8_error:.4f}, of a float32 model {float_error:.4f}")
    assert error < fp8_error < 16 * error
    assert max(fp8_error, float_error) < 0.1


@needs_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("option", [{}, {"qkv_bias": False}, {"hidden_act": "quick_gelu"}], ids=str)
def test_the_quantised_model_is_the_same_with_kernels(dtype, option):
    model = fastvit.quantize(small_model(dtype, **option), "fp8")
    pixels = small_pixels(dtype)
    with torch.no_grad():
        with fastvit.backend("reference"):
            expected = model(pixels).logits
        with fastvit.backend("triton"):
            found = model(pixels).logits
    # A value on the border of two e4m3 numbers may become either: at most the error of quantising itself.
    assert relative_error(found, expected) < 0.02


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_activation_without_a_kernel(activation):
    model = small_model(hidden_act=activation)
    with torch.no_grad():
        exact = model(small_pixels()).logits
        assert relative_error(fastvit.quantize(model, "fp8")(small_pixels()).logits, exact) < 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attentions_and_hidden_states_are_those_of_the_model_up_to_the_error(implementation):
    model = small_model(attn_implementation=implementation)
    pixels = small_pixels()
    with torch.no_grad():
        expected = model.vit(pixels, output_hidden_states=True, output_attentions=True)
        found = fastvit.quantize(model, "fp8").vit(pixels, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 4 and len(found.attentions) == 3
    for ours, theirs in zip((*found.hidden_states, *found.attentions), (*expected.hidden_states, *expected.attentions)):  # noqa: B905
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 0.06


@pytest.mark.parametrize("masked", [False, True])
def test_the_last_block_for_the_class_token_alone_gives_that_token(masked):
    model = fastvit.quantize(small_model(), "fp8").vit
    mask = torch.ones(2, 17, device=DEVICE)
    mask[0, 2:] = 0
    with torch.no_grad():
        whole = model(small_pixels(), attention_mask=mask if masked else None).last_hidden_state
        alone = model(small_pixels(), attention_mask=mask if masked else None, class_token_only=True).last_hidden_state
        unmasked = model(small_pixels(), class_token_only=True).last_hidden_state
    assert alone.shape == (2, 1, 48)
    # Another number of rows may be added up in another order, which moves a bfloat16 by a step, and e4m3 then, too.
    torch.testing.assert_close(alone, whole[:, :1], rtol=0.02, atol=0.02)
    torch.testing.assert_close(alone[1], unmasked[1], rtol=0.02, atol=0.02)  # whose mask leaves every token
    assert (relative_error(unmasked[0], alone[0]) > 0.01) == masked


def test_an_additive_mask_does_what_a_boolean_one_does():
    model = fastvit.quantize(small_model(), "fp8").vit
    keep = torch.ones(2, 1, 1, 17, dtype=torch.bool, device=DEVICE)
    keep[0, ..., 5:9] = False
    with torch.no_grad():
        boolean = model(small_pixels(), attention_mask=keep).last_hidden_state
        additive = model(small_pixels(), attention_mask=torch.zeros(keep.shape, device=DEVICE).masked_fill(~keep, -1e9))
    torch.testing.assert_close(additive.last_hidden_state, boolean, rtol=0.02, atol=0.02)


def test_an_empty_batch_of_images():
    model = fastvit.quantize(small_model(), "fp8")
    assert model(small_pixels()[:0]).logits.shape == (0, 16)


def test_an_image_with_nan_spoils_its_own_logits_only():
    model = fastvit.quantize(small_model(), "fp8")
    pixels = small_pixels()
    expected = model(pixels).logits
    pixels[0, 0, 3, 3] = float("nan")
    found = model(pixels).logits
    assert found[0].isnan().all() and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=needs_product)])
def test_it_compiles_as_one_graph(backend):
    model = fastvit.quantize(small_model(), "fp8")
    with torch.no_grad(), fastvit.backend(backend):
        expected = model(small_pixels()).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(small_pixels()).logits, expected, rtol=0.02, atol=0.02)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_weights_take_half_the_memory_of_bfloat16():
    config = ViTConfig(**{**TINY, "num_hidden_layers": 2})
    model = fastvit.ViTForImageClassification(config).bfloat16()
    before = bytes_of(model.vit.encoder.state_dict().values())
    parameters = model.num_parameters()
    fastvit.quantize(model, "fp8")
    assert bytes_of(model.vit.encoder.state_dict().values()) < 0.52 * before
    assert (
        sum(tensor.numel() for name, tensor in model.state_dict().items() if not name.endswith("scale")) == parameters
    )


def test_the_state_is_saved_and_loaded(tmp_path):
    model = small_model(torch.bfloat16)
    pixels = small_pixels(torch.bfloat16)
    assert fastvit.quantize(model, "fp8") is model and not model.training
    expected = model(pixels).logits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = fastvit.quantize(fastvit.ViTForImageClassification(model.config).to(DEVICE, torch.bfloat16), "fp8")
    assert not torch.equal(again(pixels).logits, expected)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(pixels).logits, expected)
    torch.save(model, tmp_path / "model.pt")
    whole = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(whole(pixels).logits, expected)
    assert torch.equal(copy.deepcopy(model)(pixels).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_of_dtype_does_not_reach_the_quantised_numbers(dtype):
    layer = Fp8Linear(nn.Linear(48, 32).to(DEVICE))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to(dtype).to("cpu").to(DEVICE)
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
        "weight": E4M3, "scale": torch.float32, "bias": torch.bfloat16
    }  # fmt: skip
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert layer.to("meta").weight.dtype == E4M3


def test_training_is_an_error_that_says_so():
    model = fastvit.quantize(small_model(), "fp8")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(fastvit.InputError, match=r"quantised to fp8, for inference alone: call eval\(\)"):
        model.train()(small_pixels())
    model.eval()
    with pytest.raises(fastvit.InputError, match="disable gradients"):
        model(small_pixels().requires_grad_())
    model.classifier.requires_grad_()  # a linear probe is trained on features, not through them
    model(small_pixels()).logits.sum().backward()
    assert model.classifier.weight.grad is not None


def test_what_cannot_be_quantised_is_named():
    with pytest.raises(fastvit.InputError, match="kind: expected one of fp8, int8, got 'int4'"):
        fastvit.quantize(small_model(), "int4")
    with pytest.raises(fastvit.InputError, match="model: expected a Vision Transformer of fastvit, got Linear"):
        fastvit.quantize(nn.Linear(2, 2), "fp8")
    with pytest.raises(
        fastvit.InputError, match=r"config\.intermediate_size: expected a multiple of 16 for fp8, got 100"
    ):
        fastvit.quantize(small_model(intermediate_size=100), "fp8")
    with pytest.raises(
        fastvit.InputError, match=r"expected torch\.bfloat16 or torch\.float32 for fp8, got torch\.float16"
    ):
        fastvit.quantize(small_model(torch.float16), "fp8")
    model = fastvit.quantize(small_model(), "fp8")
    for kind in ("fp8", "int8"):
        with pytest.raises(fastvit.InputError, match="query of block 0 is in fp8"):
            fastvit.quantize(model, kind)


def test_a_watched_or_wrapped_layer_is_named_and_nothing_is_changed():
    model = small_model()
    hook = model.vit.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(fastvit.InputError, match=r"output\.dense of block 1 is wrapped, quantised or hooked"):
        fastvit.quantize(model, "fp8")
    hook.remove()
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(fastvit.InputError, match=r"query\S* of block 0 is wrapped"):
        fastvit.quantize(wrapped, "fp8")
    fastvit.quantize(model, "fp8")


def test_a_norm_that_is_watched_after_quantising_is_called():
    model = fastvit.quantize(small_model(), "fp8")
    expected, seen = model(small_pixels()).logits, []
    for norm in (model.vit.encoder.layer[0].layernorm_before, model.vit.encoder.layer[1].layernorm_after):
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    found = model(small_pixels()).logits
    assert len(seen) == 2 and relative_error(found, expected) < 0.02


def test_gpus_without_fp8_are_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    why_not = ops.kernel_unavailable_reason.__wrapped__
    monkeypatch.setattr(ops, "kernel_unavailable_reason", why_not)
    for operation in ("linear_fp8", "layer_norm_fp8", "quantize_rows"):
        reason = why_not(operation, "cuda", 0, torch.float32)
        assert reason == "this GPU (sm_80) has no fp8 matmul; sm_89 and newer have one"
    assert why_not("layer_norm", "cuda", 0, torch.float32) is None
    assert "an error (this GPU (sm_80)" in info.describe_backend("linear_fp8", torch.device("cuda", 0))
    with pytest.raises(fastvit.InputError, match=r"linear_fp8: this GPU \(sm_80\) has no fp8 .*backend\('reference'\)"):
        ops._choose_implementation("linear_fp8", "auto", "cuda", 0, torch.float32, None, None)
    assert ops._choose_implementation("quantize_rows", "auto", "cuda", 0, torch.float32, None, None) == "default"

    model = small_model()
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0))
    with pytest.raises(fastvit.InputError, match=r"'fp8' cannot run here: this GPU \(sm_80\) has no fp8"):
        fastvit.quantize(model, "fp8")
    with fastvit.backend("reference"):
        fastvit.quantize(model, "fp8")
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        assert why_not("linear_fp8", "cuda", 0, torch.float32) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in why_not("linear_fp8", "cuda", 0, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# int8
# ---------------------------------------------------------------------------------------------------------------------


def test_int8_without_torchao_says_what_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else found(name))
    with pytest.raises(fastvit.InputError, match="kind: 'int8' needs the package torchao, which is not installed"):
        fastvit.quantize(small_model(), "int8")


def test_int8_asks_torchao_for_the_linear_layers_of_the_blocks(monkeypatch):
    """With a stand-in for torchao that rounds the weights of the layers it is asked for."""
    asked = []

    class Int8WeightOnlyConfig:
        pass

    def quantize_(model, config, filter_fn):
        assert isinstance(config, Int8WeightOnlyConfig)
        for name, module in model.named_modules():
            if filter_fn(module, name):
                asked.append(name)
                scale = module.weight.abs().amax(-1, keepdim=True) / 127
                module.weight = nn.Parameter((module.weight / scale).round() * scale, requires_grad=False)

    package, quantization = ModuleType("torchao"), ModuleType("torchao.quantization")
    package.__spec__ = ModuleSpec("torchao", None)
    quantization.Int8WeightOnlyConfig, quantization.quantize_ = Int8WeightOnlyConfig, quantize_
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", quantization)
    model = small_model()
    with torch.no_grad():
        expected = model(small_pixels()).logits
        found = fastvit.quantize(model, "int8")(small_pixels()).logits
    assert len(asked) == 3 * 6 and all(".encoder.layer." in name for name in asked)
    assert 0 < relative_error(found, expected) < 0.03
    assert not model.training


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_int8_by_torchao_itself():
    model = small_model(torch.bfloat16)
    with torch.no_grad():
        expected = model(small_pixels(torch.bfloat16)).logits
        found = fastvit.quantize(model, "int8")(small_pixels(torch.bfloat16)).logits
    assert type(model.vit.encoder.layer[0].output.dense.weight) is not nn.Parameter
    assert type(model.classifier.weight) is nn.Parameter
    assert relative_error(found, expected) < 0.03
    with pytest.raises(fastvit.InputError, match="wrapped, quantised or hooked"):
        fastvit.quantize(model, "fp8")
