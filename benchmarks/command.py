"""`fastvit benchmark`: run benchmarks, and report, compare or publish their results."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from fastvit import ops
from fastvit.benchmarks.ceilings import measure_ceilings
from fastvit.benchmarks.compare import compare_results
from fastvit.benchmarks.harness import Settings, describe_error, run_case
from fastvit.benchmarks.measure import free_memory
from fastvit.benchmarks.records import (
    SCHEMA,
    Record,
    Result,
    describe_environment,
    format_csv,
    get_dtype_name,
    has_failures,
    load_results,
    write_result,
)
from fastvit.benchmarks.report import README_ROWS, draw_bars, print_table, render_page, update_tables
from fastvit.errors import InputError
from fastvit.files import write_text
from fastvit.report.info import get_device_name
from fastvit.train.arguments import Parser

KERNELS = ("bench_layer_norm", "bench_patch_embed", "bench_attention", "bench_layer_norm_linear")
MODELS = ("bench_model", "bench_quantize")
SUITES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kernels": ("each operation beside PyTorch, compilers and other kernels", KERNELS),
    "model": ("the whole model beside transformers and timm", MODELS),
    "predictor": ("image files to classes, by runtime and dtype, beside transformers' pipeline", ("bench_predictor",)),
    "memory": ("memory of the operations and the model; nothing is timed", (*KERNELS, *MODELS)),
    "coldstart": ("time to the first prediction", ("bench_coldstart",)),
    "host": ("overhead of Python, PyTorch and Triton's launcher per pass; needs no GPU", ("bench_host",)),
    "all": (
        "kernels, model, predictor, coldstart and host",
        (*KERNELS, *MODELS, "bench_predictor", "bench_coldstart", "bench_host"),
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPILOG = """suites:
{suites}
and with results:
  fastvit benchmark report FOLDER...      one page with tables and a roofline plot
  fastvit benchmark compare BEFORE AFTER  list regressions; exit code 1 if there are any
  fastvit benchmark readme                write the tables of README and docs from benchmarks/results
"""


def main(argv: list[str]) -> int:
    """Runs the command line after `fastvit benchmark`; returns the exit code."""
    commands = {"report": write_report, "compare": compare_folders, "readme": write_readme}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return run_suite(build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="fastvit benchmark",
        description="Time fastvit beside other libraries on this machine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG.format(suites="".join(f"  {name:<12}{text}\n" for name, (text, _) in SUITES.items())),
    )
    add = parser.add_argument
    add("suite", nargs="?", choices=SUITES, default="all", help="what to run [all]")
    add("--device", choices=("cpu", "cuda"), help="where to run [cuda if available]")
    add("--dtype", nargs="+", choices=DTYPES, help="[bfloat16 on a GPU, float32 on a CPU]")
    add("--out", type=Path, metavar="DIR", help="folder for the results [benchmarks/results/DEVICE]")
    add("--quick", action="store_true", help="one small shape, few rounds; results go to runs/benchmark")
    add("--full", action="store_true", help="every shape, and compilers at every shape and on CPUs")
    add("--only", default="", metavar="REGEX", help="operations and shapes, e.g. 'attention.*batch 256'")
    add("--providers", default="", metavar="REGEX", help="providers; the baseline always runs")
    add(
        "--time-budget",
        type=float,
        default=450.0,
        metavar="SECONDS",
        help="start nothing after this [450]; 0: no limit",
    )
    add("--list", action="store_true", help="list the cases and run nothing")
    return parser


def find_root() -> Path:
    """Returns the folder of README.md and of the results in it: the source tree, otherwise the current folder."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() else Path()


class Task(NamedTuple):
    """A case of an operation, or a module's own measurement."""

    operation: str
    name: str
    tier: int
    run: Callable[[Settings], Iterable[Record]]


def make_task(operation, shape, dtype) -> Task:
    name = f"{operation.name} {shape.name} {get_dtype_name(dtype)}"
    return Task(operation.name, name, shape.tier, partial(run_case, operation, shape, dtype))


def list_tasks(options: argparse.Namespace, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Task]:
    """Lists the cases that the options ask for, the most important shapes of all suites first."""
    tasks = []
    for name in SUITES[options.suite][1]:
        module = importlib.import_module(f"fastvit.benchmarks.{name}")
        if hasattr(module, "OPERATIONS"):
            for operation in module.OPERATIONS:
                shapes = operation.list_shapes(device, options.quick)
                tasks += [make_task(operation, shape, dtype) for shape in shapes for dtype in dtypes]
        else:
            operation = name.removeprefix("bench_")
            tasks.append(Task(operation, f"{operation} {module.NAME}", 0, partial(module.run, dtypes[0])))
    tasks = [task for task in tasks if re.search(options.only, task.name) and (task.tier < 2 or options.full)]
    if not tasks:
        raise InputError(f"--only: expected one of the names that --list shows, got {options.only!r}")
    return sorted(tasks, key=lambda task: task.tier)


