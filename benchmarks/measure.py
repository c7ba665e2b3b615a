"""Time and memory of a call.

Triton's `do_bench` and PyTorch's `Timer` measure one function at a time. Here the providers take turns, round by round,
so that a machine that slows down slows all of them. On a GPU the device first idles while the host queues the call, so
that device time is measured and not launch overhead, which is reported beside it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

QUANTILES = {"min": 0.0, "p05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "p95": 0.95, "max": 1.0}
# Seconds of one provider before the next has its turn. In use one model runs in a loop; a pass of 7 ms right after
# another model's finds caches, branch predictors and the allocator in the other's state, and took 10 ms on two cores.
TURN = 0.1


class Step(NamedTuple):
    """`run(prepare())`, of which only `run` is timed."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Samples(NamedTuple):
    milliseconds: list[float]
    host_microseconds: list[float]  # until the call returned; on a CPU the same time


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def get_cache_flusher(device: torch.device) -> Tensor:
    """Returns a buffer of twice the last-level cache; writing it evicts the inputs."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 * 2**20
    return torch.empty(2 * size, dtype=torch.uint8, device=device)


def run_once(step: Step, device: torch.device) -> float:
    """Returns the seconds of one call, including the device's work."""
    prepared = step.prepare()
    synchronize(device)
    start = time.perf_counter()
    step.run(prepared)
    synchronize(device)
    return time.perf_counter() - start


def time_calls(step: Step, calls: int, pause: float | None, device: torch.device) -> Samples:
    """Times `calls` calls in a row.

    Args:
        pause: seconds that a GPU idles before each call, for the host to run ahead. None: host time counts.
    """
    if device.type != "cuda":
        seconds = [run_once(step, device) for _ in range(calls)]
        return Samples([1e3 * second for second in seconds], [1e6 * second for second in seconds])
    host, events = [], []
    for _ in range(calls):
        prepared = step.prepare()
        get_cache_flusher(device).zero_()
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


def measure_times(
    steps: Mapping[str, Step], device: torch.device, *, seconds: float, min_rounds: int, hides_launch: bool = True
) -> dict[str, Samples | Exception]:
    """Times all steps in turn, after two calls of warm-up each.

    Args:
        seconds: about as long for each step.
        min_rounds: at least so many turns, however long they are.
        hides_launch: measure device time only.

    Returns:
        Samples by name, or the exception that the warm-up raised.
    """
    outcomes: dict[str, Samples | Exception] = {}
    turns: dict[str, tuple[int, float | None]] = {}  # calls per turn, pause
    longest = 0.0
    for name, step in steps.items():
        try:
            run_once(step, device)
            duration, pause = run_once(step, device), None
            if hides_launch and device.type == "cuda":
                pause = 2e-6 * statistics.median(time_calls(step, 3, 0.0, device).host_microseconds)
        except Exception as error:
            outcomes[name] = error
            continue
        duration += pause or 0.0
        turns[name] = max(1, min(20, int(TURN / duration))), pause
        longest = max(longest, turns[name][0] * duration)
        outcomes[name] = Samples([], [])
    rounds = max(min_rounds, min(100, int(seconds / longest))) if turns else 0
    for number in range(rounds):
        # There and back, so that no provider always follows the same one.
        for name in list(turns)[:: 1 if number % 2 == 0 else -1]:
            samples: Any = outcomes[name]
            new = time_calls(steps[name], *turns[name], device)
            samples.milliseconds.extend(new.milliseconds)
            samples.host_microseconds.extend(new.host_microseconds)
    return outcomes


def median_ms(step: Step, device: torch.device, *, seconds: float, min_rounds: int) -> float:
    """Returns the median of one step measured alone; raises what it raises."""
    outcome = measure_times({"": step}, device, seconds=seconds, min_rounds=min_rounds)[""]
    if isinstance(outcome, Exception):
        raise outcome
    return statistics.median(outcome.milliseconds)


def compute_quantiles(samples: Sequence[float]) -> dict[str, float | int]:
    values = np.quantile(np.asarray(samples, dtype=np.float64), list(QUANTILES.values()))
    return {name: float(value) for name, value in zip(QUANTILES, values, strict=True)} | {"samples": len(samples)}


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_peak_bytes(step: Step, device: torch.device) -> int | None:
    """Returns the peak memory of a call above what was allocated before it, its inputs included; None on a CPU."""
    if device.type != "cuda":
        return None
    run_once(step, device)  # allocations that stay, such as an optimizer's state, do not belong to the call
    prepared = step.prepare()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step.run(prepared)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def count_saved_bytes(forward: Callable[[], object], known: Sequence[Any]) -> int:
    """Counts the bytes that a forward pass saves for backward, without the tensors in `known` (inputs, weights)."""
    known_pointers = {leaf.untyped_storage().data_ptr() for leaf in known if isinstance(leaf, Tensor)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_pointers:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # kept alive, so that no address is used twice
    del output
    return sum(saved.values())
