"""Every kernel compiles for every supported GPU, and its machine code has the expected instructions and no spills."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
from fastvit.kernels import tuning

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]

# Matmul kernels, whose tiles have the 64 rows that wgmma needs on sm_90 for half precision.
MATRIX_KERNELS = {
    "_patch_embed_fwd",
    "_patch_embed_weight_bwd",
    "_linear",
}
# GPUs on which the third candidate of `_linear` copies its operands by descriptor.
DESCRIPTOR_TARGETS = ("sm_90", "sm_100")
# Memory-bound kernels, which must load 16 bytes per thread on NVIDIA GPUs.
MEMORY_KERNELS = {
    "_layer_norm_fwd",
    "_layer_norm_bwd",
    "_patch_embed_tokens_bwd",
    "_activation_fwd",
    "_activation_bwd",
}
# Memory-bound kernels for GPUs with e4m3.
FP8_KERNELS = {"_activation_e4m3"}
FP8_TARGETS = ("sm_89", "sm_90", "sm_100")


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
# The installed Triton, and the oldest one that pyproject.toml allows, from another environment. The oldest runs for two
# targets only, one with mma.sync and one with wgmma, to limit the time of a CI run.
TRITONS = {"installed": sys.executable, "oldest": os.environ.get("FASTVIT_OLDEST_PYTHON")}
STACKS = [("installed", target) for target in TARGETS] + [("oldest", target) for target in ("sm_80", "sm_90")]

# Kernels that may spill registers on sm_80 or sm_90.
MAY_SPILL = (  # (regular expression for "Triton version, target, kernel, case, candidate", reason)
    (
        r"sm_90, _attention_bwd_key_value, 197 x 64 .*candidate 1$",
        "every matmul on wgmma, at 255 registers: 8 to 24 bytes, for a third fewer instructions",
    ),
    (r"sm_80, _attention_fwd_long, 197 x 128 .*candidate 1$", "64 x 64 scores of heads 128 wide: 8 bytes"),
)


def run_script(triton: str, script: Path, *arguments: str) -> str:
    """Run a script in another process, which may compile kernels, and return its output."""
    python = TRITONS[triton]
    if not python:
        pytest.skip(
            "FASTVIT_OLDEST_PYTHON does not name a Python with the oldest PyTorch and Triton: make setup-oldest"
        )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # import fastvit from this source tree
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def compile_for_target(triton: str, target: str, folder: Path) -> dict:
    run_script(triton, SCRIPT, "--quick", "--targets", target, "--output", str(folder / triton))
    return json.loads((folder / triton / f"{target}.json").read_text())


class Reports(dict):
    """Futures of compile reports by Triton and target; a report starts when it is first requested."""

    def __init__(self, pool: ThreadPoolExecutor, folder: Path):
        super().__init__()
        self.pool, self.folder = pool, folder

    def __missing__(self, stack: tuple[str, str]) -> Future:
        return self.setdefault(stack, self.pool.submit(compile_for_target, *stack, self.folder))


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = Reports(pool, tmp_path_factory.mktemp("compile"))
        for item in request.session.items:  # start the reports of all collected tests in parallel
            if stack := getattr(item, "callspec", None) and item.callspec.params.get("report"):
                reports[stack]
        yield reports


@pytest.fixture(params=STACKS, ids=" ".join)
def report(request, reports):
    return reports[request.param].result()


@pytest.fixture
def rows(report):
    """Rows at the sizes of models. Sizes of 1, with labels that begin with "one", only need to compile."""
    return [row for row in report["kernels"] if not row["case"].startswith("one ")]


def test_kernels_compile_without_spilling(report, rows):
    target = report["target"]
    expected = MATRIX_KERNELS | MEMORY_KERNELS
    expected |= FP8_KERNELS if target in FP8_TARGETS else set()
    assert {row["kernel"] for row in rows} >= expected
    if target in ("sm_80", "sm_90"):
        spilling = {
            f"{report['triton']}, {target}, {row['kernel']}, {row['case']}, candidate {row['candidate']}": row[
                "spill_bytes"
            ]
            for row in rows
            if row["spill_bytes"] or row["spill_instructions"]
        }
        allowed = [name for name in spilling if any(re.search(pattern, name) for pattern, _ in MAY_SPILL)]
        assert not {name: size for name, size in spilling.items() if name not in allowed}


def test_kernels_use_the_instructions_they_are_built_for(rows):
    for row in rows:
        name = f"{row['kernel']} {row['case']} {row['target']}"
        # AMD's wavefronts are twice as wide: in the same tile a lane loads 8 bytes.
        if row["kernel"] in MEMORY_KERNELS | FP8_KERNELS and row["target"] != "gfx942":
            assert row["loads_128"] + row["async_copies_128"] > 0, name
        if row["kernel"] == "_linear" and row["candidate"] == 2 and row["target"] in DESCRIPTOR_TARGETS:
            assert row["descriptor_copies"] > 0, name
        if row["kernel"] in MATRIX_KERNELS and "float32" not in row["case"].split(",")[0]:
            assert row["wgmma" if row["target"] == "sm_90" else "mma"] > 0, name


def test_every_rule_of_the_tuning_table_is_compiled(reports):
    """Each at shapes that select it, with all candidates."""
    compiled = {rule for target in TARGETS for rule in reports["installed", target].result()["rules"]}
    missing = [
        f"{rule.operation}, {rule.shape}, {rule.dtype}, {rule.device}"
        for index, rule in enumerate(tuning.TABLE)
        if index not in compiled and rule.device != "interpreter"
    ]
    assert not missing


@pytest.mark.parametrize("triton", TRITONS)
def test_kernels_go_through_tritons_launcher(triton, reports):
    """Triton 3.6 failed to launch attention kernels that the interpreter ran and the compiler compiled."""
    launched = json.loads(run_script(triton, SCRIPT.with_name("launch_kernels.py")).splitlines()[-1])
    compiled = reports[triton, "sm_90"].result()["rules"]
    missing = [str(tuning.TABLE[index][:4]) for index in compiled if index not in launched]
    assert not missing, "rules of the tuning table that are compiled for sm_90 and selected by no call"
