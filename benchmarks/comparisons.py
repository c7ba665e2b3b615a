"""Ours beside the best of the others, and beside what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastvit.benchmarks.formats import percent


class Comparison(NamedTuple):
    """One shape, dtype and pass: the fastest of ours and of the rivals that were timed, and everybody."""

    record: dict[str, Any]  # any of them, for what they share
    ours: dict[str, Any] | None
    rival: dict[str, Any] | None
    everybody: list[dict[str, Any]]

    @property
    def speed_up(self) -> float | None:
        if self.ours is None or self.rival is None:
            return None
        return self.rival["ms"]["median"] / self.ours["ms"]["median"]


def comparisons(results: Sequence[dict[str, Any]]) -> list[Comparison]:
    """A comparison for each result, shape, dtype and pass, in the order of the records."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for index, result in enumerate(results):
        for record in result["records"]:
            key = (index, record["operation"], record["shape"], record["dtype"], record["pass"])
            groups.setdefault(key, []).append(record)
    found = []
    for records in groups.values():
        timed = sorted((record for record in records if record.get("ms")), key=lambda record: record["ms"]["median"])
        ours = next((record for record in timed if record["ours"]), None)
        rival = next((record for record in timed if not record["ours"]), None)
        found.append(Comparison(records[0], ours, rival, records))
    return found


def against_targets(comparison: Comparison) -> str:
    """What was wanted and whether it was reached: "1.3x met, 65 % missed"; empty where nothing was asked."""
    found = []
    ours, rival, everybody = comparison.ours, comparison.rival, comparison.everybody
    for kind, wanted in (comparison.record.get("targets") or {}).items():
        reached: float | None
        if kind == "speed_up":
            text, reached = f"{wanted:g}x", comparison.speed_up
        elif kind == "of_floor":
            text, reached = f"{percent(wanted)} of floor", ours.get("of_floor") if ours else None
        elif kind == "images_per_s":
            text, reached = f"{wanted:,g} images/s", ours.get("images_per_s") if ours else None
        elif kind.startswith("over "):
            name = kind.removeprefix("over ")
            theirs = next((one["ms"]["median"] for one in everybody if one["provider"] == name and one.get("ms")), None)
            text, reached = f"{wanted:g}x {name}", theirs / ours["ms"]["median"] if theirs and ours else None
        else:
            peaks = [one.get("peak_bytes") if one else None for one in (ours, rival)]
            text, reached = f"{wanted:g}x the memory", peaks[0] / peaks[1] if peaks[0] and peaks[1] else None
        met = reached is not None and (reached <= wanted if kind == "memory" else reached >= wanted)
        found.append(f"{text}: {'not measured' if reached is None else 'met' if met else 'missed'}")
    return ", ".join(found)


def not_timed(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(what, status, reason), each once, wrong and failed ones first with all they were wrong in."""
    seen: dict[tuple[str, str, str], None] = {}
    for result in results:
        for record in result["records"]:
            if record["status"] in ("wrong", "failed"):
                what = f"{record['provider']}, {record['operation']} {record['shape']} {record['dtype']}"
                seen[what, record["status"], record["reason"]] = None
        for case in result.get("failed_cases", []):
            seen[case["case"], "failed", case["reason"]] = None
    for result in results:
        for record in result["records"]:
            if record["status"] in ("missing", "left out"):
                seen[record["provider"], record["status"], record["reason"]] = None
        for name in result.get("not_begun", []):
            seen[name, "left out", "the time budget was spent before its turn"] = None
    return list(seen)
