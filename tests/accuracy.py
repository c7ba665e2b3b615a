"""How kernel tests judge a result: its error against float64 may not exceed that of PyTorch's own operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

FLOAT32_EPS = torch.finfo(torch.float32).eps


def measure_errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """(relative error of the whole in the Euclidean norm, the largest relative error of one element).

    An element's error is divided by the element or, where that is larger, by the root mean square of its row, the last
    dimension: one bad element, row or column shows in the second number where the first would hide it. Rows that are
    nothing beside the others are measured against a ten-thousandth of the whole's root mean square.
    """
    error = result.double() - exact
    whole = exact.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    row = exact.square().mean(dim=-1, keepdim=True).sqrt() if exact.ndim else whole
    worst = (error.abs() / torch.maximum(exact.abs(), row.clamp(min=1e-4 * whole))).max()
    return (error.square().mean().sqrt() / whole).item(), worst.item()


def assert_no_worse_than(
    ours: Tensor, theirs: Tensor, exact: Tensor, *, slack: float = 1.25, worst: float = 4, name: str = ""
) -> None:
    """ours is at most `slack` times as far from `exact` (float64) as `theirs`, PyTorch's result in the same dtype.

    That is asked of the whole. Which element is the worst is chance, and so is how bad it is: it may be 4 times as far
    (or `worst` times) as PyTorch's, where a wrong row or column would be thousands of times. Where PyTorch's error is
    below that of rounding `exact` to this dtype, or below what a few roundings of float32 cost, in which kernels
    compute (one unit in the last place for a whole whose errors average out, four for one element or the whole of a
    few), that is the measure: less is luck. NaN and infinities must stand where PyTorch has them.
    """
    assert ours.shape == theirs.shape == exact.shape, f"{name}: {ours.shape}, {theirs.shape}, {exact.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, PyTorch's is {theirs.dtype}"
    finite = theirs.isfinite()
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: NaN in other places than PyTorch's"
    assert torch.equal(ours[ours.isinf()], theirs[theirs.isinf()]), f"{name}: infinities other than PyTorch's"
    ours, theirs, exact = (tensor.masked_fill(~finite, 0) for tensor in (ours, theirs, exact))
    if exact.numel() == 0:
        return
    limits = (
        ("whole", slack, FLOAT32_EPS if exact.numel() >= 64 else 4 * FLOAT32_EPS),
        ("worst", worst, 4 * FLOAT32_EPS),
    )
    measures = zip(*(measure_errors(tensor, exact) for tensor in (ours, theirs, exact.to(ours.dtype))), strict=True)
    for (measure, factor, smallest), (our_error, their_error, rounding) in zip(limits, measures, strict=True):
        assert our_error <= factor * max(their_error, rounding, smallest), (
            f"{name}: {measure} error {our_error:.3g}, PyTorch's {their_error:.3g}, of rounding {rounding:.3g}"
        )


@contextlib.contextmanager
def poison_memory() -> Iterator[None]:
    """Inside, fresh memory is NaN (or the largest integer), so that an element nobody wrote is seen."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill
