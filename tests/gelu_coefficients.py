"""Fit and print the polynomials that `fastvit.kernels.gelu` uses for half precision.

t = |x|, Phi and phi are the normal distribution and its density, and GELU's derivative is zero at -ROOT:

    tail(t)  = Phi(-t)             = 2 ** P(t)                          gelu(-t)  = -t * tail
    slope(t) = Phi(-t) - t phi(t)  = tail * (ROOT - t) * Q(t)           gelu'(-t) = slope,  gelu'(t) = 1 - slope

P and Q are weighted minimax fits in float64 on 1,200 Chebyshev points of [0, 13.6]; beyond 13.6 results
underflow in bfloat16. Lawson's iteration: least squares, each weight multiplied by its error. A unit of error is half a
unit in the last place of bfloat16 or float16, whichever is finer at that result. Factoring out the root preserves the
relative accuracy of the derivative near its zero.
"""

from __future__ import annotations

import math

import numpy as np
import torch

LIMIT = 13.6
ROOT = 0.7517915246935645
DEGREES = {"P": 9, "Q": 7}


def compute_targets() -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the points, the functions to fit, and the error of each that is half a unit in the last place."""
    points = (1 - np.cos(np.pi * (np.arange(1200) + 0.5) / 1200)) / 2 * LIMIT
    points = points[np.abs(points - ROOT) > 1e-3]  # 0 / 0
    log_tail = torch.special.log_ndtr(torch.from_numpy(-points)).numpy()
    tail = np.exp(log_tail)
    hazard = np.exp(-0.5 * points**2 - 0.5 * math.log(2 * math.pi) - log_tail)  # phi / tail
    functions = {"P": log_tail / math.log(2), "Q": (1 - points * hazard) / (ROOT - points)}
    slope = tail * (ROOT - points) * functions["Q"]

    def compute_half_unit(result: np.ndarray) -> np.ndarray:
        # Relative to the result. float16 has 11 significant bits down to 2^-14, bfloat16 has 8.
        return np.minimum(2.0**-9, np.maximum(2.0**-12, 2.0**-25 / np.abs(result)))

    units = {
        "P": compute_half_unit(points * tail) / math.log(2),
        "Q": compute_half_unit(slope) * np.abs(functions["Q"]),
    }
    return points, functions, units


def fit(points: np.ndarray, function: np.ndarray, unit: np.ndarray, degree: int) -> tuple[np.ndarray, float]:
    """Return the coefficients in order of increasing degree, and the largest error in units."""
    basis = np.polynomial.chebyshev.chebvander(2 * points / LIMIT - 1, degree)
    weights, best = np.full(len(points), 1 / len(points)), (None, math.inf)
    for _ in range(2000):
        root = np.sqrt(weights) / unit
        found = np.linalg.lstsq(basis * root[:, None], function * root, rcond=None)[0]
        error = np.abs(basis @ found - function) / unit
        if error.max() < best[1]:
            best = found, error.max()
        weights = weights * error
        weights /= weights.sum()
    series = np.polynomial.chebyshev.Chebyshev(best[0], domain=[0, LIMIT])
    return series.convert(kind=np.polynomial.Polynomial).coef, best[1]


if __name__ == "__main__":
    points, functions, units = compute_targets()
    for name, degree in DEGREES.items():
        coefficients, error = fit(points, functions[name], units[name], degree)
        print(f"{name}: largest error {error:.3f} of half a unit in the last place; in order of increasing degree:")
        print("   ", ", ".join(f"{float(np.float32(value)):.9g}" for value in coefficients))
