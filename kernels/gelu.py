"""Bias and activation in one pass over memory, and all their gradients in another.

    y = activation(x + bias)         [..., F] -> [..., F]      GELU (exact, or its tanh form), quick-GELU
    y = silu(x1 + b1) * (x2 + b2)    [..., 2 F] -> [..., F]    SwiGLU: [x1, x2] = x and [b1, b2] = bias, in halves

Backward reads the gradient and x, and writes the gradient of x. The same kernel computes the bias gradient, which takes
PyTorch a pass of its own: a fixed number of programs each sum their rows, and PyTorch sums over the programs. There are
no atomics, so two runs are bitwise equal. The activation is not saved for backward. Where backward needs it, as the
weight gradient of a feed-forward's second layer does, this pass writes it again.

All arithmetic is float32. Exact GELU uses erf for float32 and a polynomial for half precision, with which the pass
compiles to 22 instructions per element on sm_90; with erf it takes 39 and is bound by instructions instead of memory.

GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415. SwiGLU: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_optional, check_tensor, make_contiguous
from fastvit.kernels.operators import is_fake, register, select_gradients
from fastvit.kernels.tuning import cdiv, describe_rows, next_power_of_2

# Activation names of transformers' configs, and the formulas that the kernels implement.
FORMULAS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def get_formula(activation: str, dtype: torch.dtype) -> str:
    """The kernels' FORMULA; "gelu_half" where the result is rounded to half precision, or x was half precision."""
    formula = "silu" if activation == "swiglu" else FORMULAS[activation]
    return "gelu_half" if formula == "gelu" and dtype != torch.float32 else formula


# Exact GELU for half precision, t = |x|. Before rounding, results and derivatives are within 0.08 units in the last
# place of bfloat16 and float16 (tests/test_gelu.py checks every number of both). The coefficients are a minimax fit on
# [0, 13.6], the range of nonzero bfloat16 results (tests/gelu_coefficients.py computes and prints them).
@triton.jit
def _normal_tail(t):
    """P(normal variable > t) = 2 ** polynomial(t). Beyond 13.6 the polynomial falls to -inf and the result to 0.

    The exponent is computed with an offset of 24: NVIDIA's exp2 flushes results below 2 ** -126 to 0.
    """
    p = 1.52230143e-07 - 2.10761542e-09 * t
    p = ((p * t - 4.81986444e-06) * t + 8.86188718e-05) * t - 0.00106114056
    p = ((p * t + 0.00885618757) * t - 0.0544526987) * t - 0.458139986
    return tl.exp2((p * t - 1.1513207) * t + (24 - 0.999995708)) * 5.9604644775390625e-08


@triton.jit
def _slope_from_tail(t, tail):
    """GELU's derivative at -t. Its zero is factored out, so that there is no cancellation near it."""
    u = tl.minimum(t, 13.6)  # a polynomial of 1e38 would be infinite, and NaN with a tail of 0
    q = 1.20755485e-05 - 2.35477088e-07 * u
    q = ((q * u - 0.000256690226) * u + 0.00297435117) * u - 0.0209625531
    q = ((q * u + 0.095648706) * u + 0.708148539) * u + 1.33012164
    return tail * (0.751791525 - t) * q


@triton.jit
def _gate(x, FORMULA: tl.constexpr):
    """activation(x) / x, between 0 and 1, and its derivative, in float32."""
    if FORMULA == "gelu":
        gate = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        if FORMULA == "gelu_tanh":  # 0.5 * (1 + tanh(z / 2)) = sigmoid(z), which loses no digits as tanh nears -1
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
            inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        elif FORMULA == "quick_gelu":
            z = 1.702 * x
            inner_slope = 1.702
        else:
            tl.static_assert(FORMULA == "silu")
            z = x
            inner_slope = 1.0
        shrunk = tl.exp(-tl.abs(z))  # at most 1: no overflow, and 1 - gate loses no digits as gate nears 1
        larger = 1.0 / (1.0 + shrunk)
        gate = tl.where(z < 0, shrunk * larger, larger)
        slope = shrunk * larger * larger * inner_slope
    return gate, slope


