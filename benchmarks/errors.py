"""The check before the clock: results against the definition in float64, with PyTorch's error as the measure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    whole: float  # of all elements, relative, Euclidean norm
    row: float  # of the worst row, the last dimension, relative to the larger of its norm and a tenth of the typical


def measure_error(result: Tensor, exact: Tensor) -> Error:
    if result.shape != exact.shape:
        raise ValueError(f"shape {list(result.shape)} instead of {list(exact.shape)}")
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
    """Which result is further off than is allowed, or None. NaN is always wrong.

    Allowed are four times the error of `baseline`, PyTorch's own operations in the same dtype, or `floor` where they
    are better than that, and eight times for the worst row; never more than `limit`, which alone judges the baseline.
    """
    for name, error in errors.items():
        allowed = Error(limit, 10 * limit)
        if baseline is not None:
            whole, row = max(4 * baseline[name].whole, floor), max(8 * baseline[name].row, 4 * floor)
            allowed = Error(min(whole, allowed.whole), min(row, allowed.row))
        for measure, is_, may_be in zip(("", " in the worst row"), error, allowed, strict=True):
            if not is_ <= may_be:  # NaN too
                return f"{name} is off by {is_:.1e}{measure}, {may_be:.1e} is allowed"
    return None
