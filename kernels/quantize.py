"""Rows in 8 bits, for inference: what stands between two e4m3 matrix products, each in one pass over memory.

    scale  = max(max|row| / 448, 2^-126)                    float32, one a row
    values = round_e4m3(row * (1 / scale))

    quantize_rows        row = x                            e.g. attention's output
    layer_norm_fp8       row = layer_norm(x)
    add_layer_norm_fp8   row = layer_norm(residual'),       residual' = x + residual
    bias_gelu_fp8        row = activation(x + bias)
    linear_fp8           (values * scale) @ (weight * weight_scale)^T + bias, PyTorch's own product on e4m3 tensor cores

    x, residual [rows, D]  ->  values [rows, D] e4m3, scale [rows, 1]

The row's maximum must be known before its first value can be written: a program holds whole rows in registers, as the
LayerNorm of `fastvit.kernels.layer_norm` does anyway, and so does the activation here. Apart, an activation reads and
writes 2 + 2 bytes a value and quantising it reads 2 (twice, where a row does not stay in registers) and writes 1:
together 2 + 1. LayerNorm with the residual add: 2 + 2 read, 2 + 1 written, instead of 2 + 2, 2 + 2 and 2 + 1. Nothing
is rounded between LayerNorm or activation, in float32, and e4m3.

NVIDIA's sm_89 (RTX 40, L4), sm_90 (H100) and newer: older GPUs have neither the conversion to e4m3 nor a product of it,
and Triton does not compile the one for them.

Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.gelu import FORMULAS, activate, check_activation
from fastvit.kernels.launch import launch
from fastvit.kernels.layer_norm import MAX_DIM, _chunk, _row_offsets, _rows, _tile
from fastvit.kernels.operators import operator
from fastvit.kernels.tuning import cdiv, next_power_of_2

FP8 = torch.float8_e4m3fn
MAX_WIDTH = 16384  # of a row that is not normalised: forward holds its values once

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # float32's smallest normal number, whose reciprocal is still finite


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _store_e4m3(
    pieces, values_ptr, scale_ptr, row, row_mask,
    DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Quantise rows held as a tuple of float32 [ROWS, CHUNK] whose columns beyond DIM are 0."""
    # As an integer a positive float32 is ordered like itself, and NaN is the largest: a maximum that NaN survives.
    largest = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(CHUNKS):
        magnitude = pieces[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(magnitude, 1))
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), E4M3_MAX)
    scale = tl.maximum(scale, SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.div_rn(1.0, scale)[:, None]
    tl.store(scale_ptr + row, scale, row_mask)
    out_rows = values_ptr + row.to(tl.int64)[:, None] * DIM
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        tl.store(out_rows + cols, (pieces[i] * inverse).to(tl.float8e4nv), mask)


@triton.jit
def _activation_e4m3(
    x_ptr, bias_ptr,                                # in:  [rows, dim], [dim] or None
    values_ptr, scale_ptr,                          # out: [rows, dim] e4m3, [rows] float32
    stride_x_outer, stride_x_inner,
    rows, inner,
    FORMULA: tl.constexpr,                          # None: x itself
    DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    x_rows = x_ptr + _row_offsets(row, inner, stride_x_outer, stride_x_inner)
    pieces = ()
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        value = tl.load(x_rows + cols, mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            value += tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
        if FORMULA is not None:
            value = activate(value, FORMULA)  # 0 for the 0 beyond DIM
        pieces = pieces + (value,)
    _store_e4m3(pieces, values_ptr, scale_ptr, row, row_mask, DIM, ROWS, CHUNK, CHUNKS)


@triton.jit
def _layer_norm_e4m3(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,      # in:  [rows, dim], [rows, dim] or None, [dim] x2
    sum_ptr, values_ptr, scale_ptr,                 # out: [rows, dim] or None, [rows, dim] e4m3, [rows] float32
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    rows, inner, eps,
    DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    x_rows = x_ptr + _row_offsets(row, inner, stride_x_outer, stride_x_inner)
    pieces = ()
    total = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        value = tl.load(x_rows + cols, mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual_rows = residual_ptr + _row_offsets(row, inner, stride_residual_outer, stride_residual_inner)
            value += tl.load(residual_rows + cols, mask, other=0.0).to(tl.float32)
            rounded = value.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row.to(tl.int64)[:, None] * DIM + cols, rounded, mask)
            value = rounded.to(tl.float32)  # normalise what the next layer will read
        total += tl.sum(value, 1)
        pieces = pieces + (value,)
    mean = (total / DIM)[:, None]

    centred = ()
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        value = pieces[i] - mean
        if DIM % CHUNK != 0:
            value = tl.where(cols < DIM, value, 0.0)
        squares += tl.sum(value * value, 1)
        centred = centred + (value,)
    rstd = tl.rsqrt(squares / DIM + eps)[:, None]

    normalized = ()
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
        normalized = normalized + (centred[i] * rstd * weight + bias,)
    _store_e4m3(normalized, values_ptr, scale_ptr, row, row_mask, DIM, ROWS, CHUNK, CHUNKS)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------


def _shape(rows: int, dim: int) -> str:
    return f"{next_power_of_2(dim)}, {'many' if rows >= 8192 else 'few'} rows"


def _empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values and scales of x's rows, uninitialised."""
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _launch_activation(x: Tensor, bias: Tensor | None, activation: str | None) -> tuple[Tensor, Tensor]:
    values, scale = _empty_rows(x)
    rows, dim = scale.numel(), x.shape[-1]
    if rows == 0:
        return values, scale
    inner, (x,), strides = _rows(x, per_sample=False)
    formula = None if activation is None else FORMULAS[activation]

    def run(choice: tuning.Choice) -> None:
        tile = _tile(dim, x.dtype.itemsize, choice)
        grid = (cdiv(rows, tile["ROWS"]),)
        numbers = (*strides, rows, inner)
        launch(_activation_e4m3, grid, (x, bias, values, scale), numbers, {"FORMULA": formula, **tile})

    run(tuning.choose("activation_fp8", _shape(rows, dim), x.dtype, x.device, run))
    return values, scale


def _launch_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """residual' (an empty tensor where there is no residual), values, scale."""
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    summed = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    values, scale = _empty_rows(x)
    rows, dim = scale.numel(), x.shape[-1]
    if rows == 0:
        return summed, values, scale
    inner, (x, residual), strides = _rows(x, residual, per_sample=False)

    def run(choice: tuning.Choice) -> None:
        tile = _tile(dim, dtype.itemsize, choice)
        tensors = (x, residual, weight, bias, None if residual is None else summed, values, scale)
        launch(_layer_norm_e4m3, (cdiv(rows, tile["ROWS"]),), tensors, (*strides, rows, inner, eps), tile)

    run(tuning.choose("layer_norm_fp8", _shape(rows, dim), dtype, x.device, run))
    return summed, values, scale


def product(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """[rows, K] x [F, K] -> [rows, F] bfloat16, by PyTorch's product with a factor for each row of both.

    It wants the left operand in rows and the right one in columns, which is weight's own layout, K and F multiples of
    16, and a bias of the output's dtype. Fast accumulation is off: on Hopper it would keep a sum in about 14 bits, an
    error that the stated one does not contain. Without it, sums of 128 products are added up in float32.
    """
    return torch._scaled_mm(
        values, weight.t(), scale, weight_scale.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# Operators: without gradients, which rounding to so few bits does not have
# ---------------------------------------------------------------------------------------------------------------------


@operator("activation_fp8")
def _activation_fp8(x: Tensor, bias: Tensor | None, activation: str | None) -> tuple[Tensor, Tensor]:
    return _launch_activation(x, None if bias is None else bias.contiguous(), activation)


@_activation_fp8.register_fake
def _(x, bias, activation):
    return _empty_rows(x)


@operator("layer_norm_fp8")
def _layer_norm_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_layer_norm(x, residual, weight.contiguous(), bias.contiguous(), eps)


@_layer_norm_fp8.register_fake
def _(x, residual, weight, bias, eps):
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    return x.new_empty(0 if residual is None else x.shape, dtype=dtype), *_empty_rows(x)


# ---------------------------------------------------------------------------------------------------------------------
# The public functions
# ---------------------------------------------------------------------------------------------------------------------


def why_not_on(major: int, minor: int) -> str | None:
    """Why a GPU of this compute capability cannot, or None."""
    if torch.version.hip is not None:
        return "the e4m3 product is written for NVIDIA GPUs"
    if (major, minor) < (8, 9):
        return f"this GPU (sm_{major}{minor}) has no fp8 matrix product; sm_89 and newer do"
    return None


def why_not(activation: str) -> str | None:
    """Why this activation has no kernel, or None."""
    return None if activation in FORMULAS else f"the kernel has no activation {activation!r}"


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as values * scale, row by row.

    x: [..., D], float32, bfloat16 or float16, D at most 16,384; rows may be strided.
    Returns values [..., D], torch.float8_e4m3fn, and scale [..., 1], float32, both contiguous. A row that holds NaN or
        an infinity has such a scale. Raises ValueError for shapes or dtypes that do not fit. Has no gradient, like the
        other operations here.
    """
    _check("x", x, MAX_WIDTH)
    return _activation_fp8(x, None, None)


def bias_gelu_fp8(x: Tensor, bias: Tensor | None = None, activation: str = "gelu") -> tuple[Tensor, Tensor]:
    """quantize_rows(activation(x + bias)), with nothing rounded in between.

    x: as in `quantize_rows`; bias: [D] or None; activation: a key of `fastvit.kernels.gelu.FORMULAS`.
    """
    check_activation(activation)
    _check("x", x, MAX_WIDTH)
    if bias is not None:
        check_tensor("bias", bias, x.shape[-1:], DTYPES, x.device)
    return _activation_fp8(x, bias, activation)


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """quantize_rows(layer_norm(x)), with nothing rounded in between.

    x: as in `quantize_rows`, D at most 8,192; weight, bias: [D], of one dtype, which may be another than x's.
    """
    _check_norm(x, weight, bias)
    _, values, scale = _layer_norm_fp8(x, None, weight, bias, eps)
    return values, scale


def add_layer_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + residual, and the two of layer_norm_fp8 of it). residual: of x's shape; its dtype may be another.

    The sum is in the dtype that x and residual promote to, and what is normalised is the rounded sum.
    """
    _check_norm(x, weight, bias)
    check_tensor("residual", residual, x.shape, DTYPES, x.device)
    return _layer_norm_fp8(x, residual, weight, bias, eps)


def linear_fp8(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """(values * scale) @ (weight * weight_scale)^T + bias, in bfloat16.

    values: [..., K] and scale: [..., 1], as from `quantize_rows`; weight: [F, K] and weight_scale: [F, 1] likewise;
        bias: [F] bfloat16 or None. K and F are multiples of 16.
    Returns [..., F]. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if values.ndim == 0:
        raise ValueError("values: expected [..., K], got []")
    if weight.ndim != 2 or weight.shape[1] != values.shape[-1]:
        raise ValueError(f"weight: expected [units, {values.shape[-1]}], got {list(weight.shape)}")
    if 0 in weight.shape or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(f"weight: expected sizes that are multiples of 16, got {list(weight.shape)}")
    check_tensor("values", values, values.shape, (FP8,), values.device)
    check_tensor("scale", scale, (*values.shape[:-1], 1), (torch.float32,), values.device)
    check_tensor("weight", weight, weight.shape, (FP8,), values.device)
    check_tensor("weight_scale", weight_scale, (weight.shape[0], 1), (torch.float32,), values.device)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], (torch.bfloat16,), values.device)
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    out = product(rows, scale.reshape(-1, 1).contiguous(), weight.contiguous(), weight_scale, bias)
    return out.view(*values.shape[:-1], weight.shape[0])


def _check(name: str, x: Tensor, limit: int) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= limit:
        raise ValueError(f"{name}: expected [..., D] with D from 1 to {limit}, got {list(x.shape)}")
    check_tensor(name, x, x.shape, DTYPES, x.device)


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    _check("x", x, MAX_DIM)
    check_tensor("weight", weight, x.shape[-1:], DTYPES, x.device)
    check_tensor("bias", bias, x.shape[-1:], (weight.dtype,), x.device)
