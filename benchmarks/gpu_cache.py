"""Compile kernels for an H100 or H200 on a machine without one, into a cache that Triton there accepts as its own.

Triton names a binary by a hash of the kernel's source, its argument types, the target ("sm90", of which it makes
sm_90a), the options, ptxas's version, a few environment variables, and of Triton itself: its Python files and
libtriton.so, which differs between builds for other versions of Python. Nothing of it asks the driver, so a cache hits
if it was filled with the key of the very build that is installed there. `triton_key` takes that of any build's files.
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

KEY = "triton-key.txt"  # in a cache: of which build it is


def triton_key(folder: Path | None = None) -> str:
    """What Triton hashes of itself: of the build whose `triton` folder this is, or of the installed one."""
    spec = importlib.util.find_spec("triton.runtime.cache")
    assert spec is not None and spec.origin is not None
    if folder is None:
        from triton.runtime import cache

        return cache.triton_key()
    source = folder / "runtime" / "cache.py"
    found: dict[str, Any] = {"__file__": str(source), "__name__": "cache_of_another_build"}
    exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), found)  # its own walk over its own files
    return found["triton_key"]()


def fill(out: Path, triton: Path | None = None) -> int:
    """Launch the cases of `gpu_checks` for ViT-Ti to ViT-L into a driver that does nothing; OUT is then the cache.

    Args:
        out: the folder; moved to `gpu.CACHE` while it is used, since Triton writes absolute paths into it.
        triton: the folder `triton` of the unpacked wheel that is installed where the cache is to be used.
    """
    from fastvit.benchmarks import gpu

    os.environ |= {"TRITON_CACHE_DIR": str(gpu.CACHE), "TRITON_STORE_BINARY_ONLY": "1"}
    os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are imported
    import torch
    from triton.runtime import cache

    from fastvit.benchmarks import gpu_checks
    from fastvit.benchmarks.bench_host import launch_nothing
    from fastvit.benchmarks.gpu_phases import Run, in_processes

    key = triton_key(triton)
    cache.triton_key = lambda: key
    launch_nothing()
    sizes = [("ViT-B", "odd"), ("ViT-Ti", None), ("ViT-S", None), ("ViT-L", None)]
    cases = [case for pair in sizes for case in gpu_checks.cases(*pair) if case.call != "training step"]
    run = Run(out, time.monotonic() + 3600, toy=False, at_once=os.cpu_count() or 1)
    failed = 0
    for case, found in in_processes(cases, functools.partial(compile_case, torch.device("cpu")), run):
        failed += "failed" in found
        print(f"{case}: {json.dumps(found)}", flush=True)
    for path in gpu.CACHE.rglob("*.source"):
        path.unlink()  # nobody reads it
    (gpu.CACHE / KEY).write_text(key, encoding="utf-8")
    shutil.move(gpu.CACHE, out)
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{len(cases) - failed} of {len(cases)} cases are compiled: {total / 2**20:.1f} MiB in {out}")
    return int(bool(failed))


def compile_case(device: Any, case: Any) -> dict[str, Any]:
    from fastvit.benchmarks import gpu_checks

    gpu_checks.launch(case, device)
    return {}


def verdict(folder: Path) -> str:
    """Whether the installed Triton will find what is in this cache."""
    try:
        key = (folder / KEY).read_text(encoding="utf-8")
    except OSError:
        return "no cache was carried"
    return "the carried cache is of this Triton" if key == triton_key() else "the carried cache is of another build"


if __name__ == "__main__":
    sys.exit(fill(Path(sys.argv[1]).resolve(), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
