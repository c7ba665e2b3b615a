"""Every operation's providers as pytest-benchmark tests at toy size: checked by the harness first, then timed.

    python -m pytest benchmarks --benchmark-enable --benchmark-group-by=func,param:name

pytest-benchmark times calls on the host. `extra_info` adds the median time on the device (ms) and the bandwidth (GB/s).
"""

import importlib
from functools import cache

import pytest
import torch

from fastvit.benchmarks import command
from fastvit.benchmarks.harness import CaseRun, Settings
from fastvit.benchmarks.measure import median_ms, run_once

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = Settings(DEVICE, quick=True)
OPERATIONS = {
    operation.name: operation
    for module in command.KERNELS
    for operation in importlib.import_module(f"fastvit.benchmarks.{module}").OPERATIONS
}
PROVIDERS = [
    (operation.name, provider.name, step)
    for operation in OPERATIONS.values()
    for provider in operation.providers.values()
    if provider.tier == 0 and DEVICE.type in provider.devices  # tier 0: no compiler
    for step in operation.passes
]


@cache
def start_case(name: str) -> CaseRun:
    """Draws the inputs of an operation and measures the errors of its baseline, which judge the other providers."""
    operation = OPERATIONS[name]
    case = CaseRun(operation, operation.list_shapes(DEVICE, quick=True)[0], torch.float32, SETTINGS)
    baseline = case.check(operation.providers[operation.baseline])
    assert baseline.status == "timed", baseline.reason
    case.baseline = baseline.errors
    return case


@pytest.mark.parametrize("name, provider_name, step", PROVIDERS)
def test_operation(benchmark, name, provider_name, step):
    case = start_case(name)
    provider = case.operation.providers[provider_name]
    if skipped := SETTINGS.find_skip_reason(provider, case.shape):
        pytest.skip(skipped[1])
    check = case.check(provider)
    if check.status == "failed" and provider.kernel is None:  # another library may lack this device or dtype
        pytest.skip(check.reason)
    assert check.status == "timed", check.reason
    if benchmark.enabled:
        milliseconds = median_ms(check.steps[step], DEVICE, seconds=0.1, min_rounds=3)
        cost = case.operation.compute_costs(case.shape, case.dtype)[step]
        benchmark.extra_info |= {"device_ms": milliseconds, "gb_per_s": cost.bytes / milliseconds / 1e6}
    benchmark(run_once, check.steps[step], DEVICE)
