"""`log.jsonl`: what happens in a run, while it happens, one JSON object a line.

Every record has `event`, `time` (seconds since 1970) and `step`:

    start        a process begins to train: `max_steps`, `epochs`, `device`, `process` (host, pid, when it was started)
    log          whatever Trainer logs: loss, learning_rate, images_per_second, eval_accuracy, ...; null is NaN or inf
    checkpoint   a checkpoint was written: its folder's name, `checkpoint`
    kernels      `failed`: kernels that PyTorch took over from; `measured`: the records that operations went by
    end          `outcome` is finished, interrupted or failed; `reason` says why

A line is written whole by one call. Where a process was killed in the middle of one, readers leave the piece out, and
the next process begins a new line. A run that is resumed goes on in the same file: what an earlier process did beyond
the step that it is resumed from counts no more.
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
    """Add a record to the log of the run in `folder`."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    line = json.dumps({"event": event, "time": time.time(), "step": step, **finite}).encode() + b"\n"
    # Not through a temporary file as other files are: a reader may see a part of the last line and waits for the rest.
    with (folder / LOG_FILE).open("a+b", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def identify_process() -> dict[str, Any]:
    """What tells this process from all others, also from a later one with its number."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(process: dict[str, Any]) -> bool | None:
    """Whether the process still runs; None if it runs, or ran, on another machine."""
    if process["host"] != socket.gethostname():
        return None
    try:
        running = psutil.Process(process["pid"])
        return abs(running.create_time() - process["started"]) < 1 and running.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class RunLog:
    """The log of the run in `folder` as far as it was read: call `read` again for what was added since.

    start, end: the newest of these records, `end` only if it came after; logs, checkpoints: the records that count.
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
        """The records that were added since the last call, after taking them in."""
        path = self.folder / LOG_FILE
        if not path.is_file() or path.stat().st_size < self.offset:  # not begun, or begun anew by --overwrite
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
        """The value that was logged last under this name, or None."""
        return next((record[name] for record in reversed(self.logs) if record.get(name) is not None), None)

    def get_curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever a finite value was logged under this name."""
        return extract_curve(self.logs, name)


def extract_curve(history: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of the records with a finite value of this name; history: Trainer's, or the log's."""
    return [
        (record["step"], float(record[name]))
        for record in history
        if record.get(name) is not None and math.isfinite(record[name])
    ]


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """A record, or None for what a killed process left of one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"event", "step"} <= record.keys() else None