@triton.jit
def activate(x, FORMULA: tl.constexpr):
    """activation(x) in float32."""
    if FORMULA == "gelu_half":
        tail = _normal_tail(tl.abs(x))
        gate = tl.where(x < 0, tail, 1.0 - tail)
    else:
        gate, _ = _gate(x, FORMULA)
    return x * gate


@triton.jit
def activate_with_slope(x, FORMULA: tl.constexpr):
    """activation(x) and its derivative at x, in float32, sharing their common terms."""
    if FORMULA == "gelu_half":
        tail = _normal_tail(tl.abs(x))
        slope = _slope_from_tail(tl.abs(x), tail)
        gate = tl.where(x < 0, tail, 1.0 - tail)
        slope = tl.where(x < 0, slope, 1.0 - slope)
    else:
        gate, gate_slope = _gate(x, FORMULA)
        slope = gate + x * gate_slope
    return x * gate, slope


@triton.jit
def _load_biased(x_rows, bias_ptr, cols, mask):
    """x + bias in float32, [rows, cols]."""
    value = tl.load(x_rows + cols, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def _activation_fwd(
    x_ptr, bias_ptr,                                # in:  [rows, dim], [dim] or None; twice dim wide if GATED
    y_ptr,                                          # out: [rows, dim]; may be x itself
    stride_x, rows,
    DIM: tl.constexpr, FORMULA: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col_tiles: tl.constexpr = (DIM + COLS - 1) // COLS  # a grid of one axis: the second is limited to 65,535
    first_row = tl.program_id(0) // col_tiles * ROWS
    first_col = tl.program_id(0) % col_tiles * COLS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # rows * dim exceeds 2**31
    # Columns are repeated per row so that bias is loaded in the layout of x, 16 bytes per thread.
    cols = tl.broadcast_to((first_col + tl.arange(0, COLS))[None, :], [ROWS, COLS])
    mask = (row < rows) & (cols < DIM)
    x_rows = x_ptr + row * stride_x
    y = activate(_load_biased(x_rows, bias_ptr, cols, mask), FORMULA)
    if GATED:
        y = y * _load_biased(x_rows, bias_ptr, cols + DIM, mask)
    tl.store(y_ptr + row * DIM + cols, y, mask)


@triton.jit
def _activation_bwd(
    grad_y_ptr, x_ptr, bias_ptr,                    # in:  [rows, dim] x2, [dim] or None; x, bias twice as wide if GATED
    grad_x_ptr, y_ptr,                              # out: like x (may be grad_y itself), [rows, dim] or None
    partial_ptr,                                    # out: [programs, width of x] float32 or None
    stride_grad_y, stride_x, rows,
    DIM: tl.constexpr, FORMULA: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = 2 * DIM if GATED else DIM
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    cols = tl.broadcast_to((tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :], [ROWS, COLS])
    sums = tl.zeros([ROWS, COLS], tl.float32)
    linear_sums = tl.zeros([ROWS, COLS], tl.float32)
    # STAGES >= 2: the next rows are copied to shared memory (cp.async) while these are computed.
    for first in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & (cols < DIM)
        grad_y = tl.load(grad_y_ptr + row * stride_grad_y + cols, mask, other=0.0).to(tl.float32)
        x_rows = x_ptr + row * stride_x
        y, slope = activate_with_slope(_load_biased(x_rows, bias_ptr, cols, mask), FORMULA)
        grad_x_rows = grad_x_ptr + row * WIDTH
        if GATED:
            linear = _load_biased(x_rows, bias_ptr, cols + DIM, mask)
            grad_linear = grad_y * y
            tl.store(grad_x_rows + cols + DIM, grad_linear, mask)
            linear_sums += grad_linear
            grad_y = grad_y * linear
            y = y * linear
        grad_x = grad_y * slope
        tl.store(grad_x_rows + cols, grad_x, mask)
        sums += grad_x
        if y_ptr is not None:
            tl.store(y_ptr + row * DIM + cols, y, mask)
    if partial_ptr is not None:
        cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
        tl.store(partial_ptr + program * WIDTH + cols, tl.sum(sums, 0), cols < DIM)
        if GATED:
            tl.store(partial_ptr + program * WIDTH + DIM + cols, tl.sum(linear_sums, 0), cols < DIM)


def disable_autocast(function):
    """Run an operator's body in the dtypes of its inputs: the public functions have already applied autocast.

    A backward under autocast whose forward was not would otherwise return another dtype than the operator declares.
    """

    @functools.wraps(function)
    def body(x, *args, **kwargs):
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return body


def as_rows(tensor: Tensor) -> Tensor:
    """[..., dim] viewed as [rows, dim] with a last stride of 1; copied only if the rows need more than one stride."""
    if is_fake(tensor):  # reshape would guard on symbolic strides
        return tensor.new_empty(tensor.numel() // tensor.shape[-1], tensor.shape[-1])
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])


def _size_tile(dim: int, dtype: torch.dtype, activation: str, choice: tuning.Choice) -> dict[str, object]:
    """The kernels' keyword arguments."""
    columns = min(choice["columns"], next_power_of_2(dim))
    rows = max(1, choice["rows"] * choice["columns"] // columns)
    formula = {"FORMULA": get_formula(activation, dtype), "GATED": activation == "swiglu"}
    return {"DIM": dim, "ROWS": rows, "COLS": columns, "num_warps": choice["num_warps"], **formula}


def launch_forward(
    x: Tensor, bias: Tensor | None, activation: str, candidate: int = 0, out: Tensor | None = None
) -> Tensor:
    """activation(x + bias) [..., F], contiguous; `out` may be x itself if x is contiguous."""
    dim = x.shape[-1] // 2 if activation == "swiglu" else x.shape[-1]
    out = x.new_empty(*x.shape[:-1], dim) if out is None else out
    if is_fake(x) or out.numel() == 0:
        return out
    (bias,), x, rows = make_contiguous(bias), as_rows(x), out.numel() // dim
    choice = tuning.select("activation_forward", describe_rows(rows, dim), x.dtype, x.device, candidate)
    tile = _size_tile(dim, x.dtype, activation, choice)
    grid = (cdiv(dim, tile["COLS"]) * cdiv(rows, tile["ROWS"]),)
    _activation_fwd[grid](x, bias, out, x.stride(0), rows, **tile)
    return out


def launch_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, activation: str, bias_grad: bool, candidate: int = 0,
    *, with_y: bool = False, grad_x: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x and bias, and y recomputed; all contiguous. The last two are empty unless requested.

    The gradient of x is written to `grad_x`, which may be grad_y itself if grad_y is contiguous.
    """
    width = x.shape[-1]
    dim = width // 2 if activation == "swiglu" else width
    grad_x = x.new_empty(x.shape) if grad_x is None else grad_x
    y = x.new_empty((*x.shape[:-1], dim) if with_y else (0, dim))
    grad_bias = x.new_empty(width if bias_grad else 0, dtype=x.dtype if bias is None else bias.dtype)
    if is_fake(x) or x.numel() == 0:
        return grad_x, grad_bias.zero_(), y
    (bias,), grad_y, x, rows = make_contiguous(bias), as_rows(grad_y), as_rows(x), x.numel() // width
    rule = "swiglu_backward" if activation == "swiglu" else "activation_backward"
    choice = tuning.select(rule, describe_rows(rows, dim), x.dtype, x.device, candidate)
    tile = _size_tile(dim, x.dtype, activation, choice)
    columns = cdiv(dim, tile["COLS"])
    most = cdiv(tuning.describe_device(x.device).multiprocessors * choice["waves"], columns)
    programs = min(cdiv(rows, tile["ROWS"]), most)
    partial = x.new_empty(programs, width, dtype=torch.float32) if bias_grad else None
    tensors = (grad_y, x, bias, grad_x, y if with_y else None, partial)
    strides = (grad_y.stride(0), x.stride(0))
    _activation_bwd[(columns, programs)](*tensors, *strides, rows, STAGES=choice["stages"], **tile)
    return grad_x, grad_bias if partial is None else partial.sum(0).to(grad_bias.dtype), y


def compute_activation(x: Tensor, activation: str) -> Tensor:
    """activation(x) in plain PyTorch, for fallbacks."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


def compute_activation_gradient(grad_y: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of x in plain PyTorch. Autograd is not available inside an operator's body."""
    if activation == "quick_gelu":
        return torch.ops.aten.silu_backward(grad_y, 1.702 * x)
    return torch.ops.aten.gelu_backward(grad_y, x, approximate="none" if activation == "gelu" else "tanh")


def forward_fallback(x: Tensor, bias: Tensor | None, activation: str, candidate: int = 0) -> Tensor:
    z = x.float() if bias is None else x.float() + bias.float()
    if activation == "swiglu":
        gate, linear = z.chunk(2, -1)
        return (F.silu(gate) * linear).to(x.dtype)
    return compute_activation(z, activation).to(x.dtype)


def backward_fallback(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, activation: str, bias_grad: bool, candidate: int = 0
) -> tuple[Tensor, Tensor]:
    """The first two results of `launch_backward` in plain PyTorch."""
    z, grad_y = x.float() if bias is None else x.float() + bias.float(), grad_y.float()
    if activation == "swiglu":
        gate, linear = z.chunk(2, -1)
        grad = torch.cat([torch.ops.aten.silu_backward(grad_y * linear, gate), grad_y * F.silu(gate)], -1)
    else:
        grad = compute_activation_gradient(grad_y, z, activation)
    grad_bias = grad.flatten(0, -2).sum(0) if bias_grad else grad.new_empty(0)
    return grad.to(x.dtype), grad_bias.to(x.dtype if bias is None else bias.dtype)


@register("activation", fallback=forward_fallback)
def _activation(x: Tensor, bias: Tensor | None, activation: str, candidate: int) -> Tensor:
    return launch_forward(x, bias, activation, candidate)


@register("activation_backward", fallback=backward_fallback)
def _activation_backward(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, activation: str, bias_grad: bool, candidate: int
) -> tuple[Tensor, Tensor]:
    return launch_backward(grad_y, x, bias, activation, bias_grad, candidate)[:2]


def _setup_context(ctx, inputs, output) -> None:
    x, bias, ctx.activation, ctx.candidate = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad_y):
    return select_gradients(ctx, *_activation_backward(
        grad_y, *ctx.saved_tensors, ctx.activation, ctx.needs_input_grad[1], ctx.candidate
    ))  # fmt: skip


_activation.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor | None = None, activation: str = "gelu", *, candidate: int = 0) -> Tensor:
    """activation(x + bias) in one pass.

    The sum is not rounded before the activation. x is saved for backward. Not twice differentiable.

    Args:
        x: [..., F], float32, bfloat16 or float16; copied only if its rows need more than one stride.
        bias: [F] or None; any of these dtypes.
        activation: a key of `FORMULAS`.
        candidate: number of the tile in the tuning table, for forward and backward.

    Returns:
        [..., F] in x's dtype, contiguous.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or the activation is unknown.
    """
    check_activation(activation)
    _check_inputs(x, bias)
    return _activation(x, bias, activation, candidate)


def swiglu(x: Tensor, bias: Tensor | None = None, *, candidate: int = 0) -> Tensor:
    """silu(x1 + b1) * (x2 + b2), the gated unit of DINOv2 (giant) and DINOv3; one GEMM computes both halves.

    Args:
        x: [..., 2 F], the gate's half first; dtypes and strides as in `bias_gelu`.
        bias: [2 F] or None.
        candidate: as in `bias_gelu`.

    Returns:
        [..., F] in x's dtype, contiguous.

    Raises:
        ValueError: as in `bias_gelu`, or if x's last dimension is odd.
    """
    _check_inputs(x, bias)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension, two halves, got {list(x.shape)}")
    return _activation(x, bias, "swiglu", candidate)


def check_activation(activation: str) -> None:
    if activation not in FORMULAS:
        raise ValueError(f"activation: expected one of {', '.join(FORMULAS)}, got {activation!r}")


def _check_inputs(x: Tensor, bias: Tensor | None) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., F] with F at least 1, got {list(x.shape)}")
    check_tensor("x", x, x.shape, DTYPES, x.device)
    check_optional("bias", bias, x.shape[-1:], DTYPES, x.device)
