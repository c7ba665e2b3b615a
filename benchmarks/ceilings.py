"""The roofline: memory bandwidth and matmul throughput of the device, measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastvit.benchmarks.cases import Cost
from fastvit.benchmarks.measure import Samples, Step, compute_quantiles, free_memory, median_ms
from fastvit.benchmarks.records import get_dtype_name
from fastvit.ops import eager


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> dict[str, Any]:
    """Measures a copy (bytes read plus written) and square matmuls of random data."""
    if device.type == "cuda":
        side, size = (4096 if quick else 8192), 2**30
    else:
        side, size = (512 if quick else 2048), (2**26 if quick else 2**28)

    def time(call: Callable[[], object]) -> float:
        seconds, rounds = (0.05, 3) if quick else (0.5, 5)
        return median_ms(Step(lambda _: call()), device, seconds=seconds, min_rounds=rounds) / 1e3

    def time_matmul(dtype: torch.dtype) -> float:
        left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(left)
        seconds = time(lambda: torch.mm(left, right, out=out))
        if eager.prefers_onednn(left, right):  # on a CPU MKL's matmul is not always the fastest
            seconds = min(seconds, time(lambda: eager.onednn_linear(left, right, None)))
        return seconds

    def time_copy() -> float:
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return time(lambda: target.copy_(source))

    matmuls = {get_dtype_name(dtype): 2e-12 * side**3 / time_matmul(dtype) for dtype in dtypes}
    free_memory(device)
    return {
        "copy_bytes": size,
        "copy_gb_per_s": 2e-9 * size / time_copy(),
        "matmul_side": side,
        "matmul_tflop_per_s": matmuls,
    }


def compute_speeds(
    samples: Samples, cost: Cost, dtype: torch.dtype, device: torch.device, ceilings: Any, images: int | None
) -> dict[str, Any]:
    """Returns the fields of a record that follow from times; `floor_ms` is the shortest time under the ceilings."""
    milliseconds, floor = compute_quantiles(samples.milliseconds), None
    seconds = milliseconds["median"] / 1e3
    if ceilings and (matmul := ceilings["matmul_tflop_per_s"].get(get_dtype_name(dtype))):
        floor = 1e3 * max(cost.flops / (1e12 * matmul), cost.bytes / (1e9 * ceilings["copy_gb_per_s"]))
    return {
        "ms": milliseconds,
        "host_us": statistics.median(samples.host_microseconds) if device.type == "cuda" else None,
        "flops": cost.flops,
        "bytes": cost.bytes or None,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "gb_per_s": cost.bytes / seconds / 1e9 if cost.bytes else None,
        "floor_ms": floor,
        "of_floor": floor and floor / milliseconds["median"],
        "images_per_s": images and images / seconds,
    }
