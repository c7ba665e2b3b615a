"""One case of a benchmark: every provider is checked, timed and weighed.

check   `errors`: everybody's outputs and gradients against the definition in float64; what is wrong is not timed
clock   `timing`: providers take turns, round by round, so that a machine that slows down slows all of them. On a
        GPU: events, caches flushed before each call, and the call queued behind a pause, so that the device's time
        is measured and not the host's (which is reported beside it). On a CPU: the wall clock
memory  `memory`: on a GPU the allocator's peak; everywhere the bytes that are kept for backward
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fastvit.benchmarks.cases import OURS, Operation, Provider, Shape
from fastvit.benchmarks.ceilings import speeds
from fastvit.benchmarks.environment import name_of
from fastvit.benchmarks.errors import Error, measure_errors
from fastvit.benchmarks.memory import free, peak_bytes
from fastvit.benchmarks.timing import Step, measure, median_ms, run_once


@dataclasses.dataclass
class Settings:
    device: torch.device
    quick: bool = False
    full: bool = False  # all shapes, and compilers everywhere
    memory_only: bool = False
    brief: bool = False  # one suite among others, which want their time too
    providers: str = ""  # a regular expression; only those whose name holds it
    deadline: float = float("inf")  # time.monotonic() after which nothing new is begun
    ceilings: dict[str, Any] | None = None

    def why_left_out(self, provider: Provider, shape: Shape) -> str | None:
        if time.monotonic() > self.deadline:
            return "the time budget was spent before its turn"
        if provider.max_batch is not None and shape.batch > provider.max_batch:
            return f"it is for batches up to {provider.max_batch}"
        if provider.tier == 0 or self.full:
            return None
        if self.quick or self.device.type == "cpu":
            return "compiling takes longer than all the rest; --full includes it"
        if provider.tier > 2 or (provider.tier == 2 and shape.tier > 0):
            return "autotuning takes longer than all the rest; --full includes it"
        return None


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class Checked(NamedTuple):
    """What is known of a provider before it is timed."""

    status: str
    reason: str | None = None
    error: float | None = None  # the largest of its results
    first_calls: Mapping[str, float] = {}  # seconds
    steps: dict[str, Step] | None = None  # of those that may be timed
    errors: dict[str, Error] | None = None


def check(
    operation: Operation,
    provider: Provider,
    shape: Shape,
    case: Any,
    dtype: torch.dtype,
    baseline: Mapping[str, Error] | None,
    settings: Settings,
) -> Checked:
    """Whether a provider runs, and is right by the errors of `baseline`."""
    if reason := provider.why_not(settings.device):
        return Checked("missing", reason)
    if reason := settings.why_left_out(provider, shape):
        return Checked("left out", reason)
    first: dict[str, float] = {}
    worst = None
    try:
        steps = operation.prepare(provider, case)
        first = {name: run_once(step, settings.device) for name, step in operation.first_calls(steps).items()}
        errors = measure_errors(operation.results(steps, case), case.expected)
        worst = max(error.whole for error in errors.values())
        if reason := operation.judge(errors, baseline, dtype):
            return Checked("wrong", reason, worst, first)
        return Checked("timed", None, worst, first, steps, errors)
    except Exception as error:  # what one provider cannot do is no reason to stop the others
        free(settings.device)
        return Checked("failed", describe(error), None, first)


def run_case(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    settings: Settings,
    tick: Callable[[str], object] = lambda what: None,
) -> Iterator[dict[str, Any]]:
    """Check, time and weigh every provider: a record for each and each pass. tick: told what is done next."""
    device = settings.device
    common = {
        "operation": operation.name,
        "shape": shape.name,
        "sizes": shape.sizes(),
        "headline": shape.tier == 0 or (device.type == "cpu" and shape.tier == 1),
        "dtype": name_of(dtype),
    }
    torch._dynamo.reset()  # its limit of compilations for one function is not meant for a list of shapes
    tick("definition")
    case = operation.make_case(shape, dtype, device)
    records: dict[tuple[str, str], dict[str, Any]] = {}
    ready: Ready = {}
    baseline: dict[str, Error] | None = None
    # Whoever is the measure of the others comes first.
    for provider in sorted(operation.providers.values(), key=lambda provider: provider.name != operation.baseline):
        is_baseline = provider.name == operation.baseline
        if not is_baseline and not re.search(settings.providers, provider.name):
            continue
        label = provider.label(device, dtype)
        tick(label)
        found = check(operation, provider, shape, case, dtype, None if is_baseline else baseline, settings)
        baseline = found.errors if is_baseline else baseline
        if found.steps is not None:
            ready[label] = found.steps
        for name in operation.passes:
            who = {"provider": label, "registered": provider.name, "ours": label.startswith(OURS)}
            record = common | {"pass": name, **who, "status": found.status, "reason": found.reason}
            record |= {"error": found.error} if found.error is not None else {}
            if not settings.quick and (targets := operation.targets_at(shape, device).get(name)):
                record["targets"] = dict(targets)
            records[label, name] = record | {"first_call_s": found.first_calls.get(name)}
    for name in operation.passes:
        of_pass = {label: records[label, name] for label in ready}
        if not settings.memory_only:
            tick(f"timing {name}")
            time_pass(operation, name, shape, dtype, settings, ready, of_pass)
        tick(f"memory {name}")
        weigh_pass(operation, name, case, settings, ready, of_pass)
    yield from records.values()


Ready = dict[str, dict[str, Step]]  # provider -> pass -> step
Records = dict[str, dict[str, Any]]  # provider -> record of one pass


def time_pass(
    operation: Operation,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    settings: Settings,
    ready: Ready,
    records: Records,
) -> None:
    """Add everybody's times, and the speeds that they mean, to the records of the pass."""
    device = settings.device
    seconds = operation.seconds if device.type != "cpu" else operation.seconds_on_cpu or operation.seconds
    measured = measure(
        {label: steps[name] for label, steps in ready.items()},
        device,
        seconds=0.02 if settings.quick else seconds,
        min_rounds=3 if settings.quick else 5,
        hides_launch=operation.hides_launch,
    )
    cost = operation.costs(shape, dtype)[name]
    for label, outcome in measured.items():
        if isinstance(outcome, Exception):
            records[label] |= {"status": "failed", "reason": describe(outcome)}
        else:
            records[label] |= speeds(outcome, cost, dtype, device, settings.ceilings, operation.rate(shape))


