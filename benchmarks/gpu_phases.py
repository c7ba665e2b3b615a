"""The phases of `benchmarks/gpu.py`, one process each: `python -m fastvit.benchmarks.gpu_phases NAME OUT SECONDS`.

A phase writes OUT/NAME.json after each thing that it has found out, so that a phase that is killed leaves the others.
Exit codes: 0; 1 something is wrong; 3 it cannot run here, for the reason in the last line.
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
from fastvit.benchmarks import bench_model, command, formats, gpu, gpu_cache, gpu_checks, storage, tables
from fastvit.benchmarks.cases import Shape
from fastvit.benchmarks.ceilings import measure_ceilings
from fastvit.benchmarks.comparisons import against_targets, comparisons, not_timed
from fastvit.benchmarks.environment import describe_environment
from fastvit.benchmarks.harness import Settings, describe
from fastvit.benchmarks.timing import run_once
from fastvit.files import write_text
from fastvit.report.info import run_command

if ops.is_interpreting() and "interpreter" not in sys.modules:  # mends for bfloat16, before kernels are imported
    sys.path.insert(0, str(gpu_checks.TESTS))
    import interpreter

    interpreter.install()

BFLOAT16 = torch.bfloat16
SKIPPED = 3


class Run(NamedTuple):
    """What a phase is told."""

    out: Path
    deadline: float  # time.monotonic() after which nothing new is begun
    toy: bool  # interpreted kernels, toy sizes
    at_once: int  # processes

    def save(self, name: str, found: Any) -> None:
        write_text(self.out / f"{name}.json", json.dumps(found, indent=1, default=str) + "\n")

    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.toy else "cuda")

    def ceilings(self) -> dict[str, Any]:
        """As the first phase measured them, or measured now."""
        try:
            return json.loads((self.out / "environment.json").read_text(encoding="utf-8"))["ceilings"]
        except (OSError, ValueError, KeyError):
            return measure_ceilings(self.device, [BFLOAT16, torch.float32], self.toy)


class Skip(Exception):
    """Why a phase cannot run here."""


def look_around(run: Run) -> bool:
    """Versions, driver, clocks, and what memory and matrix units do at best."""
    found: dict[str, Any] = {"environment": describe_environment(run.device)}
    if not run.toy:
        found["triton key"] = gpu_cache.triton_key()  # with it a cache can be filled for this machine
        print(gpu_cache.verdict(gpu.CACHE))
    query = ("--query-gpu=name,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu", "--format=csv")
    found["clocks before"] = run_command("nvidia-smi", *query)
    found["ceilings"] = measure_ceilings(run.device, [BFLOAT16, torch.float32], run.toy)
    found["clocks after"] = run_command("nvidia-smi", *query)
    run.save("environment", found)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Many processes at once, where nothing is timed
# ---------------------------------------------------------------------------------------------------------------------


def in_processes(
    cases: Sequence[Any], function: Callable[[Any], dict[str, Any]], run: Run
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each case and what `function` found, in a process of its own: one that crashes takes nobody along.

    They are forks of this process, which has imported everything and must not have touched the GPU.
    """
    context, waiting = get_context("fork"), list(cases)
    running: dict[Any, tuple[Any, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < run.at_once and run.left() > 0:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_report, args=(function, waiting[0], sender))
            process.start()
            sender.close()  # the process has its own; now its end is seen here
            running[receiver] = process, waiting.pop(0), time.monotonic()
        ready: Any = connection.wait(list(running), timeout=max(0.0, run.left()))
        for end in ready or list(running):  # nobody in time: that was the end
            process, case, begun = running.pop(end)
            try:
                found = end.recv() if ready else {"failed": "not ready in time"}
            except EOFError:
                process.join()
                found = {"failed": f"its process ended with exit code {process.exitcode}"}
            process.kill()
            process.join()
            yield case, found | {"seconds": round(time.monotonic() - begun, 1)}
        if run.left() <= 0 and not running:
            yield from ((case, {"failed": "not begun in time"}) for case in waiting)
            return


def _report(function: Callable[[Any], dict[str, Any]], case: Any, sender: connection.Connection) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        sender.send(function(case))
    except Exception as error:
        sender.send({"failed": describe(error)})


def check_kernels(run: Run) -> bool:
    """Every kernel and candidate against float64, and a training step on which no kernel may fall back."""
    cases = gpu_checks.cases("toy", None) if run.toy else gpu_checks.cases()
    records = []
    for case, found in in_processes(cases, gpu_checks.check, run):
        records.append({"case": str(case), **found})
        run.save("correctness", records)
    bad = [record for record in records if record.get("wrong") or record.get("failed")]
    for record in bad:
        print(f"{record['case']}: {record.get('failed') or '; '.join(record['wrong'])}")
    print(f"{len(records) - len(bad)} of {len(records)} cases are right")
    return not bad


def compile_ahead(run: Run) -> bool:
    """Fill the caches of Triton and the compilers with what the timed phases will need, while nothing is timed."""
    if run.toy:
        raise Skip("there is no GPU to compile for")
    ours = [(f"tune {shape.name} {training}", partial(try_to_tune, run, shape, training)) for shape, training in TUNED]
    rivals = [
        (f"{operation.name} {shape.name}, {provider.name}", partial(call_once, run, operation, shape, provider))
        for operation, shape in [*model_cases(run), *kernel_cases(run)]
        for provider in operation.providers.values()
        if provider.compile_mode is not None and re.search(PROVIDERS, provider.name)
        if provider.max_batch is None or shape.batch <= provider.max_batch
    ]
    jobs = [job for pair in zip_longest(ours, rivals) for job in pair if job is not None]
    # Each has threads, and up to 25 GB on the GPU: a training step's activations at batch 256.
    few = run._replace(at_once=max(1, run.at_once // 3))
    for (name, _), found in in_processes(jobs, lambda job: job[1](), few):
        print(f"{name}: {found}", flush=True)
    return True


def try_to_tune(run: Run, shape: Shape, training: bool) -> dict[str, Any]:
    """Run every candidate, time none, keep nothing but the binaries."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FASTVIT_CACHE_DIR"] = folder
        return {"records": len(tune(run, shape, training, run.left(), timer=lambda trial: 1.0))}


def call_once(run: Run, operation: Any, shape: Shape, provider: Any) -> dict[str, Any]:
    case = getattr(operation, "make_inputs", operation.make_case)(shape, BFLOAT16, run.device)
    calls = operation.first_calls(operation.prepare(provider, case))
    return {name: round(run_once(step, run.device), 1) for name, step in calls.items()}


def sanitize(run: Run) -> bool:
    """NVIDIA's checker of races and of addresses, on the backward passes that share sums between threads."""
    tool = shutil.which("compute-sanitizer")
    if run.toy or tool is None:
        raise Skip("there is no GPU" if run.toy else "compute-sanitizer is not on the PATH")
    running = {}
    for check in ("racecheck", "memcheck"):
        for call in ("attention_packed", "add_layer_norm"):
            line = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m"]
            line += ["fastvit.benchmarks.gpu_phases", "launch", call, "0"]
            env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation, with its own end
            running[check, call] = subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
            )
    records = []
    for (check, call), process in running.items():
        record: dict[str, Any] = {"tool": check, "case": call}
        try:
            output = process.communicate(timeout=max(1.0, run.left()))[0]
            lines = [line for line in output.splitlines() if line.startswith("=====")]
            record |= {"exit code": process.returncode, "last lines": lines[-4:] or output.splitlines()[-4:]}
            if "Device not supported" in output:
                record["skipped"] = "it does not support this machine's device"
        except subprocess.TimeoutExpired:
            process.kill()
            record["failed"] = "not ready in time"
        records.append(record)
        run.save("sanitizer", records)
        print(record)
    if all("skipped" in record for record in records):
        raise Skip(records[0]["skipped"])
    return all(record.get("exit code") == 0 or "skipped" in record for record in records)


# ---------------------------------------------------------------------------------------------------------------------
# What is timed: one after the other
# ---------------------------------------------------------------------------------------------------------------------


TUNED = [
    (Shape(size, 224, batch), training)
    for size, batch in (("base", 256), ("small", 256), ("large", 64), ("tiny", 256))
    for training in (False, True)
]


def tune(run: Run, shape: Shape, training: bool, seconds: float, timer: Callable[[Any], float] | None) -> list[Any]:
    from fastvit.tuning import tuner

    tuner.compile_ahead = lambda *_: {}  # the phase before has done it, with fewer starts of processes
    with run.device:
        model = fastvit.ViTForImageClassification(bench_model.vit_config(shape))
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
    """Records for ViTs of each size, inference and training; OUT/records.json can be shipped as it is."""
    from fastvit.ops import records

    todo = [(Shape("micro", 32, 1), training) for training in (False, True)] if run.toy else TUNED
    timer = (lambda trial: 1.0) if run.toy else None
    failed = 0
    for shape, training in todo:
        try:  # the first ones may take their time, but not all of it
            said = f"{len(tune(run, shape, training, max(1.0, run.left() / 2), timer))} records"
        except Exception as error:
            said, failed = describe(error), failed + 1
        records.write(run.out / "records.json", records.read_cache())
        print(f"{shape.name}, {'training' if training else 'inference'}: {said}", flush=True)
    return not failed


PROVIDERS = "^(?!.*max-autotune)"  # which takes a minute each


def kernel_cases(run: Run) -> list[tuple[Any, Shape]]:
    modules = [importlib.import_module(f"fastvit.benchmarks.{module}") for module in command.KERNELS]
    operations = [operation for module in modules for operation in module.OPERATIONS]
    cases = [(operation, shape) for operation in operations for shape in operation.shapes(run.device, run.toy)]
    if run.toy:
        return [(operation, dataclasses.replace(shape, image_size=32, batch=1)) for operation, shape in cases]
    return sorted((case for case in cases if case[1].tier < 2), key=lambda case: case[1].tier)


def time_operations(run: Run) -> bool:
    """Each operation beside PyTorch's, compilers' and other kernels."""
    return run_benchmarks(run, "operations", kernel_cases(run))


def model_cases(run: Run) -> list[tuple[Any, Shape]]:
    """The whole model at the batches that matter in inference or training; the most telling first."""
    both, inference, training = (*bench_model.Model.passes,), (bench_model.INFERENCE,), (bench_model.TRAINING,)
    rows: list[tuple[tuple[str, ...], Shape]] = [
        (both, Shape("base", 224, 256)),
        (inference, Shape("base", 224, 1, 1)),
        (training, Shape("base", 224, 64, 1)),
        (inference, Shape("base", 224, 32, 1)),
        (both, Shape("small", 224, 256, 1)),
    ]
    if run.toy:
        rows = [(both, Shape("micro", 32, 1))]
    cases = []
    for passes, shape in rows:
        operation = bench_model.Model()
        operation.passes, operation.providers, operation.seconds = passes, bench_model.model.providers, 0.7
        cases.append((operation, shape))
    return cases


def time_model(run: Run) -> bool:
    """The whole model beside transformers' and timm's, eager and compiled, small batches with CUDA graphs."""
    return run_benchmarks(run, "model", model_cases(run))


def run_benchmarks(run: Run, name: str, cases: Sequence[tuple[Any, Shape]]) -> bool:
    """Time cases by the harness; OUT/name.json is a list of results that `fastvit benchmark report` reads."""

    def task_of(operation: Any, shape: Shape) -> command.Task:
        def run_it(settings: Settings, tick: Callable[[str], object]) -> Iterator[dict[str, Any]]:
            return command.run_case(operation, shape, torch.float32 if run.toy else BFLOAT16, settings, tick)

        return command.Task(operation.name, f"{operation.name} {shape.name}", shape.tier, run_it)

    saved: dict[str, dict[str, Any]] = {}

    def save(result: dict[str, Any]) -> None:
        saved[result["operation"]] = result
        run.save(name, list(saved.values()))

    arguments = ["kernels", "--providers", PROVIDERS] + (["--quick"] if run.toy else [])
    options = command.build_parser().parse_args(arguments)
    settings = Settings(run.device, quick=run.toy, providers=PROVIDERS, deadline=run.deadline, ceilings=run.ceilings())
    with command.full_float32():
        results = command.run_tasks([task_of(*case) for case in cases], settings, options, save)
    print(tables.render_table(list(results.values())))
    ours = [record for result in results.values() for record in result["records"] if record["ours"]]
    holes = any(result["failed_cases"] for result in results.values())
    return not holes and all(record["status"] not in ("wrong", "failed") for record in ours)


# ---------------------------------------------------------------------------------------------------------------------
# The end
# ---------------------------------------------------------------------------------------------------------------------


def summarize(run: Run) -> bool:
    """A short table: which targets (they stand in bench_*.py) were missed, which were met, and all other times."""
    results = [
        result
        for name in ("operations", "model")
        if (run.out / f"{name}.json").exists()
        for result in storage.load([run.out / f"{name}.json"], may_be_empty=True)
    ]
    rows = []
    for comparison in comparisons(results):
        record, rival = comparison.record, comparison.rival
        if any(record.get("ms") for record in comparison.everybody):
            rows.append(
                {
                    "verdict": against_targets(comparison),
                    "what": f"{record['operation']} {record['shape']}, {record['pass']}",
                    "ours": formats.milliseconds(comparison.ours),
                    "best other": f"{formats.milliseconds(rival)} {rival['provider'] if rival else ''}",
                    "times as fast": formats.times(comparison.speed_up),
                    "rate": formats.rate(comparison.ours),
                    "of floor": formats.percent(comparison.ours.get("of_floor") if comparison.ours else None),
                }
            )
    rows.sort(key=lambda row: 0 if "missed" in row["verdict"] else 1 if row["verdict"] else 2)
    path = run.out / "summary.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run.save("summary", before | {"rows": rows})
    for row in rows[:60]:  # who reads only the end of the output reads all of this
        print(" | ".join(row.values()).strip(" |"))
    for what, status, reason in not_timed(results):
        if status in ("wrong", "failed"):
            print(f"{what}: {status}: {reason}")
    return True


PHASES: dict[str, Callable[[Run], bool]] = {
    "environment": look_around,
    "compile": compile_ahead,
    "sanitizer": sanitize,
    "correctness": check_kernels,
    "records": tune_models,
    "operations": time_operations,
    "model": time_model,
    "summary": summarize,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*PHASES, "launch"])
    parser.add_argument("out", type=Path, help="the folder of results; for launch: a case")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args(argv)
    if options.name == "launch":
        for size in ("odd", "ViT-B"):  # other kernels compute attention at the second
            gpu_checks.launch(gpu_checks.Case(str(options.out), size, BFLOAT16), torch.device("cuda"))
        torch.cuda.synchronize()
        return 0
    at_once = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    run = Run(options.out, time.monotonic() + options.seconds, options.toy, at_once)
    try:
        return 0 if PHASES[options.name](run) else 1
    except Skip as reason:
        print(reason)
        return SKIPPED


if __name__ == "__main__":
    sys.exit(main())
