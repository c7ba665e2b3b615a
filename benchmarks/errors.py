"""Accuracy, checked before anything is timed: error against the float64 definition, relative to PyTorch's error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """Relative errors, Euclidean norm."""

    whole: float  # of all elements
    row: float  # of the worst row (last dimension), relative to the larger of its norm and a tenth of the typical norm


def measure_error(result: Tensor, exact: Tensor) -> Error:
    if result.shape != exact.shape:
        raise ValueError(f"expected shape {list(exact.shape)}, got {list(result.shape)}")
    exact = exact.double().reshape(-1, exact.shape[-1] if exact.ndim else 1)
    difference = result.detach().double().reshape(exact.shape) - exact
    norm = exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
    rows = exact.norm(dim=-1).clamp(min=0.1 * norm.item() / max(1, len(exact)) ** 0.5)
    return Error((difference.norm() / norm).item(), (difference.norm(dim=-1) / rows).max().item())


def measure_errors(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Error]:
    return {
        name: measure_error(tensor, expected[name.removesuffix(" of inference")]) for name, tensor in results.items()
    }


def find_mistake(
    errors: Mapping[str, Error], baseline: Mapping[str, Error] | None, floor: float, limit: float
) -> str | None:
    """Returns which result has too large an error, or None. NaN is always a mistake.

    Allowed is four times the error of `baseline`, PyTorch's own operations in the same dtype, or `floor` where that is
    larger, and eight times for the worst row. `limit` is never exceeded; it alone judges the baseline.
    """
    for name, error in errors.items():
        allowed = Error(limit, 10 * limit)
        if baseline is not None:
            whole, row = max(4 * baseline[name].whole, floor), max(8 * baseline[name].row, 4 * floor)
            allowed = Error(min(whole, allowed.whole), min(row, allowed.row))
        for where, found, bound in zip(("", " in the worst row"), error, allowed, strict=True):
            if not found <= bound:  # NaN too
                return f"{name}: error {found:.1e}{where}, allowed {bound:.1e}"
    return None
