"""Matmuls with an activation in the epilogue, so that it needs no pass over memory of its own.

    pre      = x @ weight^T + bias,  out = activation(pre)          forward; bias and activation are optional
    grad_pre = (grad_out @ weight) * activation'(pre)               backward of a linear layer and its activation

    x [rows, depth], weight [units, depth]  ->  pre, out [rows, units]
    grad_out [rows, depth], weight [depth, units], pre [rows, units]  ->  grad_pre [rows, units]

The forward writes pre only if backward needs it. The backward also returns activation(pre), which was not saved but is
needed for the weight gradient of the second layer, and the bias gradient: each tile writes the sum of grad_pre over its
rows, and PyTorch sums over the tiles. There are no atomics: two runs are bitwise equal.

Three implementations, the candidates of `fastvit.kernels.tuning`:
    0   cuBLAS, then the activation as a separate pass (`fastvit.kernels.gelu`)
    1   one fused kernel, one program per tile; programs of neighbouring tiles share their operands in L2
    2   one fused persistent kernel: as many programs as fit on the GPU process tile after tile; the GPU's copy engine
        loads the operands (TMA: sm_90 and newer), so that no thread computes an address

Computed for ViT-B at batch 256 and an H100's 3.0 TB/s, fusing saves 207 us in forward (103 us in training, which writes
pre) and 207 us in backward, unless our matmul is slower than cuBLAS's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit.kernels import gelu, tuning
from fastvit.kernels.checks import DTYPES, check_optional, check_tensor
from fastvit.kernels.gelu import activate, activate_with_slope
from fastvit.kernels.operators import is_fake
from fastvit.kernels.tuning import cdiv


@triton.jit
def _locate_tile(tile, rows, UNITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile by its number. Tiles are numbered in groups of GROUP row tiles, column by column."""
    row_tiles = tl.cdiv(rows, ROWS)
    col_tiles: tl.constexpr = (UNITS + COLS - 1) // COLS
    first = tile // (GROUP * col_tiles) * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tile % (GROUP * col_tiles)
    return first + within % height, within // height


