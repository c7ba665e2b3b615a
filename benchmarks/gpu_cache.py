"""Compile kernels for an H100 or H200 on a machine without one, into a cache that Triton on that machine accepts.

Triton's cache key is a hash of the kernel's source, its argument types, the target, the options, the version of ptxas,
a few environment variables, and Triton itself: its Python files and libtriton.so, which differs with Python's version.
The driver is not part of it, so a cache hits if it was filled with the key of the build that is installed on the GPU's
machine. `read_triton_key` computes the key of any build from its files.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

KEY = "triton-key.txt"  # file in the cache: the key of its build


def read_triton_key(folder: Path | None = None) -> str:
    """Returns Triton's hash of itself, for the build in the folder `triton`, or for the installed one."""
    spec = importlib.util.find_spec("triton.runtime.cache")
    assert spec is not None and spec.origin is not None
    if folder is None:
        from triton.runtime import cache

        return cache.triton_key()
    source = folder / "runtime" / "cache.py"
    found: dict[str, Any] = {"__file__": str(source), "__name__": "cache_of_another_build"}
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), found)  # hashes the files around it
    return found["triton_key"]()


def fill_cache(out: Path, triton: Path | None = None) -> int:
    """Launches the cases of `gpu_checks` for ViT-Ti to ViT-L into a driver that does nothing.

    Args:
        out: folder for the cache, which is filled in `gpu.CACHE`, since Triton writes absolute paths into it.
        triton: the folder `triton` of the unpacked wheel that is installed on the GPU's machine.

    Returns:
        The exit code: 1 if a case failed.
    """
    from fastvit.benchmarks import gpu

    os.environ |= {"TRITON_CACHE_DIR": str(gpu.CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported
    import torch
    from triton.runtime import cache

    from fastvit.benchmarks import gpu_checks
    from fastvit.benchmarks.bench_host import launch_nothing
    from fastvit.benchmarks.gpu_phases import Run, run_in_processes

    key = read_triton_key(triton)
    cache.triton_key = lambda: key
    launch_nothing()
    sizes = [("ViT-B", "odd"), ("ViT-Ti", None), ("ViT-S", None), ("ViT-L", None)]
    cases = [case for pair in sizes for case in gpu_checks.list_cases(*pair) if case.call != "training step"]
    run = Run(out, time.monotonic() + 3600, toy=False, workers=os.cpu_count() or 1)
    failed = 0
    for case, found in run_in_processes(cases, functools.partial(compile_case, torch.device("cpu")), run):
        failed += "failed" in found
        print(f"{case}: {json.dumps(found)}", flush=True)
    for path in gpu.CACHE.rglob("*.source"):
        path.unlink()  # not read
    (gpu.CACHE / KEY).write_text(key, encoding="utf-8")
    shutil.move(gpu.CACHE, out)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{len(cases) - failed} of {len(cases)} cases compiled: {total / 2**20:.1f} MiB in {out}")
    return int(bool(failed))


def compile_case(device: Any, case: Any) -> dict[str, Any]:
    from fastvit.benchmarks import gpu_checks

    gpu_checks.launch_case(case, device)
    return {}


def check_cache(folder: Path) -> str:
    """Returns, in words, whether the installed Triton accepts this cache."""
    try:
        key = (folder / KEY).read_text(encoding="utf-8")
    except OSError:
        return "no cache was copied here"
    return f"the cache is for {'this' if key == read_triton_key() else 'another'} build of Triton"


if __name__ == "__main__":
    sys.exit(fill_cache(Path(sys.argv[1]).resolve(), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