def weigh_pass(operation: Operation, name: str, case: Any, settings: Settings, ready: Ready, records: Records) -> None:
    """Add the memory that everybody needs to the records of the pass."""
    for label, steps in ready.items():
        record = records[label]
        try:
            record["peak_bytes"] = peak_bytes(steps[name], settings.device)
            record["kept_bytes"] = operation.kept_bytes(steps, case) if name == operation.passes[-1] else None
            record["status"] = "measured" if settings.memory_only else record["status"]
        except Exception as error:
            record["memory_error"] = describe(error)
            if settings.memory_only:
                record |= {"status": "failed", "reason": describe(error)}


def as_test(operation: Operation) -> Callable[..., None]:
    """A pytest-benchmark test of every provider that needs no compiler, at toy size: checked first, then timed."""
    if importlib.util.find_spec("pytest") is None:  # benchmarks run where no tests do
        return lambda: None
    import pytest

    names = [name for name, provider in operation.providers.items() if provider.tier == 0]

    @pytest.mark.parametrize("step", operation.passes)
    @pytest.mark.parametrize("name", names)
    def test(benchmark: Any, name: str, step: str) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        provider = operation.providers[name]
        if reason := provider.why_not(device):
            pytest.skip(reason)
        shape = operation.shapes(device, quick=True)[0]
        case = operation.make_case(shape, torch.float32, device)
        baseline_steps = operation.prepare(operation.providers[operation.baseline], case)
        baseline = measure_errors(operation.results(baseline_steps, case), case.expected)
        steps = operation.prepare(provider, case)
        try:
            errors = measure_errors(operation.results(steps, case), case.expected)
        except RuntimeError as error:
            if provider.kernel is not None:  # ours must run
                raise
            pytest.skip(describe(error))
        assert operation.judge(errors, baseline, torch.float32) is None
        if benchmark.enabled:
            milliseconds = median_ms(steps[step], device, seconds=0.1, min_rounds=3)
            benchmark.extra_info["device_ms"] = milliseconds
            benchmark.extra_info["gb_per_s"] = operation.costs(shape, torch.float32)[step].bytes / milliseconds / 1e6
        benchmark(run_once, steps[step], device)

    return test