@triton.jit
def _matmul(
    a_ptr, b_ptr, row_tile, col_tile, rows, stride_a, stride_b_unit, stride_b_depth,
    UNITS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of a [rows, depth] @ b [units, depth]^T in float32, [ROWS, COLS]."""
    row = row_tile * ROWS + tl.arange(0, ROWS)
    unit = col_tile * COLS + tl.arange(0, COLS)
    a_rows = a_ptr + row.to(tl.int64)[:, None] * stride_a  # rows * depth exceeds 2**31 at large batches
    b_units = b_ptr + unit[None, :] * stride_b_unit
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, DEPTH, STEP):
        depth = start + tl.arange(0, STEP)
        a_mask = (row < rows)[:, None]
        b_mask = (unit < UNITS)[None, :]
        if DEPTH % STEP != 0:
            a_mask = a_mask & (depth < DEPTH)[None, :]
            b_mask = b_mask & (depth < DEPTH)[:, None]
        a = tl.load(a_rows + depth[None, :], a_mask, other=0.0)
        b = tl.load(b_units + depth[:, None] * stride_b_depth, b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _matmul_by_descriptor(
    a, b, row_tile, col_tile,  # descriptors of [rows, depth] and [units, depth]
    DEPTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, DEPTH_FIRST: tl.constexpr,
):  # fmt: skip
    """As `_matmul`. DEPTH_FIRST: b is [depth, units]. Elements out of bounds are read as 0."""
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, DEPTH, STEP):
        left = a.load([row_tile * ROWS, start])
        if DEPTH_FIRST:
            right = b.load([start, col_tile * COLS])
        else:
            right = b.load([col_tile * COLS, start]).T
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _split_quarters(acc, ROWS: tl.constexpr, COLS: tl.constexpr):
    """acc [ROWS, COLS] in four parts by columns: acc fills the registers, so an epilogue over all of it would spill."""
    HALF: tl.constexpr = COLS // 2
    QUARTER: tl.constexpr = COLS // 4
    left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
    first, second = tl.split(tl.permute(tl.reshape(left, (ROWS, 2, QUARTER)), (0, 2, 1)))
    third, fourth = tl.split(tl.permute(tl.reshape(right, (ROWS, 2, QUARTER)), (0, 2, 1)))
    return first, second, third, fourth


@triton.jit
def _fused_tile(
    a, b, bias_ptr, pre_ptr, out_ptr, y_ptr, partial_ptr, stride_a, tile, rows,
    BACKWARD: tl.constexpr, PERSISTENT: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, FORMULA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = _locate_tile(tile, rows, UNITS, ROWS, COLS, GROUP)
    if PERSISTENT:
        acc = _matmul_by_descriptor(a, b, row_tile, col_tile, DEPTH, ROWS, COLS, STEP, BACKWARD)
    elif BACKWARD:
        acc = _matmul(a, b, row_tile, col_tile, rows, stride_a, 1, UNITS, UNITS, DEPTH, ROWS, COLS, STEP)
    else:
        acc = _matmul(a, b, row_tile, col_tile, rows, stride_a, DEPTH, 1, UNITS, DEPTH, ROWS, COLS, STEP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    quarters = _split_quarters(acc, ROWS, COLS)
    for i in tl.static_range(4):
        unit = col_tile * COLS + i * (COLS // 4) + tl.arange(0, COLS // 4)
        mask = (row < rows)[:, None] & (unit < UNITS)[None, :]
        at = row.to(tl.int64)[:, None] * UNITS + unit[None, :]
        out = quarters[i]
        if BACKWARD:
            y, slope = activate_with_slope(tl.load(pre_ptr + at, mask, other=0.0).to(tl.float32), FORMULA)
            if y_ptr is not None:
                tl.store(y_ptr + at, y, mask)
            out = out * slope
        else:
            if bias_ptr is not None:
                out += tl.load(bias_ptr + unit, unit < UNITS, other=0.0).to(tl.float32)[None, :]
            if FORMULA is not None:
                rounded = out.to(out_ptr.dtype.element_ty)  # as backward reads it; the same result in inference
                if pre_ptr is not None:
                    tl.store(pre_ptr + at, rounded, mask)
                out = activate(rounded.to(tl.float32), FORMULA)
        tl.store(out_ptr + at, out, mask)
        if partial_ptr is not None:
            tl.store(partial_ptr + row_tile * UNITS + unit, tl.sum(out, 0), unit < UNITS)


@triton.jit
def _linear(
    a, b,                                           # in:  x and weight, BACKWARD grad_out and weight (see `_launch`);
                                                    #      PERSISTENT: their descriptors
    bias_ptr, pre_ptr,                              # in:  [units] or None; [rows, units] (forward: out, or None)
    out_ptr, y_ptr,                                 # out: out or grad_pre, and activation(pre) or None, [rows, units]
    partial_ptr,                                    # out: [row tiles, units] float32 or None
    stride_a, rows, programs,
    BACKWARD: tl.constexpr, PERSISTENT: tl.constexpr, UNITS: tl.constexpr, DEPTH: tl.constexpr, FORMULA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS) * ((UNITS + COLS - 1) // COLS), programs):
            _fused_tile(
                a, b, bias_ptr, pre_ptr, out_ptr, y_ptr, partial_ptr, stride_a, tile, rows,
                BACKWARD, PERSISTENT, UNITS, DEPTH, FORMULA, ROWS, COLS, STEP, GROUP,
            )  # fmt: skip
    else:
        _fused_tile(
            a, b, bias_ptr, pre_ptr, out_ptr, y_ptr, partial_ptr, stride_a, tl.program_id(0), rows,
            BACKWARD, PERSISTENT, UNITS, DEPTH, FORMULA, ROWS, COLS, STEP, GROUP,
        )  # fmt: skip


def make_descriptor(choice: tuning.Choice, matrix: Tensor, *block: int) -> TensorDescriptor | None:
    """A descriptor that copies tiles `block` = (rows, columns) of `matrix`, if the choice is persistent.

    None where the hardware cannot: rows that are not contiguous, not aligned to 16 bytes, or overlapping (a stride of
    0). The kernel that computes addresses then uses the choice's tile.
    """
    fits = (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and (matrix.device.type == "meta" or matrix.data_ptr() % 16 == 0)
    )
    return TensorDescriptor.from_tensor(matrix, list(block)) if choice.get("persistent") and fits else None


def _launch(choice, a, b, outputs, activation: str | None, backward: bool) -> None:
    """Launch the kernel for a [rows, depth] and b: [depth, units] in backward, [units, depth] in forward."""
    (rows, depth), units = a.shape, b.shape[1 if backward else 0]
    height, width, step = choice["rows"], choice["columns"], choice["depth"]
    tiles, block = cdiv(rows, height) * cdiv(units, width), (step, width) if backward else (width, step)
    operands, programs = (make_descriptor(choice, a, height, step), make_descriptor(choice, b, *block)), 1
    is_persistent = None not in operands
    if is_persistent:
        tiles = programs = min(tiles, choice["persistent"] * tuning.describe_device(a.device).multiprocessors)
    else:
        operands = (a, b)
    _linear[(tiles,)](
        *operands, *outputs, a.stride(0), rows, programs,
        BACKWARD=backward, PERSISTENT=is_persistent, UNITS=units, DEPTH=depth,
        FORMULA=None if activation is None else gelu.get_formula(activation, b.dtype),
        ROWS=height, COLS=width, STEP=step, GROUP=8, num_warps=choice["num_warps"], num_stages=choice["num_stages"],
    )  # fmt: skip


def _find_fused_tile(operation: str, rows: int, weight: Tensor, candidate: int) -> tuning.Choice | None:
    """The fused kernel's tile, or None where cuBLAS is used: for candidate 0, for no rows, and for fake tensors, whose
    shapes PyTorch's own operations compute."""
    if is_fake(weight) or rows == 0:
        return None
    shape = f"{weight.shape[1]} to {weight.shape[0]}"
    choice = tuning.select(operation, shape, weight.dtype, weight.device, candidate)
    return choice if choice["fused"] else None


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_pre: bool, candidate: int
) -> tuple[Tensor, Tensor]:
    """Returns pre = x @ weight^T + bias (empty unless keep_pre) and out = activation(pre), both [rows, units].

    x is [rows, depth], its rows may be strided; weight [units, depth] and bias [units] are contiguous and of x's dtype.
    With activation None, out is pre and the first result is empty.
    """
    if (choice := _find_fused_tile("linear_forward", x.shape[0], weight, candidate)) is None:
        pre = F.linear(x, weight, bias)
        if activation is None:
            return pre.new_empty(0), pre
        out = gelu.launch_forward(pre, None, activation, out=None if keep_pre else pre)
        return pre if keep_pre else pre.new_empty(0), out
    out = weight.new_empty(x.shape[0], weight.shape[0])
    pre = torch.empty_like(out) if keep_pre else out.new_empty(0)
    _launch(choice, x, weight, (bias, pre if keep_pre else None, out, None, None), activation, backward=False)
    return pre, out


