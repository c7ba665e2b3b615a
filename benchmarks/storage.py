"""Files of results, written and read.

A file of results is JSON: `environment` and `ceilings` of the run, and `records`, one for each shape, dtype, pass and
provider, with its `status`:

    timed, measured   it was right, and was timed, or only its memory measured
    wrong             its results were further off than PyTorch's may be: not timed
    failed            it raised an error, the `reason`
    missing           it is not installed, or not for this device
    left out          it would have taken too long
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastvit.errors import InputError
from fastvit.files import write_text

SCHEMA = 1
COLUMNS = ("operation", "shape", "dtype", "pass", "provider", "status", "reason")
NUMBERS = (
    "host_us", "gb_per_s", "tflop_per_s", "images_per_s", "floor_ms", "of_floor", "first_call_s", "peak_bytes",
    "kept_bytes", "error",
)  # fmt: skip
QUANTILES = ("min", "p05", "q25", "median", "q75", "p95", "max", "samples")


def write(result: dict[str, Any], folder: Path) -> None:
    name = result["operation"] + ("-memory" if result["options"]["memory_only"] else "")
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / f"{name}.csv", as_csv([result]))


def load(paths: Iterable[Path], *, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """Results of all files given, and of all in the folders given; `source` says where each was.

    A file holds the results of one operation, or a list of them.
    """
    results = []
    for path in paths:
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        found = 0
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{file}: cannot be read as results ({error})") from None
            for result in content if isinstance(content, list) else [content]:
                if not isinstance(result, dict) or "records" not in result or "environment" not in result:
                    if file is path:
                        raise InputError(f"{file}: expected results of `fastvit benchmark`, got other JSON")
                    continue  # other reports lie beside results
                if result.get("schema") != SCHEMA:
                    raise InputError(f"{file}: expected results of schema {SCHEMA}, got {result.get('schema')}")
                results.append(result | {"source": str(file.parent)})
                found += 1
        if not found and not may_be_empty:
            raise InputError(f"{path}: expected a folder with results of `fastvit benchmark`, found none")
    return results


def as_csv(results: Sequence[dict[str, Any]]) -> str:
    out, about = io.StringIO(), ("device", "date", "commit")
    fields = [*about, *COLUMNS, *(f"ms_{name}" for name in QUANTILES), *NUMBERS]
    writer = csv.DictWriter(out, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        where = {name: result["environment"].get(name) for name in about}
        for record in result["records"]:
            times = record.get("ms") or {}
            writer.writerow(where | record | {f"ms_{name}": value for name, value in times.items()})
    return out.getvalue()
