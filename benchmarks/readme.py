"""The README's tables: the first shapes on every device in benchmarks/results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastvit.benchmarks.comparisons import against_targets, comparisons
from fastvit.benchmarks.formats import milliseconds, percent, times
from fastvit.benchmarks.storage import load
from fastvit.errors import InputError

MARKERS = (
    "<!-- benchmarks: `fastvit benchmark readme` writes what is between these two lines -->",
    "<!-- /benchmarks -->",
)


def with_section(text: str, section: str) -> str:
    """`text` with `section` between the two markers."""
    begin, end = (text.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise InputError(f"README.md: expected the lines {MARKERS[0]} and {MARKERS[1]}")
    return f"{text[: begin + len(MARKERS[0])]}\n\n{section}\n\n{text[end:]}"


def readme_section(folder: Path) -> str:
    """The tables of the first shapes on every device in benchmarks/results; quick runs do not count."""
    results = load([folder], may_be_empty=True) if folder.is_dir() else []
    results = [
        result
        for result in results
        if not any(result["options"][name] for name in ("quick", "interpreted", "memory_only"))
    ]
    by_device: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for result in results:
        about = result["environment"]
        by_device.setdefault((about["device_type"] != "cuda", about["device"]), []).append(result)
    parts = []
    if not any(about["device_type"] == "cuda" for about in (result["environment"] for result in results)):
        parts.append(
            "No results of a GPU have been recorded yet. `fastvit benchmark` on one writes them to\n"
            "`benchmarks/results`, and `fastvit benchmark readme` writes the tables here."
        )
    for (_, device), of_device in sorted(by_device.items()):
        parts.append(f"{device}, {summarize(of_device)}:\n\n{readme_table(of_device)}")
    return "\n\n".join(parts)


def summarize(results: Sequence[dict[str, Any]]) -> str:
    """Where the numbers come from, in a line."""
    abouts = [result["environment"] for result in results]

    def each(values: Iterable[Any]) -> str:
        return " and ".join(sorted({str(value) for value in values if value}))

    text = f"PyTorch {each(about['packages'].get('torch') for about in abouts)}"
    if triton := each(about["packages"].get("triton") for about in abouts if about["device_type"] == "cuda"):
        text += f", Triton {triton}"
    return f"{text}, {each(about['date'][:10] for about in abouts)}"


def readme_table(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        ["operation", "pass", "fastvit ms", "best other ms", "speed-up", "of floor", "target"],
        ["---", "---", "---:", "---", "---:", "---:", "---"],
    ]
    for comparison in comparisons(results):
        record = comparison.record
        if not record["headline"] or comparison.ours is None:
            continue
        if record["pass"] == "forward + backward" and not record.get("targets"):
            continue  # the two halves say it
        rival = f"{milliseconds(comparison.rival)} ({comparison.rival['provider']})" if comparison.rival else "–"
        rows.append([
            f"{record['operation']}, {record['shape']}, {record['dtype']}",
            record["pass"],
            milliseconds(comparison.ours),
            rival,
            times(comparison.speed_up),
            percent(comparison.ours.get("of_floor")),
            against_targets(comparison),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