def launch_backward(
    grad_out: Tensor, weight: Tensor, pre: Tensor, activation: str, *, bias_grad: bool, with_y: bool, candidate: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of pre [rows, units] and of its bias [units], and activation(pre), for
    out = activation(pre) @ weight^T. The last two are empty unless bias_grad and with_y are set.

    grad_out is [rows, depth], its rows may be strided; weight [depth, units] and pre [rows, units] are contiguous.
    """
    rows, units = pre.shape
    if (choice := _find_fused_tile("linear_backward", rows, weight.t(), candidate)) is None:
        grad_y = grad_out @ weight
        return gelu.launch_backward(grad_y, pre, None, activation, bias_grad, with_y=with_y, grad_x=grad_y)
    grad_pre = torch.empty_like(pre)
    y = pre.new_empty(pre.shape if with_y else (0, units))
    partial = pre.new_empty(cdiv(rows, choice["rows"]), units, dtype=torch.float32) if bias_grad else None
    _launch(choice, grad_out, weight, (None, pre, grad_pre, y if with_y else None, partial), activation, backward=True)
    return grad_pre, pre.new_empty(0) if partial is None else partial.sum(0).to(pre.dtype), y


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, suffix: str = "") -> None:
    """Raise ValueError unless weight is [units, x's last dimension] and bias [units]. suffix: of their names."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D at least 1, got {list(x.shape)}")
    check_tensor("x", x, x.shape, DTYPES, x.device)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight{suffix}: expected [units, {x.shape[-1]}], got {list(weight.shape)}")
    check_tensor(f"weight{suffix}", weight, weight.shape, DTYPES, x.device)
    check_optional(f"bias{suffix}", bias, weight.shape[:1], (weight.dtype,), x.device)
