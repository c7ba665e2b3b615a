"""Regressions between two sets of results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from fastvit.benchmarks.records import Record, Result, format_bytes, format_ms
from fastvit.benchmarks.report import is_measured
from fastvit.errors import InputError


def compare_results(before: Sequence[Result], after: Sequence[Result], threshold: float) -> tuple[str, bool]:
    """Compares ours in two sets of results.

    Slower means that the median grew by more than the threshold and that the interquartile ranges do not overlap.
    Whatever was timed before and is wrong or fails now is worse too. Changes of the others show how much is due to the
    machine.

    Returns:
        The changes as text, and whether something became worse.

    Raises:
        InputError: if nothing of ours is in both.
    """
    old, new = index_records(before), index_records(after)
    measured = [key for key, record in old.items() if is_measured(record)]
    if not any(key in new and old[key]["ours"] for key in measured):
        raise InputError("the two sets have no case in common: nothing of ours in the first is in the second")
    changes: dict[str, list[str]] = {"worse": [], "better": [], "not measured again": []}
    drift = []
    for key in measured:
        was, now = old[key], new.get(key, {"status": "left out"})
        if was["ours"]:
            for kind, line in find_changes(was, now, threshold):
                changes[kind].append(f"  {' | '.join((*key[:-1], was['provider']))}{line}")
        elif is_measured(now) and was.get("ms") and now.get("ms"):
            drift.append(now["ms"]["median"] / was["ms"]["median"])
    lines = []
    devices = [{result["environment"]["device"] for result in results} for results in (before, after)]
    if devices[0] != devices[1]:
        lines.append(f"note: different devices ({'; '.join(', '.join(sorted(names)) for names in devices)})")
    if drift:
        lines.append(f"others, whose code did not change: {statistics.median(drift):.3f}x the time (the machine)")
    for title, found in changes.items():
        lines += [f"{title}:", *found] if found else []
    worse, better, gone = map(len, changes.values())
    compared = sum(old[key]["ours"] for key in measured) - gone
    lines.append(f"{worse} worse, {better} better of {compared} compared, beyond {threshold:.0%} and noise")
    return "\n".join(lines), bool(worse)


def index_records(results: Sequence[Result]) -> dict[tuple[str, ...], Record]:
    """Returns records by case and provider; times win over memory alone."""
    found: dict[tuple[str, ...], Record] = {}
    for result in results:
        for record in result["records"]:
            key = tuple(record[name] for name in ("operation", "shape", "dtype", "pass", "registered"))
            if key not in found or record["status"] != "measured":
                found[key] = record
    return found


def find_changes(was: Record, now: Record, threshold: float) -> Iterator[tuple[str, str]]:
    """Yields (worse, better or not measured again; the rest of the line after the name)."""
    if now["status"] == "left out":
        yield "not measured again", ""
        return
    # A kernel and the plain PyTorch that replaces it are registered under one name.
    name = "" if now["provider"] == was["provider"] else f" -> {now['provider']}"
    if not is_measured(now):
        yield "worse", f"{name}: {now['status']} ({now['reason']})"
        return
    if was.get("ms") and now.get("ms"):
        ratio = now["ms"]["median"] / was["ms"]["median"]
        line = f"{name}: {format_ms(was)} -> {format_ms(now)} ms ({ratio - 1:+.1%})"
        if ratio > 1 + threshold and now["ms"]["q25"] > was["ms"]["q75"]:
            yield "worse", line
        elif ratio < 1 / (1 + threshold) and now["ms"]["q75"] < was["ms"]["q25"]:
            yield "better", line
    for kind, text in (("peak_bytes", "peak memory"), ("kept_bytes", "saved for backward")):
        if was.get(kind) and now.get(kind) is not None and now[kind] > (1 + threshold) * was[kind]:
            yield "worse", f"{name}: {text} {format_bytes(was[kind])} -> {format_bytes(now[kind])}"
