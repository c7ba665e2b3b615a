"""Tables: ours beside the best other, for a terminal and a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvit.benchmarks.comparisons import Comparison, against_targets, comparisons, not_timed
from fastvit.benchmarks.formats import bytes_of, memory, milliseconds, percent, rate, size, spread, times

HEADER = (
    "operation", "shape", "dtype", "pass", "ours ms", "best other ms", "", "ours is", "our rate", "of floor", "memory",
    "target",
)  # fmt: skip
RIGHT = (4, 5, 7, 8, 9, 10)  # columns of numbers
NOTE = """
'ours is': times as fast as the best other. Memory, ours : the best other's, is the peak on a GPU;
elsewhere the bytes kept for backward, in the line of the last pass."""


def cells(comparison: Comparison) -> list[str]:
    """A row under `HEADER`; who was not timed is shown with its memory."""
    record, ours, rival = comparison.record, comparison.ours, comparison.rival
    least = sorted((one for one in comparison.everybody if memory(one) != "–"), key=lambda one: bytes_of(one) or 0)
    ours = ours or next((one for one in least if one["ours"]), None)
    rival = rival or next((one for one in least if not one["ours"]), None)
    return [
        *(record[name] for name in HEADER[:4]),
        milliseconds(ours),
        milliseconds(rival),
        rival["provider"] if rival else "",
        times(comparison.speed_up),
        rate(ours),
        percent(ours.get("of_floor") if ours else None),
        f"{memory(ours)} : {memory(rival)}" if memory(ours) != "–" else "–",
        against_targets(comparison),
    ]


def render_table(results: Sequence[dict[str, Any]]) -> str:
    """For a terminal: a line for each shape and pass, then everybody who was not timed and why."""
    rows = [list(HEADER)] + [row for row in map(cells, comparisons(results)) if {row[4], row[5], row[10]} != {"–"}]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [
            f"{cell:{'><'[n not in RIGHT]}{width}}" for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.append(NOTE)
    if reasons := not_timed(results):
        lines += ["\nnot timed:", *("  " + ": ".join(reason) for reason in reasons)]
    return "\n".join(lines)


EVERYBODY = (
    "shape", "dtype", "pass", "provider", "ms", "quartiles", "rate", "of floor", "host µs", "first call s", "peak",
    "kept", "error",
)  # fmt: skip


def everybody(result: dict[str, Any]) -> list[list[str]]:
    """A row for each provider that was timed or measured, under `EVERYBODY`."""
    rows = []
    for record in result["records"]:
        if record["status"] not in ("timed", "measured"):
            continue
        host, first, error = (record.get(name) for name in ("host_us", "first_call_s", "error"))
        rows.append([
            *(record[name] for name in EVERYBODY[:4]),
            milliseconds(record),
            spread(record) if record.get("ms") else "–",
            rate(record),
            percent(record.get("of_floor")),
            "–" if host is None else f"{host:.0f}",
            "–" if first is None else f"{first:.3g}",
            size(record.get("peak_bytes")),
            size(record.get("kept_bytes")),
            "–" if error is None else f"{error:.1e}",
        ])  # fmt: skip
    return rows
