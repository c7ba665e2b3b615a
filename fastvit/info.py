"""`fastvit info`: what runs here, and why."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastvit
from fastvit import ops

PACKAGES = ("torch", "triton", "transformers", "datasets", "accelerate", "numpy")


def report() -> str:
    """Versions, devices, and for each operation on each device who computes it and why."""
    lines = [f"fastvit {fastvit.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {installed_version(name)}" for name in PACKAGES))
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    lines += [f"device {device}: {describe(device)}" for device in devices]
    lines.append(f"backend asked for: {ops.current_backend()} (FASTVIT_BACKEND, or with fastvit.backend(...))")
    if ops.why_not_triton_anywhere() is None:
        from fastvit.kernels import tuning

        lines.append(
            f"tiles: the table{'' if os.environ.get('FASTVIT_AUTOTUNE') == '0' else f', and {tuning.cache_path()}'}"
        )
    for device in devices[:1]:
        lines.append(f"operations on {device}:")
        for operation in ops.KERNELS:
            lines.append(f"  {operation:<30}{who_computes(operation, device)}")
    return "\n".join(lines)


def who_computes(operation: str, device: torch.device) -> str:
    """Which backend computes an operation on this device; dtypes are told apart only where they differ."""
    asked = ops.current_backend()
    if asked == "reference":
        return "plain PyTorch (asked for)"
    answers = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reason = ops.why_not_triton(operation, device.type, device.index, dtype)
        if asked == "auto" and device.type != "cuda":
            reason = reason or "Triton only interprets on a CPU"
        if reason is None:
            answers[dtype] = "Triton kernel"
        else:
            is_error = asked == "triton" or (device.type == "cuda" and operation in ops.NO_FALLBACK)
            answers[dtype] = f"an error ({reason})" if is_error else f"plain PyTorch ({reason})"
    if len(set(answers.values())) == 1:
        return answers[torch.float32]
    return "; ".join(f"{str(dtype).removeprefix('torch.')}: {answer}" for dtype, answer in answers.items())


def describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    capability = f"capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"


def installed_version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"
