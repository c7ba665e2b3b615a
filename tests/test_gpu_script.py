"""The script for a GPU's first ten minutes: phases that fail, and the purpose of each phase."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from fastvit import ops

pytest.importorskip("triton")
from fastvit.benchmarks import bench_layer_norm, gpu, gpu_cache, gpu_checks, gpu_phases
from fastvit.benchmarks.cases import Shape
from fastvit.benchmarks.gpu_checks import Case
from fastvit.benchmarks.gpu_phases import Run
from fastvit.ops import records

TOY = Case("layer_norm", "toy", torch.bfloat16)


@pytest.fixture
def run(tmp_path):
    if not ops.is_interpreting():
        pytest.skip("toy sizes are for interpreted kernels")
    return Run(tmp_path, time.monotonic() + 60, toy=True, workers=2)


def load(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The driver
# ---------------------------------------------------------------------------------------------------------------------

WRITE = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('[1]');"


def make_phase(name, folder, code="", seconds=20, **options):
    line = (sys.executable, "-S", "-c", WRITE + code, str(folder / f"{name}.json"))
    return gpu.Phase(name, seconds, command=line, **options)


@pytest.fixture
def _on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)


def test_without_a_gpu_it_exits_with_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "has_gpu", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 2
    assert "PyTorch finds no GPU; --toy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_on_a_gpu")
def test_a_phase_that_fails_or_exceeds_its_limit_keeps_the_others_and_all_files(tmp_path, capsys):
    raising = (sys.executable, "-S", "-c", "raise RuntimeError('no such GPU')")
    child = "import subprocess; subprocess.Popen(['sleep', '987']).wait()"
    phases = [
        gpu.Phase("environment", 2, command=raising),
        make_phase("compile", tmp_path, "print('no GPU'); sys.exit(3)", beside="correctness"),
        make_phase("correctness", tmp_path, child, seconds=1),
        make_phase("operations", tmp_path),
    ]
    assert gpu.main([str(tmp_path)], phases) == 1
    ended = {outcome["phase"]: outcome for outcome in load(tmp_path, "summary")["phases"]}
    assert {name: outcome["status"] for name, outcome in ended.items()} == {
        "environment": "failed",
        "compile": "skipped",
        "correctness": "out of time",
        "operations": "ok",
    }
    assert ended["environment"]["reason"] == "RuntimeError: no such GPU" and ended["compile"]["reason"] == "no GPU"
    assert load(tmp_path, "environment")["reason"] == "RuntimeError: no such GPU"
    assert load(tmp_path, "correctness") == load(tmp_path, "operations") == [1]  # written before the phase was killed
    assert "no such GPU" in (tmp_path / "log.txt").read_text() and "operations: ok" in capsys.readouterr().out
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert b"sleep\0987\0" not in commands  # killed with its phase


@pytest.mark.usefixtures("_on_a_gpu")
def test_unused_time_goes_to_the_next_phase(tmp_path):
    phases = [
        make_phase("environment", tmp_path, seconds=5),
        make_phase("operations", tmp_path, "time.sleep(3)", seconds=1),
    ]
    assert gpu.main([str(tmp_path)], phases) == 0


def test_all_phases_together_take_eight_minutes_and_eight_files():
    serial = [phase for phase in gpu.PHASES if not phase.beside]
    assert sum(phase.seconds for phase in serial) <= 480
    assert [phase.name for phase in gpu.PHASES] == list(gpu_phases.PHASES)
    files = {f"{phase.name}.json" for phase in gpu.PHASES if phase.name != "compile"} | {"log.txt"}
    assert len(files) <= 8


def test_a_phase_runs_with_the_source_tree_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTVIT_COMMIT", "c0ffee")
    assert gpu.main([str(tmp_path), "--toy", "--only", "environment", "--time-scale", "3"]) == 0
    found = load(tmp_path, "environment")
    assert found["environment"]["commit"] == "c0ffee" and found["ceilings"]["copy_gb_per_s"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The phases
# ---------------------------------------------------------------------------------------------------------------------


def run_outcome(case):
    if case == "raises":
        raise ValueError("because")
    if case == "crashes":
        os._exit(7)
    if case == "hangs":
        time.sleep(60)
    return {"wrong": []}


def test_a_case_that_crashes_or_hangs_does_not_stop_the_others(run):
    run = run._replace(deadline=time.monotonic() + 3)
    cases = ["raises", "crashes", "right", "hangs", "hangs", "late"]
    found = [(case, result.get("failed")) for case, result in gpu_phases.run_in_processes(cases, run_outcome, run)]
    assert sorted(found, key=str) == sorted(
        [
            ("raises", "ValueError: because"),
            ("crashes", "its process ended with exit code 7"),
            ("right", None),
            ("hangs", "not finished in time"),
            ("hangs", "not finished in time"),
            ("late", "not started in time"),
        ],
        key=str,
    )


def test_every_kernel_is_checked():
    assert set(ops.KERNEL_MODULES) <= {name.split(",")[0] for name in gpu_checks.CALLS}
    cases = gpu_checks.list_cases()
    assert len(set(cases)) == len(cases) <= 100


def test_wrong_results_are_found(run, monkeypatch):
    monkeypatch.setattr(gpu_checks, "list_cases", lambda *sizes: [TOY, TOY._replace(call="swiglu")])
    right = gpu_checks.get_kernel
    monkeypatch.setattr(
        gpu_checks,
        "get_kernel",
        lambda name: right(name) if name == "swiglu" else lambda *inputs: right(name)(*inputs) * 1.01,
    )
    assert not gpu_phases.check_kernels(run)
    found = {record["case"].split()[0]: record["wrong"] for record in load(run.out, "correctness")}
    assert found["swiglu"] == [] and any(text.startswith("output 0: whole error") for text in found["layer_norm"])


def test_operations_are_timed_and_missed_targets_come_first(run, capsys):
    cases = [(operation, Shape("micro", 32, 1)) for operation in bench_layer_norm.OPERATIONS]
    with ops.backend("triton"):
        assert gpu_phases.run_benchmarks(run, "operations", cases)
    results = load(run.out, "operations")
    for result in results:
        for record in result["records"]:
            record["targets"] = {"speed_up": 1.3 if result["operation"] == "add_layer_norm" else 1e-9}
    run.save("operations", results)
    capsys.readouterr()
    assert gpu_phases.summarize(run)
    rows = load(run.out, "summary")["rows"]
    met = 3 * (len(cases) - 1)
    assert [row["target"] for row in rows] == ["1.3x: missed"] * 3 + ["1e-09x: met"] * met
    assert {row["operation"] for row in rows[:3]} == {"add_layer_norm"}
    assert capsys.readouterr().out.splitlines()[1].startswith("add_layer_norm ")


def test_records_are_made_for_inference_and_training(run, monkeypatch):
    pytest.importorskip("fastvit.tuning")
    monkeypatch.setenv("FASTVIT_CACHE_DIR", str(run.out))
    monkeypatch.setattr(records, "_table", None)  # other tests of this process go by none
    with ops.backend("triton"):
        assert gpu_phases.tune_models(run)
    directions = {record["direction"] for record in load(run.out, "records")}
    assert len(directions) == 2


def test_phases_that_need_a_gpu_are_skipped_without_one(run):
    for name in ("compile", "sanitizer"):
        with pytest.raises(gpu_phases.Skip, match="there is no GPU"):
            gpu_phases.PHASES[name](run)


def test_the_key_of_a_build_is_computed_from_its_files():
    triton = pytest.importorskip("triton")
    assert gpu_cache.read_triton_key(Path(triton.__file__).parent) == gpu_cache.read_triton_key()
