"""The clock: providers take turns, on a GPU behind a pause and with caches flushed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

QUANTILES = {"min": 0.0, "p05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "p95": 0.95, "max": 1.0}


class Step(NamedTuple):
    """What is timed, `run(prepare())`, and what comes before each time and is not."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Samples(NamedTuple):
    milliseconds: list[float]
    host_microseconds: list[float]  # until the call returned; on a CPU the same time


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def cache_flusher(device: torch.device) -> Tensor:
    """A buffer of twice the last-level cache; writing it leaves nothing of the inputs there."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
    return torch.empty(2 * size, dtype=torch.uint8, device=device)


def run_once(step: Step, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    prepared = step.prepare()
    synchronize(device)
    start = time.perf_counter()
    step.run(prepared)
    synchronize(device)
    return time.perf_counter() - start


def time_calls(step: Step, calls: int, device: torch.device, pause: float | None) -> Samples:
    """`calls` samples in a row. pause: seconds that the device idles first, for the host to run ahead; None: no pause,
    the host's time counts."""
    if device.type != "cuda":
        seconds = [run_once(step, device) for _ in range(calls)]
        return Samples([1e3 * second for second in seconds], [1e6 * second for second in seconds])
    flusher = cache_flusher(device)
    host, events = [], []
    for _ in range(calls):
        prepared = step.prepare()
        flusher.zero_()
        if pause is None:
            torch.cuda.synchronize(device)
        else:
            torch.cuda._sleep(int(pause * 2e9))  # cycles; clocks are near 2 GHz
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        start.record()
        result = step.run(prepared)
        end.record()
        host.append(1e6 * (time.perf_counter() - begin))
        events.append((start, end))
        del result, prepared
    torch.cuda.synchronize(device)
    return Samples([start.elapsed_time(end) for start, end in events], host)


# Seconds of one provider before the next has its turn. In use one model runs in a loop; a pass of 7 ms right after
# another model's finds caches, branch predictors and the allocator in the other's state, and took 10 ms on two cores.
IN_A_ROW = 0.1


def measure(
    steps: Mapping[str, Step], device: torch.device, *, seconds: float, min_rounds: int, hides_launch: bool = True
) -> dict[str, Samples | Exception]:
    """Time everybody in turn, about `seconds` each and at least `min_rounds` rounds, after two calls of warm-up.

    Who fails in the warm-up gets the exception instead of samples, and the others go on.
    """
    outcomes: dict[str, Samples | Exception] = {}
    pauses: dict[str, float | None] = {}
    calls: dict[str, int] = {}
    longest = 0.0
    for name, step in steps.items():
        try:
            run_once(step, device)
            took = run_once(step, device)
            pause = None
            if hides_launch:  # twice what the host takes
                host = time_calls(step, 3, device, 0.0).host_microseconds if device.type == "cuda" else [0.0]
                pause = 2e-6 * statistics.median(host)
        except Exception as error:
            outcomes[name] = error
            continue
        outcomes[name], pauses[name] = Samples([], []), pause
        each = took + (pause or 0.0)
        calls[name] = max(1, min(20, int(IN_A_ROW / each)))
        longest = max(longest, calls[name] * each)
    rounds = max(min_rounds, min(100, int(seconds / longest))) if calls else 0
    for number in range(rounds):
        # There and back, so that nobody always follows the same neighbour.
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            new, samples = time_calls(steps[name], calls[name], device, pauses[name]), outcomes[name]
            assert isinstance(samples, Samples)
            samples.milliseconds.extend(new.milliseconds)
            samples.host_microseconds.extend(new.host_microseconds)
    return outcomes


def median_ms(step: Step, device: torch.device, *, seconds: float, min_rounds: int) -> float:
    """The median of one alone; what it raises is raised."""
    outcome = measure({"": step}, device, seconds=seconds, min_rounds=min_rounds)[""]
    if isinstance(outcome, Exception):
        raise outcome
    return statistics.median(outcome.milliseconds)


def quantiles(samples: Sequence[float]) -> dict[str, float | int]:
    values = np.quantile(np.asarray(samples, dtype=np.float64), list(QUANTILES.values()))
    return {name: float(value) for name, value in zip(QUANTILES, values, strict=True)} | {"samples": len(samples)}
