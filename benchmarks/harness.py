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


class Check(NamedTuple):
    """A provider before it is timed; steps may be timed if the status is "timed"."""

    status: str
    reason: str | None = None
    first_calls: Mapping[str, float] = {}  # pass -> seconds
    errors: Mapping[str, Error] | None = None  # by result
    steps: Mapping[str, Step] = {}  # by pass


def make_record(operation: str, shape: Shape, dtype: torch.dtype, name: str, provider: str) -> Record:
    """Returns the record of a provider and pass, to which times are added."""
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


def run_case(operation: Operation, shape: Shape, dtype: torch.dtype, settings: Settings) -> list[Record]:
    """Checks, times and measures the memory of every provider; returns a record for each provider and pass."""
    torch._dynamo.reset()  # its limit of recompilations is not meant for a list of shapes
    return CaseRun(operation, shape, dtype, settings).run()


class CaseRun:
    """An operation at one shape and dtype."""

    def __init__(self, operation: Operation, shape: Shape, dtype: torch.dtype, settings: Settings):
        self.operation, self.shape, self.dtype, self.settings = operation, shape, dtype, settings
        self.device = settings.device
        self.case = operation.make_case(shape, dtype, self.device)
        self.baseline: Mapping[str, Error] | None = None

    def run(self) -> list[Record]:
        operation = self.operation
        records: dict[tuple[str, str], Record] = {}
        steps: dict[str, Mapping[str, Step]] = {}
        # The baseline comes first: its errors judge the others.
        for provider in sorted(operation.providers.values(), key=lambda provider: provider.name != operation.baseline):
            if provider.name != operation.baseline and not re.search(self.settings.providers, provider.name):
                continue
            label = provider.get_label(self.device, self.dtype)
            skipped = self.settings.find_skip_reason(provider, self.shape)
            check = Check(*skipped) if skipped else self.check(provider)
            if check.status == "timed":
                steps[label] = check.steps
                self.baseline = check.errors if provider.name == operation.baseline else self.baseline
            for name in operation.passes:
                records[label, name] = self.make_record(provider, label, name, check)
        for name in operation.passes:
            if not self.settings.memory_only:
                self.time_pass(name, steps, {label: records[label, name] for label in steps})
            for label, of_provider in steps.items():
                self.measure_memory(name, of_provider, records[label, name])
        return list(records.values())

    def check(self, provider: Provider) -> Check:
        """Runs a provider and compares its errors with those of the baseline."""
        first: dict[str, float] = {}
        try:
            steps = self.operation.prepare(provider, self.case)
            for name, step in self.operation.list_first_calls(steps).items():
                first[name] = run_once(step, self.device)
            errors = measure_errors(self.operation.compute_results(steps, self.case), self.case.expected)
        except Exception as error:  # must not stop the other providers
            free_memory(self.device)
            return Check("failed", describe_error(error), first)
        reason = find_mistake(errors, self.baseline, *self.operation.get_error_bounds(self.dtype))
        return Check("wrong" if reason else "timed", reason, first, errors, steps)

    def make_record(self, provider: Provider, label: str, name: str, check: Check) -> Record:
        record = make_record(self.operation.name, self.shape, self.dtype, name, label)
        record |= {"registered": provider.name, "status": check.status, "reason": check.reason}
        record |= self.operation.describe_provider(provider)
        record["headline"] = self.shape.tier == 0 or (self.device.type == "cpu" and self.shape.tier == 1)
        record["first_call_s"] = check.first_calls.get(name)
        if check.errors:
            record["error"] = max(error.whole for error in check.errors.values())
        if not self.settings.quick and (targets := self.operation.get_targets(self.shape, self.device).get(name)):
            record["targets"] = dict(targets)
        return record

    def time_pass(self, name: str, steps: Mapping[str, Mapping[str, Step]], records: Mapping[str, Record]) -> None:
        """Adds times and speeds of all providers to the records of a pass; steps: provider -> pass -> step."""
        operation, device, quick = self.operation, self.device, self.settings.quick
        seconds = operation.seconds_on_cpu if device.type == "cpu" and operation.seconds_on_cpu else operation.seconds
        outcomes = measure_times(
            {label: of_provider[name] for label, of_provider in steps.items()},
            device,
            seconds=0.02 if quick else seconds,
            min_rounds=3 if quick else 5,
            hides_launch=operation.hides_launch,
        )
        cost = operation.compute_costs(self.shape, self.dtype)[name]
        images = self.shape.batch if operation.counts_images else None
        for label, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                records[label].update(status="failed", reason=describe_error(outcome))
            else:
                ceilings = self.settings.ceilings
                records[label].update(compute_speeds(outcome, cost, self.dtype, device, ceilings, images))

    def measure_memory(self, name: str, steps: Mapping[str, Step], record: Record) -> None:
        """Adds peak memory, and after the last pass the bytes saved for backward, to a record."""
        outcome: Record = {"status": "measured"}
        try:
            record["peak_bytes"] = measure_peak_bytes(steps[name], self.device)
            is_last = name == self.operation.passes[-1]
            record["kept_bytes"] = self.operation.measure_saved_bytes(steps, self.case) if is_last else None
        except Exception as error:
            record["memory_error"] = describe_error(error)
            outcome = {"status": "failed", "reason": describe_error(error)}
        record.update(outcome if self.settings.memory_only else {})
