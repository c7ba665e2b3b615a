"""Where something was measured: device, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastvit.report import info

PACKAGES = ("torch", "triton", "transformers", "timm", "liger-kernel", "flash-attn", "numpy")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_environment(device: torch.device) -> dict[str, Any]:
    commit, commit_is_all = info.read_commit()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": info.get_device_name(device),
        "device_type": device.type,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in PACKAGES},
        "commit": commit,
        "commit_is_all": commit_is_all,
        "settings": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("FASTVIT_", "TRITON_"))
        },
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = info.run_command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "driver": driver.splitlines()[0] if driver else None,
            "cuda": torch.version.cuda or torch.version.hip,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return found
