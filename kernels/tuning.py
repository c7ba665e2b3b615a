"""Which tile a kernel runs with: one small table, and a cache on disk of what was measured.

A choice is a mapping of names to integers that the kernel's launcher understands. `FASTVIT_AUTOTUNE` says where it
comes from:

    unset   what an earlier run measured and left in the cache, else the table; nothing is timed
    1       as before, and what the cache lacks is timed once (tens of milliseconds a candidate) and kept there
    0       the table alone

The cache is `tuning.json` in `$FASTVIT_CACHE_DIR` or `~/.cache/fastvit`. An entry holds for one operation, shape class,
dtype, device name and Triton version. Nothing is timed on a CPU, nor while a CUDA graph is being captured.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton

Choice = Mapping[str, int]


class Rule(NamedTuple):
    """One line of the table. None matches everything; the first candidate is the choice, the others may be timed."""

    operation: str
    shape_class: str | None
    dtype: torch.dtype | None
    capability: tuple[int, int] | None
    candidates: tuple[Choice, ...]


# The first line that matches is used. Chosen from compiled registers, instructions and shared memory on sm_80 and sm_90
# (benchmarks/results/compile), November 2026; not yet from times.
TABLE = (
    # elements: the most values of a row that one thread holds; num_warps: the fewest warps a program has.
    # 40 values keep a row of 768, 1024 or 1280 half-precision values in one warp, so that its sums need no shared
    # memory, in 48 to 72 registers; four such rows a program keep the number of programs to launch low.
    Rule("layer_norm_forward", None, None, None, (
        {"elements": 40, "num_warps": 4},
        {"elements": 40, "num_warps": 8},
        {"elements": 16, "num_warps": 4},
    )),
    # waves: programs a multiprocessor; each adds up weight gradients over its rows, and writes them once.
    # Backward holds five such sets of values: 24 fit (128 registers, four programs a multiprocessor), 40 took 254.
    Rule("layer_norm_backward", None, None, None, (
        {"elements": 24, "num_warps": 4, "waves": 4},
        {"elements": 24, "num_warps": 4, "waves": 2},
        {"elements": 24, "num_warps": 8, "waves": 2},
        {"elements": 16, "num_warps": 4, "waves": 4},
    )),
    # rows, keys: the tile of scores. piece: all keys at once, in pieces of at most so many, and `blocks` tiles of rows
    # for a program. 64 rows and 208 keys in pieces take 193 registers (two programs a multiprocessor) and nothing is
    # read twice; in one piece of 256 they spill. wgmma needs 64 rows; with mma.sync (sm_80) 64 spill, 32 take 160.
    *(Rule("attention_forward", f"short, dim {dim}", dtype, (9, 0), (
        {"rows": 64, "piece": 64, "blocks": 4, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "piece": 64, "blocks": 4, "num_warps": 4, "num_stages": 1},
        {"rows": 64, "piece": 128, "blocks": 4, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "piece": 64, "blocks": 2, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "piece": 64, "blocks": 2, "num_warps": 8, "num_stages": 1},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
    )) for dim in (64, 80) for dtype in (torch.bfloat16, torch.float16)),
    *(Rule("attention_forward", "short, dim 64", dtype, (8, 0), (
        {"rows": 32, "piece": 64, "blocks": 8, "num_warps": 4, "num_stages": 1},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    )) for dtype in (torch.bfloat16, torch.float16)),
    # Full float32 products run on the ordinary units: larger tiles spill thousands of registers.
    Rule("attention_forward", None, torch.float32, None, (
        {"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 2},
    )),
    *(Rule("attention_forward", f"{length}, dim 128", None, None, (
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
    )) for length in ("short", "short, looped", "long")),
    Rule("attention_forward", None, None, None, (
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2},
        {"rows": 128, "keys": 64, "num_warps": 8, "num_stages": 2},
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2},
    )),
    # keys_per_warp: one kernel, one program a head, 256 keys in 16 warps (128 registers) or 8 (239). It reads and
    # writes 620 MB at ViT-B/16's shape; two kernels 930 MB, with 7 products instead of 5. With mma.sync it spills.
    *(Rule("attention_backward", "short, dim 64", dtype, (9, 0), (
        {"rows": 32, "keys_per_warp": 16, "num_stages": 1},
        {"rows": 32, "keys_per_warp": 32, "num_stages": 1},
        {"rows": 32, "keys_per_warp": 32, "num_stages": 2},
        {"rows": 16, "keys_per_warp": 16, "num_stages": 1},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 64, "key_value_warps": 4},
    )) for dtype in (torch.bfloat16, torch.float16)),
    # Two kernels, by queries and (key_value_) by keys.
    Rule("attention_backward", None, torch.float32, None, (
        {"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 32, "key_value_warps": 8},
    )),
    *(Rule("attention_backward", f"{length}, dim 128", None, None, (
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 64, "key_value_keys": 64, "key_value_warps": 8},
    )) for length in ("short", "short, looped", "long")),
    Rule("attention_backward", None, None, None, (
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 64, "key_value_warps": 4},
        {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2,
         "key_value_rows": 32, "key_value_keys": 128, "key_value_warps": 8},
    )),
    Rule("attention_mask_backward", None, torch.float32, None, (
        {"rows": 32, "keys": 32, "num_warps": 8, "num_stages": 2},
    )),
    Rule("attention_mask_backward", None, None, None, (
        {"rows": 64, "keys": 64, "num_warps": 8, "num_stages": 1},
        {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 2},
    )),
)  # fmt: skip


class Device(NamedTuple):
    name: str
    capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def describe(device: torch.device) -> Device:
    """What the choice depends on; asked of the driver once. A CPU, where Triton interprets, counts as a small GPU."""
    if device.type != "cuda":
        return Device("interpreter", (0, 0), 1)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def candidates(operation: str, shape_class: str, dtype: torch.dtype, device: torch.device) -> tuple[Choice, ...]:
    """The table's line for this case."""
    asked = (operation, shape_class, dtype, describe(device).capability)
    for rule in TABLE:
        if all(expected in (None, given) for expected, given in zip(rule, asked, strict=False)):
            return rule.candidates
    raise KeyError(f"no tile for {asked}")


