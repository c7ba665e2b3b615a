"""Numbers of a record as a person reads them; – where there is none."""

from __future__ import annotations

from typing import Any


def milliseconds(record: dict[str, Any] | None) -> str:
    if record is None or not record.get("ms"):
        return "–"
    value = record["ms"]["median"]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def spread(record: dict[str, Any]) -> str:
    return f"{record['ms']['q25']:.4g} to {record['ms']['q75']:.4g}"


def times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}x"


def rate(record: dict[str, Any] | None) -> str:
    """Pictures a second for models; bytes where they decide the floor, arithmetic where that does."""
    if record is None or not record.get("ms"):
        return "–"
    if record.get("images_per_s"):
        return f"{record['images_per_s']:,.4g} images/s"
    if not record.get("gb_per_s"):
        return "–"
    return f"{record['gb_per_s']:,.4g} GB/s, {record['tflop_per_s']:.3g} TFLOP/s"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def size(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def bytes_of(record: dict[str, Any]) -> float | None:
    """The allocator's peak on a GPU; elsewhere what is kept for backward."""
    return record["peak_bytes"] if record.get("peak_bytes") is not None else record.get("kept_bytes")


def memory(record: dict[str, Any] | None) -> str:
    return "–" if record is None else size(bytes_of(record))
