"""Matrix products with something done on the way in or out, so that it costs no pass over memory of its own.

    out = activation(norm(x) @ weight^T + bias) + residual      forward;  norm, bias, activation, residual each optional
    grad_pre = (grad_out @ weight) * activation'(pre)           backward through a linear layer and what it read

    x [rows, depth], weight [units, depth]  ->  out [rows, units];      grad_out [rows, depth], weight [depth, units]

The forward's pre-activation (before `activation`) is written only where backward needs it. The backward kernel also
gives activation(pre), which the layer's weight gradient needs and nobody kept, and the sums of grad_pre over the rows
of each tile, from which a second kernel makes the bias gradient: no atomics, the same bits every time.

LayerNorm on the way in takes the mean and 1 / standard deviation of each row and normalises the tile of x in registers,
then rounds it to the product's dtype: the very numbers a LayerNorm kernel would have written. (The other way, scaling
the weight by the norm's and correcting out = rstd * (x @ W'^T - mean * sum(W')) afterwards, keeps the loop free of it,
but loses the digits of mean / std: a row of nearly equal values comes out as noise.)

On GPUs whose copy engine takes tiles by descriptor (TMA: sm_90 and newer) a choice may be `persistent`: one or two
programs for each multiprocessor, working through tile after tile, so that the next tile's operands come in while the
epilogue of this one runs, and no address of x or weight is computed by a thread. Only for operands as they are:
descriptors copy straight to shared memory, which leaves nothing to normalise on the way, and want rows on 16-byte
boundaries.

cuBLAS is hard to beat at the product itself. What these kernels can gain, on ViT-B at batch 256 (an H100 at 3.0 TB/s):
the activation's pass of its own 207 us forward, writing and reading the gradient 207 us backward, the residual's pass
77 us, writing the normalised rows 26 us. Programs of neighbouring tiles run at the same time and share their rows and
columns in L2.

Also here: `linear_residual`, the second layer of a feed-forward or attention's output projection.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.gelu import (
    FORMULAS,
    activate,
    activate_with_slope,
    as_rows,
    launch_backward,
    without_autocast,
)
from fastvit.kernels.launch import launch
from fastvit.kernels.operators import operator
from fastvit.kernels.tuning import cdiv

# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(tile, rows, UNITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile by its number: GROUP tiles of rows for one of columns, then the next of columns, ..."""
    row_tiles = tl.cdiv(rows, ROWS)
    col_tiles: tl.constexpr = (UNITS + COLS - 1) // COLS
    first = tile // (GROUP * col_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * col_tiles)
    return first + within % height, within // height


@triton.jit
def _product(
    a_ptr, b_ptr, row, unit, rows, stride_a, stride_b_unit, stride_b_depth,
    statistics_ptr, norm_weight_ptr, norm_bias_ptr,  # [2, rows] float32, [depth] x2; or None: a as it is
    UNITS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """a[row, :] @ b[unit, :]^T in float32, [ROWS, COLS]."""
    row_mask = row < rows
    unit_mask = unit < UNITS
    if norm_weight_ptr is not None:
        mean = tl.load(statistics_ptr + row, row_mask, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + rows + row, row_mask, other=0.0)[:, None]
    a_rows = a_ptr + row.to(tl.int64)[:, None] * stride_a  # rows * depth passes 2**31 at large batches
    b_units = b_ptr + unit[None, :] * stride_b_unit
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, DEPTH, STEP):
        depth = start + tl.arange(0, STEP)
        a_mask = row_mask[:, None]
        b_mask = unit_mask[None, :]
        if DEPTH % STEP != 0:
            a_mask = a_mask & (depth < DEPTH)[None, :]
            b_mask = b_mask & (depth < DEPTH)[:, None]
        a = tl.load(a_rows + depth[None, :], a_mask, other=0.0)
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + depth, depth < DEPTH, other=0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_ptr + depth, depth < DEPTH, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) - mean) * rstd * norm_weight[None, :] + norm_bias[None, :]
        b = tl.load(b_units + depth[:, None] * stride_b_depth, b_mask, other=0.0)
        acc = tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")
    return acc


