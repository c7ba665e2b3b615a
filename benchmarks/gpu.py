"""A GPU's first ten minutes: right numbers, races, records, speed beside every peer; 8 minutes, 8 files.

    python -m benchmarks.gpu OUT          in the source tree, or with it on PYTHONPATH
    python -m benchmarks.gpu OUT --toy    does the script work? Interpreted kernels, toy sizes, no GPU

Each phase (`gpu_phases.py`) is a process with a time limit that writes OUT/NAME.json as it goes: one that fails or
hangs costs its own results only. Time that a phase leaves is the next one's. What phases print is in OUT/log.txt; the
output ends with a short table. This file needs Python alone: a broken installation of PyTorch is reported, too.
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
LOG_BYTES = 1_000_000  # of a phase, the end
CACHE = Path(tempfile.gettempdir()) / "fastvit-triton-cache"  # one place everywhere: a cache of Triton's holds paths


class Phase(NamedTuple):
    name: str
    seconds: float
    beside: str = ""  # the phase that it runs beside; nothing is timed in either. Alone where that one is not asked for
    command: tuple[str, ...] = ()  # for tests; otherwise the phase of this name in gpu_phases


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
    end: float  # when it is stopped


def begin(phase: Phase, options: argparse.Namespace, limit: float) -> Running:
    log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `finish`
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


def finish(running: Running, options: argparse.Namespace) -> dict[str, Any]:
    """Wait until a phase has ended, or end it; its status, and its output in the log."""
    phase, process = running.phase, running.process
    try:
        code = process.wait(max(0.0, running.end - time.monotonic()))
        status = {0: "ok", SKIPPED: "skipped"}.get(code, "failed")
    except subprocess.TimeoutExpired:
        status = "out of time"
    seconds = round(time.monotonic() - running.begun, 1)
    kill(running)
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


def kill(running: Running) -> None:
    """With the processes that it began, also those it forgot."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()


def run(phases: Sequence[Phase], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All phases; how each ended. summary.json holds it after every one."""
    options.out.mkdir(parents=True, exist_ok=True)
    for phase in phases:
        (options.out / f"{phase.name}.json").unlink(missing_ok=True)  # an earlier run's
    names = {phase.name for phase in phases}
    serial = [phase for phase in phases if phase.beside not in names]
    left = options.time_scale * sum(phase.seconds for phase in serial)
    end = time.monotonic() + left
    outcomes: list[dict[str, Any]] = []
    for phase in serial:
        left -= options.time_scale * phase.seconds  # for those after it
        together = [phase, *(other for other in phases if other.beside == phase.name)]
        limit = max(1.0, end - left - time.monotonic())
        running = [begin(one, options, limit) for one in together]
        try:
            outcomes += [finish(one, options) for one in running]
        except BaseException:  # stopped: nobody may go on
            for one in running:
                kill(one)
            raise
        write_summary(options.out, outcomes)
    return outcomes


def write_summary(out: Path, outcomes: list[dict[str, Any]]) -> None:
    """How the phases ended, beside what the last phase adds."""
    path = out / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | {"phases": outcomes}, indent=1) + "\n", encoding="utf-8")


def has_gpu() -> bool:
    """Asks PyTorch, which takes seconds, only where the system shows no device."""
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists():
        return True
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def main(argv: Sequence[str] | None = None, phases: Sequence[Phase] = PHASES) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results; made where missing")
    parser.add_argument("--toy", action="store_true", help="interpreted kernels, toy sizes, no GPU")
    parser.add_argument("--only", nargs="+", choices=[phase.name for phase in phases], metavar="PHASE")
    parser.add_argument("--time-scale", type=float, default=1.0, help="times every limit [1: 8 minutes in all]")
    parser.add_argument("--triton-cache", type=Path, metavar="DIR", help="binaries, as gpu_cache makes them")
    options = parser.parse_args(argv)
    if not (options.toy or has_gpu()):
        print("error: no GPU that this Python's PyTorch can use; --toy runs every phase without one", file=sys.stderr)
        return 2
    options.out = options.out.resolve()
    if options.triton_cache:
        shutil.copytree(options.triton_cache, CACHE, dirs_exist_ok=True)
    outcomes = run([phase for phase in phases if not options.only or phase.name in options.only], options)
    return int(any(outcome["status"] in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
