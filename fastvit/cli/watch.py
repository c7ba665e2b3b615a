"""`fastvit watch DIR`: show a run while it trains, read from its `log.jsonl`, from any terminal with its files."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastvit.cli.parsers import build_parser
from fastvit.errors import InputError
from fastvit.report import run_log
from fastvit.report.run_log import LOG_FILE, RunLog
from fastvit.report.tasks import TASKS, find_metric

CURVE_ROWS = 8
ENDED = ("finished", "interrupted", "failed", "killed")


def main(argv: list[str]) -> int:
    parser = build_parser(
        "watch",
        description="Show a run of `fastvit finetune` while it trains: progress, loss, accuracy, speed, memory.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="output folder of the run")
    parser.add_argument("--once", action="store_true", help="show the current state and exit")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="time between two updates")
    options = parser.parse_args(argv)
    if not options.interval > 0:
        raise InputError(f"--interval: expected a number above 0, got {options.interval}")
    check_is_run(options.folder)
    return watch(RunLog(options.folder), Console(highlight=False), once=options.once, interval=options.interval)


def check_is_run(folder: Path) -> None:
    """Check that `folder` is that of a run with a log, or of one that will begin.

    Raises:
        InputError: it is not.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the output folder of a run, found no folder")
    if (folder / LOG_FILE).is_file():
        return
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"{folder}: expected the output folder of `fastvit finetune`, found neither a log nor a config.yaml"
        )
    if (folder / "trainer_state.json").is_file():
        raise InputError(f"{folder}: expected a run with a log, found one without {LOG_FILE}")


def watch(log: RunLog, console: Console, *, once: bool, interval: float) -> int:
    """Show the run until it has ended.

    On a terminal, one view is redrawn. Elsewhere, every record of the log is a line.

    Returns:
        The exit code: 0, or 1 if the run failed or was killed.
    """
    new = log.read()
    if once:
        console.print(build_view(log, console))
    elif console.is_terminal:
        with Live(build_view(log, console), console=console, auto_refresh=False) as live:
            while get_status(log) not in ENDED:
                time.sleep(interval)
                log.read()
                live.update(build_view(log, console), refresh=True)
    else:
        while True:
            for record in new:
                if line := format_record(record):
                    console.print(line, markup=False, soft_wrap=True)
            if get_status(log) in ENDED:
                break
            time.sleep(interval)
            new = log.read()
        console.print(describe_status(log), markup=False, soft_wrap=True)
    return 1 if get_status(log) in ("failed", "killed") else 0


# ---------------------------------------------------------------------------------------------------------------------
# Status
# ---------------------------------------------------------------------------------------------------------------------


def get_status(log: RunLog) -> str:
    """The status of a run: waiting, training, finishing, or one of `ENDED`."""
    if log.start is None:
        return "waiting"
    if log.end is None and run_log.is_alive(log.start["process"]) is False:
        log.read()  # it may have logged its end since the last read
        if log.end is None:
            return "killed"
    if log.end is not None:
        return log.end["outcome"]
    return "finishing" if get_step(log) >= log.start["max_steps"] else "training"


def get_step(log: RunLog) -> int:
    """The last step in the log."""
    return max(
        (record["step"] for record in (*log.logs[-1:], *log.checkpoints[-1:], log.start or {"step": 0})), default=0
    )


def describe_status(log: RunLog) -> str:
    """Describe the status in words."""
    now, step = get_status(log), get_step(log)
    if log.start is None:
        return "waiting for training to begin"
    if now == "finishing":
        return "trained; evaluating and writing the results"
    if now == "killed":
        return f"ended after step {step} without a record: the process was killed, or the machine went down"
    if now == "training":
        process = log.start["process"]
        where = f" on {process['host']}" if run_log.is_alive(process) is None else ""
        return f"training{where}, step {step}"
    reason = log.end["reason"] if log.end is not None else ""
    return f"{now} after step {step}" + (f": {reason}" if reason else "")


def estimate_seconds_left(log: RunLog) -> float | None:
    """Estimate the time left from the mean speed of this process, with evaluations and checkpoints."""
    if log.start is None or not log.logs:
        return None
    step, last = log.logs[-1]["step"], log.logs[-1]["time"]
    if step <= log.start["step"]:
        return None
    return (last - log.start["time"]) / (step - log.start["step"]) * max(0, log.start["max_steps"] - step)


# ---------------------------------------------------------------------------------------------------------------------
# Output on a terminal
# ---------------------------------------------------------------------------------------------------------------------


def build_view(log: RunLog, console: Console) -> RenderableType:
    """Build the view of a run, as wide as the terminal."""
    now = get_status(log)
    colour = {"failed": "red", "killed": "red", "interrupted": "yellow", "finished": "green"}.get(now, "cyan")
    head = Text.assemble((log.folder.name or str(log.folder), "bold"), "  ", (describe_status(log), colour))
    parts: list[RenderableType] = [head]
    if log.start is not None:
        parts.append(build_progress(log, now))
    if points := log.get_curve("loss"):
        parts += ["", *draw_loss_curve(points, console)]
    if rows := list_figures(log):
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(name, "dim"), Text(value))
        parts += ["", table]
    return Group(*parts)