def run_suite(options: argparse.Namespace) -> int:
    """Runs a suite and writes a file of results for each operation; returns 1 if ours was wrong or failed."""
    for name in ("only", "providers"):
        try:
            re.compile(getattr(options, name))
        except re.error as error:
            raise InputError(
                f"--{name}: expected a regular expression, got {getattr(options, name)!r} ({error})"
            ) from None
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [DTYPES[name] for name in options.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"])]
    tasks = list_tasks(options, device, dtypes)
    if options.list:
        print("\n".join(task.name for task in tasks))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: expected cpu, got cuda, and PyTorch finds no GPU")
    # Toy numbers are kept apart.
    parent = Path("runs/benchmark" if options.quick or ops.is_interpreting() else "benchmarks/results")
    folder = options.out or parent / re.sub(r"[^a-z0-9]+", "-", get_device_name(device).lower()).strip("-")
    chosen = {name: getattr(options, name) for name in ("suite", "quick", "full", "only", "providers")}
    settings = Settings(device, **chosen, deadline=time.monotonic() + (options.time_budget or float("inf")))
    print(f"device: {get_device_name(device)}; results: {folder}")
    if device.type == "cpu" and ops.current_backend() == "triton":
        print("kernels are interpreted: this shows that they run, their times mean nothing")
    elif device.type == "cpu":
        print("no GPU: fastvit runs plain PyTorch. Kernels, CUDA graphs and GPU-only providers are left out")
    with disable_tf32():
        if not settings.memory_only:
            settings.ceilings = measure_ceilings(device, list(dict.fromkeys([*dtypes, torch.float32])), options.quick)
        results = run_tasks(tasks, settings, lambda result: write_result(result, folder))
    try:
        for result in results:
            draw_bars(result, folder)
    except ImportError:
        print("no PNG plots: matplotlib is not installed")
    print_table(results)
    print(f"\nwritten: {', '.join(sorted(path.name for path in folder.glob('*.json')))} and .csv in {folder}")
    return int(has_failures(results))


@contextlib.contextmanager
def disable_tf32() -> Iterator[None]:
    """float32 means float32: by default PyTorch lets convolutions round their inputs to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def run_tasks(tasks: Sequence[Task], settings: Settings, save: Callable[[Result], object]) -> list[Result]:
    """Runs tasks until the deadline; returns a result for each operation, saved after each of its tasks."""
    common = {
        "environment": describe_environment(settings.device),
        "ceilings": settings.ceilings,
        "options": {
            **{name: getattr(settings, name) for name in ("quick", "full", "only", "providers", "memory_only")},
            "interpreted": ops.is_interpreting(),
        },
    }
    results: dict[str, Result] = {}
    waiting = [task.name for task in tasks]
    progress = tqdm(tasks, unit="case", dynamic_ncols=True, file=sys.stderr)
    for task in progress:
        if time.monotonic() > settings.deadline:
            break
        progress.set_description(task.name)
        empty: Result = {"not_begun": [], "failed_cases": [], "case_seconds": {}, "records": []}
        result = results.setdefault(task.operation, {"schema": SCHEMA, "operation": task.operation, **common, **empty})
        begun = time.monotonic()
        try:
            result["records"].extend(task.run(settings))
        except Exception as error:  # one case that is too large for this device must not stop the rest
            result["failed_cases"].append({"case": task.name, "reason": describe_error(error)})
        result["case_seconds"][task.name] = round(time.monotonic() - begun, 1)
        waiting.remove(task.name)
        result["not_begun"] = [name for name in waiting if name.split()[0] == task.operation]
        save(result)
        free_memory(settings.device)
    progress.close()
    if waiting:
        print(f"not started within the time budget: {'; '.join(waiting)}")
    return list(results.values())


def write_report(argv: list[str]) -> int:
    parser = Parser(prog="fastvit benchmark report", description="Write results to one HTML page.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders (or files) of results")
    parser.add_argument("--out", type=Path, default=Path("benchmark-report.html"), help="[benchmark-report.html]")
    parser.add_argument("--csv", action="store_true", help="print all records as CSV instead")
    options = parser.parse_args(argv)
    results = load_results(options.folders)
    if options.csv:
        print(format_csv(results), end="")
        return 0
    write_text(options.out, render_page(results))
    print(f"written: {options.out}")
    return 0


def compare_folders(argv: list[str]) -> int:
    parser = Parser(
        prog="fastvit benchmark compare",
        description="List what became slower or needs more memory, beyond noise. Exit code 1 if something of ours did.",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="folder or file of results")
    parser.add_argument("after", type=Path, metavar="AFTER", help="folder or file of results")
    parser.add_argument("--threshold", type=float, default=0.05, help="largest change that is ignored [0.05: 5 %%]")
    options = parser.parse_args(argv)
    if not options.threshold >= 0:
        raise InputError(f"--threshold: expected 0 or more, got {options.threshold}")
    before, after = (load_results([path]) for path in (options.before, options.after))
    text, regressed = compare_results(before, after, options.threshold)
    print(text)
    return int(regressed)


def write_readme(argv: list[str]) -> int:
    parser = Parser(
        prog="fastvit benchmark readme",
        description="Write the tables of README.md and docs/benchmarks.md from benchmarks/results.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    options = parser.parse_args(argv)
    outdated = 0
    for name, max_rows in (("README.md", README_ROWS), ("docs/benchmarks.md", None)):
        path = find_root() / name
        if not path.exists():
            raise InputError(f"{name}: not found; run this in the source tree")
        old = path.read_text(encoding="utf-8")
        new = update_tables(old, find_root() / "benchmarks" / "results", max_rows=max_rows)
        if options.check:
            print(f"{name} {'agrees' if old == new else 'disagrees'} with benchmarks/results")
            outdated += old != new
        else:
            write_text(path, new)
            print(f"written: {path}")
    return int(outdated > 0)
