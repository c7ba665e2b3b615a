"""Tuning records: the fastest candidate for each operation and shape on a GPU.

A candidate is PyTorch's operation ("pytorch", or for attention "pytorch flash" and the like), or ours with a number in
the tuning table ("ours 0"). Records are stored in one file in `FASTVIT_CACHE_DIR` or `~/.cache/fastvit`; the package
ships files for GPUs measured by us. A record is valid for one GPU, for the versions of PyTorch and Triton, and for the
kernel source that it was measured with. This module does not import Triton.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import tempfile
import tokenize
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvit.files import wrap_write_errors
from fastvit.ops.cases import Case

OURS, PYTORCH = "ours", "pytorch"
MARGIN = 0.97  # ours must take less than this share of PyTorch's time: a tie goes to the more widely tested one
SDPA_BACKEND_NAMES = ("flash", "cudnn", "efficient", "math")  # of PyTorch's attention
MAX_CANDIDATES = 3  # of ours
KERNELS_FOLDER = Path(__file__).resolve().parents[1] / "kernels"
SHIPPED = Path(__file__).with_suffix("")  # a folder beside this file
FILE_NAME = "records.json"


class Timing(NamedTuple):
    """A candidate's median time, or the reason why it has none: an exception or a wrong result."""

    candidate: str
    ms: float | None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """The fastest candidate for one case on one GPU. kernel: `hash_kernel` of its source."""

    operation: str
    direction: str
    sizes: tuple[tuple[str, int | str], ...]
    rows: int
    tokens: int
    dtype: str
    gpu: str
    torch: str
    triton: str
    kernel: str
    candidates: tuple[Timing, ...]
    winner: str

    @property
    def case(self) -> Case:
        return Case(self.operation, self.direction, self.sizes, self.rows, self.tokens, self.dtype)

    @property
    def choice(self) -> int | str:
        """The winner: our candidate's number, or for PyTorch "default" or the SDPA backend's name."""
        provider, _, option = self.winner.partition(" ")
        return int(option) if provider == OURS else option or "default"

    def best_ms(self, provider: str) -> float | None:
        """The lowest median of `OURS` or `PYTORCH` in milliseconds, or None if none was timed."""
        times = [t.ms for t in self.candidates if t.ms is not None and t.candidate.partition(" ")[0] == provider]
        return min(times, default=None)


def choose_winner(timings: Iterable[Timing]) -> str | None:
    """The fastest candidate, or None if nothing was timed.

    Ours must be 3 % faster than PyTorch's best. An SDPA backend must also be 3 % faster than PyTorch's default choice,
    because selecting it costs time on the host.
    """
    timed = {timing.candidate: timing.ms for timing in timings if timing.ms is not None}

    def best(provider: str) -> str | None:
        return min((name for name in timed if name.startswith(provider)), key=lambda name: timed[name], default=None)

    ours, pytorch = best(OURS), best(PYTORCH)
    if ours is not None and (pytorch is None or timed[ours] < MARGIN * timed[pytorch]):
        return ours
    if pytorch is not None and PYTORCH in timed and timed[pytorch] >= MARGIN * timed[PYTORCH]:
        return PYTORCH
    return pytorch


# ---------------------------------------------------------------------------------------------------------------------
# The validity of a record
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache  # querying the driver takes longer than the choice
def get_gpu_name(device_type: str, device_index: int | None) -> str:
    return torch.cuda.get_device_name(device_index) if device_type == "cuda" else "interpreter"


@functools.cache
def get_versions() -> tuple[str, str]:
    """The versions of PyTorch and Triton."""
    for package in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return torch.__version__, version(package)
        except PackageNotFoundError:
            continue
    return torch.__version__, "none"