@triton.jit
def _product_by_descriptor(
    a, b, row, unit,  # descriptors of [rows, depth] and [units, depth]; where the tile begins
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, DEPTH_FIRST: tl.constexpr,
):  # fmt: skip
    """As `_product`, the operands as they are. DEPTH_FIRST: b is [depth, units]. What lies outside is read as 0."""
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, DEPTH, STEP):
        left = a.load([row, start])
        if DEPTH_FIRST:
            right = b.load([start, unit])
        else:
            right = b.load([unit, start]).T
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _quarters(acc, ROWS: tl.constexpr, COLS: tl.constexpr):
    """acc [ROWS, COLS] by columns: a whole tile's sums fill the registers, and what is done to them would spill."""
    HALF: tl.constexpr = COLS // 2
    QUARTER: tl.constexpr = COLS // 4
    left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
    first, second = tl.split(tl.permute(tl.reshape(left, (ROWS, 2, QUARTER)), (0, 2, 1)))
    third, fourth = tl.split(tl.permute(tl.reshape(right, (ROWS, 2, QUARTER)), (0, 2, 1)))
    return first, second, third, fourth


@triton.jit
def _store_linear(
    acc, row, unit, rows, bias_ptr, residual_ptr, pre_ptr, out_ptr, stride_residual,
    UNITS: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    mask = (row < rows)[:, None] & (unit < UNITS)[None, :]
    at = row.to(tl.int64)[:, None] * UNITS + unit[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + unit, unit < UNITS, other=0.0).to(tl.float32)[None, :]
    if FORMULA is not None:
        rounded = acc.to(out_ptr.dtype.element_ty)  # backward starts from it; without backward the same numbers
        if pre_ptr is not None:
            tl.store(pre_ptr + at, rounded, mask)
        acc = activate(rounded.to(tl.float32), FORMULA)
    if residual_ptr is not None:
        residual_at = row.to(tl.int64)[:, None] * stride_residual + unit[None, :]
        acc += tl.load(residual_ptr + residual_at, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc, mask)


@triton.jit
def _linear_fwd(
    x_ptr, weight_ptr, bias_ptr,                    # in:  [rows, depth], [units, depth], [units] or None
    statistics_ptr, norm_weight_ptr, norm_bias_ptr,  # in:  [2, rows] float32, [depth] x2; all or none
    residual_ptr,                                   # in:  [rows, units] or None
    pre_ptr, out_ptr,                               # out: [rows, units] or None, [rows, units]
    stride_x, stride_residual, rows,
    UNITS: tl.constexpr, DEPTH: tl.constexpr, FORMULA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = _place(tl.program_id(0), rows, UNITS, ROWS, COLS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    unit = col_tile * COLS + tl.arange(0, COLS)
    acc = _product(
        x_ptr, weight_ptr, row, unit, rows, stride_x, DEPTH, 1, statistics_ptr, norm_weight_ptr, norm_bias_ptr,
        UNITS, DEPTH, ROWS, COLS, STEP,
    )  # fmt: skip
    quarters = _quarters(acc, ROWS, COLS)
    for i in tl.static_range(4):
        unit = col_tile * COLS + i * (COLS // 4) + tl.arange(0, COLS // 4)
        _store_linear(
            quarters[i], row, unit, rows, bias_ptr, residual_ptr, pre_ptr, out_ptr, stride_residual, UNITS, FORMULA
        )


@triton.jit
def _linear_fwd_persistent(
    x, weight,                                      # in:  descriptors of [rows, depth], [units, depth]
    bias_ptr, residual_ptr,                         # in:  [units] or None, [rows, units] or None
    pre_ptr, out_ptr,                               # out: [rows, units] or None, [rows, units]
    stride_residual, rows, programs,
    UNITS: tl.constexpr, DEPTH: tl.constexpr, FORMULA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS) * ((UNITS + COLS - 1) // COLS)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        row_tile, col_tile = _place(tile, rows, UNITS, ROWS, COLS, GROUP)
        acc = _product_by_descriptor(x, weight, row_tile * ROWS, col_tile * COLS, DEPTH, ROWS, COLS, STEP, False)
        row = row_tile * ROWS + tl.arange(0, ROWS)
        quarters = _quarters(acc, ROWS, COLS)
        for i in tl.static_range(4):
            unit = col_tile * COLS + i * (COLS // 4) + tl.arange(0, COLS // 4)
            _store_linear(
                quarters[i], row, unit, rows, bias_ptr, residual_ptr, pre_ptr, out_ptr, stride_residual, UNITS, FORMULA
            )


@triton.jit
def _store_slope(
    grad_y, row_tile, row, unit, rows, pre_ptr, grad_pre_ptr, y_ptr, partial_ptr,
    UNITS: tl.constexpr, FORMULA: tl.constexpr,
):  # fmt: skip
    mask = (row < rows)[:, None] & (unit < UNITS)[None, :]
    at = row.to(tl.int64)[:, None] * UNITS + unit[None, :]
    y, slope = activate_with_slope(tl.load(pre_ptr + at, mask, other=0.0).to(tl.float32), FORMULA)
    if y_ptr is not None:
        tl.store(y_ptr + at, y, mask)
    grad_pre = grad_y * slope
    tl.store(grad_pre_ptr + at, grad_pre, mask)
    if partial_ptr is not None:
        tl.store(partial_ptr + row_tile * UNITS + unit, tl.sum(grad_pre, 0), unit < UNITS)


@triton.jit
def _linear_activation_bwd(
    grad_out_ptr, weight_ptr, pre_ptr,              # in:  [rows, depth], [depth, units], [rows, units]
    grad_pre_ptr, y_ptr,                            # out: [rows, units], [rows, units] or None
    partial_ptr,                                    # out: [row tiles, units] float32 or None
    stride_grad_out, rows,
    UNITS: tl.constexpr, DEPTH: tl.constexpr, FORMULA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = _place(tl.program_id(0), rows, UNITS, ROWS, COLS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    unit = col_tile * COLS + tl.arange(0, COLS)
    grad_y = _product(
        grad_out_ptr, weight_ptr, row, unit, rows, stride_grad_out, 1, UNITS, None, None, None,
        UNITS, DEPTH, ROWS, COLS, STEP,
    )  # fmt: skip
    quarters = _quarters(grad_y, ROWS, COLS)
    for i in tl.static_range(4):
        unit = col_tile * COLS + i * (COLS // 4) + tl.arange(0, COLS // 4)
        _store_slope(quarters[i], row_tile, row, unit, rows, pre_ptr, grad_pre_ptr, y_ptr, partial_ptr, UNITS, FORMULA)


@triton.jit
def _linear_activation_bwd_persistent(
    grad_out, weight,                               # in:  descriptors of [rows, depth], [depth, units]
    pre_ptr,                                        # in:  [rows, units]
    grad_pre_ptr, y_ptr,                            # out: [rows, units], [rows, units] or None
    partial_ptr,                                    # out: [row tiles, units] float32 or None
    rows, programs,
    UNITS: tl.constexpr, DEPTH: tl.constexpr, FORMULA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(rows, ROWS) * ((UNITS + COLS - 1) // COLS)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        row_tile, col_tile = _place(tile, rows, UNITS, ROWS, COLS, GROUP)
        grad_y = _product_by_descriptor(
            grad_out, weight, row_tile * ROWS, col_tile * COLS, DEPTH, ROWS, COLS, STEP, True
        )
        row = row_tile * ROWS + tl.arange(0, ROWS)
        quarters = _quarters(grad_y, ROWS, COLS)
        for i in tl.static_range(4):
            unit = col_tile * COLS + i * (COLS // 4) + tl.arange(0, COLS // 4)
            _store_slope(
                quarters[i], row_tile, row, unit, rows, pre_ptr, grad_pre_ptr, y_ptr, partial_ptr, UNITS, FORMULA
            )


# ---------------------------------------------------------------------------------------------------------------------
# Launchers. A choice's `fused` says whether the kernels above make the product, or cuBLAS and other kernels the rest
# ---------------------------------------------------------------------------------------------------------------------


def shape_class(rows: int, depth: int, units: int) -> str:
    return f"{depth} to {units}, {'many' if rows >= 8192 else 'few'} rows"


def _tile(choice: tuning.Choice) -> dict[str, int]:
    return {
        "ROWS": choice["rows"],
        "COLS": choice["columns"],
        "STEP": choice["depth"],
        "GROUP": 8,
        "num_warps": choice["num_warps"],
        "num_stages": choice["num_stages"],
    }


def descriptor_of(choice: tuning.Choice, matrix: Tensor, *block: int) -> TensorDescriptor | None:
    """A descriptor that copies `block` = (rows, columns) of `matrix` at a time, where the choice is for one.

    None where the hardware cannot: a row that does not begin on a 16-byte boundary, or is not contiguous. The choice's
    tile is then computed by the kernel that reads by address.
    """
    fits = (
        matrix.stride(1) == 1
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and (matrix.device.type == "meta" or matrix.data_ptr() % 16 == 0)
    )
    return TensorDescriptor.from_tensor(matrix, list(block)) if choice.get("persistent") and fits else None


def launch_linear(
    choice: tuning.Choice,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    keep_pre: bool = False,
) -> tuple[Tensor, Tensor]:
    """(pre, out), [rows, units] each, pre empty where it is not kept; norm: its statistics, weight and bias."""
    (rows, depth), units = x.shape, weight.shape[0]
    dtype = weight.dtype if residual is None else torch.result_type(weight, residual)
    out = torch.empty(rows, units, dtype=dtype, device=x.device)
    pre = torch.empty_like(out) if keep_pre else out.new_empty(0)
    if rows == 0:
        return pre, out
    tiles = cdiv(rows, choice["rows"]) * cdiv(units, choice["columns"])
    described = (
        descriptor_of(choice, x, choice["rows"], choice["depth"]),
        descriptor_of(choice, weight, choice["columns"], choice["depth"]),
    )
    stride_residual = 0 if residual is None else residual.stride(0)
    outputs = (residual, pre if keep_pre else None, out)
    settings = {"UNITS": units, "DEPTH": depth, "FORMULA": activation and FORMULAS[activation], **_tile(choice)}
    if norm is not None or None in described:
        tensors = (x, weight, bias, *(norm or (None, None, None)), *outputs)
        launch(_linear_fwd, (tiles,), tensors, (x.stride(0), stride_residual, rows), settings)
        return pre, out
    programs = min(tiles, choice["persistent"] * tuning.describe(x.device).multiprocessors)
    with torch.cuda.device_of(x):
        _linear_fwd_persistent[(programs,)](*described, bias, *outputs, stride_residual, rows, programs, **settings)
    return pre, out


def linear_activation_backward(
    grad_out: Tensor, weight: Tensor, pre: Tensor, activation: str, *, bias_grad: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre and of the bias it contains, and activation(pre), for out = activation(pre) @ weight^T.

    grad_out: [rows, depth]; weight: [depth, units]; pre: [rows, units], contiguous. The last two of what is returned
    have no elements where not wanted.
    """

    def run(choice: tuning.Choice) -> tuple[Tensor, Tensor, Tensor]:
        return launch_linear_activation_backward(
            choice, grad_out, weight, pre, activation, bias_grad=bias_grad, with_y=with_y
        )

    shape = shape_class(pre.shape[0], *weight.shape)
    return run(tuning.choose("linear_activation_backward", shape, weight.dtype, weight.device, run))


def launch_linear_activation_backward(
    choice: tuning.Choice, grad_out: Tensor, weight: Tensor, pre: Tensor, activation: str, *, bias_grad, with_y
) -> tuple[Tensor, Tensor, Tensor]:
    rows, units = pre.shape
    if not choice["fused"] or rows == 0:
        grad_y = grad_out @ weight
        return launch_backward(grad_y, pre, None, activation, bias_grad=bias_grad, with_y=with_y, grad_x=grad_y)
    grad_pre = torch.empty_like(pre)
    y = pre.new_empty(pre.shape if with_y else (0, units))
    row_tiles = cdiv(rows, choice["rows"])
    partial = pre.new_empty(row_tiles, units, dtype=torch.float32) if bias_grad else None
    tiles = row_tiles * cdiv(units, choice["columns"])
    described = (
        descriptor_of(choice, grad_out, choice["rows"], choice["depth"]),
        descriptor_of(choice, weight, choice["depth"], choice["columns"]),
    )
    outputs = (pre, grad_pre, y if with_y else None, partial)
    settings = {"UNITS": units, "DEPTH": weight.shape[0], "FORMULA": FORMULAS[activation], **_tile(choice)}
    if None in described:
        tensors = (grad_out, weight, *outputs)
        launch(_linear_activation_bwd, (tiles,), tensors, (grad_out.stride(0), rows), settings)
    else:
        programs = min(tiles, choice["persistent"] * tuning.describe(pre.device).multiprocessors)
        with torch.cuda.device_of(pre):
            _linear_activation_bwd_persistent[(programs,)](*described, *outputs, rows, programs, **settings)
    return grad_pre, pre.new_empty(0) if partial is None else partial.sum(0).to(pre.dtype), y


def launch_linear_residual(
    choice: tuning.Choice, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor
) -> Tensor:
    if choice["fused"]:
        return launch_linear(choice, x, weight, bias, residual=residual)[1]
    if bias is None and residual.dtype == weight.dtype:
        return torch.addmm(residual, x, weight.t())  # the product adds to a copy of residual: rounded once, not twice
    out = F.linear(x, weight, bias)
    if out.dtype == torch.result_type(out, residual):
        return out.add_(residual)
    return out + residual


# ---------------------------------------------------------------------------------------------------------------------
# linear_residual: the operator and the function
# ---------------------------------------------------------------------------------------------------------------------


@operator("linear_residual")
@without_autocast
def _linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    x_rows, residual_rows = as_rows(x), as_rows(residual)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()

    def run(choice: tuning.Choice) -> Tensor:
        return launch_linear_residual(choice, x_rows, weight, bias, residual_rows)

    shape = shape_class(x_rows.shape[0], *weight.t().shape)
    return run(tuning.choose("linear_residual", shape, weight.dtype, weight.device, run)).view(residual.shape)


@_linear_residual.register_fake
def _(x, weight, bias, residual):
    return x.new_empty(residual.shape, dtype=torch.result_type(weight, residual))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, residual = inputs
    ctx.save_for_backward(x, weight)
    ctx.residual_dtype = residual.dtype


def _backward(ctx, grad):
    """Plain products and a sum: nothing here to fuse."""
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1]).to(weight.dtype)
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (rows @ weight).view(x.shape)
    if ctx.needs_input_grad[1]:
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias, grad.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None


_linear_residual.register_autograd(_backward, setup_context=_setup_context)


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x @ weight^T + bias: a linear layer that adds to the residual stream.

    x: [..., K]; weight: [D, K] and bias: [D] or None, of x's dtype, float32, bfloat16 or float16; under autocast all
        three are cast as for a linear layer. residual: [..., D], of x's leading shape, any of these dtypes.
    Returns [..., D], contiguous, in the dtype that weight and residual promote to.
    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_linear(x, weight, bias)
    check_tensor("x", x, x.shape, (weight.dtype,), x.device)
    check_tensor("residual", residual, (*x.shape[:-1], weight.shape[0]), DTYPES, x.device)
    return _linear_residual(x, weight, bias, residual)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = "") -> None:
    """weight [units, x's last dimension], bias [units]; suffix: of their names in the error."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D at least 1, got {list(x.shape)}")
    check_tensor("x", x, x.shape, DTYPES, x.device)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight{suffix}: expected [units, {x.shape[-1]}], got {list(weight.shape)}")
    check_tensor(f"weight{suffix}", weight, weight.shape, DTYPES, x.device)
    if bias is not None:
        check_tensor(f"bias{suffix}", bias, weight.shape[:1], (weight.dtype,), x.device)
