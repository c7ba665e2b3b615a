"""Compile candidates in parallel: each process runs some of them once, and Triton caches the binaries on disk.

If a process fails, its candidates are compiled later instead. A candidate that breaks the GPU for its process is
reported, and the tuner excludes it.

    python -m fastvit.tuning.compiling < jobs        prints a JSON line for each completed job
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time

import psutil
import torch

from fastvit.tuning.trials import Call, Trial

Job = tuple[Call, str]  # a call and a candidate

PROCESS_BYTES = 3 * 2**30  # host memory per process: PyTorch, its libraries and the compiler
CONTEXT_BYTES = 2**30  # GPU memory per process
# After these errors no other kernel runs in the process.
FATAL = ("illegal memory access", "misaligned address", "illegal instruction", "unspecified launch failure")


def compile_ahead(jobs: list[Job], device: torch.device, seconds: float) -> dict[int, str]:
    """Run each job once in another process, within the time limit.

    Args:
        jobs: calls and candidates.
        device: of the tensors.
        seconds: the time limit.

    Returns:
        The errors of the jobs that broke the GPU for their process, by index of the job.
    """
    count = count_processes(jobs, device)
    if count < 2:
        return {}
    deadline = time.monotonic() + seconds
    shares = [list(range(first, len(jobs), count)) for first in range(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )
        for _ in shares
    ]  # fmt: skip
    broken = {}
    try:
        for worker, share in zip(workers, shares, strict=True):
            send_jobs(worker, [jobs[index] for index in share], device)
        for worker, share in zip(workers, shares, strict=True):
            for line in read_results(worker, deadline):
                done = json.loads(line)
                if done["error"] and any(words in done["error"] for words in FATAL):
                    broken[share[done["job"]]] = done["error"]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return broken


def count_processes(jobs: list[Job], device: torch.device) -> int:
    """The number of processes that cores and memory allow."""
    bounds = [len(jobs), os.cpu_count() or 1, psutil.virtual_memory().available // PROCESS_BYTES]
    if device.type == "cuda":
        # An operation with gradients and temporaries needs a few times its inputs.
        largest = max((6 * call.count_bytes() for call, _ in jobs), default=0)
        bounds.append(torch.cuda.mem_get_info(device)[0] // (CONTEXT_BYTES + largest))
    return int(min(bounds))


def send_jobs(worker: subprocess.Popen, jobs: list[Job], device: torch.device) -> None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(pickle.dumps((jobs, device)))
        worker.stdin.close()
    except OSError:  # the process has already ended
        pass
    worker.stdin = None


def read_results(worker: subprocess.Popen, deadline: float) -> list[str]:
    """The JSON lines that a process has printed when it ends or is killed at the deadline."""
    try:
        printed, _ = worker.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        worker.kill()
        printed, _ = worker.communicate()
    return [line for line in printed.decode().splitlines() if line.startswith("{") and line.endswith("}")]


def main() -> None:
    jobs, device = pickle.load(sys.stdin.buffer)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    from fastvit import ops

    for index, (call, candidate) in enumerate(jobs):
        error = None
        try:
            with ops.backend("triton"):
                ops.import_kernels()
                Trial(call.case, candidate, call.make_inputs(device))()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as reason:
            error = f"{type(reason).__name__}: {reason}"
        print(json.dumps({"job": index, "error": error}), flush=True)
        if error and any(words in error for words in FATAL):
            return


if __name__ == "__main__":
    main()
