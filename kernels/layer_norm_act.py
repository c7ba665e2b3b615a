"""LayerNorm with an activation behind it, elementwise, for heads and necks.

    y = activation((x - mean) * rstd * weight + bias)        x, y: [..., D]

Apart the two read and write 4 row-lengths of memory, here 2. Backward computes the normalised row, what the activation
was taken of, and its derivative again from x, mean and rstd: it reads the gradient and x and writes that of x, 3
row-lengths where PyTorch's two steps need 6. Weight gradients take two steps without atomics, as in
`fastvit.kernels.layer_norm`; unlike there, a program has a whole row in one piece, for this is used once a model.

Ba, Kiros & Hinton 2016, arXiv:1607.06450; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.gelu import (
    FORMULAS,
    activate,
    activate_with_slope,
    as_rows,
    check_activation,
)
from fastvit.kernels.launch import launch
from fastvit.kernels.operators import operator
from fastvit.kernels.tuning import cdiv, next_power_of_2

MAX_DIM = 8192


@triton.jit
def _layer_norm_act_fwd(
    x_ptr, weight_ptr, bias_ptr,                    # in:  [rows, dim], [dim] x2
    y_ptr, statistics_ptr,                          # out: [rows, dim], [2, rows] float32: mean, rstd
    stride_x, rows, eps,
    DIM: tl.constexpr, FORMULA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Columns are repeated for each row, so that weight and bias come out in the layout of x, 16 bytes a thread.
    cols = tl.broadcast_to(tl.arange(0, COLS)[None, :], [ROWS, COLS])
    mask = (row < rows)[:, None] & (cols < DIM)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride_x + cols, mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / DIM
    centred = tl.where(cols < DIM, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DIM + eps)
    weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
    y = activate(centred * rstd[:, None] * weight + bias, FORMULA)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * DIM + cols, y, mask)
    tl.store(statistics_ptr + row, mean, row < rows)
    tl.store(statistics_ptr + rows + row, rstd, row < rows)


@triton.jit
def _layer_norm_act_bwd(
    grad_y_ptr, x_ptr, weight_ptr, bias_ptr,        # in:  [rows, dim] x2, [dim] x2
    statistics_ptr,                                 # in:  [2, rows] float32
    grad_x_ptr, partial_ptr,                        # out: [rows, dim], [programs, 2 * dim] float32 or None
    stride_grad_y, stride_x, rows,
    DIM: tl.constexpr, FORMULA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.broadcast_to(tl.arange(0, COLS)[None, :], [ROWS, COLS])
    weight = tl.load(weight_ptr + cols, cols < DIM, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, cols < DIM, other=0.0).to(tl.float32)
    weight_sums = tl.zeros([ROWS, COLS], tl.float32)
    bias_sums = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (cols < DIM)
        mean = tl.load(statistics_ptr + row, row < rows, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + rows + row, row < rows, other=0.0)[:, None]
        row = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * stride_x + cols, mask, other=0.0).to(tl.float32)
        normal = tl.where(mask, (x - mean) * rstd, 0.0)
        grad_y = tl.load(grad_y_ptr + row * stride_grad_y + cols, mask, other=0.0).to(tl.float32)
        _, slope = activate_with_slope(normal * weight + bias, FORMULA)
        grad_affine = grad_y * slope
        weight_sums += grad_affine * normal
        bias_sums += grad_affine
        # grad_x = rstd * (g - mean(g) - normal * mean(g * normal)),  g = grad_affine * weight
        grad = grad_affine * weight
        projected = normal * (tl.sum(grad * normal, 1) / DIM)[:, None]
        grad_x = (grad - (tl.sum(grad, 1) / DIM)[:, None] - projected) * rstd
        tl.store(grad_x_ptr + row * DIM + cols, grad_x, mask)
    if partial_ptr is not None:
        cols = tl.arange(0, COLS)
        tl.store(partial_ptr + program * 2 * DIM + cols, tl.sum(weight_sums, 0), cols < DIM)
        tl.store(partial_ptr + program * 2 * DIM + DIM + cols, tl.sum(bias_sums, 0), cols < DIM)


def _tile(dim: int, itemsize: int, choice: tuning.Choice) -> dict[str, int]:
    """Rows a program and warps, so that a thread holds `elements` values of a row, or as few as 16 bytes."""
    columns = next_power_of_2(dim)
    threads_a_row = max(1, columns // max(choice["elements"], 16 // itemsize))
    num_warps = min(16, max(choice["num_warps"], threads_a_row // 32))
    return {"DIM": dim, "ROWS": max(1, 32 * num_warps // threads_a_row), "COLS": columns, "num_warps": num_warps}


def _shape_class(rows: int, dim: int) -> str:
    return f"{next_power_of_2(dim)}, {'many' if rows >= 8192 else 'few'} rows"


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str) -> tuple[Tensor, Tensor]:
    rows, dim = x.shape
    y = x.new_empty(rows, dim)
    statistics = x.new_empty(2, rows, dtype=torch.float32)

    def run(choice: tuning.Choice) -> None:
        tile = {"FORMULA": FORMULAS[activation], **_tile(dim, x.dtype.itemsize, choice)}
        grid = (cdiv(rows, tile["ROWS"]),)
        launch(_layer_norm_act_fwd, grid, (x, weight, bias, y, statistics), (x.stride(0), rows, eps), tile)

    if rows:
        run(tuning.choose("layer_norm_act_forward", _shape_class(rows, dim), x.dtype, x.device, run))
    return y, statistics


def _launch_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, activation: str, parameter_grads: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and those of weight and bias one behind the other, of no elements where not wanted."""
    rows, dim = x.shape
    grad_x = x.new_empty(rows, dim)
    if rows == 0:
        return grad_x, weight.new_zeros(2 * dim if parameter_grads else 0)

    def run(choice: tuning.Choice) -> Tensor:
        tile = _tile(dim, x.dtype.itemsize, choice)
        programs = min(cdiv(rows, tile["ROWS"]), tuning.describe(x.device).multiprocessors * choice["waves"])
        partial = x.new_empty(programs, 2 * dim, dtype=torch.float32) if parameter_grads else None
        tensors = (grad_y, x, weight, bias, statistics, grad_x, partial)
        numbers = (grad_y.stride(0), x.stride(0), rows)
        launch(_layer_norm_act_bwd, (programs,), tensors, numbers, {"FORMULA": FORMULAS[activation], **tile})
        return weight.new_empty(0) if partial is None else partial.sum(0).to(weight.dtype)

    grad_parameters = run(tuning.choose("layer_norm_act_backward", _shape_class(rows, dim), x.dtype, x.device, run))
    return grad_x, grad_parameters