_chosen: dict[tuple, Choice] = {}


def choose(
    operation: str, shape_class: str, dtype: torch.dtype, device: torch.device, run: Callable[[Choice], object]
) -> Choice:
    """The choice for one launch. `run(choice)` launches the kernel with it and may be called many times, or never."""
    key = (operation, shape_class, dtype, device)
    if key not in _chosen:
        options = candidates(*key)
        mode = os.environ.get("FASTVIT_AUTOTUNE", "")
        choice = None
        if device.type != "cuda" or mode == "0" or len(options) == 1:
            choice = options[0]
        else:
            entry = "|".join((operation, shape_class, str(dtype), describe(device).name, triton.__version__))
            choice = read_cache().get(entry)
            if choice not in options:  # never measured, or the table has changed since
                choice = options[0]
                if mode == "1":
                    if torch.cuda.is_current_stream_capturing():
                        return choice  # for now: it is measured at a later call
                    choice = fastest(options, run)
                    add_to_cache(entry, choice)
        _chosen[key] = choice
    return _chosen[key]


def fastest(options: tuple[Choice, ...], run: Callable[[Choice], object]) -> Choice:
    """The candidate with the lowest median time; one that this device cannot launch is passed over."""
    times = []
    for option in options:
        try:
            times.append(triton.testing.do_bench(lambda: run(option), warmup=5, rep=20, return_mode="median"))  # noqa: B023
        except triton.runtime.errors.OutOfResources:
            times.append(float("inf"))
    return options[times.index(min(times))]


def cache_path() -> Path:
    folder = os.environ.get("FASTVIT_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "fastvit") / "tuning.json"


def read_cache() -> dict[str, Choice]:
    """Everything that was measured. A file that is not such a cache is reported and replaced by an empty one."""
    path = cache_path()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, dict):
            raise ValueError("not a table of measurements")
    except OSError:
        return {}
    except ValueError as error:  # also broken JSON and broken UTF-8
        warnings.warn(f"{path} is not a tuning cache ({error}): starting a new one", stacklevel=2)
        write_cache({})
        return {}
    return entries


def add_to_cache(entry: str, choice: Choice) -> None:
    """Add one measurement to what is on disk now, which another process may have written since we read it."""
    write_cache(read_cache() | {entry: dict(choice)})


def write_cache(entries: dict[str, Choice]) -> None:
    """Replace the file in one step: a reader sees the old one or the new one, never a part."""
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=path.name, suffix=".part", delete=False
        ) as file:
            json.dump(entries, file, indent=1, sort_keys=True)
        os.replace(file.name, path)  # noqa: PTH105 (the name is a string)
    except OSError as error:  # a read-only home directory is no reason to stop
        warnings.warn(f"tile measurements are not kept: {error}", stacklevel=2)
