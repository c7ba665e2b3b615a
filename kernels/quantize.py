"""Rows in 8 bits for inference: the operations between two e4m3 matmuls, each in one pass over memory.

    scale  = max(max|row| / 448, 2^-126)                    float32, one per row
    values = round_e4m3(row * (1 / scale))

    quantize_rows        row = x                            e.g. attention's output
    layer_norm_fp8       row = layer_norm(x)
    add_layer_norm_fp8   row = layer_norm(residual'),       residual' = x + residual
    bias_gelu_fp8        row = activation(x + bias)
    linear_fp8           (values * scale) @ (weight * weight_scale)^T + bias, PyTorch's matmul on e4m3 tensor cores

    x, residual [rows, D]  ->  values [rows, D] e4m3, scale [rows, 1]

No value of a row can be written before the row's maximum is known, so a program holds whole rows in registers, as in
`fastvit.kernels.layer_norm`. Nothing is rounded between the float32 LayerNorm or activation and e4m3.

Needs NVIDIA's sm_89 (RTX 40, L4), sm_90 (H100) or newer; older GPUs have neither the e4m3 conversion nor the matmul.

Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import gelu, layer_norm, tuning
from fastvit.kernels.checks import DTYPES, check_optional, check_tensor, make_contiguous
from fastvit.kernels.gelu import activate, check_activation
from fastvit.kernels.layer_norm import _chunk, _row_offsets, _size_tile, _store_e4m3, _view_rows, check_norm
from fastvit.kernels.operators import is_fake, register
from fastvit.kernels.tuning import cdiv, describe_rows

FP8 = torch.float8_e4m3fn
MAX_WIDTH = 16384  # of a row without a norm; forward holds its values once


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
            value = activate(value, FORMULA)  # beyond DIM, activation(0) = 0
        pieces = pieces + (value,)
    _store_e4m3(pieces, values_ptr, scale_ptr, row, row_mask, DIM, ROWS, CHUNK, CHUNKS)


def _launch_activation(
    x: Tensor, bias: Tensor | None, activation: str | None, candidate: int = 0
) -> tuple[Tensor, Tensor]:
    values, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    if is_fake(x) or scale.numel() == 0:
        return values, scale
    rows, dim, dtype = scale.numel(), x.shape[-1], x.dtype
    inner, (x,), strides = _view_rows(x, per_sample=False)
    choice = tuning.select("activation_fp8", describe_rows(rows, dim), dtype, x.device, candidate)
    tile = _size_tile(dim, dtype.itemsize, choice)
    formula = None if activation is None else gelu.get_formula(activation, dtype)
    tensors = (x, *make_contiguous(bias), values, scale)
    _activation_e4m3[(cdiv(rows, tile["ROWS"]),)](*tensors, *strides, rows, inner, FORMULA=formula, **tile)
    return values, scale


def _launch_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns residual' (empty without residual), values and scale."""
    return layer_norm.launch_forward(x, residual, weight, bias, None, None, eps, FP8, None, candidate)