@operator("layer_norm_act")
def _layer_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str) -> tuple[Tensor, Tensor]:
    y, statistics = _launch_forward(as_rows(x), weight.contiguous(), bias.contiguous(), eps, activation)
    return y.view(x.shape), statistics


@_layer_norm_act.register_fake
def _(x, weight, bias, eps, activation):
    return x.new_empty(x.shape), x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


@operator("layer_norm_act_backward")
def _layer_norm_act_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, activation: str, parameter_grads: bool
) -> tuple[Tensor, Tensor]:
    parameters = weight.contiguous(), bias.contiguous()
    grad_x, grad_parameters = _launch_backward(
        as_rows(grad_y), as_rows(x), *parameters, statistics, activation, parameter_grads
    )
    return grad_x.view(x.shape), grad_parameters


@_layer_norm_act_backward.register_fake
def _(grad_y, x, weight, bias, statistics, activation, parameter_grads):
    return x.new_empty(x.shape), weight.new_empty(2 * weight.shape[0] if parameter_grads else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, ctx.activation = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, weight, bias, statistics)


def _backward(ctx, grad_y, _):
    x, weight, bias, statistics = ctx.saved_tensors
    parameter_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_x, grad_parameters = _layer_norm_act_backward(
        grad_y, x, weight, bias, statistics, ctx.activation, parameter_grads
    )
    grad_weight = grad_parameters[: weight.shape[0]] if ctx.needs_input_grad[1] else None
    grad_bias = grad_parameters[weight.shape[0] :] if ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias, None, None


_layer_norm_act.register_autograd(_backward, setup_context=_setup_context)


def layer_norm_act(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "gelu") -> Tensor:
    """activation(layer_norm(x)), elementwise.

    x: [..., D], float32, bfloat16 or float16, D at most 8,192; copied where its rows cannot be reached by one step.
    weight, bias: [D], of one dtype, which may be another than x's. activation: a key of `gelu.FORMULAS`.
    Returns [..., D] in x's dtype, contiguous; autocast changes nothing, as in `fastvit.kernels.layer_norm`. Keeps x and
    8 bytes a row for backward.
    Raises ValueError for shapes, dtypes or devices that do not fit. Second derivatives are not supported.
    """
    check_activation(activation)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_DIM:
        raise ValueError(f"x: expected [..., D] with D from 1 to {MAX_DIM}, got {list(x.shape)}")
    check_tensor("x", x, x.shape, DTYPES, x.device)
    check_tensor("weight", weight, x.shape[-1:], DTYPES, x.device)
    check_tensor("bias", bias, x.shape[-1:], (weight.dtype,), x.device)
    return _layer_norm_act(x, weight, bias, eps, activation)[0]
