"""The marks that transformers' test classes carry, and the comparison of our outcomes with the yardstick's."""

import pytest

MARKS = """
    accelerate_tests all_flash_attn_test bitsandbytes flash_attn_3_test flash_attn_4_test flash_attn_test generate
    is_agent_test is_expert_parallel_test is_fsdp_test is_pipeline_test is_staging_test is_tensor_parallel_test
    is_training_test order torch_compile_test
"""
YARDSTICK, OURS = "TestTransformersViT", "TestFastViT"
outcomes: dict[str, dict[str, str]] = {YARDSTICK: {}, OURS: {}}


def pytest_configure(config):
    for mark in MARKS.split():
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' tests")


def pytest_runtest_logreport(report):
    *_, class_name, name = report.nodeid.split("::")
    if class_name in outcomes and (report.when == "call" or not report.passed):
        xfailed = report.skipped and hasattr(report, "wasxfail")
        outcomes[class_name][name] = "listed" if xfailed else report.outcome


def not_passed() -> list[str]:
    """What the yardstick passes, we neither pass nor list, and has not failed by itself."""
    ours = outcomes[OURS]
    return [
        f"{name}: {ours.get(name, 'missing')}"
        for name, outcome in outcomes[YARDSTICK].items()
        if outcome == "passed" and ours and ours.get(name) not in ("passed", "listed", "failed")
    ]


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if not_passed() and not session.config.option.keyword and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if not any(outcomes.values()):
        return
    terminalreporter.section("transformers' tests for ViT")
    kinds = ("passed", "failed", "listed", "skipped")
    terminalreporter.write_line(f"{'':22}" + "".join(f"{kind:>10}" for kind in kinds))
    for class_name, label in ((YARDSTICK, "transformers' ViT"), (OURS, "fastvit")):
        counts = [list(outcomes[class_name].values()).count(kind) for kind in kinds]
        terminalreporter.write_line(f"{label:22}" + "".join(f"{count:>10}" for count in counts))
    for line in not_passed():
        terminalreporter.write_line(f"passed by transformers' ViT and not by ours: {line}")
