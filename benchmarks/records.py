"""Results: their files, numbers for readers, and ours compared with the best other provider.

A file of results is JSON: `environment` and `ceilings` of the run, and `records`, one for each shape, dtype, pass and
provider, with its `status`:

    timed, measured   it was right, and was timed, or only its memory measured
    wrong             its error was larger than allowed: not timed
    failed            it raised an error, the `reason`
    missing           it is not installed, or not for this device
    left out          it would have taken too long
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import filesize

from fastvit.errors import InputError
from fastvit.files import write_text
from fastvit.report import info

SCHEMA = 1
OUT_OF_TIME = "the time budget was spent before its turn"
PACKAGES = ("torch", "triton", "transformers", "timm", "liger-kernel", "flash-attn", "numpy")
FIELDS = [
    "device", "date", "commit", "operation", "shape", "dtype", "pass", "provider", "status", "reason",
    *(f"ms_{name}" for name in ("min", "p05", "q25", "median", "q75", "p95", "max", "samples")),
    "host_us", "gb_per_s", "tflop_per_s", "images_per_s", "floor_ms", "of_floor", "first_call_s", "peak_bytes",
    "kept_bytes", "error",
]  # fmt: skip

Record = dict[str, Any]
Result = dict[str, Any]


def get_dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Returns device, versions and commit of a run."""
    commit, commit_is_all = info.read_commit()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": info.get_device_name(device),
        "device_type": device.type,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: find_version(name) for name in PACKAGES},
        "commit": commit,
        "commit_is_all": commit_is_all,
        "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("FASTVIT_", "TRITON_"))},
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        driver = info.run_command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = driver.splitlines()[0] if driver else None
        found["cuda"] = torch.version.cuda or torch.version.hip
        found["properties"] = str(torch.cuda.get_device_properties(device))
    return found


def write_result(result: Result, folder: Path) -> None:
    """Writes the JSON and CSV files of one operation."""
    name = result["operation"] + ("-memory" if result["options"]["memory_only"] else "")
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / f"{name}.csv", format_csv([result]))


def load_results(paths: Iterable[Path], *, may_be_empty: bool = False) -> list[Result]:
    """Reads all files given, and all JSON files in the folders given; a file holds one result or a list of them.

    Returns:
        The results; `source` is the folder of each.

    Raises:
        InputError: for a file that cannot be read or has another schema, or a path without results.
    """
    results: list[Result] = []
    for path in paths:
        before = len(results)
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{file}: cannot be read as results ({error})") from None
            for result in content if isinstance(content, list) else [content]:
                if not isinstance(result, dict) or not {"records", "environment"} <= result.keys():
                    continue  # other reports lie beside results
                if result.get("schema") != SCHEMA:
                    raise InputError(f"{file}: expected results of schema {SCHEMA}, got {result.get('schema')}")
                results.append(result | {"source": str(file.parent)})
        if len(results) == before and not may_be_empty:
            raise InputError(f"{path}: expected results of `fastvit benchmark`, found none")
    return results


def format_csv(results: Sequence[Result]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        for record in result["records"]:
            quantiles = {f"ms_{name}": value for name, value in (record.get("ms") or {}).items()}
            writer.writerow(result["environment"] | record | quantiles)
    return out.getvalue()


def format_number(value: float | None, spec: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{spec}}{unit}"


def format_ms(record: Record | None) -> str:
    if record is None or not record.get("ms"):
        return "–"
    value = record["ms"]["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def format_rate(record: Record | None) -> str:
    """Returns images per second if they are known, otherwise bandwidth and throughput."""
    if record is None or not record.get("ms"):
        return "–"
    if record.get("images_per_s"):
        return f"{record['images_per_s']:,.4g} images/s"
    return f"{record['gb_per_s']:,.4g} GB/s, {record['tflop_per_s']:.3g} TFLOP/s" if record.get("gb_per_s") else "–"


def format_bytes(count: float | None) -> str:
    if count is None:
        return "–"
    unit, suffix = filesize.pick_unit_and_suffix(int(count), ["B", "KiB", "MiB", "GiB"], 1024)
    return f"{count / unit:.4g} {suffix}"


class Comparison(NamedTuple):
    """One shape, dtype and pass: the fastest of ours and of the others that were timed, and all records."""

    ours: Record | None
    rival: Record | None
    records: list[Record]

    @property
    def speed_up(self) -> float | None:
        return self.rival["ms"]["median"] / self.ours["ms"]["median"] if self.ours and self.rival else None


def compare_providers(results: Sequence[Result]) -> list[Comparison]:
    """Returns a comparison for each result, shape, dtype and pass, in the order of the records."""
    groups: dict[tuple, list[Record]] = {}
    for index, result in enumerate(results):
        for record in result["records"]:
            key = (index, record["operation"], record["shape"], record["dtype"], record["pass"])
            groups.setdefault(key, []).append(record)
    found = []
    for records in groups.values():
        timed = sorted((record for record in records if record.get("ms")), key=lambda record: record["ms"]["median"])
        ours, rival = (next((one for one in timed if one["ours"] == is_ours), None) for is_ours in (True, False))
        found.append(Comparison(ours, rival, records))
    return found


def format_targets(comparison: Comparison) -> str:
    """Returns targets and whether they were met: "1.3x: met, 65% of roofline: missed"; empty without targets."""
    ours, rival = comparison.ours or {}, comparison.rival or {}
    found = []
    for kind, target in (comparison.records[0].get("targets") or {}).items():
        reached: float | None
        if kind == "speed_up":
            text, reached = f"{target:g}x", comparison.speed_up
        elif kind == "of_floor":
            text, reached = f"{target:.0%} of roofline", ours.get("of_floor")
        elif kind == "images_per_s":
            text, reached = f"{target:,g} images/s", ours.get("images_per_s")
        elif kind == "memory":
            peaks = ours.get("peak_bytes"), rival.get("peak_bytes")
            text, reached = f"{target:g}x the memory", peaks[0] / peaks[1] if peaks[0] and peaks[1] else None
        else:  # over NAME
            name = kind.removeprefix("over ")
            medians = {one["provider"]: one["ms"]["median"] for one in comparison.records if one.get("ms")}
            text = f"{target:g}x {name}"
            reached = medians[name] / ours["ms"]["median"] if ours and name in medians else None
        is_met = reached is not None and (reached <= target if kind == "memory" else reached >= target)
        found.append(f"{text}: {'not measured' if reached is None else 'met' if is_met else 'missed'}")
    return ", ".join(found)


def list_untimed(results: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Returns (name, status, reason), each once; failed and wrong ones come first, one for each shape."""
    bad: dict[tuple[str, str, str], None] = {}
    skipped: dict[tuple[str, str, str], None] = {}
    for result in results:
        bad |= {(case["case"], "failed", case["reason"]): None for case in result["failed_cases"]}
        skipped |= {(name, "left out", OUT_OF_TIME): None for name in result["not_begun"]}
        for record in result["records"]:
            name, why = record["provider"], (record["status"], record["reason"])
            if why[0] in ("wrong", "failed"):
                bad[f"{name}, {record['operation']} {record['shape']} {record['dtype']}", *why] = None
            elif why[0] in ("missing", "left out"):
                skipped[name, *why] = None
    return [*bad, *skipped]


def has_failures(results: Iterable[Result]) -> bool:
    """Whether a case could not be set up, or something of ours was wrong or failed."""
    return any(
        result["failed_cases"]
        or any(record["ours"] and record["status"] in ("wrong", "failed") for record in result["records"])
        for result in results
    )
