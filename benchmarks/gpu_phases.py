"""The phases of `benchmarks/gpu.py`, one process each: `python -m fastvit.benchmarks.gpu_phases NAME OUT SECONDS`.

A phase rewrites OUT/NAME.json after each result, so that a phase that is killed keeps what it had. Exit codes: 0; 1
something is wrong; 3 the phase cannot run here, for the reason in the last line.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastvit
from fastvit import ops
from fastvit.benchmarks import bench_model, command, gpu, gpu_cache, gpu_checks
from fastvit.benchmarks.cases import Shape
from fastvit.benchmarks.ceilings import measure_ceilings
from fastvit.benchmarks.harness import Settings, describe_error
from fastvit.benchmarks.measure import run_once
from fastvit.benchmarks.records import Result, describe_environment, has_failures, load_results
from fastvit.benchmarks.report import HEADER, list_rows, print_table
from fastvit.files import write_text
from fastvit.report.info import run_command

if ops.is_interpreting() and "interpreter" not in sys.modules:  # patches bfloat16, before kernels are imported
    sys.path.insert(0, str(gpu_checks.TESTS))
    import interpreter

    interpreter.install()

BFLOAT16 = torch.bfloat16
SKIPPED = 3


class Run(NamedTuple):
    """Arguments of a phase."""

    out: Path
    deadline: float  # time.monotonic() after which nothing new starts
    toy: bool  # interpreted kernels, toy sizes
    workers: int  # processes at a time

    def save(self, name: str, content: Any) -> None:
        write_text(self.out / f"{name}.json", json.dumps(content, indent=1, default=str) + "\n")

    def get_time_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.toy else "cuda")

    def read_ceilings(self) -> dict[str, Any]:
        """Returns those of the first phase, or measures them."""
        try:
            return json.loads((self.out / "environment.json").read_text(encoding="utf-8"))["ceilings"]
        except (OSError, ValueError, KeyError):
            return measure_ceilings(self.device, [BFLOAT16, torch.float32], self.toy)


class Skip(Exception):
    """Raised with the reason why a phase cannot run here."""


def inspect_environment(run: Run) -> bool:
    """Records versions, driver and clocks, and measures the ceilings."""
    found: dict[str, Any] = {"environment": describe_environment(run.device)}
    if not run.toy:
        found["triton key"] = gpu_cache.read_triton_key()  # a cache for this machine needs it
        print(gpu_cache.check_cache(gpu.CACHE))
    query = ("--query-gpu=name,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu", "--format=csv")
    found["clocks before"] = run_command("nvidia-smi", *query)
    found["ceilings"] = measure_ceilings(run.device, [BFLOAT16, torch.float32], run.toy)
    found["clocks after"] = run_command("nvidia-smi", *query)
    run.save("environment", found)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Several processes at a time, where nothing is timed
# ---------------------------------------------------------------------------------------------------------------------


def run_in_processes(
    cases: Sequence[Any], function: Callable[[Any], dict[str, Any]], run: Run
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Runs each case in its own process, so that one that crashes does not stop the others.

    Args:
        function: case -> JSON.
        run: workers and deadline. Workers are forks of this process, which must not have initialized CUDA.

    Yields:
        The case and what `function` returned, or {"failed": reason}, in the order in which they end.
    """
    context, waiting = get_context("fork"), list(cases)
    running: dict[Any, tuple[Any, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < run.workers and run.get_time_left() > 0:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send_outcome, args=(function, waiting[0], sender))
            process.start()
            sender.close()  # the process has its own copy; with this one closed its exit is seen here
            running[receiver] = process, waiting.pop(0), time.monotonic()
        ready: Any = connection.wait(list(running), timeout=max(0.0, run.get_time_left()))
        for end in ready or list(running):  # none ready: the deadline has passed
            process, case, begun = running.pop(end)
            try:
                found = end.recv() if ready else {"failed": "not finished in time"}
            except EOFError:
                process.join()
                found = {"failed": f"its process ended with exit code {process.exitcode}"}
            process.kill()
            process.join()
            yield case, found | {"seconds": round(time.monotonic() - begun, 1)}
        if run.get_time_left() <= 0 and not running:
            yield from ((case, {"failed": "not started in time"}) for case in waiting)
            return


def _send_outcome(function: Callable[[Any], dict[str, Any]], case: Any, sender: connection.Connection) -> None:
    torch.set_num_threads(1)  # OpenMP threads do not survive a fork
    try:
        sender.send(function(case))
    except Exception as error:
        sender.send({"failed": describe_error(error)})


def check_kernels(run: Run) -> bool:
    """Checks every kernel and candidate against float64, and a training step in which no kernel may fall back."""
    cases = gpu_checks.list_cases("toy", None) if run.toy else gpu_checks.list_cases()
    records = []
    for case, found in run_in_processes(cases, gpu_checks.check_case, run):
        records.append({"case": str(case), **found})
        run.save("correctness", records)
    bad = [record for record in records if record.get("wrong") or record.get("failed")]
    for record in bad:
        print(f"{record['case']}: {record.get('failed') or '; '.join(record['wrong'])}")
    print(f"{len(records) - len(bad)} of {len(records)} cases are correct")
    return not bad


def compile_ahead(run: Run) -> bool:
    """Fills the caches of Triton and torch.compile for the timed phases, while nothing is timed."""
    if run.toy:
        raise Skip("there is no GPU to compile for")
    ours = [
        (f"tune {shape.name} {training}", partial(run_candidates, run, shape, training)) for shape, training in TUNED
    ]
    rivals = [
        (f"{operation.name} {shape.name}, {provider.name}", partial(call_once, run, operation, shape, provider))
        for operation, shape in [*list_model_cases(run), *list_kernel_cases(run)]
        for provider in operation.providers.values()
        if provider.compile_mode is not None and re.search(PROVIDERS, provider.name)
        if provider.max_batch is None or shape.batch <= provider.max_batch
    ]
    jobs = [job for pair in zip_longest(ours, rivals) for job in pair if job is not None]
    # Each has threads, and up to 25 GB on the GPU: the activations of a training step at batch 256.
    few = run._replace(workers=max(1, run.workers // 3))
    for (name, _), found in run_in_processes(jobs, lambda job: job[1](), few):
        print(f"{name}: {found}", flush=True)
    return True


def run_candidates(run: Run, shape: Shape, training: bool) -> dict[str, Any]:
    """Runs every candidate without timing it; keeps only the binaries."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTVIT_CACHE_DIR"] = folder
        return {"records": len(tune(run, shape, training, run.get_time_left(), timer=lambda trial: 1.0))}


def call_once(run: Run, operation: Any, shape: Shape, provider: Any) -> dict[str, Any]:
    case = getattr(operation, "make_inputs", operation.make_case)(shape, BFLOAT16, run.device)
    calls = operation.list_first_calls(operation.prepare(provider, case))
    return {name: round(run_once(step, run.device), 1) for name, step in calls.items()}


def run_sanitizer(run: Run) -> bool:
    """Runs compute-sanitizer (races, out-of-bounds accesses) on backward passes that share sums between threads."""
    tool = shutil.which("compute-sanitizer")
    if run.toy or tool is None:
        raise Skip("there is no GPU" if run.toy else "compute-sanitizer is not on the PATH")
    cases = [(check, call) for check in ("racecheck", "memcheck") for call in ("attention_packed", "add_layer_norm")]
    records = []
    for (check, call), found in run_in_processes(cases, partial(sanitize, tool), run._replace(workers=len(cases))):
        records.append({"tool": check, "case": call, **found})
        run.save("sanitizer", records)
        print(records[-1])
    if all("skipped" in record for record in records):
        raise Skip(records[0]["skipped"])
    return all(record.get("exit code") == 0 or "skipped" in record for record in records)


def sanitize(tool: str, case: tuple[str, str]) -> dict[str, Any]:
    """Runs `gpu_phases launch` under one of compute-sanitizer's tools; returns its exit code and last lines."""
    check, call = case
    line = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m"]
    line += ["fastvit.benchmarks.gpu_phases", "launch", call, "0"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation per tensor
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    lines = done.stdout.splitlines()
    found: dict[str, Any] = {"exit code": done.returncode}
    found["last lines"] = [line for line in lines if line.startswith("=====")][-4:] or lines[-4:]
    if "Device not supported" in done.stdout:
        found["skipped"] = "compute-sanitizer does not support this device"
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Timed phases, one after the other
# ---------------------------------------------------------------------------------------------------------------------


TUNED = [
    (Shape(size, 224, batch), training)
    for size, batch in (("base", 256), ("small", 256), ("large", 64), ("tiny", 256))
    for training in (False, True)
]


def tune(run: Run, shape: Shape, training: bool, seconds: float, timer: Callable[[Any], float] | None) -> list[Any]:
    from fastvit.tuning import tuner

    tuner.compile_ahead = lambda *_: {}  # the compile phase has done it
    with run.device:
        model = fastvit.ViTForImageClassification(bench_model.make_config(shape))
    return tuner.tune(
        model if training else model.to(BFLOAT16),
        batch_size=shape.batch,
        training=training,
        dtype=BFLOAT16 if training else None,
        time_limit=seconds,
        timer=timer,
        progress=False,
    )


def tune_models(run: Run) -> bool:
    """Writes records for ViTs of each size, inference and training; OUT/records.json can be shipped as it is."""
    from fastvit.ops import records

    todo = [(Shape("micro", 32, 1), training) for training in (False, True)] if run.toy else TUNED
    timer = (lambda trial: 1.0) if run.toy else None
    failed = 0
    for shape, training in todo:
        try:  # half of the remaining time is the limit of each
            outcome = f"{len(tune(run, shape, training, max(1.0, run.get_time_left() / 2), timer))} records"
        except Exception as error:
            outcome, failed = describe_error(error), failed + 1
        records.write(run.out / "records.json", records.read_cache())
        print(f"{shape.name}, {'training' if training else 'inference'}: {outcome}", flush=True)
    return not failed


PROVIDERS = "^(?!.*max-autotune)"  # which takes a minute each


def list_kernel_cases(run: Run) -> list[tuple[Any, Shape]]:
    modules = [importlib.import_module(f"fastvit.benchmarks.{module}") for module in command.KERNELS]
    operations = [operation for module in modules for operation in module.OPERATIONS]
    cases = [(operation, shape) for operation in operations for shape in operation.list_shapes(run.device, run.toy)]
    if run.toy:
        return [(operation, dataclasses.replace(shape, image_size=32, batch=1)) for operation, shape in cases]
    return sorted((case for case in cases if case[1].tier < 2), key=lambda case: case[1].tier)


def list_model_cases(run: Run) -> list[tuple[Any, Shape]]:
    """Returns the whole model at the batches that matter in inference or training, the most important first."""
    both, inference, training = (*bench_model.Model.passes,), (bench_model.INFERENCE,), (bench_model.TRAINING,)
    rows: list[tuple[tuple[str, ...], Shape]] = [
        (both, Shape("base", 224, 256)),
        (inference, Shape("base", 224, 1, 1)),
        (training, Shape("base", 224, 64, 1)),
        (inference, Shape("base", 224, 32, 1)),
        (both, Shape("small", 224, 256, 1)),
    ]
    cases = []
    for passes, shape in [(both, Shape("micro", 32, 1))] if run.toy else rows:
        operation = bench_model.Model()
        operation.passes, operation.providers, operation.seconds = passes, bench_model.model.providers, 0.7
        cases.append((operation, shape))
    return cases


def time_operations(run: Run) -> bool:
    """Times each operation beside PyTorch, compilers and other kernels."""
    return run_benchmarks(run, "operations", list_kernel_cases(run))


def time_model(run: Run) -> bool:
    """Times the whole model beside transformers and timm, eager and compiled, small batches with CUDA graphs."""
    return run_benchmarks(run, "model", list_model_cases(run))


def run_benchmarks(run: Run, name: str, cases: Sequence[tuple[Any, Shape]]) -> bool:
    """Times cases; OUT/name.json is a list of results that `fastvit benchmark report` reads."""
    saved: dict[str, Result] = {}

    def save(result: Result) -> None:
        saved[result["operation"]] = result
        run.save(name, list(saved.values()))

    tasks = [command.make_task(operation, shape, torch.float32 if run.toy else BFLOAT16) for operation, shape in cases]
    settings = Settings(
        run.device, quick=run.toy, providers=PROVIDERS, deadline=run.deadline, ceilings=run.read_ceilings()
    )
    with command.disable_tf32():
        results = command.run_tasks(tasks, settings, save)
    print_table(results)
    return not has_failures(results)


# ---------------------------------------------------------------------------------------------------------------------
# The end
# ---------------------------------------------------------------------------------------------------------------------


def summarize(run: Run) -> bool:
    """Prints a short table: missed targets (defined in bench_*.py) first, then met ones, then all other times."""
    paths = [path for name in ("operations", "model") if (path := run.out / f"{name}.json").exists()]
    results = load_results(paths, may_be_empty=True)
    path = run.out / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [dict(zip(HEADER, row, strict=True)) for row in list_rows(results, missed_first=True)]
    run.save("summary", before | {"rows": rows})
    print_table(results, missed_first=True)
    return True


PHASES: dict[str, Callable[[Run], bool]] = {
    "environment": inspect_environment,
    "compile": compile_ahead,
    "sanitizer": run_sanitizer,
    "correctness": check_kernels,
    "records": tune_models,
    "operations": time_operations,
    "model": time_model,
    "summary": summarize,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*PHASES, "launch"])
    parser.add_argument("out", type=Path, help="folder of the results; for launch: a case")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    if options.name == "launch":
        for size in ("odd", "ViT-B"):  # attention uses other kernels at the second
            gpu_checks.launch_case(gpu_checks.Case(str(options.out), size, BFLOAT16), torch.device("cuda"))
        torch.cuda.synchronize()
        return 0
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run = Run(options.out, time.monotonic() + options.seconds, options.toy, workers)
    try:
        return 0 if PHASES[options.name](run) else 1
    except Skip as reason:
        print(reason)
        return SKIPPED


if __name__ == "__main__":
    sys.exit(main())
