"""Every kernel compiles for every GPU it is meant for, and the machine code is what its author counted on."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_kernels.py")

# Kernels made of matrix products, whose tiles have the 64 rows that wgmma needs on sm_90 for half precision.
MATRIX_KERNELS = {
    "_patch_embed_fwd",
    "_patch_embed_weight_bwd",
    "_linear_fwd",
    "_linear_activation_bwd",
}
# The same where operands are copied by descriptor.
DESCRIPTOR_KERNELS = {"_linear_fwd_persistent", "_linear_activation_bwd_persistent"}
DESCRIPTOR_TARGETS = ("sm_90", "sm_100")
# Kernels bound by memory: they must load 16 bytes a thread on NVIDIA's GPUs.
MEMORY_KERNELS = {
    "_layer_norm_fwd",
    "_layer_norm_bwd",
    "_patch_embed_tokens_bwd",
    "_activation_fwd",
    "_activation_bwd",
}
# Also bound by memory, but for GPUs with e4m3 only.
FP8_KERNELS = {"_activation_e4m3", "_layer_norm_e4m3"}
FP8_TARGETS = ("sm_89", "sm_90", "sm_100")


TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")


def compile_for(target, folder):
    """The compile report for one kind of GPU. One process cannot both interpret and compile, so it is another one."""
    command = [sys.executable, str(SCRIPT), "--quick", "--targets", target, "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{target}.json").read_text())["kernels"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compile")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {target: pool.submit(compile_for, target, folder) for target in TARGETS}


@pytest.fixture(params=TARGETS)
def rows(request, reports):
    """Those of the sizes that models have. Sizes of 1 (the label begins with "one") need only compile."""
    return [row for row in reports[request.param].result() if not row["case"].startswith("one ")]


def test_kernels_compile_without_spilling(rows):
    expected = MATRIX_KERNELS | MEMORY_KERNELS
    expected |= FP8_KERNELS if rows[0]["target"] in FP8_TARGETS else set()
    expected |= DESCRIPTOR_KERNELS if rows[0]["target"] in DESCRIPTOR_TARGETS else set()
    assert {row["kernel"] for row in rows} >= expected
    if rows[0]["target"] in ("sm_80", "sm_90"):
        spilling = [(row["kernel"], row["case"]) for row in rows if row["spill_bytes"] or row["spill_instructions"]]
        assert not spilling


def test_kernels_use_the_instructions_they_are_built_for(rows):
    for row in rows:
        name = f"{row['kernel']} {row['case']} {row['target']}"
        # AMD's waves are twice as wide: the same tile is 8 bytes a lane, and as many bytes a load.
        if row["kernel"] in MEMORY_KERNELS | FP8_KERNELS and row["target"] != "gfx942":
            assert row["loads_128"] + row["async_copies_128"] > 0, name
        if row["kernel"] in DESCRIPTOR_KERNELS:
            assert row["descriptor_copies"] > 0, name
        if row["kernel"] in MATRIX_KERNELS | DESCRIPTOR_KERNELS and "float32" not in row["case"].split(",")[0]:
            assert row["wgmma" if row["target"] == "sm_90" else "mma"] > 0, name


def test_kernels_go_through_tritons_launcher():
    """Written because Triton 3.6 launched none of attention's kernels, which the interpreter and the reports took."""
    command = [sys.executable, str(SCRIPT.with_name("launch_kernels.py"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
