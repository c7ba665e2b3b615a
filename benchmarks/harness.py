"""One case of a benchmark: every provider is checked, then timed in turn with the others, then its memory measured."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastvit
from fastvit.benchmarks.cases import OURS, Operation, Provider, Shape
from fastvit.benchmarks.ceilings import compute_speeds
from fastvit.benchmarks.errors import Error, find_mistake, measure_errors
from fastvit.benchmarks.measure import Step, free_memory, measure_peak_bytes, measure_times, run_once
from fastvit.benchmarks.records import OUT_OF_TIME, Record, get_dtype_name


@dataclasses.dataclass
class Settings:
    device: torch.device
    suite: str = "kernels"
    quick: bool = False
    full: bool = False  # all shapes, and compilers everywhere
    only: str = ""  # a regular expression over the names of cases
    providers: str = ""  # a regular expression over the names of providers
    deadline: float = float("inf")  # time.monotonic() after which nothing new begins
    ceilings: dict[str, Any] | None = None

    @property
    def memory_only(self) -> bool:
        return self.suite == "memory"

    def find_skip_reason(self, provider: Provider, shape: Shape) -> tuple[str, str] | None:
        """Returns (status, reason) of a provider that does not run at a shape, or None."""
        if reason := provider.unsupported_reason(self.device):
            return "missing", reason
        if time.monotonic() > self.deadline:
            return "left out", OUT_OF_TIME
        if provider.max_batch is not None and shape.batch > provider.max_batch:
            return "left out", f"for batches up to {provider.max_batch}"
        limit = 0 if self.quick or self.device.type == "cpu" else 2 if shape.tier == 0 else 1
        if provider.tier > limit and not self.full:
            return "left out", "compiling takes longer than everything else; --full includes it"
        return None


def describe_error(error: BaseException) -> str:
    """Returns an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


Errors = Mapping[str, Error]  # by result


class Check(NamedTuple):
    """A provider before it is timed."""

    status: str
    reason: str | None = None
    first_calls: Mapping[str, float] = {}  # pass -> seconds
    errors: Mapping[str, Error] = {}
    steps: Mapping[str, Step] = {}


def check_provider(
    operation: Operation,
    provider: Provider,
    case: Any,
    dtype: torch.dtype,
    baseline: Errors | None,
    device: torch.device,
) -> Check:
    """Runs a provider and compares its errors with those of `baseline`; only status "timed" may be timed."""
    first: dict[str, float] = {}
    try:
        steps = operation.prepare(provider, case)
        first |= {name: run_once(step, device) for name, step in operation.list_first_calls(steps).items()}
        errors = measure_errors(operation.compute_results(steps, case), case.expected)
    except Exception as error:  # must not stop the other providers
        free_memory(device)
        return Check("failed", describe_error(error), first)
    reason = find_mistake(errors, baseline, *operation.get_error_bounds(dtype))
    return Check("wrong" if reason else "timed", reason, first, errors, steps)


def make_record(operation: str, shape: Shape, dtype: torch.dtype, name: str, provider: str, **fields: Any) -> Record:
    """Returns the record of a provider and pass; see `records` for status and reason."""
    return {
        "operation": operation,
        "shape": shape.name,
        "sizes": shape.get_sizes(),
        "headline": True,
        "dtype": get_dtype_name(dtype),
        "pass": name,
        "provider": provider,
        "registered": provider,
        "ours": provider.startswith(OURS),
        "status": "timed",
        "reason": None,
        **fields,
    }


