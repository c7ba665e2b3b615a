"""`fastvit watch DIR`: a run as it goes on, read from its `log.jsonl`. Works from any terminal on the same files."""

from __future__ import annotations

import argparse
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

from fastvit.errors import InputError
from fastvit.report import run_log
from fastvit.report.run_log import LOG_FILE, RunLog

CURVE_ROWS = 8
ENDED = ("finished", "interrupted", "failed", "killed")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastvit watch",
        description="Show a run of `fastvit finetune` while it goes on: progress, loss, accuracy, speed, memory.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the run's output folder")
    parser.add_argument("--once", action="store_true", help="show how things stand and leave")
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks [1]")
    options = parser.parse_args(argv)
    if not options.interval > 0:
        raise InputError(f"--interval: expected a number above 0, got {options.interval}")
    check_is_run(options.folder)
    return watch(RunLog(options.folder), Console(highlight=False), once=options.once, interval=options.interval)


def check_is_run(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the output folder of a run, found no folder")
    if (folder / LOG_FILE).is_file():
        return
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: expected the output folder of `fastvit finetune`, found neither a log nor options")
    if (folder / "trainer_state.json").is_file():
        raise InputError(f"{folder}: this run has left no {LOG_FILE}, so there is nothing to watch")


def watch(log: RunLog, console: Console, *, once: bool, interval: float) -> int:
    """Show the run until it has ended; the exit code, 0 unless it failed or was killed.

    On a terminal one view is drawn anew; anywhere else there is a line for everything that is logged.
    """
    new = log.read()
    if once:
        console.print(view(log, console))
    elif console.is_terminal:
        with Live(view(log, console), console=console, auto_refresh=False) as live:
            while standing(log) not in ENDED:
                time.sleep(interval)
                log.read()
                live.update(view(log, console), refresh=True)
    else:
        while True:
            for record in new:
                if line := line_of(record):
                    console.print(line, markup=False, soft_wrap=True)
            if standing(log) in ENDED:
                break
            time.sleep(interval)
            new = log.read()
        console.print(sentence(log), markup=False, soft_wrap=True)
    return 1 if standing(log) in ("failed", "killed") else 0


# ---------------------------------------------------------------------------------------------------------------------
# How things stand
# ---------------------------------------------------------------------------------------------------------------------


def standing(log: RunLog) -> str:
    """waiting, training, finishing, or one of ENDED."""
    if log.start is None:
        return "waiting"
    if log.end is None and run_log.is_alive(log.start["process"]) is False:
        log.read()  # it may have said how it ended just before it did
        if log.end is None:
            return "killed"
    if log.end is not None:
        return log.end["outcome"]
    return "finishing" if step_of(log) >= log.start["max_steps"] else "training"


def step_of(log: RunLog) -> int:
    return max(
        (record["step"] for record in (*log.logs[-1:], *log.checkpoints[-1:], log.start or {"step": 0})), default=0
    )


def sentence(log: RunLog) -> str:
    """How things stand, in words."""
    now, step = standing(log), step_of(log)
    if log.start is None:
        return "waiting for training to begin"
    if now == "finishing":
        return "trained; measuring and writing"
    if now == "killed":
        return f"ended without a word after step {step}: the process was killed, or the machine went down"
    if now == "training":
        process = log.start["process"]
        where = f" on {process['host']}" if run_log.is_alive(process) is None else ""
        return f"training{where}, step {step}"
    reason = log.end["reason"] if log.end is not None else ""
    return f"{now} after step {step}" + (f": {reason}" if reason else "")


def seconds_left(log: RunLog) -> float | None:
    """By the mean speed of this process so far, evaluations and checkpoints included."""
    if log.start is None or not log.logs:
        return None
    step, last = log.logs[-1]["step"], log.logs[-1]["time"]
    if step <= log.start["step"]:
        return None
    return (last - log.start["time"]) / (step - log.start["step"]) * max(0, log.start["max_steps"] - step)


# ---------------------------------------------------------------------------------------------------------------------
# For a terminal
# ---------------------------------------------------------------------------------------------------------------------


def view(log: RunLog, console: Console) -> RenderableType:
    """Everything at a glance, as wide as the terminal."""
    now = standing(log)
    colour = {"failed": "red", "killed": "red", "interrupted": "yellow", "finished": "green"}.get(now, "cyan")
    head = Text.assemble((log.folder.name or str(log.folder), "bold"), "  ", (sentence(log), colour))
    parts: list[RenderableType] = [head]
    if log.start is not None:
        parts.append(progress(log, now))
    if points := log.get_curve("loss"):
        parts += ["", *loss_curve(points, console)]
    if rows := figures(log):
        table = Table.grid(padding=(0, 2))
        for what, value in rows:
            table.add_row(Text(what, "dim"), Text(value))
        parts += ["", table]
    return Group(*parts)


def progress(log: RunLog, now: str) -> RenderableType:
    assert log.start is not None
    step, steps = step_of(log), log.start["max_steps"]
    text = f"{step:,}/{steps:,} steps"
    left = seconds_left(log)
    if now == "training" and left is not None:
        text += f", {clock(left)} left"
    row = Table.grid(expand=True, padding=(0, 2, 0, 0))
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    row.add_row(ProgressBar(total=max(1, steps), completed=step), Text(text))
    return row


def figures(log: RunLog) -> list[tuple[str, str]]:
    """(what, value) of what has been logged so far."""
    rows = []
    epoch, loss, rate = (log.get_latest(name) for name in ("epoch", "loss", "learning_rate"))
    if loss is not None:
        rows.append(("loss", f"{loss:.4f}" + (f", learning rate {rate:.2e}" if rate is not None else "")))
    if accuracies := log.get_curve("eval_accuracy"):
        step, best = max(accuracies, key=lambda point: point[1])
        rows.append(("accuracy", f"{accuracies[-1][1]:.2%} on validation; best {best:.2%} at step {step:,}"))
    if epoch is not None and log.start is not None:
        rows.append(("epoch", f"{epoch:.2f} of {log.start['epochs']:g}"))
    if (speed := log.get_latest("images_per_second")) is not None:
        rows.append(("speed", f"{speed:,.0f} images/s"))
    if (memory := log.get_latest("memory_gib")) is not None:
        rows.append(("memory", f"{memory:.2f} GiB, peak {log.get_latest('peak_memory_gib'):.2f} GiB"))
    if log.checkpoints:
        last = log.checkpoints[-1]
        rows.append(("checkpoint", f"{last['checkpoint']}, written {clock(time.time() - last['time'])} ago"))
    return rows


def loss_curve(points: Sequence[tuple[int, float]], console: Console) -> list[Text]:
    """The training loss as dots: eight lines with the highest and the lowest value beside them."""
    utf = (console.encoding or "").lower().startswith("utf")
    values = [value for _, value in points]
    labels = [f"{max(values):.3g}", *[""] * (CURVE_ROWS - 2), f"{min(values):.3g}"]
    width = max(map(len, labels))
    rows = dots(points, max(8, console.width - width - 3), CURVE_ROWS, utf)
    bar = "│" if utf else "|"
    return [
        Text.assemble((f"{label:>{width}} {bar}", "dim"), (row, "cyan"))
        for label, row in zip(labels, rows, strict=True)
    ]


def dots(points: Sequence[tuple[float, float]], columns: int, rows: int, utf: bool) -> list[str]:
    """Points as lines of text: two by four dots in a Braille character, or one dot in a character without UTF-8."""
    across, down = (2, 4) if utf else (1, 1)
    width, height = columns * across, rows * down
    (low_x, high_x), (low, high) = ((min(axis), max(axis)) for axis in ([x for x, _ in points], [y for _, y in points]))
    cells = [[0] * columns for _ in range(rows)]
    places = [
        ((x - low_x) / ((high_x - low_x) or 1) * (width - 1), (high - y) / ((high - low) or 1) * (height - 1))
        for x, y in points
    ]
    for column, row in joined(places):
        bit = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))[row % down][column % across]
        cells[row // down][column // across] |= bit
    if utf:
        return ["".join(chr(0x2800 + cell) for cell in line) for line in cells]
    return ["".join("*" if cell else " " for cell in line).rstrip() for line in cells]


def joined(places: Sequence[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """The whole-numbered places on the straight lines from each place to the next."""
    for (x, y), (next_x, next_y) in pairwise([*places, places[-1]]):
        steps = max(1, round(max(abs(next_x - x), abs(next_y - y))))
        for step in range(steps):
            share = step / steps
            yield round(x + share * (next_x - x)), round(y + share * (next_y - y))


def clock(seconds: float) -> str:
    """1:05 or 2:03:00."""
    text = str(datetime.timedelta(seconds=max(0, round(seconds))))
    return text.removeprefix("0:").removeprefix("0") if seconds < 3600 else text


# ---------------------------------------------------------------------------------------------------------------------
# For a file or a pipe
# ---------------------------------------------------------------------------------------------------------------------


def line_of(record: dict[str, Any]) -> str:
    """A record in a line; empty for those that say nothing to a person."""
    step = f"step {record['step']}"
    if record["event"] == "start":
        return f"{step} of {record['max_steps']}: training on {record['device']}"
    if record["event"] == "checkpoint":
        return f"{step}: {record['checkpoint']} written"
    if record.get("eval_accuracy") is not None:
        return f"{step}: validation accuracy {record['eval_accuracy']:.2%}"
    if record["event"] == "log" and "loss" in record:
        said = [f"loss {'not finite' if record['loss'] is None else format(record['loss'], '.4f')}"]
        if record.get("images_per_second") is not None:
            said.append(f"{record['images_per_second']:,.0f} images/s")
        if record.get("memory_gib") is not None:
            said.append(f"{record['memory_gib']:.2f} GiB")
        return f"{step}: {', '.join(said)}"
    return ""
