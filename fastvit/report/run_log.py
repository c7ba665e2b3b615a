"""`log.jsonl`: the events of a run, one JSON object per line, appended as they happen.

Every record has `event`, `time` (seconds since 1970) and `step`:

    start        training starts in a process: `max_steps`, `epochs`, `device`, `process` (host, pid, start time)
    log          values logged by Trainer: loss, learning_rate, images_per_second, eval_accuracy, ...; null: NaN or inf
    checkpoint   a checkpoint was written; `checkpoint` is the name of its folder
    kernels      `failed`: kernels that PyTorch replaced; `measured`: the records that decided the backend
    end          `outcome` is finished, interrupted or failed; `reason` is the cause

Each line is written by a single call. If a process is killed while writing, readers skip the incomplete line and the
next process starts a new one. A resumed run appends to the same file. Records of an earlier process beyond the step at
which the run is resumed are then ignored.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

LOG_FILE = "log.jsonl"


def append_record(folder: Path, event: str, step: int, **values: Any) -> None:
    """Append a record to the log of the run in `folder`. NaN and infinity are written as null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    line = json.dumps({"event": event, "time": time.time(), "step": step, **finite}).encode() + b"\n"
    # No atomic replacement as for other files: readers wait for the rest of an incomplete last line.
    with (folder / LOG_FILE).open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def identify_process() -> dict[str, Any]:
    """Identify this process uniquely: the start time distinguishes it from later processes with the same pid."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Whether the process is running; None if it belongs to another machine."""
    if process["host"] != socket.gethostname():
        return None
    try:
        running = psutil.Process(process["pid"])
        return abs(running.create_time() - process["started"]) < 1 and running.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class RunLog:
    """The log of a run, read incrementally: `read` adds the records that were written since the last call.

    Attributes:
        folder: the run's folder.
        start: the last `start` record.
        end: the `end` record after it, if any.
        logs: the `log` records, without those that a resumed run discarded.
        checkpoints: the `checkpoint` records, likewise.
        offset: bytes read so far.
    """

    folder: Path
    start: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    logs: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    offset: int = 0

    @property
    def exists(self) -> bool:
        return (self.folder / LOG_FILE).is_file()

    def read(self) -> list[dict[str, Any]]:
        """Read the records that were added since the last call, update the attributes and return the records."""
        path = self.folder / LOG_FILE
        if not path.is_file() or path.stat().st_size < self.offset:  # not started, or restarted by --overwrite
            self.start = self.end = None
            self.logs, self.checkpoints, self.offset = [], [], 0
            if not path.is_file():
                return []
        with path.open("rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        records = [record for line in whole.splitlines() if (record := _parse_record(line)) is not None]
        for record in records:
            self._add_record(record)
        return records

    def _add_record(self, record: dict[str, Any]) -> None:
        event = record["event"]
        if event == "start":
            self.start, self.end = record, None
            self.logs = [one for one in self.logs if one["step"] <= record["step"]]
            self.checkpoints = [one for one in self.checkpoints if one["step"] <= record["step"]]
        elif event == "log":
            self.logs.append(record)
        elif event == "checkpoint":
            self.checkpoints.append(record)
        elif event == "end":
            self.end = record

    def get_latest(self, name: str) -> Any:
        """The last value logged under this name, or None."""
        return next((record[name] for record in reversed(self.logs) if record.get(name) is not None), None)

    def get_curve(self, name: str) -> list[tuple[int, float]]:
        """The curve of a logged value, see `extract_curve`."""
        return extract_curve(self.logs, name)


def extract_curve(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Extract the curve of a logged value.

    Args:
        history: the `log` records of a run log, or `TrainerState.log_history`.
        name: of the value.

    Returns:
        (step, value) of all records with a finite value.
    """
    return [
        (record["step"], float(record[name]))
        for record in history
        if record.get(name) is not None and math.isfinite(record[name])
    ]


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """Parse a record; None for the incomplete line of a killed process."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"event", "step"} <= record.keys() else None
