"""What a device does at best, measured in the same run, and how near to that a pass came."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastvit.benchmarks.cases import Cost
from fastvit.benchmarks.environment import name_of
from fastvit.benchmarks.memory import free
from fastvit.benchmarks.timing import Samples, Step, median_ms, quantiles
from fastvit.ops import eager


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> dict[str, Any]:
    """A copy (bytes read plus written) and square matmuls of random data, as this device does them now."""
    if device.type == "cuda":
        side, copied = (4096 if quick else 8192), 2**30
    else:
        side, copied = (512 if quick else 2048), (2**26 if quick else 2**28)

    def time(call: Callable[[], object]) -> float:
        seconds, rounds = (0.05, 3) if quick else (0.5, 5)
        return median_ms(Step(lambda _: call()), device, seconds=seconds, min_rounds=rounds) / 1e3

    copy = time_copy(copied, device, time)
    matmuls = {name_of(dtype): 2e-12 * side**3 / time_matmul(side, dtype, device, time) for dtype in dtypes}
    free(device)
    return {
        "copy_bytes": copied,
        "copy_gb_per_s": 2e-9 * copied / copy,
        "matmul_side": side,
        "matmul_tflop_per_s": matmuls,
    }


def time_copy(count: int, device: torch.device, time: Callable[[Callable[[], object]], float]) -> float:
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return time(lambda: target.copy_(source))


def time_matmul(
    side: int, dtype: torch.dtype, device: torch.device, time: Callable[[Callable[[], object]], float]
) -> float:
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    took = time(lambda: torch.mm(left, right, out=out))
    # On a CPU MKL's matmul is not always the fastest there is.
    return (
        min(took, time(lambda: eager.onednn_linear(left, right, None))) if eager.prefers_onednn(left, right) else took
    )


def floor_ms(cost: Cost, dtype: torch.dtype, ceilings: dict[str, Any] | None) -> float | None:
    """The time that no implementation can beat, by the ceilings of this run."""
    matmul = ceilings["matmul_tflop_per_s"].get(name_of(dtype)) if ceilings else None
    if ceilings is None or matmul is None:
        return None
    return 1e3 * max(cost.flops / (1e12 * matmul), cost.bytes / (1e9 * ceilings["copy_gb_per_s"]))


def speeds(
    samples: Samples, cost: Cost, dtype: torch.dtype, device: torch.device, ceilings: Any, images: float | None
) -> dict[str, Any]:
    """What a record says of a pass that was timed. images: how many a call handles, where that is the question."""
    milliseconds = quantiles(samples.milliseconds)
    seconds = milliseconds["median"] / 1e3
    floor = floor_ms(cost, dtype, ceilings)
    return {
        "ms": milliseconds,
        "host_us": statistics.median(samples.host_microseconds) if device.type == "cuda" else None,
        "flops": cost.flops,
        "bytes": cost.bytes or None,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "gb_per_s": cost.bytes / seconds / 1e9 if cost.bytes else None,
        "floor_ms": floor,
        "of_floor": floor / milliseconds["median"] if floor is not None else None,
        "images_per_s": images / seconds if images else None,
    }
