"""LayerNorm, alone or in one pass with the residual add before it.

    residual' = residual + row_scale * scale * x        (scale: LayerScale; row_scale: drop path; both optional)
    y         = (residual' - mean) * rstd * weight + bias,    rstd = 1 / sqrt(variance + eps), over the last dimension

Add and LayerNorm apart read and write 7 row-lengths of memory, together 4. Backward reads the two incoming gradients
and residual' once each and writes their common gradient once: 4 instead of 3 + 1 + 3; the normalised rows are computed
again from mean and rstd, not kept, and y with them where a product's weight gradient asks for it.

A program holds whole rows in registers, cut into `CHUNKS` pieces of `CHUNK` columns: 768 is 3 x 256, where one power of
two would leave a quarter of the threads idle. Sums are float32, the variance is that of the centred values (two passes
over registers cost no memory traffic). Weight gradients take two steps without atomics, so two runs give the same bits:
a fixed number of programs each add up their own rows, and PyTorch adds up the programs.

Ba, Kiros & Hinton 2016, arXiv:1607.06450; LayerScale: Touvron et al. 2021, arXiv:2103.17239; drop path: Huang et al.
2016, arXiv:1603.09382.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import tuning
from fastvit.kernels.checks import DTYPES, check_tensor
from fastvit.kernels.launch import launch
from fastvit.kernels.operators import operator
from fastvit.kernels.tuning import cdiv, next_power_of_2

MAX_DIM = 8192  # rows of 16,384 spill in backward, whatever the number of warps


# Rows are [outer, inner]: a view such as tokens[:, 1:] has another step from picture to picture than from token to
# token. Where one step reaches every row, inner is 1 and the division below is gone at compile time.
@triton.jit
def _row_offsets(row, inner, stride_outer, stride_inner):
    row = row.to(tl.int64)  # rows * dim passes 2**31 at large batches
    return ((row // inner) * stride_outer + (row % inner) * stride_inner)[:, None]


@triton.jit
def _chunk(index: tl.constexpr, row_mask, DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Columns [ROWS, CHUNK] of one piece, and which of its elements exist.

    Columns are repeated for each row, so that the loads of weight and bias come out in the layout of the rows: 16 bytes
    a thread, and no exchange through shared memory.
    """
    cols = tl.broadcast_to((index * CHUNK + tl.arange(0, CHUNK))[None, :], [ROWS, CHUNK])
    mask = tl.broadcast_to(row_mask[:, None], [ROWS, CHUNK])
    if DIM % CHUNK != 0:
        mask = mask & (cols < DIM)
    return cols, mask