def run_python(*arguments: str, **variables: str | None) -> Any:
    """Runs Python with this package on its path and returns the JSON in the last line of its output.

    Args:
        variables: changes to the environment; None unsets one.

    Raises:
        RuntimeError: with the last line of its errors, if it fails.
    """
    root = str(Path(fastvit.__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    changed = os.environ | {"PYTHONPATH": path} | variables
    environment = {name: value for name, value in changed.items() if value is not None}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def run_case(
    operation: Operation,
    shape: Shape,
    dtype: torch.dtype,
    settings: Settings,
) -> list[Record]:
    """Checks, times and measures the memory of every provider; returns a record for each provider and pass."""
    device = settings.device
    torch._dynamo.reset()  # its limit of recompilations is not meant for a list of shapes
    case = operation.make_case(shape, dtype, device)
    targets = {} if settings.quick else operation.get_targets(shape, device)
    checks: dict[str, Check] = {}
    records: dict[tuple[str, str], Record] = {}
    baseline: Errors | None = None
    # The baseline comes first: its errors judge the others.
    for provider in sorted(operation.providers.values(), key=lambda provider: provider.name != operation.baseline):
        is_baseline = provider.name == operation.baseline
        if not is_baseline and not re.search(settings.providers, provider.name):
            continue
        label = provider.get_label(device, dtype)
        skipped = settings.find_skip_reason(provider, shape)
        check = Check(*skipped) if skipped else check_provider(operation, provider, case, dtype, baseline, device)
        if is_baseline and check.status == "timed":
            baseline = check.errors
        checks[label] = check
        for name in operation.passes:
            record = make_record(operation.name, shape, dtype, name, label, status=check.status, reason=check.reason)
            record["headline"] = shape.tier == 0 or (device.type == "cpu" and shape.tier == 1)
            record["registered"] = provider.name
            record["first_call_s"] = check.first_calls.get(name)
            if check.errors:
                record["error"] = max(error.whole for error in check.errors.values())
            if name in targets:
                record["targets"] = dict(targets[name])
            records[label, name] = record
    steps = {label: check.steps for label, check in checks.items() if check.status == "timed"}
    for name in operation.passes:
        of_pass = {label: records[label, name] for label in steps}
        if not settings.memory_only:
            time_pass(operation, name, shape, dtype, settings, steps, of_pass)
        for label, of_provider in steps.items():
            measure_memory(operation, name, case, of_provider, settings, of_pass[label])
    return list(records.values())


def time_pass(
    operation: Operation,
    name: str,
    shape: Shape,
    dtype: torch.dtype,
    settings: Settings,
    steps: Mapping[str, Mapping[str, Step]],
    records: Mapping[str, Record],
) -> None:
    """Adds times and speeds of all providers to the records of a pass; steps: provider -> pass -> step."""
    device = settings.device
    seconds = operation.seconds_on_cpu if device.type == "cpu" and operation.seconds_on_cpu else operation.seconds
    outcomes = measure_times(
        {label: of_provider[name] for label, of_provider in steps.items()},
        device,
        seconds=0.02 if settings.quick else seconds,
        min_rounds=3 if settings.quick else 5,
        hides_launch=operation.hides_launch,
    )
    cost, images = operation.compute_costs(shape, dtype)[name], shape.batch if operation.counts_images else None
    for label, outcome in outcomes.items():
        if isinstance(outcome, Exception):
            records[label].update(status="failed", reason=describe_error(outcome))
        else:
            records[label].update(compute_speeds(outcome, cost, dtype, device, settings.ceilings, images))


def measure_memory(
    operation: Operation, name: str, case: Any, steps: Mapping[str, Step], settings: Settings, record: Record
) -> None:
    """Adds peak memory, and after the last pass the bytes saved for backward, to the record of a provider and pass."""
    outcome: Record = {"status": "measured"} if settings.memory_only else {}
    try:
        record["peak_bytes"] = measure_peak_bytes(steps[name], settings.device)
        is_last = name == operation.passes[-1]
        record["kept_bytes"] = operation.measure_saved_bytes(steps, case) if is_last else None
    except Exception as error:
        record["memory_error"] = describe_error(error)
        outcome = {"status": "failed", "reason": describe_error(error)} if settings.memory_only else {}
    record.update(outcome)
