"""Programs run as a user runs them, each in a process forked from one that has imported the libraries once."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import pytest


@contextmanager
def serve(environment: Mapping[str, str], *modules: str) -> Iterator[None]:
    """Start the process that is forked, with `modules` imported under `environment`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this platform cannot fork")
    with pytest.MonkeyPatch.context() as patch:
        fixed = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        fixed["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        for name, value in {**fixed, **environment}.items():
            patch.setenv(name, value)
        preload = forkserver._forkserver._preload_modules
        forkserver._forkserver._stop()  # that of an earlier test file has another environment
        forkserver.set_forkserver_preload(["forked", *modules])
        forkserver.ensure_running()
    try:
        yield
    finally:
        forkserver._forkserver._stop()  # it would hold what it imported as long as the tests run
        forkserver.set_forkserver_preload(preload)


def start(
    program: str, *arguments: object, log: Path, environment=(), missing: tuple[str, ...] = (), cwd: Path | None = None
) -> multiprocessing.Process:
    """Run a file, or a module by its name, with its output in `log`; packages in `missing` cannot be imported."""
    strings = [str(argument) for argument in arguments]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run, args=(program, strings, log, dict(environment), missing, cwd))
    process.start()
    return process


def finish(process: multiprocessing.Process, log: Path) -> str:
    """Wait for a program that must succeed, and return its output."""
    process.join(240)
    if process.is_alive():
        process.kill()
        process.join()
    output = log.read_text(encoding="utf-8")
    assert process.exitcode == 0, output[-3000:]
    return output


def _run(program, arguments, log, environment, missing, cwd) -> None:
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    sys.modules.update(dict.fromkeys(missing))  # None: as if it were not installed
    sys.argv = [program, *arguments]
    if cwd is not None:
        os.chdir(cwd)
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