@triton.jit
def _layer_norm_fwd(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,      # in:  [rows, dim], [rows, dim] or None, [dim] x2
    scale_ptr, row_scale_ptr,                       # in:  [dim] or None, [outer] float32 or None
    sum_ptr, y_ptr, statistics_ptr,                 # out: [rows, dim] x2 (None: no residual, not wanted), [2, rows]
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    rows, inner, eps,
    DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    x_rows = x_ptr + _row_offsets(row, inner, stride_x_outer, stride_x_inner)
    out_rows = row.to(tl.int64)[:, None] * DIM
    if residual_ptr is not None:
        residual_rows = residual_ptr + _row_offsets(row, inner, stride_residual_outer, stride_residual_inner)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row // inner, row_mask, other=0.0)[:, None]

    values = ()
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        value = tl.load(x_rows + cols, mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            value = value * tl.load(scale_ptr + cols, mask, other=0.0).to(tl.float32)
        if row_scale_ptr is not None:
            value = value * row_scale
        if residual_ptr is not None:
            value = value + tl.load(residual_rows + cols, mask, other=0.0).to(tl.float32)
            rounded = value.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + out_rows + cols, rounded, mask)
            value = rounded.to(tl.float32)  # normalise what the next layer will read
        values = values + (value,)

    total = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        total += tl.sum(values[i], 1)
    mean = total / DIM
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        centred = values[i] - mean[:, None]
        if DIM % CHUNK != 0:
            centred = tl.where(cols < DIM, centred, 0.0)
        squares += tl.sum(centred * centred, 1)
    rstd = tl.rsqrt(squares / DIM + eps)

    if y_ptr is not None:
        for i in tl.static_range(CHUNKS):
            cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
            weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
            y = (values[i] - mean[:, None]) * rstd[:, None] * weight + bias
            tl.store(y_ptr + out_rows + cols, y, mask)
    tl.store(statistics_ptr + row, mean, row_mask)
    tl.store(statistics_ptr + rows + row, rstd, row_mask)


@triton.jit
def _layer_norm_bwd(
    grad_y_ptr, grad_sum_ptr, sum_ptr, x_ptr,       # in:  [rows, dim] each; grad_sum, x: or None
    weight_ptr, bias_ptr, scale_ptr, row_scale_ptr,  # in: [dim], [dim] or None x2, [outer] float32 or None
    statistics_ptr,                                 # in:  [2, rows] float32: mean, rstd
    grad_residual_ptr, grad_x_ptr, y_ptr,           # out: [rows, dim], [rows, dim] or None x2
    partial_ptr,                                    # out: [2 or 3, programs, dim] float32 or None
    stride_grad_y_outer, stride_grad_y_inner, stride_grad_sum_outer, stride_grad_sum_inner,
    stride_sum_outer, stride_sum_inner, stride_x_outer, stride_x_inner,
    rows, inner,
    DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """x is given where the gradient of scale is wanted, bias where y is; partial sums are those of weight, bias and
    then scale."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    weight_sums, bias_sums, scale_sums = (), (), ()
    for i in tl.static_range(CHUNKS):
        zero = tl.zeros([ROWS, CHUNK], tl.float32)
        weight_sums, bias_sums, scale_sums = weight_sums + (zero,), bias_sums + (zero,), scale_sums + (zero,)

    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        row_mask = row < rows
        grad_y_rows = grad_y_ptr + _row_offsets(row, inner, stride_grad_y_outer, stride_grad_y_inner)
        sum_rows = sum_ptr + _row_offsets(row, inner, stride_sum_outer, stride_sum_inner)
        out_rows = row.to(tl.int64)[:, None] * DIM
        mean = tl.load(statistics_ptr + row, row_mask, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + rows + row, row_mask, other=0.0)[:, None]

        # grad = rstd * (g - mean(g) - normalized * mean(g * normalized)),  g = grad_y * weight
        grads, normals, new_weight_sums, new_bias_sums = (), (), (), ()
        total = tl.zeros([ROWS], tl.float32)
        projection = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(CHUNKS):
            cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
            grad_y = tl.load(grad_y_rows + cols, mask, other=0.0).to(tl.float32)
            normal = (tl.load(sum_rows + cols, mask, other=0.0).to(tl.float32) - mean) * rstd
            if partial_ptr is not None:
                new_weight_sums = new_weight_sums + (weight_sums[i] + grad_y * normal,)
                new_bias_sums = new_bias_sums + (bias_sums[i] + grad_y,)
            weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
            if y_ptr is not None:
                y = normal * weight + tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
                tl.store(y_ptr + out_rows + cols, y, mask)
            grad = grad_y * weight
            total += tl.sum(grad, 1)
            projection += tl.sum(grad * normal, 1)
            grads, normals = grads + (grad,), normals + (normal,)
        if partial_ptr is not None:
            weight_sums, bias_sums = new_weight_sums, new_bias_sums

        if grad_sum_ptr is not None:
            grad_sum_rows = grad_sum_ptr + _row_offsets(row, inner, stride_grad_sum_outer, stride_grad_sum_inner)
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + row // inner, row_mask, other=0.0)[:, None]
        if x_ptr is not None:
            x_rows = x_ptr + _row_offsets(row, inner, stride_x_outer, stride_x_inner)
        new_scale_sums = ()
        for i in tl.static_range(CHUNKS):
            cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
            grad = (grads[i] - (total / DIM)[:, None] - normals[i] * (projection / DIM)[:, None]) * rstd
            if grad_sum_ptr is not None:
                grad += tl.load(grad_sum_rows + cols, mask, other=0.0).to(tl.float32)
            tl.store(grad_residual_ptr + out_rows + cols, grad, mask)
            if row_scale_ptr is not None:
                grad = grad * row_scale
            if x_ptr is not None:
                x = tl.load(x_rows + cols, mask, other=0.0).to(tl.float32)
                new_scale_sums = new_scale_sums + (scale_sums[i] + grad * x,)
            if grad_x_ptr is not None:
                if scale_ptr is not None:
                    grad = grad * tl.load(scale_ptr + cols, mask, other=0.0).to(tl.float32)
                tl.store(grad_x_ptr + out_rows + cols, grad, mask)
        if x_ptr is not None:
            scale_sums = new_scale_sums

    if partial_ptr is not None:
        for i in tl.static_range(CHUNKS):
            cols = i * CHUNK + tl.arange(0, CHUNK)
            partial = partial_ptr + program * DIM + cols
            tl.store(partial, tl.sum(weight_sums[i], 0), cols < DIM)
            tl.store(partial + programs * DIM, tl.sum(bias_sums[i], 0), cols < DIM)
            if x_ptr is not None:
                tl.store(partial + 2 * programs * DIM, tl.sum(scale_sums[i], 0), cols < DIM)


def _tile(dim: int, itemsize: int, choice: tuning.Choice) -> dict[str, int]:
    """Compile-time sizes for rows of `dim` values, the widest of `itemsize` bytes, from a choice of the table."""
    vector = 16 // itemsize  # values in one load of 16 bytes
    chunk = next_power_of_2(cdiv(dim, choice["elements"] // vector))
    chunk = max(chunk, min(64, next_power_of_2(dim)))
    num_warps = max(choice["num_warps"], chunk // (32 * vector))  # so that a thread holds `elements` and no more
    return {
        "DIM": dim,
        "ROWS": max(1, min(16, num_warps * 32 * vector // chunk)),
        "CHUNK": chunk,
        "CHUNKS": cdiv(dim, chunk),
        "num_warps": num_warps,
    }


def _shape(rows: int, dim: int) -> str:
    return f"{next_power_of_2(dim)}, {'many' if rows >= 8192 else 'few'} rows"


def _rows(*tensors: Tensor | None, per_sample: bool) -> tuple[int, list[Tensor | None], list[int]]:
    """How to step through the rows of tensors of one shape [..., D]: `inner`, the tensors, two strides for each.

    Strided rows are read where they lie. A tensor is copied only where its last dimension is not contiguous, or where
    its rows need more than two strides. per_sample: rows must be told apart by sample, the first dimension.
    """
    shape = next(tensor.shape for tensor in tensors if tensor is not None)
    dim = shape[-1]
    if not per_sample and all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return 1, list(tensors), [dim, 0] * len(tensors)
    outer, inner = (shape[0] if len(shape) > 1 else 1), math.prod(shape[1:-1])
    views = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
            tensor = tensor.reshape(outer, inner, dim)
        views.append(tensor)
    steps = [(0, 0) if view is None else view.stride()[:2] for view in views]
    if not per_sample and inner > 1 and all(outer == 1 or step[0] == step[1] * inner for step in steps):
        inner, steps = 1, [(step[1], 0) for step in steps]
    return inner, views, [stride for step in steps for stride in step]


def _launch_forward(
    x, residual, weight, bias, scale, row_scale, eps, *, y_dtype=None, statistics_only=False
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual', or an empty tensor where there is no residual; y; mean and rstd [2, rows] float32).

    y is in residual's dtype unless another is named: the product that reads it may want half precision. A product that
    normalises by itself wants the statistics only, and y is empty.
    """
    dim = x.shape[-1]
    rows = x.numel() // dim
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    summed = torch.empty(0 if residual is None else x.shape, dtype=dtype, device=x.device)
    y = torch.empty(0 if statistics_only else x.shape, dtype=y_dtype or dtype, device=x.device)
    statistics = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return summed, y, statistics
    inner, (x, residual), strides = _rows(x, residual, per_sample=row_scale is not None)

    def run(choice: tuning.Choice) -> None:
        tile = _tile(dim, dtype.itemsize, choice)
        outputs = (None if residual is None else summed, None if statistics_only else y, statistics)
        tensors = (x, residual, weight, bias, scale, row_scale, *outputs)
        launch(_layer_norm_fwd, (cdiv(rows, tile["ROWS"]),), tensors, (*strides, rows, inner, eps), tile)

    run(tuning.choose("layer_norm_forward", _shape(rows, dim), dtype, x.device, run))
    return summed, y, statistics


def _launch_backward(
    grad_y, grad_sum, summed, x, weight, scale, row_scale, statistics, x_dtype, residual_dtype, parameter_grads,
    *, bias=None, y=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of residual, x, and of weight, bias and scale; see `_empty_gradients` for those that are left out.

    y, like summed and contiguous: where the normalised rows are to be written again; it takes the norm's bias.
    """
    grads = _empty_gradients(summed, x, weight, scale, row_scale, x_dtype, residual_dtype, parameter_grads)
    grad_residual, grad_x, grad_parameters = grads
    dim = summed.shape[-1]
    rows = summed.numel() // dim
    if rows == 0:
        return tuple(grad.zero_() for grad in grads)
    inner, (grad_y, grad_sum, summed, x), strides = _rows(grad_y, grad_sum, summed, x, per_sample=row_scale is not None)

    def run(choice: tuning.Choice) -> Tensor:
        tile = _tile(dim, summed.dtype.itemsize, choice)
        programs = min(cdiv(rows, tile["ROWS"]), tuning.describe(summed.device).multiprocessors * choice["waves"])
        partial = None
        if parameter_grads:
            partial = grad_parameters.new_empty(len(grad_parameters), programs, dim)
        outputs = (grad_residual, grad_x if grad_x.numel() else None, y, partial)
        tensors = (grad_y, grad_sum, summed, x, weight, bias, scale, row_scale, statistics, *outputs)
        launch(_layer_norm_bwd, (programs,), tensors, (*strides, rows, inner), tile)
        return grad_parameters if partial is None else partial.sum(1)

    grad_parameters = run(tuning.choose("layer_norm_backward", _shape(rows, dim), summed.dtype, summed.device, run))
    return grad_residual, grad_x, grad_parameters


def _empty_gradients(
    summed, x, weight, scale, row_scale, x_dtype, residual_dtype, parameter_grads
) -> tuple[Tensor, Tensor, Tensor]:
    """What backward returns, uninitialised. One that is not wanted has no elements; the gradient of x has none where it
    is, value and dtype, that of residual. Those of weight, bias and (where x is given) scale are rows of one tensor."""
    x_differs = scale is not None or row_scale is not None or x_dtype != residual_dtype
    shape = (2 if x is None else 3, *weight.shape) if parameter_grads else (0,)
    return (
        summed.new_empty(summed.shape, dtype=residual_dtype),
        summed.new_empty(summed.shape if x_differs else 0, dtype=x_dtype),
        weight.new_empty(shape, dtype=torch.float32),
    )


@operator("layer_norm")
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _, y, statistics = _launch_forward(x, None, weight.contiguous(), bias.contiguous(), None, None, eps)
    return y, statistics


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


@operator("add_layer_norm")
def _add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = (tensor if tensor is None else tensor.contiguous() for tensor in (weight, bias, scale, row_scale))
    return _launch_forward(x, residual, *vectors, eps)


@_add_layer_norm.register_fake
def _(x, residual, weight, bias, scale, row_scale, eps):
    summed = x.new_empty(x.shape, dtype=torch.result_type(x, residual))
    return summed, torch.empty_like(summed), x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)


@operator("layer_norm_backward")
def _layer_norm_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    summed: Tensor,
    x: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    row_scale: Tensor | None,
    statistics: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    parameter_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, scale, row_scale = (t if t is None else t.contiguous() for t in (weight, scale, row_scale))
    return _launch_backward(
        grad_y, grad_sum, summed, x, weight, scale, row_scale, statistics, x_dtype, residual_dtype, parameter_grads
    )


@_layer_norm_backward.register_fake
def _(grad_y, grad_sum, summed, x, weight, scale, row_scale, statistics, x_dtype, residual_dtype, parameter_grads):
    return _empty_gradients(summed, x, weight, scale, row_scale, x_dtype, residual_dtype, parameter_grads)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, statistics)


def _backward(ctx, grad_y, _):
    if grad_y is None:
        return None, None, None, None
    x, weight, statistics = ctx.saved_tensors
    parameter_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    grad_x, _, grads = _layer_norm_backward(
        grad_y, None, x, None, weight, None, None, statistics, x.dtype, x.dtype, parameter_grads
    )
    return (*_wanted(ctx, grad_x, *split_parameter_gradients(grads, weight)), None)


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def _add_setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, scale, row_scale, _ = inputs
    summed, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, residual.dtype
    kept_x = x if scale is not None and ctx.needs_input_grad[4] else None
    ctx.save_for_backward(summed, kept_x, weight, scale, row_scale, statistics)


def _add_backward(ctx, grad_sum, grad_y, _):
    if grad_sum is None and grad_y is None:
        return (None,) * 7
    summed, x, weight, scale, row_scale, statistics = ctx.saved_tensors
    if grad_y is None:  # only the sum was used, which hardly happens: not worth a kernel of its own
        grad_y = torch.zeros_like(grad_sum)
    parameter_grads = any(ctx.needs_input_grad[2:5])
    grad_residual, grad_x, grads = _layer_norm_backward(
        grad_y, grad_sum, summed, x, weight, scale, row_scale, statistics, *ctx.dtypes, parameter_grads
    )
    if scale is None and row_scale is None and ctx.dtypes[0] == ctx.dtypes[1]:
        grad_x = grad_residual
    grads = split_parameter_gradients(grads, weight, scale)
    return (*_wanted(ctx, grad_x, grad_residual, *grads), None, None)


def split_parameter_gradients(grads: Tensor, weight: Tensor, scale: Tensor | None = None) -> list[Tensor | None]:
    """Those of weight, bias and scale in the parameters' dtypes, None for those that were not computed."""
    dtypes = (weight.dtype, weight.dtype, weight.dtype if scale is None else scale.dtype)
    found = [grad.to(dtype) for grad, dtype in zip(grads.unbind(), dtypes, strict=False)]
    return [*found, *[None] * (3 - len(found))]


def _wanted(ctx, *grads: Tensor) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False)]


_add_layer_norm.register_autograd(_add_backward, setup_context=_add_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    x: [..., D], float32, bfloat16 or float16, D at most 8,192. Rows may be strided (tokens[:, 1:], a slice of columns);
        where the last dimension is not contiguous, or the rows need more than two strides, x is copied.
    weight, bias: [D], of one dtype, which may be another than x's.
    Returns [..., D] in x's dtype, contiguous. Autocast changes nothing: the sums are float32 whatever the dtype, so
    unlike PyTorch's own LayerNorm on CUDA it has no reason to return float32.
    Raises ValueError for shapes, dtypes or devices that do not fit. Second derivatives are not supported.
    """
    _check(x, weight, bias)
    return _layer_norm(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + row_scale * scale * x, and the LayerNorm of that.

    x: the branch [..., D]; weight, bias, eps: as in `layer_norm`.
    residual: [..., D], of x's shape; its dtype may be another (under autocast it is float32 and x bfloat16).
    scale: [D], LayerScale's factor. row_scale: [B] float32, drop path's factor for each sample (0, or 1 / keep
        probability), with x [B, ..., D]; it has no gradient.
    Returns (the sum, its LayerNorm), each [..., D] and contiguous, in the dtype that x and residual promote to. The sum
    is rounded to that dtype once, and what is normalised is the rounded sum.
    Raises ValueError for shapes, dtypes or devices that do not fit. Second derivatives are not supported.
    """
    _check(x, weight, bias)
    check_tensor("residual", residual, x.shape, DTYPES, x.device)
    if scale is not None:
        check_tensor("scale", scale, weight.shape, DTYPES, x.device)
    if row_scale is not None:
        check_tensor("row_scale", row_scale, x.shape[:1] if x.ndim > 1 else (1,), (torch.float32,), x.device)
    summed, y, _ = _add_layer_norm(x, residual, weight, bias, scale, row_scale, eps)
    return summed, y


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_DIM:
        raise ValueError(f"x: expected [..., D] with D from 1 to {MAX_DIM}, got {list(x.shape)}")
    check_tensor("x", x, x.shape, DTYPES, x.device)
    check_tensor("weight", weight, x.shape[-1:], DTYPES, x.device)
    check_tensor("bias", bias, x.shape[-1:], (weight.dtype,), x.device)
