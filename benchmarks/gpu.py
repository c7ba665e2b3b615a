"""A GPU's first ten minutes: correctness, races, tuning records, speed beside other libraries; 8 minutes, 8 files.

    python -m benchmarks.gpu OUT          in the source tree, or with it on PYTHONPATH
    python -m benchmarks.gpu OUT --toy    checks the script: interpreted kernels, toy sizes, no GPU

Each phase (`gpu_phases.py`) is a process with a time limit that rewrites OUT/NAME.json as it goes: one that fails or
hangs loses only its own results. Unused time goes to the next phase. OUT/log.txt has all output; a short table ends it.
This file imports only the standard library, so that a broken installation of PyTorch is reported, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 3  # the exit code of a phase that cannot run here
LOG_BYTES = 1_000_000  # kept of the end of a phase's output
CACHE = Path(tempfile.gettempdir()) / "fastvit-triton-cache"  # the same everywhere: Triton's cache contains paths


class Phase(NamedTuple):
    name: str
    seconds: float
    beside: str = ""  # a phase to run in parallel with, if that one runs; nothing is timed in either
    command: tuple[str, ...] = ()  # for tests; default: the phase of this name in gpu_phases


PHASES = (
    Phase("environment", 45),
    Phase("compile", 115, beside="correctness"),
    Phase("sanitizer", 115, beside="correctness"),
    Phase("correctness", 115),
    Phase("records", 95),
    Phase("operations", 80),
    Phase("model", 125),
    Phase("summary", 20),
)


class Running(NamedTuple):
    phase: Phase
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    begun: float
    end: float  # time.monotonic() at which it is killed


def start_phase(phase: Phase, options: argparse.Namespace, limit: float) -> Running:
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `finish_phase`
    line = [sys.executable, "-m", "fastvit.benchmarks.gpu_phases", phase.name, str(options.out), f"{0.95 * limit:.1f}"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if options.toy:
        line.append("--toy")
        environment |= {"TRITON_INTERPRET": "1", "FASTVIT_BACKEND": "triton"}
        environment["FASTVIT_CACHE_DIR"] = str(options.out / "toy-cache")
    if options.triton_cache:
        environment["TRITON_CACHE_DIR"] = str(CACHE)
    process = subprocess.Popen(
        phase.command or line, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    now = time.monotonic()
    return Running(phase, process, log, now, now + limit)


def finish_phase(running: Running, options: argparse.Namespace) -> dict[str, Any]:
    """Waits for a phase, kills it at its limit, and appends its output to the log; returns its status."""
    phase, process = running.phase, running.process
    try:
        code = process.wait(max(0.0, running.end - time.monotonic()))
        status = {0: "ok", SKIPPED: "skipped"}.get(code, "failed")
    except subprocess.TimeoutExpired:
        status = "out of time"
    seconds = round(time.monotonic() - running.begun, 1)
    kill_phase(running)
    running.log.seek(max(0, running.log.seek(0, os.SEEK_END) - LOG_BYTES))
    text = running.log.read().decode(errors="replace")
    running.log.close()
    with (options.out / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"===== {phase.name}: {status} after {seconds} s\n{text}\n")
    lines = [line for line in text.splitlines() if line.strip()]
    reason = lines[-1][:300] if lines and status != "ok" else ""
    outcome = {"phase": phase.name, "status": status, "seconds": seconds, "reason": reason}
    path = options.out / f"{phase.name}.json"
    if status != "ok" and phase.name not in ("compile", "summary") and not path.exists():
        path.write_text(json.dumps(outcome) + "\n", encoding="utf-8")
    if phase.name == "summary":
        print(text)
    print(f"{phase.name}: {status}, {seconds} s {reason}", flush=True)
    return outcome


def kill_phase(running: Running) -> None:
    """Kills a phase and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


def run_phases(phases: Sequence[Phase], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs all phases; returns how each ended, which summary.json has after every one."""
    options.out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        (options.out / f"{phase.name}.json").unlink(missing_ok=True)  # of an earlier run
    names = {phase.name for phase in phases}
    serial = [phase for phase in phases if phase.beside not in names]
    left = options.time_scale * sum(phase.seconds for phase in serial)
    end = time.monotonic() + left
    outcomes: list[dict[str, Any]] = []
    for phase in serial:
        left -= options.time_scale * phase.seconds  # for the following ones
        together = [phase, *(other for other in phases if other.beside == phase.name)]
        limit = max(1.0, end - left - time.monotonic())
        running = [start_phase(one, options, limit) for one in together]
        try:
            outcomes += [finish_phase(one, options) for one in running]
        except BaseException:  # interrupted
            for one in running:
                kill_phase(one)
            raise
        write_summary(options.out, outcomes)
    return outcomes


def write_summary(out: Path, outcomes: list[dict[str, Any]]) -> None:
    """Writes how the phases ended, beside the rows that the last phase adds."""
    path = out / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | {"phases": outcomes}, indent=1) + "\n", encoding="utf-8")


def has_gpu() -> bool:
    """Whether there is a GPU; asks PyTorch, which takes seconds, only if /dev shows none."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        return True
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def main(argv: Sequence[str] | None = None, phases: Sequence[Phase] = PHASES) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--toy", action="store_true", help="interpreted kernels, toy sizes, no GPU")
    parser.add_argument("--only", nargs="+", choices=[phase.name for phase in phases], metavar="PHASE")
    parser.add_argument("--time-scale", type=float, default=1.0, help="factor of all limits [1: 8 minutes in total]")
    parser.add_argument("--triton-cache", type=Path, metavar="DIR", help="binaries that gpu_cache made")
    options = parser.parse_args(argv)
    if not (options.toy or has_gpu()):
        print("error: PyTorch finds no GPU; --toy runs every phase without one", file=sys.stderr)
        return 2
    options.out = options.out.resolve()
    if options.triton_cache:
        shutil.copytree(options.triton_cache, CACHE, dirs_exist_ok=True)
    outcomes = run_phases([phase for phase in phases if not options.only or phase.name in options.only], options)
    return int(any(outcome["status"] in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