def build_progress(log: RunLog, now: str) -> RenderableType:
    assert log.start is not None
    step, steps = get_step(log), log.start["max_steps"]
    text = f"{step:,}/{steps:,} steps"
    left = estimate_seconds_left(log)
    if now == "training" and left is not None:
        text += f", {format_duration(left)} left"
    row = Table.grid(expand=True, padding=(0, 2, 0, 0))
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(ProgressBar(total=max(1, steps), completed=step), Text(text))
    return row


def list_figures(log: RunLog) -> list[tuple[str, str]]:
    """The last logged values: (name, value)."""
    rows = []
    epoch, loss, rate = (log.get_latest(name) for name in ("epoch", "loss", "learning_rate"))
    if loss is not None:
        rows.append(("loss", f"{loss:.4f}" + (f", learning rate {rate:.2e}" if rate is not None else "")))
    for task in TASKS.values():
        if values := log.get_curve(f"eval_{task.metric}"):
            step, best = (max if task.greater_is_better else min)(values, key=lambda point: point[1])
            shown = [task.format_metric(value) for value in (values[-1][1], best)]
            rows.append((task.metric_name, f"{shown[0]} on validation; best {shown[1]} at step {step:,}"))
    if epoch is not None and log.start is not None:
        rows.append(("epoch", f"{epoch:.2f} of {log.start['epochs']:g}"))
    if (speed := log.get_latest("images_per_second")) is not None:
        rows.append(("speed", f"{speed:,.0f} images/s"))
    if (memory := log.get_latest("memory_gib")) is not None:
        rows.append(("memory", f"{memory:.2f} GiB, peak {log.get_latest('peak_memory_gib'):.2f} GiB"))
    if log.checkpoints:
        last = log.checkpoints[-1]
        rows.append(("checkpoint", f"{last['checkpoint']}, written {format_duration(time.time() - last['time'])} ago"))
    return rows


def draw_loss_curve(points: Sequence[tuple[int, float]], console: Console) -> list[Text]:
    """Draw the training loss as lines of dots, labelled with the highest and the lowest value."""
    utf = (console.encoding or "").lower().startswith("utf")
    values = [value for _, value in points]
    labels = [f"{max(values):.3g}", *[""] * (CURVE_ROWS - 2), f"{min(values):.3g}"]
    width = max(map(len, labels))
    rows = draw_dots(points, max(8, console.width - width - 3), CURVE_ROWS, utf)
    bar = "│" if utf else "|"
    return [
        Text.assemble((f"{label:>{width}} {bar}", "dim"), (row, "cyan"))
        for label, row in zip(labels, rows, strict=True)
    ]


def draw_dots(points: Sequence[tuple[float, float]], columns: int, rows: int, utf: bool) -> list[str]:
    """Draw points as lines of text: 2x4 dots per Braille character, or one per character without UTF-8."""
    across, down = (2, 4) if utf else (1, 1)
    width, height = columns * across, rows * down
    (low_x, high_x), (low, high) = ((min(axis), max(axis)) for axis in ([x for x, _ in points], [y for _, y in points]))
    cells = [[0] * columns for _ in range(rows)]
    places = [
        ((x - low_x) / ((high_x - low_x) or 1) * (width - 1), (high - y) / ((high - low) or 1) * (height - 1))
        for x, y in points
    ]
    for column, row in connect_points(places):
        bit = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))[row % down][column % across]
        cells[row // down][column // across] |= bit
    if utf:
        return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
    return ["".join("*" if cell else " " for cell in line).rstrip() for line in cells]


def connect_points(places: Sequence[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """The integer points on the straight lines from each place to the next."""
    for (x, y), (next_x, next_y) in pairwise([*places, places[-1]]):
        steps = max(1, round(max(abs(next_x - x), abs(next_y - y))))
        for step in range(steps):
            share = step / steps
            yield round(x + share * (next_x - x)), round(y + share * (next_y - y))


def format_duration(seconds: float) -> str:
    """Format seconds as 1:05 or 2:03:00."""
    text = str(datetime.timedelta(seconds=max(0, round(seconds))))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text


# ---------------------------------------------------------------------------------------------------------------------
# Output to a file or a pipe
# ---------------------------------------------------------------------------------------------------------------------


def format_record(record: dict[str, Any]) -> str:
    """Format a record as a line; empty for records of no interest to the user."""
    step = f"step {record['step']}"
    if record["event"] == "start":
        return f"{step} of {record['max_steps']}: training on {record['device']}"
    if record["event"] == "checkpoint":
        return f"{step}: {record['checkpoint']} written"
    if (metric := find_metric(record)) is not None:
        return f"{step}: validation {metric[0].metric_name} {metric[0].format_metric(metric[1])}"
    if record["event"] == "log" and "loss" in record:
        parts = [f"loss {'not finite' if record['loss'] is None else format(record['loss'], '.4f')}"]
        if record.get("images_per_second") is not None:
            parts.append(f"{record['images_per_second']:,.0f} images/s")
        if record.get("memory_gib") is not None:
            parts.append(f"{record['memory_gib']:.2f} GiB")
        return f"{step}: {', '.join(parts)}"
    return ""
