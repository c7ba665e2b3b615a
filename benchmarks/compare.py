"""What became slower between two sets of results."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from fastvit.benchmarks.formats import milliseconds, size
from fastvit.errors import InputError

MEASURED = ("timed", "measured")

Record = dict[str, Any]


def compare(before: Sequence[Record], after: Sequence[Record], threshold: float) -> tuple[str, bool]:
    """What changed, as text, and whether something of ours became worse by more than `threshold`.

    Slower means that the median grew by more than the threshold and that the middle halves of the samples do not
    overlap. What was timed before and is wrong, fails or is gone now is worse too. Others' changes tell of the machine.
    """
    old, new = index_records(before), index_records(after)
    measured = [key for key, record in old.items() if record["status"] in MEASURED]
    if not any(key in new and old[key]["ours"] for key in measured):
        raise InputError("nothing of ours that was measured in the first is in the second: they have no case in common")
    changes: dict[str, list[str]] = {"worse": [], "better": [], "not measured again": []}
    drift = []
    for key in measured:
        was, now = old[key], new.get(key, {"status": "left out"})
        if was["ours"]:
            for kind, line in find_changes(was, now, threshold):
                changes[kind].append(f"  {' | '.join((*key[:-1], was['provider']))}{line}")
        elif now["status"] in MEASURED and was.get("ms") and now.get("ms"):
            drift.append(now["ms"]["median"] / was["ms"]["median"])
    lines = []
    devices = [sorted({result["environment"]["device"] for result in results}) for results in (before, after)]
    if devices[0] != devices[1]:
        lines.append(f"note: other devices ({', '.join(devices[0])}; {', '.join(devices[1])})")
    if drift:
        median = statistics.median(drift)
        lines.append(f"others, whose code is the same, take {median:.3f}x the time: that is the machine")
    for title, found in changes.items():
        lines += [f"{title}:", *found] if found else []
    worse, better, gone = map(len, changes.values())
    compared = sum(old[key]["ours"] for key in measured) - gone
    lines.append(f"{worse} worse, {better} better of {compared} compared, beyond {threshold:.0%} and noise")
    return "\n".join(lines), bool(worse)


def index_records(results: Sequence[Record]) -> dict[tuple[str, ...], Record]:
    """Records by what they are of; times count more than memory alone."""
    found: dict[tuple[str, ...], Record] = {}
    for result in results:
        for record in result["records"]:
            key = tuple(record[name] for name in ("operation", "shape", "dtype", "pass", "registered"))
            if key not in found or record["status"] != "measured":
                found[key] = record
    return found


def find_changes(was: Record, now: Record, threshold: float) -> Iterator[tuple[str, str]]:
    """(worse, better or not measured again; what is said after the name) of one of ours."""
    if now["status"] == "left out":
        yield "not measured again", ""
        return
    # The kernel and its plain PyTorch have the same place in the list.
    name = "" if now["provider"] == was["provider"] else f" -> {now['provider']}"
    if now["status"] not in MEASURED:
        yield "worse", f"{name}: {now['status']} ({now['reason']})"
        return
    if was.get("ms") and now.get("ms"):
        ratio = now["ms"]["median"] / was["ms"]["median"]
        line = f"{name}: {milliseconds(was)} -> {milliseconds(now)} ms ({ratio - 1:+.1%})"
        if ratio > 1 + threshold and now["ms"]["q25"] > was["ms"]["q75"]:
            yield "worse", line
        elif ratio < 1 / (1 + threshold) and now["ms"]["q75"] < was["ms"]["q25"]:
            yield "better", line
    for kind in ("peak_bytes", "kept_bytes"):
        if was.get(kind) and now.get(kind) is not None and now[kind] > (1 + threshold) * was[kind]:
            yield "worse", f"{name}: {kind.replace('_', ' ')} {size(was[kind])} -> {size(now[kind])}"
