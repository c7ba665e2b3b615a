"""`fastvit benchmark`: run benchmarks and show what they found."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fastvit import ops
from fastvit.benchmarks import storage
from fastvit.benchmarks.ceilings import measure_ceilings
from fastvit.benchmarks.compare import compare
from fastvit.benchmarks.environment import describe_environment, name_of, slug
from fastvit.benchmarks.harness import Settings, describe, run_case
from fastvit.benchmarks.memory import free
from fastvit.benchmarks.page import render_page
from fastvit.benchmarks.plots import draw_bars
from fastvit.benchmarks.readme import readme_section, with_section
from fastvit.benchmarks.tables import render_table
from fastvit.errors import InputError
from fastvit.files import write_text
from fastvit.report.info import get_device_name

KERNELS = (
    "bench_layer_norm",
    "bench_patch_embed",
    "bench_attention",
    "bench_layer_norm_linear",
)
MODELS = ("bench_model", "bench_quantize")
SUITES = {
    "kernels": "each operation beside PyTorch, compilers and other kernels",
    "model": "the whole model beside transformers' and timm's",
    "predictor": "pictures in files to classes, beside transformers' pipeline",
    "memory": "what the operations and the model need, nothing timed",
    "coldstart": "how long until the first prediction",
    "host": "what Python, PyTorch and Triton's launcher take for a pass; needs no GPU",
    "all": "kernels, model, predictor, coldstart and host",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str]) -> int:
    """Run the command line after `fastvit benchmark`; returns the exit code."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "report": report_command,
        "compare": compare_command,
        "readme": readme_command,
    }
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return run(build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastvit benchmark",
        description="Time fastvit beside its rivals on this machine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="suites:\n"
        + "".join(f"  {name:<12}{what}\n" for name, what in SUITES.items())
        + "\nand with what was found:\n"
        "  fastvit benchmark report FOLDER...      one page with tables and a roofline plot\n"
        "  fastvit benchmark compare BEFORE AFTER  what became slower; exit code 1 if something did\n"
        "  fastvit benchmark readme                write the README's tables from benchmarks/results\n",
    )
    parser.add_argument("suite", nargs="?", choices=SUITES, default="all", help="what to run [all]")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to run [cuda if there is one]")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="[bfloat16 on a GPU, float32 on a CPU]")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go [benchmarks/results/DEVICE]")
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds; goes to runs/benchmark")
    parser.add_argument("--full", action="store_true", help="every shape, and compilers at every shape and on CPUs")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="operations and shapes, e.g. 'attention.*batch 256'"
    )
    parser.add_argument("--providers", default="", metavar="REGEX", help="only those, and the one who is the measure")
    parser.add_argument(
        "--time-budget",
        type=float,
        default=450.0,
        metavar="SECONDS",
        help="begin nothing new after this [450]; 0: no end",
    )
    parser.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    return parser


def checkout() -> Path:
    """The folder that holds benchmarks/results and README.md: the source tree or, without one, the current folder."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").exists() else Path()


class Task(NamedTuple):
    """One line of the list of work: a case of an operation, or cold starts."""

    operation: str
    name: str
    tier: int
    run: Callable[[Settings, Callable[[str], object]], Iterator[dict[str, Any]]]


def tasks_of(options: argparse.Namespace, device: torch.device, dtypes: list[torch.dtype]) -> list[Task]:
    """Everything that is asked for, the most telling shapes of all suites first."""
    modules: list[str] = []
    if options.suite in ("kernels", "memory", "all"):
        modules += KERNELS
    if options.suite in ("model", "memory", "all"):
        modules += MODELS
    if options.suite in ("predictor", "all"):
        modules.append("bench_predictor")
    tasks = []
    for module in modules:
        for operation in importlib.import_module(f"fastvit.benchmarks.{module}").OPERATIONS:
            for shape in operation.shapes(device, options.quick):
                for dtype in dtypes:

                    def run_it(settings, tick, operation=operation, shape=shape, dtype=dtype):
                        return run_case(operation, shape, dtype, settings, tick)

                    name = f"{operation.name} {shape.name} {name_of(dtype)}"
                    tasks.append(Task(operation.name, name, shape.tier, run_it))
    if options.suite in ("coldstart", "all"):
        from fastvit.benchmarks import bench_coldstart

        def run_cold(settings, tick):
            return bench_coldstart.run(settings, dtypes[0], tick)

        tasks.append(Task("coldstart", f"coldstart {name_of(dtypes[0])}", 0, run_cold))
    if options.suite in ("host", "all"):
        from fastvit.benchmarks import bench_host

        tasks.append(Task("host", f"host {bench_host.SHAPE.name}", 0, bench_host.run))
    try:
        tasks = [task for task in tasks if re.search(options.only, task.name) and (task.tier < 2 or options.full)]
    except re.error as error:
        raise InputError(f"--only: expected a regular expression, got {options.only!r} ({error})") from None
    if not tasks:
        raise InputError(
            f"--only: nothing in {options.suite} matches {options.only!r}; --list without it shows the names"
        )
    return sorted(tasks, key=lambda task: task.tier)


def run(options: argparse.Namespace) -> int:
    """The chosen suites, one file of results for each operation. Exit code 1: ours was wrong, or failed."""
    started = time.monotonic()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [DTYPES[name] for name in options.dtype or (["bfloat16"] if device.type == "cuda" else ["float32"])]
    tasks = tasks_of(options, device, dtypes)
    if options.list:
        print("\n".join(task.name for task in tasks))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: there is no GPU that this PyTorch can use")
    try:
        re.compile(options.providers)
    except re.error as error:
        raise InputError(f"--providers: expected a regular expression, got {options.providers!r} ({error})") from None
    # Toy numbers stay away from those that are kept.
    parent = checkout() / ("runs/benchmark" if options.quick or ops.is_interpreting() else "benchmarks/results")
    folder = options.out or parent / slug(get_device_name(device))
    settings = Settings(
        device,
        quick=options.quick,
        full=options.full,
        memory_only=options.suite == "memory",
        brief=options.suite == "all",
        providers=options.providers,
        deadline=started + options.time_budget if options.time_budget > 0 else float("inf"),
    )
    print(introduction(device, folder))
    with full_float32():
        if not settings.memory_only:
            settings.ceilings = measure_ceilings(device, list(dict.fromkeys([*dtypes, torch.float32])), options.quick)
        results = run_tasks(tasks, settings, options, lambda result: storage.write(result, folder))
    if not settings.memory_only and (drawn := draw_bars(list(results.values()), folder)) is not None:
        print(drawn)
    print(render_table(list(results.values())))
    print(f"\nwritten: {', '.join(sorted(path.name for path in folder.glob('*.json')))} and .csv in {folder}")
    ours = [record for result in results.values() for record in result["records"] if record["ours"]]
    holes = any(result["failed_cases"] for result in results.values())
    return int(holes or any(record["status"] in ("wrong", "failed") for record in ours))


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """float32 means float32 for everybody: PyTorch would let convolutions round their inputs to 10 bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def introduction(device: torch.device, folder: Path) -> str:
    lines = [f"device: {get_device_name(device)}; results: {folder}"]
    if device.type == "cpu" and ops.current_backend() == "triton":
        lines.append("kernels are interpreted step by step: this proves that they run, their times mean nothing")
    elif device.type == "cpu":
        lines.append("no GPU: fastvit is its plain PyTorch here. Kernels, CUDA graphs and GPU-only rivals are left out")
    return "\n".join(lines)