@functools.cache
def hash_kernel(module: str) -> str:
    """Hash of the code that `fastvit.kernels.<module>` uses and of its tiles, without comments and docstrings."""
    from fastvit.kernels import tuning

    sources = _read_sources(module)
    code = [_strip_comments(path, tree) for path, tree in sources.items()]
    constants = {node.value for tree in sources.values() for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = [word for word in constants if isinstance(word, str)]
    rules = [repr(rule) for rule in tuning.TABLE if any(re.fullmatch(rule.operation, name) for name in names)]
    return hashlib.sha256("\n".join([*code, *rules]).encode()).hexdigest()[:16]


def _read_sources(module: str) -> dict[Path, ast.Module]:
    """The syntax trees of a module or package of fastvit.kernels and of all its direct and indirect imports."""
    trees: dict[Path, ast.Module] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in ("tuning", "operators", "checks"):  # rules are hashed one by one; the others launch nothing
            continue
        for path in (KERNELS_FOLDER / f"{name}.py", *(KERNELS_FOLDER / name).glob("*.py")):
            if path in trees or not path.is_file():
                continue
            trees[path] = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(trees[path]):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastvit.kernels"):
                    inner = (node.module or "").split(".")[2:3]
                    pending += inner or [alias.name for alias in node.names]
    return {path: trees[path] for path in sorted(trees)}


def _strip_comments(path: Path, tree: ast.Module) -> str:
    """The text of a file without comments, docstrings and empty lines, equal for all versions of Python."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)  # type: ignore[operator]
    reader = io.StringIO(path.read_text(encoding="utf-8")).readline
    for token in tokenize.generate_tokens(reader):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


# ---------------------------------------------------------------------------------------------------------------------
# Storage
# ---------------------------------------------------------------------------------------------------------------------

# Read once per process, so that its choices do not change.
_table: dict[str, dict[tuple[Case, str], Record]] | None = None


def find(case: Case, gpu: str, module: str) -> Record | None:
    """The valid record for a case, measured with the current kernel source; constant within a process."""
    return get_table().get(gpu, {}).get((case, hash_kernel(module)))


def get_table() -> dict[str, dict[tuple[Case, str], Record]]:
    """Records for the installed PyTorch and Triton, by GPU, then by case and kernel hash. Local records override those
    of the package."""
    global _table
    if _table is None:
        shipped = [record for path in sorted(SHIPPED.glob("*.json")) for record in read_or_warn(path, "left out")]
        cached = read_cache().values()
        _table = {}
        adopt([*shipped, *cached])
    return _table


def adopt(records: Iterable[Record]) -> None:
    """Use these records in this process from now on."""
    for record in records:
        if (record.torch, record.triton) == get_versions():
            get_table().setdefault(record.gpu, {})[record.case, record.kernel] = record


def get_cache_path() -> Path:
    folder = os.environ.get("FASTVIT_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".cache" / "fastvit") / FILE_NAME


def read_cache() -> dict[str, Record]:
    """The local records by key. An unreadable file is reported and replaced by an empty one."""
    try:
        return read(get_cache_path())
    except OSError:
        return {}
    except (ValueError, RecursionError) as error:  # also broken JSON and broken UTF-8
        warnings.warn(f"{get_cache_path()} does not hold tuning records ({error}): starting a new one", stacklevel=2)
        with contextlib.suppress(OSError):
            write(get_cache_path(), {})
        return {}


def read_or_warn(path: Path, outcome: str) -> list[Record]:
    """The records of a file that must not be replaced; if it is unreadable, none and a warning with the outcome."""
    try:
        return list(read(path).values())
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} does not hold tuning records ({error}): {outcome}", stacklevel=2)
        return []


def add_to_cache(records: Iterable[Record]) -> None:
    """Add to the records on disk, which other processes may update at the same time."""
    from filelock import FileLock, Timeout

    try:
        get_cache_path().parent.mkdir(parents=True, exist_ok=True)
        with FileLock(get_cache_path().with_suffix(".lock"), timeout=10):
            write(get_cache_path(), read_cache() | {_make_key(record): record for record in records})
    except (OSError, Timeout) as error:  # a read-only home directory must not stop the program
        warnings.warn(f"tuning records are not saved: {error}", stacklevel=2)


def read(path: Path) -> dict[str, Record]:
    """The records of a file by key, without malformed ones. Raises OSError or ValueError."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list):
        raise ValueError("expected a list of records")
    records = [record for entry in entries if (record := _parse_record(entry)) is not None]
    return {_make_key(record): record for record in records}


def write(path: Path, records: dict[str, Record]) -> None:
    """Replace the file atomically: readers see the old or the new one. Raises OSError."""
    entries = [dataclasses.asdict(record) | {"candidates": [c._asdict() for c in record.candidates]}
               for _, record in sorted(records.items())]  # fmt: skip
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.name, suffix=".part", delete=False
    ) as file:
        json.dump(entries, file, indent=1)
    Path(file.name).chmod(0o644)  # readable for all users who share the folder
    Path(file.name).replace(path)


def export(path: Path, records: Iterable[Record]) -> None:
    """Write records in the format of the package's own files. Raises WriteError."""
    with wrap_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {_make_key(record): record for record in records})


def _parse_record(entry: Any) -> Record | None:
    try:
        sizes = tuple((name, value) for name, value in entry["sizes"])
        candidates = tuple(Timing(**timing) for timing in entry["candidates"])
        record = Record(**{**entry, "sizes": sizes, "candidates": candidates})
        hash(record)
        is_known = record.choice in range(MAX_CANDIDATES) or record.choice in ("default", *SDPA_BACKEND_NAMES)
        return record if is_known and record.winner.startswith((OURS, PYTORCH)) else None
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def _make_key(record: Record) -> str:
    """The key of a record; a new record replaces one with the same key."""
    return "|".join(map(str, (record.gpu, *record.case, record.torch, record.triton, record.kernel)))
