"""Registers the marks of transformers' test classes, and compares fastvit's outcomes with the baseline's."""

import os
from collections import Counter

import pytest
from _pytest.subtests import SubtestReport
from compat.differences import DIFFERENCES

MARKS = """
    accelerate_tests all_flash_attn_test bitsandbytes flash_attn_3_test flash_attn_4_test flash_attn_test generate
    is_agent_test is_expert_parallel_test is_fsdp_test is_pipeline_test is_staging_test is_tensor_parallel_test
    is_training_test order torch_compile_test
"""
BASELINE, OURS = "TestTransformersViT", "TestFastViT"
outcomes: dict[str, dict[str, str]] = {BASELINE: {}, OURS: {}}
skipped_subtests = {BASELINE: Counter(), OURS: Counter()}  # a test whose subtests are skipped passes


def pytest_configure(config):
    for mark in MARKS.split():
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' tests")


def pytest_runtest_logreport(report):
    *_, class_name, name = report.nodeid.split("::")
    if class_name not in outcomes:
        return
    if isinstance(report, SubtestReport):
        skipped_subtests[class_name][name] += report.skipped
    elif report.when == "call" or not report.passed:
        outcomes[class_name][name] = report.outcome


def get_outcome(class_name: str, name: str) -> str:
    """Return pytest's outcome, or "listed" for a test that is skipped, or fails, as DIFFERENCES expects."""
    outcome = outcomes[class_name].get(name, "missing")
    expected = class_name == OURS and name in DIFFERENCES
    return "listed" if expected and (outcome == "skipped" or skipped_subtests[OURS][name]) else outcome


def list_shortfalls() -> list[str]:
    """List tests that the baseline passes and fastvit skips, wholly or in part, or lacks; and listed ones that pass."""
    if not outcomes[OURS]:
        return []
    lines = [f"{name}: listed, but passes" for name in DIFFERENCES if get_outcome(OURS, name) == "passed"]
    for name, outcome in outcomes[BASELINE].items():
        ours = get_outcome(OURS, name)
        skipped, allowed = skipped_subtests[OURS][name], skipped_subtests[BASELINE][name]
        if outcome == "passed" and ours in ("skipped", "missing"):
            lines.append(f"{name}: {ours}")
        elif outcome == ours == "passed" and skipped > allowed:
            lines.append(f"{name}: {skipped} subtests skipped, {allowed} by transformers' ViT")
    return lines


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if not os.environ.get("FASTVIT_TRANSFORMERS_TESTS") and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK  # the module reports why it is skipped
    whole = not (session.config.option.keyword or any("::" in argument for argument in session.config.args))
    if whole and session.exitstatus == 0 and list_shortfalls():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if not any(outcomes.values()):
        return
    terminalreporter.section("transformers' tests for ViT")
    kinds = ("passed", "listed", "failed", "skipped")
    terminalreporter.write_line(f"{'':20}" + "".join(f"{kind:>10}" for kind in kinds))
    for class_name, label in ((BASELINE, "transformers' ViT"), (OURS, "fastvit")):
        counts = Counter(get_outcome(class_name, name) for name in outcomes[class_name])
        terminalreporter.write_line(f"{label:20}" + "".join(f"{counts[kind]:>10}" for kind in kinds))
    for line in list_shortfalls():
        terminalreporter.write_line(f"differs from transformers' ViT: {line}", red=True)