def run_tasks(
    tasks: list[Task], settings: Settings, options: argparse.Namespace, save: Callable[[dict[str, Any]], object]
) -> dict[str, dict[str, Any]]:
    """Results by operation, each saved after every task: a run that is killed leaves what it has measured."""
    about = {
        "environment": describe_environment(settings.device),
        "ceilings": settings.ceilings,
        "options": {
            "quick": options.quick,
            "full": options.full,
            "only": options.only,
            "providers": options.providers,
            "memory_only": settings.memory_only,
            "interpreted": ops.is_interpreting(),
        },
    }
    results: dict[str, dict[str, Any]] = {}
    waiting = [task.name for task in tasks]
    progress = tqdm(tasks, unit="case", dynamic_ncols=True, file=sys.stderr)
    for task in progress:
        if time.monotonic() > settings.deadline:
            break
        result = results.setdefault(
            task.operation,
            {
                "schema": storage.SCHEMA,
                "operation": task.operation,
                **about,
                "not_begun": [],
                "failed_cases": [],
                "case_seconds": {},
                "records": [],
            },
        )

        def tick(what: str, name: str = task.name) -> None:
            progress.set_description(f"{name}: {what}")

        begun = time.monotonic()
        try:
            result["records"].extend(task.run(settings, tick))
        except Exception as error:  # one case too large for this device is no reason to lose the rest
            result["failed_cases"].append({"case": task.name, "reason": describe(error)})
        result["case_seconds"][task.name] = round(time.monotonic() - begun, 1)
        waiting.remove(task.name)
        result["not_begun"] = [name for name in waiting if name.split()[0] == task.operation]
        save(result)
        free(settings.device)
    progress.close()
    if waiting:
        print(f"not begun when the time budget was spent: {'; '.join(waiting)}")
    return results


def report_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastvit benchmark report", description="One self-contained page from any set of results."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders (or files) of results")
    parser.add_argument("--out", type=Path, default=Path("benchmark-report.html"), help="[benchmark-report.html]")
    parser.add_argument("--csv", action="store_true", help="print all records as CSV instead")
    options = parser.parse_args(argv)
    results = storage.load(options.folders)
    if options.csv:
        print(storage.as_csv(results), end="")
        return 0
    write_text(options.out, render_page(results))
    print(f"written: {options.out}")
    return 0


def compare_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastvit benchmark compare",
        description="What became slower, or needs more memory, beyond noise. Exit code 1 if something of ours did.",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="folder or file of results")
    parser.add_argument("after", type=Path, metavar="AFTER", help="folder or file of results")
    parser.add_argument("--threshold", type=float, default=0.05, help="what is let pass [0.05]: 5 %%")
    options = parser.parse_args(argv)
    if not options.threshold >= 0:
        raise InputError(f"--threshold: expected 0 or more, got {options.threshold}")
    text, regressed = compare(storage.load([options.before]), storage.load([options.after]), options.threshold)
    print(text)
    return int(regressed)


def readme_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastvit benchmark readme", description="Write the README's tables from benchmarks/results."
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if README and results disagree"
    )
    options = parser.parse_args(argv)
    path = checkout() / "README.md"
    if not path.exists():
        raise InputError("there is no README.md here: run this in the source tree")
    old = path.read_text(encoding="utf-8")
    new = with_section(old, readme_section(checkout() / "benchmarks" / "results"))
    if options.check:
        print(
            "README.md agrees with benchmarks/results" if old == new else "README.md disagrees with benchmarks/results"
        )
        return int(old != new)
    write_text(path, new)
    print(f"written: {path}")
    return 0
