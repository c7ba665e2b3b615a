"""LayerNorm, alone or in one pass with the residual add before it.

    residual' = residual + row_scale * scale * x        (scale: LayerScale; row_scale: drop path; both optional)
    y         = (residual' - mean) * rstd * weight + bias,    rstd = 1 / sqrt(variance + eps), over the last dimension

Separately, the add moves 3 row-lengths through memory and LayerNorm 2; together they move 4. Backward reads the two
incoming gradients and residual' once and writes their common gradient once: 4, where PyTorch moves 3 for LayerNorm, 2
for its weight and bias in a kernel of their own, and 3 for the add. The normalised rows are not saved but recomputed
from mean and rstd; backward also writes y where the weight gradient of the GEMM that read it needs it.

The same two kernels compute an elementwise activation after the norm (`layer_norm_act`).

A program holds whole rows in registers, in `CHUNKS` chunks of `CHUNK` columns: 768 is 3 x 256, where one power of two
would leave a quarter of the threads idle. Sums are float32. The variance is that of the centred values: the second pass
is over registers and causes no memory traffic. Weight gradients are summed in two stages without atomics, so two runs
are bitwise equal: a fixed number of programs each sum their own rows, and PyTorch sums over the programs.

Ba, Kiros & Hinton 2016, arXiv:1607.06450; LayerScale: Touvron et al. 2021, arXiv:2103.17239; drop path: Huang et al.
2016, arXiv:1603.09382.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels import gelu, tuning
from fastvit.kernels.checks import DTYPES, check_optional, check_tensor, make_contiguous
from fastvit.kernels.gelu import activate, activate_with_slope, get_formula
from fastvit.kernels.operators import is_fake, register, select_gradients
from fastvit.kernels.tuning import cdiv, describe_rows, next_power_of_2

MAX_DIM = 8192  # rows of 16,384 spill in backward, whatever the number of warps
E4M3_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(2.0**-126)  # float32's smallest normal number, whose reciprocal is still finite


# Rows are [outer, inner]: in a view such as tokens[:, 1:] the stride between images differs from that between tokens.
# Where one stride reaches every row, inner is 1 and the compiler removes the division.
@triton.jit
def _row_offsets(row, inner, stride_outer, stride_inner):
    row = row.to(tl.int64)  # rows * dim exceeds 2**31 at large batches
    return ((row // inner) * stride_outer + (row % inner) * stride_inner)[:, None]


@triton.jit
def _chunk(index: tl.constexpr, row_mask, DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Columns [ROWS, CHUNK] of one chunk, and the mask of those that exist.

    Columns are repeated per row so that weight and bias are loaded in the layout of the rows: 16 bytes per thread, no
    exchange through shared memory.
    """
    cols = tl.broadcast_to((index * CHUNK + tl.arange(0, CHUNK))[None, :], [ROWS, CHUNK])
    mask = tl.broadcast_to(row_mask[:, None], [ROWS, CHUNK])
    if DIM % CHUNK != 0:
        mask = mask & (cols < DIM)
    return cols, mask


