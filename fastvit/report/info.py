"""`fastvit info`: versions, devices, and the backend of each operation with the reason for it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastvit
from fastvit import ops
from fastvit.ops import records

PACKAGES = ("torch", "triton", "transformers", "datasets", "accelerate", "numpy")


def build_report() -> str:
    """Report versions, devices, the backend of each operation on the first device, measurements and failed kernels."""
    lines = [f"fastvit {fastvit.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {get_installed_version(name)}" for name in PACKAGES))
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    lines += [f"device {device}: {describe_device(device)}" for device in devices]
    lines.append(f"backend: {ops.current_backend()} (set by FASTVIT_BACKEND or fastvit.backend(...))")
    for device in devices[:1]:
        lines.append(f"operations on {device}:")
        for operation in ops.KERNEL_MODULES:
            lines.append(f"  {operation:<30}{describe_backend(operation, device)}")
        lines += list_measurements(device)
    lines += [f"kernel {failure}" for failure in summarize_kernels()["failed"]]
    return "\n".join(lines)


def describe_backend(operation: str, device: torch.device) -> str:
    """Describe the backend of an operation on a device, and why. Dtypes are listed only where they differ."""
    backend = ops.current_backend()
    if backend == "reference":
        return "plain PyTorch (backend is 'reference')"
    answers = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reason = ops.kernel_unavailable_reason(operation, device.type, device.index, dtype)
        if backend == "auto" and device.type != "cuda":
            reason = reason or "on a CPU Triton kernels run in the interpreter only"
        if reason is None:
            answers[dtype] = "Triton kernel"
        else:
            is_error = backend == "triton" or (device.type == "cuda" and operation in ops.NO_FALLBACK)
            answers[dtype] = f"an error ({reason})" if is_error else f"plain PyTorch ({reason})"
    if len(set(answers.values())) == 1:
        return answers[torch.float32]
    return "; ".join(f"{str(dtype).removeprefix('torch.')}: {answer}" for dtype, answer in answers.items())


def list_measurements(device: torch.device) -> list[str]:
    """List the valid records of this GPU, which decide the backend of `auto`."""
    gpu = records.get_gpu_name(device.type, device.index)
    known = {case for case, _ in records.get_table().get(gpu, {}) if case.operation in ops.KERNEL_MODULES}
    found = [
        record for case in sorted(known) if (record := records.find(case, gpu, ops.KERNEL_MODULES[case.operation]))
    ]
    if not found:
        return ["no records of measurements on this GPU: run `fastvit tune`"] if device.type == "cuda" else []
    return ["measured on this GPU:", *(f"  {format_record(record)}" for record in found)]


def format_record(record: records.Record) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in (*record.sizes, ("rows up to", record.rows)))
    return f"{record.operation}, {record.direction}, {record.dtype}, {sizes}: {record.winner}"


def summarize_kernels() -> dict[str, list[str]]:
    """List this process' failed kernels, which PyTorch replaced, and the records that `auto` used."""
    operators = sys.modules.get("fastvit.kernels.operators")  # not imported: nothing can have failed
    failures = [] if operators is None else operators.failures.values()
    return {
        "failed": ["{} failed on {}, replaced by PyTorch: {} ({})".format(*failure) for failure in failures],
        "measured": [format_record(record) for record in ops.used_records.values()],
    }


def describe_device(device: torch.device) -> str:
    if device.type == "cpu":
        return get_device_name(device)
    properties = torch.cuda.get_device_properties(device)
    capability = f"capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"


def get_device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{read_processor_name()}, {torch.get_num_threads()} threads"


def read_processor_name() -> str:
    """The processor's name and generation, as virtual machines often report a bare "AMD EPYC"."""
    with contextlib.suppress(OSError):
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        found = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # the first processor's
        if "model name" in found:
            generation = [f"{name.split()[-1]} {found[name]}" for name in ("cpu family", "model") if name in found]
            return found["model name"] + (f" ({', '.join(generation)})" if generation else "")
    return f"{platform.processor() or platform.machine()} CPU"


def run_command(*command: str, cwd: Path | None = None) -> str | None:
    """Run a program and return its output, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def read_commit() -> tuple[str | None, bool]:
    """The commit of this code, or None if unknown, and whether the code is unchanged since.

    FASTVIT_COMMIT names the commit of a source tree without its Git history.
    """
    here = Path(__file__).resolve().parent
    # An installed copy may be in another project's repository.
    tracked = run_command("git", "ls-files", "--error-unmatch", Path(__file__).name, cwd=here) is not None
    found = os.environ.get("FASTVIT_COMMIT") or (run_command("git", "rev-parse", "HEAD", cwd=here) if tracked else None)
    changes = run_command("git", "status", "--porcelain", "--untracked-files=no", cwd=here)
    return found, found is not None and not changes


def get_installed_version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    if name == "torch":
        return torch.__version__  # includes the CUDA version of the build, unlike the package's metadata
    try:
        return version(name)
    except PackageNotFoundError:
        return "(unknown version)"
