"""The accuracy criterion of the kernel tests: no larger error against float64 than PyTorch's own operation has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

FLOAT32_EPS = torch.finfo(torch.float32).eps


def measure_errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the relative error of the whole tensor in the Euclidean norm, and the largest one of a single element.

    The error of an element is divided by the larger of its magnitude and the root mean square of its row (the last
    dimension), so a single bad element, row or column shows in the second number even where the first hides it. For
    rows that are tiny beside the others, the divisor is at least a ten-thousandth of the tensor's root mean square.
    """
    error = result.double() - exact
    whole = exact.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    row = exact.square().mean(dim=-1, keepdim=True).sqrt() if exact.ndim else whole
    worst = (error.abs() / torch.maximum(exact.abs(), row.clamp(min=1e-4 * whole))).max()
    return (error.square().mean().sqrt() / whole).item(), worst.item()


def assert_no_worse_than(
    ours: Tensor, theirs: Tensor, exact: Tensor, *, slack: float = 1.25, worst: float = 4, name: str = ""
) -> None:
    """Assert that the error of `ours` against `exact` is at most `slack` times that of `theirs`.

    The largest error of a single element depends on chance, so it may be `worst` times PyTorch's; a wrong row or column
    exceeds that a thousandfold. Neither limit is below `slack` or `worst` times the error of rounding `exact` to the
    dtype, or a few float32 roundings, because kernels compute in float32: one unit in the last place for a tensor in
    which errors average out, four for a single element or a tensor of few elements. NaN and infinities must be in the
    same places as in `theirs`.

    Args:
        ours: The result under test.
        theirs: PyTorch's result, in the same shape and dtype.
        exact: The result in float64.
        slack: Factor for the error of the whole tensor.
        worst: Factor for the largest error of one element.
        name: Begins the message of a failed assertion.
    """
    assert ours.shape == theirs.shape == exact.shape, f"{name}: {ours.shape}, {theirs.shape}, {exact.shape}"
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, PyTorch's is {theirs.dtype}"
    finite = theirs.isfinite()
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{name}: NaN in other places than in PyTorch's result"
    assert torch.equal(ours[ours.isinf()], theirs[theirs.isinf()]), f"{name}: infinities differ from PyTorch's result"
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
            f"{name}: {measure} error {our_error:.3g}, PyTorch's {their_error:.3g}, rounding alone {rounding:.3g}"
        )


@contextlib.contextmanager
def poison_memory() -> Iterator[None]:
    """Fill new memory with NaN (or the largest integer) within this context, so that unwritten elements show."""
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