def scaled_matmul(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """[rows, K] x [F, K] -> [rows, F] bfloat16, by PyTorch's matmul with a scale per row of both operands.

    It requires a row-major left operand and a column-major right one, which weight.t() is, K and F multiples of 16, and
    a bias of the output's dtype. Fast accumulation is off: on Hopper it keeps sums in about 14 bits, an error that the
    documented bound does not include. Without it, sums of 128 terms are accumulated in float32.
    """
    return torch._scaled_mm(
        values, weight.t(), scale, weight_scale.t(), bias, out_dtype=torch.bfloat16, use_fast_accum=False
    )


def _quantize_in_pytorch(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=2.0**-126)
    return (x * (1 / scale)).to(FP8).contiguous(), scale.contiguous()


def _activation_fallback(x, bias, activation, candidate=0) -> tuple[Tensor, Tensor]:
    z = x.float() if bias is None else x.float() + bias.float()
    return _quantize_in_pytorch(z if activation is None else gelu.compute_activation(z, activation))


def _layer_norm_fallback(x, residual, weight, bias, eps, candidate=0) -> tuple[Tensor, Tensor, Tensor]:
    summed, y, _ = layer_norm.forward_fallback(x, residual, weight, bias, None, None, eps, torch.float32)
    return summed, *_quantize_in_pytorch(y)


_activation_fp8 = register("activation_fp8", fallback=_activation_fallback)(_launch_activation)
_layer_norm_fp8 = register("layer_norm_fp8", fallback=_layer_norm_fallback)(_launch_layer_norm)


def gpu_unsupported_reason(major: int, minor: int) -> str | None:
    """The reason why a GPU of this compute capability does not support fp8, or None."""
    if torch.version.hip is not None:
        return "the e4m3 matmul is written for NVIDIA GPUs"
    if (major, minor) < (8, 9):
        return f"this GPU (sm_{major}{minor}) has no fp8 matmul; sm_89 and newer have one"
    return None


def quantize_rows(x: Tensor, *, candidate: int = 0) -> tuple[Tensor, Tensor]:
    """Quantise x row by row: x ~ values * scale. Like the other operations here it has no gradient.

    Args:
        x: [..., D], float32, bfloat16 or float16, D at most 16,384; rows may be strided.
        candidate: number of the tile in the tuning table.

    Returns:
        values [..., D] float8_e4m3fn and scale [..., 1] float32, both contiguous. The scale of a row that contains NaN
        or an infinity is NaN or infinite.

    Raises:
        ValueError: if shapes or dtypes are not supported.
    """
    _check_rows(x)
    return _activation_fp8(x, None, None, candidate)


def bias_gelu_fp8(
    x: Tensor, bias: Tensor | None = None, activation: str = "gelu", *, candidate: int = 0
) -> tuple[Tensor, Tensor]:
    """quantize_rows(activation(x + bias)), with no rounding in between.

    Args, Returns, Raises: as in `quantize_rows`; bias: [D] or None; activation: a key of
    `fastvit.kernels.gelu.FORMULAS`.
    """
    check_activation(activation)
    _check_rows(x)
    check_optional("bias", bias, x.shape[-1:], DTYPES, x.device)
    return _activation_fp8(x, bias, activation, candidate)


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, candidate: int = 0) -> tuple[Tensor, Tensor]:
    """quantize_rows(layer_norm(x)), with no rounding in between.

    Args, Raises: as in `fastvit.kernels.layer_norm.layer_norm`. Returns: as in `quantize_rows`.
    """
    check_norm(x, weight, bias)
    _, values, scale = _layer_norm_fp8(x, None, weight, bias, eps, candidate)
    return values, scale


def add_layer_norm_fp8(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, candidate: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual in the dtype that both promote to, and `layer_norm_fp8` of the rounded sum.

    Args, Raises: as in `fastvit.kernels.layer_norm.add_layer_norm`. Returns: the sum [..., D], values, scale.
    """
    check_norm(x, weight, bias)
    check_tensor("residual", residual, x.shape, DTYPES, x.device)
    return _layer_norm_fp8(x, residual, weight, bias, eps, candidate)


def linear_fp8(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """(values * scale) @ (weight * weight_scale)^T + bias.

    Args:
        values, scale: [..., K] e4m3 and [..., 1] float32, as from `quantize_rows`; K is a multiple of 16.
        weight, weight_scale: [F, K] e4m3 and [F, 1] float32, likewise; F is a multiple of 16.
        bias: [F] bfloat16, or None.

    Returns:
        [..., F] bfloat16.

    Raises:
        ValueError: if shapes, dtypes or devices do not match.
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
    check_optional("bias", bias, weight.shape[:1], (torch.bfloat16,), values.device)
    rows = values.reshape(-1, values.shape[-1]).contiguous()
    out = scaled_matmul(rows, scale.reshape(-1, 1).contiguous(), weight.contiguous(), weight_scale, bias)
    return out.view(*values.shape[:-1], weight.shape[0])


def _check_rows(x: Tensor) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x: expected [..., D] with D from 1 to {MAX_WIDTH}, got {list(x.shape)}")
    check_tensor("x", x, x.shape, DTYPES, x.device)