@triton.jit
def _mean_and_rstd(
    values, row_mask, eps, DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    """Mean and rstd, [ROWS] each, of rows whose columns beyond DIM are 0."""
    total = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        total += tl.sum(values[i], 1)
    mean = total / DIM
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(CHUNKS):
        cols, _ = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        centred = values[i] - mean[:, None]
        if DIM % CHUNK != 0:
            centred = tl.where(cols < DIM, centred, 0.0)
        squares += tl.sum(centred * centred, 1)
    return mean, tl.rsqrt(squares / DIM + eps)


@triton.jit
def _store_e4m3(
    pieces, values_ptr, scale_ptr, row, row_mask,
    DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Quantise rows held as a tuple of float32 [ROWS, CHUNK] whose columns beyond DIM are 0."""
    # The bits of positive float32 numbers are ordered as integers, NaN the largest: this maximum propagates NaN.
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
def _layer_norm_fwd(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,      # in:  [rows, dim], [rows, dim] or None, [dim] x2
    scale_ptr, row_scale_ptr,                       # in:  [dim] or None, [outer] float32 or None
    sum_ptr, y_ptr,                                 # out: [rows, dim] (None without residual), [rows, dim]
    statistics_ptr,                                 # out: [2, rows] float32: mean, rstd; if y is e4m3 [rows], its scale
    stride_x_outer, stride_x_inner, stride_residual_outer, stride_residual_inner,
    rows, inner, eps,
    DIM: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    FORMULA: tl.constexpr,                          # of the activation after the norm, or None
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    x_rows = x_ptr + _row_offsets(row, inner, stride_x_outer, stride_x_inner)
    if residual_ptr is not None:
        residual_rows = residual_ptr + _row_offsets(row, inner, stride_residual_outer, stride_residual_inner)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row // inner, row_mask, other=0.0)[:, None]
    values = ()  # the row's chunks; Triton's collections are tuples, built by adding
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
            tl.store(sum_ptr + row.to(tl.int64)[:, None] * DIM + cols, rounded, mask)
            value = rounded.to(tl.float32)  # normalise the values that the next layer reads
        values = values + (value,)

    mean, rstd = _mean_and_rstd(values, row_mask, eps, DIM, ROWS, CHUNK, CHUNKS)
    y_rows = y_ptr + row.to(tl.int64)[:, None] * DIM
    pieces = ()
    for i in tl.static_range(CHUNKS):  # beyond DIM, weight, bias and therefore y are 0
        cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
        weight = tl.load(weight_ptr + cols, mask, other=0.0).to(tl.float32)
        y = (values[i] - mean[:, None]) * rstd[:, None] * weight
        y += tl.load(bias_ptr + cols, mask, other=0.0).to(tl.float32)
        if FORMULA is not None:
            y = activate(y, FORMULA)
        if y_ptr.dtype.element_ty == tl.float8e4nv:
            pieces = pieces + (y,)
        else:
            tl.store(y_rows + cols, y, mask)
    if y_ptr.dtype.element_ty == tl.float8e4nv:
        _store_e4m3(pieces, y_ptr, statistics_ptr, row, row_mask, DIM, ROWS, CHUNK, CHUNKS)
    else:
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
    FORMULA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x is passed if scale needs a gradient, bias if y is written or an activation (FORMULA) follows. The rows of
    partial are the sums of weight, bias and scale."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    weight_sums, bias_sums, scale_sums, weights, biases = (), (), (), (), ()
    for i in tl.static_range(CHUNKS):
        cols, mask = _chunk(i, tl.arange(0, ROWS) < ROWS, DIM, ROWS, CHUNK)
        weights = weights + (tl.load(weight_ptr + cols, mask, other=0.0),)
        if bias_ptr is not None:
            biases = biases + (tl.load(bias_ptr + cols, mask, other=0.0),)
        zero = tl.zeros([ROWS, CHUNK], tl.float32)
        weight_sums, bias_sums, scale_sums = weight_sums + (zero,), bias_sums + (zero,), scale_sums + (zero,)

    # STAGES >= 2: the next rows are copied to shared memory (cp.async) while these are computed.
    for first in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        row_mask = row < rows
        grad_y_rows = grad_y_ptr + _row_offsets(row, inner, stride_grad_y_outer, stride_grad_y_inner)
        sum_rows = sum_ptr + _row_offsets(row, inner, stride_sum_outer, stride_sum_inner)
        out_rows = row.to(tl.int64)[:, None] * DIM
        mean = tl.load(statistics_ptr + row, row_mask, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + rows + row, row_mask, other=0.0)[:, None]

        # grad = rstd * (g - mean(g) - normal * mean(g * normal)),  g = grad_y * weight,  normal = (sum - mean) * rstd
        grads, normals, new_weight_sums, new_bias_sums = (), (), (), ()
        total = tl.zeros([ROWS], tl.float32)
        projection = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(CHUNKS):
            cols, mask = _chunk(i, row_mask, DIM, ROWS, CHUNK)
            grad_y = tl.load(grad_y_rows + cols, mask, other=0.0).to(tl.float32)
            normal = (tl.load(sum_rows + cols, mask, other=0.0).to(tl.float32) - mean) * rstd
            weight = weights[i].to(tl.float32)
            if bias_ptr is not None:
                affine = normal * weight + biases[i].to(tl.float32)
                if y_ptr is not None:
                    tl.store(y_ptr + out_rows + cols, affine, mask)
                if FORMULA is not None:
                    _, slope = activate_with_slope(affine, FORMULA)
                    grad_y = grad_y * slope
            if partial_ptr is not None:
                new_weight_sums = new_weight_sums + (weight_sums[i] + grad_y * normal,)
                new_bias_sums = new_bias_sums + (bias_sums[i] + grad_y,)
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


def _size_tile(dim: int, itemsize: int, choice: tuning.Choice) -> dict[str, int]:
    """The kernels' compile-time sizes for rows of `dim` values, the widest of `itemsize` bytes."""
    vector = 16 // itemsize  # values in one load of 16 bytes
    chunk = next_power_of_2(cdiv(dim, choice["elements"] // vector))
    chunk = max(chunk, min(64, next_power_of_2(dim)))
    num_warps = max(choice["num_warps"], chunk // (32 * vector))  # a thread holds at most `elements` values
    num_warps = max(1, min(num_warps, 16 * chunk // (32 * vector)))  # at most 16 rows, 16 bytes per thread
    rows = max(1, min(16, num_warps * 32 * vector // chunk))
    return {"DIM": dim, "ROWS": rows, "CHUNK": chunk, "CHUNKS": cdiv(dim, chunk), "num_warps": num_warps}


def _view_rows(*tensors: Tensor | None, per_sample: bool) -> tuple[int, list[Tensor | None], list[int]]:
    """Row addressing for tensors of one shape [..., D]: `inner`, the tensors, and two strides for each.

    A tensor is copied only if its last dimension is not contiguous or its rows need more than two strides. per_sample:
    the outer index must be the sample, the first dimension.
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


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None, row_scale: Tensor | None,
    eps: float, y_dtype: torch.dtype | None = None, activation: str | None = None, candidate: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns residual' (empty without residual), y, and the statistics [2, rows] float32: mean and rstd.

    y has the dtype of residual' unless y_dtype is given: the GEMM that reads y may need half precision. If it is e4m3,
    the statistics are y's scale per row, [..., 1], instead. activation: applied after the norm.
    """
    dim = x.shape[-1]
    rows = x.numel() // dim
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    summed = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    y = x.new_empty(x.shape, dtype=y_dtype or dtype)
    is_fp8 = y.dtype == torch.float8_e4m3fn
    statistics = x.new_empty((*x.shape[:-1], 1) if is_fp8 else (2, rows), dtype=torch.float32)
    if is_fake(x) or rows == 0:
        return summed, y, statistics
    vectors = make_contiguous(weight, bias, scale, row_scale)
    inner, (x, residual), strides = _view_rows(x, residual, per_sample=row_scale is not None)
    rule = "layer_norm_fp8" if is_fp8 else "layer_norm_forward"
    choice = tuning.select(rule, describe_rows(rows, dim), dtype, x.device, candidate)
    tile = _size_tile(dim, dtype.itemsize, choice)
    formula = None if activation is None else get_formula(activation, y.dtype)
    tensors = (x, residual, *vectors, None if residual is None else summed, y, statistics)
    _layer_norm_fwd[(cdiv(rows, tile["ROWS"]),)](*tensors, *strides, rows, inner, eps, FORMULA=formula, **tile)
    return summed, y, statistics


def launch_backward(
    grad_y: Tensor, grad_sum: Tensor | None, summed: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None,
    scale: Tensor | None, row_scale: Tensor | None, statistics: Tensor, x_dtype: torch.dtype,
    residual_dtype: torch.dtype, parameter_grads: bool,
    y_dtype: torch.dtype | None = None, activation: str | None = None, candidate: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of residual, x, and (weight, bias, scale), and y recomputed if its dtype is given.

    See `_empty_gradients` for those left empty. bias is required for y and for an activation after the norm.
    """
    options = (x_dtype, residual_dtype, parameter_grads, y_dtype)
    grads = grad_residual, grad_x, grad_parameters, y = _empty_gradients(summed, x, weight, scale, row_scale, *options)
    if is_fake(summed):
        return grads
    dim = summed.shape[-1]
    rows = summed.numel() // dim
    if rows == 0:
        return tuple(grad.zero_() for grad in grads)
    weight, *vectors = make_contiguous(weight, bias, scale, row_scale)
    inner, tensors, strides = _view_rows(grad_y, grad_sum, summed, x, per_sample=row_scale is not None)
    choice = tuning.select("layer_norm_backward", describe_rows(rows, dim), summed.dtype, summed.device, candidate)
    tile = _size_tile(dim, summed.dtype.itemsize, choice)
    formula = None if activation is None else get_formula(activation, summed.dtype)
    programs = min(cdiv(rows, tile["ROWS"]), tuning.describe_device(summed.device).multiprocessors * choice["waves"])
    partial = grad_parameters.new_empty(len(grad_parameters), programs, dim) if parameter_grads else None
    outputs = (grad_residual, grad_x if grad_x.numel() else None, None if y_dtype is None else y, partial)
    tensors = (*tensors, weight, *vectors, statistics, *outputs)
    _layer_norm_bwd[(programs,)](*tensors, *strides, rows, inner, FORMULA=formula, STAGES=choice["stages"], **tile)
    return grad_residual, grad_x, grad_parameters if partial is None else partial.sum(1), y


def _empty_gradients(
    summed, x, weight, scale, row_scale, x_dtype, residual_dtype, parameter_grads, y_dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of backward, uninitialised. Those not needed are empty; so is the gradient of x where it equals that
    of residual in value and dtype. Those of weight, bias and, where x is given, scale are rows of one tensor."""
    x_differs = scale is not None or row_scale is not None or x_dtype != residual_dtype
    shape = (2 if x is None else 3, *weight.shape) if parameter_grads else (0,)
    return (
        summed.new_empty(summed.shape, dtype=residual_dtype),
        summed.new_empty(summed.shape if x_differs else 0, dtype=x_dtype),
        weight.new_empty(shape, dtype=torch.float32),
        summed.new_empty(0 if y_dtype is None else summed.shape, dtype=y_dtype),
    )


def _scale_branch(x: Tensor, scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """row_scale * scale * x in float32."""
    x = x.float() if scale is None else x.float() * scale.float()
    return x if row_scale is None else x * row_scale.view(-1, *[1] * (x.ndim - 1))


def forward_fallback(
    x, residual, weight, bias, scale, row_scale, eps, y_dtype=None, activation=None, candidate=0
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    summed = _scale_branch(x, scale, row_scale) + (0 if residual is None else residual.float())
    summed = summed.to(dtype).contiguous()
    y, *statistics = torch.native_layer_norm(summed.float(), weight.shape, weight.float(), bias.float(), eps)
    y = (y if activation is None else gelu.compute_activation(y, activation)).to(y_dtype or dtype)
    statistics = torch.stack([tensor.reshape(-1) for tensor in statistics])
    return summed.new_empty(0) if residual is None else summed, y, statistics


def backward_fallback(
    grad_y, grad_sum, summed, x, weight, bias, scale, row_scale, statistics, x_dtype, residual_dtype, parameter_grads,
    y_dtype=None, activation=None, candidate=0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch_backward` in plain PyTorch, by formula: autograd is not available inside an operator."""
    mean, rstd = statistics.view(2, *summed.shape[:-1], 1)
    grad_y, normal = grad_y.float(), (summed.float() - mean) * rstd
    affine = None if bias is None else normal * weight.float() + bias.float()
    grad_y = grad_y if activation is None else gelu.compute_activation_gradient(grad_y, affine, activation)
    grad = grad_y * weight.float()
    grad = (grad - grad.mean(-1, True) - normal * (grad * normal).mean(-1, True)) * rstd
    grad = grad if grad_sum is None else grad + grad_sum.float()
    products = [grad_y * normal, grad_y, *([] if x is None else [_scale_branch(grad, None, row_scale) * x.float()])]
    sums = torch.stack([product.reshape(-1, weight.shape[0]).sum(0) for product in products])
    options = (x_dtype, residual_dtype, parameter_grads, y_dtype)
    outputs = _empty_gradients(summed, x, weight, scale, row_scale, *options)
    found = (grad, _scale_branch(grad, scale, row_scale), sums, affine)
    return tuple(out.copy_(value) if out.numel() else out for out, value in zip(outputs, found, strict=True))


_layer_norm = register("layer_norm", fallback=forward_fallback)(launch_forward)
_layer_norm_backward = register("layer_norm_backward", fallback=backward_fallback)(launch_backward)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, scale, row_scale, _, _, ctx.activation, ctx.candidate = inputs
    summed, _, statistics = output
    ctx.mark_non_differentiable(statistics, *([summed] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, x.dtype if residual is None else residual.dtype
    kept_x = x if scale is not None and ctx.needs_input_grad[4] else None
    kept_bias = None if ctx.activation is None else bias
    summed = x if residual is None else summed
    ctx.save_for_backward(summed, kept_x, weight, kept_bias, scale, row_scale, statistics)


def _backward(ctx, grad_sum, grad_y, _):
    if grad_sum is None and grad_y is None:
        return select_gradients(ctx)
    if grad_y is None:  # only the sum was used: too rare for a kernel of its own
        grad_y = torch.zeros_like(grad_sum)
    saved = _, _, weight, _, scale, row_scale, _ = ctx.saved_tensors  # once: checkpointing recomputes at each access
    options = (*ctx.dtypes, any(ctx.needs_input_grad[2:5]), None, ctx.activation, ctx.candidate)
    grad_residual, grad_x, grads, _ = _layer_norm_backward(grad_y, grad_sum, *saved, *options)
    if scale is None and row_scale is None and ctx.dtypes[0] == ctx.dtypes[1]:
        grad_x = grad_residual
    return select_gradients(ctx, grad_x, grad_residual, *split_parameter_gradients(grads, weight, scale))


def split_parameter_gradients(grads: Tensor, weight: Tensor, scale: Tensor | None = None) -> list[Tensor | None]:
    """The gradients of weight, bias and scale in the parameters' dtypes; None for those not computed."""
    dtypes = (weight.dtype, weight.dtype, weight.dtype if scale is None else scale.dtype)
    found = [grad.to(dtype) for grad, dtype in zip(grads.unbind(), dtypes, strict=False)]
    return [*found, *[None] * (3 - len(found))]


_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, candidate: int = 0) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Sums are float32 in every dtype, so under autocast the result keeps x's dtype, where PyTorch's LayerNorm on CUDA
    returns float32. x and 8 bytes per row are saved for backward. Not twice differentiable.

    Args:
        x: [..., D], float32, bfloat16 or float16, D at most 8,192. Rows may be strided (tokens[:, 1:], a slice of
            columns); x is copied if its last dimension is not contiguous or its rows need more than two strides.
        weight: [D], any of these dtypes.
        bias: [D], of weight's dtype.
        eps: added to the variance.
        candidate: number of the tile in the tuning table, for forward and backward.

    Returns:
        [..., D] in x's dtype, contiguous.

    Raises:
        ValueError: if shapes, dtypes or devices do not match.
    """
    check_norm(x, weight, bias)
    return _layer_norm(x, None, weight, bias, None, None, eps, None, None, candidate)[1]


def layer_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str = "gelu", *, candidate: int = 0
) -> Tensor:
    """activation(layer_norm(x)), elementwise, with no rounding in between.

    Args, Returns, Raises: as in `layer_norm`; activation: a key of `fastvit.kernels.gelu.FORMULAS`.
    """
    gelu.check_activation(activation)
    check_norm(x, weight, bias)
    return _layer_norm(x, None, weight, bias, None, None, eps, None, activation, candidate)[1]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
    *, scale: Tensor | None = None, row_scale: Tensor | None = None, candidate: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """residual + row_scale * scale * x, and the LayerNorm of the sum.

    Args:
        x: the branch, as in `layer_norm`.
        residual: x's shape, any of the dtypes.
        weight, bias, eps, candidate: as in `layer_norm`.
        scale: LayerScale's factor [D], any of the dtypes.
        row_scale: drop path's factor for each sample (0, or 1 / keep probability), [B] float32 for x [B, ..., D]; not
            differentiable.

    Returns:
        (sum, its LayerNorm), each [..., D], contiguous, in the dtype that x and residual promote to. The sum is rounded
        to that dtype before it is normalised.

    Raises:
        ValueError: as in `layer_norm`.
    """
    check_norm(x, weight, bias)
    check_tensor("residual", residual, x.shape, DTYPES, x.device)
    check_optional("scale", scale, weight.shape, DTYPES, x.device)
    check_optional("row_scale", row_scale, x.shape[:1] if x.ndim > 1 else (1,), (torch.float32,), x.device)
    return _layer_norm(x, residual, weight, bias, scale, row_scale, eps, None, None, candidate)[:2]


def check_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError unless x, weight and bias fit a LayerNorm over x's last dimension."""
    if x.ndim == 0 or not 1 <= x.shape[-1] <= MAX_DIM:
        raise ValueError(f"x: expected [..., D] with D from 1 to {MAX_DIM}, got {list(x.shape)}")
    check_tensor("x", x, x.shape, DTYPES, x.device)
    check_tensor("weight", weight, x.shape[-1:], DTYPES, x.device)
    check_tensor("bias", bias, x.shape[-1:], (weight.dtype,), x.device)
