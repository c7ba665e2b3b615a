"""Plots: the roofline of a page as SVG, bars as PNG where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from fastvit.benchmarks.comparisons import comparisons
from fastvit.benchmarks.formats import rate
from fastvit.report.charts import Axes


class Point(NamedTuple):
    intensity: float  # FLOP a byte
    speed: float  # TFLOP/s
    ours: bool
    title: str


def roofline_points(results: Sequence[dict[str, Any]], dtype: str) -> list[Point]:
    """Ours and the best other, wherever the bytes that must be moved are known."""
    points = []
    for comparison in comparisons(results):
        for record in (comparison.ours, comparison.rival):
            if record is None or record["dtype"] != dtype or not record.get("bytes") or not record.get("flops"):
                continue
            title = f"{record['provider']}: {record['operation']}, {record['shape']}, {record['pass']}: {rate(record)}"
            points.append(Point(record["flops"] / record["bytes"], record["tflop_per_s"], record["ours"], title))
    return points


def roofs(result: dict[str, Any], dtype: str) -> tuple[float, float] | None:
    """(TB/s of a copy, TFLOP/s of a matrix product) as measured in the run, or None."""
    measured = result.get("ceilings") or {}
    product = (measured.get("matmul_tflop_per_s") or {}).get(dtype)
    return (measured["copy_gb_per_s"] / 1e3, product) if product else None


def draw_roofline(results: Sequence[dict[str, Any]], dtype: str) -> Markup:
    """Speed over arithmetic intensity, both logarithmic, under the two ceilings of the run; empty without points."""
    points = roofline_points(results, dtype)
    roof = next((found for found in (roofs(result, dtype) for result in results) if found), None)
    if not points or roof is None:
        return Markup("")
    bandwidth, product = roof
    intensities = [point.intensity for point in points] + [product / bandwidth]
    speeds = [point.speed for point in points] + [product]
    axes = Axes(
        (min(intensities), max(intensities)), (min(speeds), max(speeds)), width=760, height=420, left=64, log=True
    )
    ridge, lowest = product / bandwidth, axes.y_range[0]
    start = max(axes.x_range[0], lowest / bandwidth)  # where the slope enters the plot
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            axes.width, axes.height, f"roofline, {dtype}"
        ),
        axes.draw_frame("FLOP per byte that must be moved", "TFLOP/s"),
        Markup('<path class="roof" d="M{:.1f} {:.1f}L{:.1f} {:.1f}H{}"><title>{}</title></path>').format(
            axes.x(start), axes.y(start * bandwidth), axes.x(ridge), axes.y(product), axes.width - axes.right,
            f"copy {bandwidth * 1e3:,.4g} GB/s, matrix product {product:,.4g} TFLOP/s",
        ),
    ]  # fmt: skip
    for point in sorted(points, key=lambda point: point.ours):  # ours on top
        parts.append(
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>').format(
                "ours" if point.ours else "other", axes.x(point.intensity), axes.y(point.speed), point.title
            )
        )
    return Markup("").join([*parts, Markup("</svg>")])


def draw_bars(results: Sequence[dict[str, Any]], folder: Path) -> str | None:
    """A PNG of bars for each operation, where matplotlib is installed; otherwise what is missing, in a line."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no PNG plots: matplotlib is not installed"
    for result in results:
        timed = [record for record in result["records"] if record.get("ms")]
        if not timed:
            continue
        places = list(dict.fromkeys((record["shape"], record["dtype"]) for record in timed))
        names = list(dict.fromkeys(record["provider"] for record in timed))
        passes = list(dict.fromkeys(record["pass"] for record in timed))
        figure = Figure(figsize=(3 + 2 * len(places), 2.5 * len(passes)), layout="constrained")
        rows = figure.subplots(len(passes), sharex=True, squeeze=False)
        width = 0.8 / len(names)
        for (axes,), of_pass in zip(rows, passes, strict=True):
            for number, name in enumerate(names):
                bars = {
                    places.index((record["shape"], record["dtype"])): record["ms"]
                    for record in timed
                    if record["provider"] == name and record["pass"] == of_pass
                }
                centres = [position + (number - (len(names) - 1) / 2) * width for position in bars]
                medians = [taken["median"] for taken in bars.values()]
                below = [taken["median"] - taken["q25"] for taken in bars.values()]
                above = [taken["q75"] - taken["median"] for taken in bars.values()]
                axes.bar(centres, medians, width, yerr=(below, above), label=name, color=f"C{number}")
            axes.set_yscale("log")
            axes.set_ylabel(f"{of_pass}, ms")
        labels = ["\n".join((*shape.split(", "), dtype)) for shape, dtype in places]
        rows[-1][0].set_xticks(range(len(places)), labels, fontsize=7)
        title = f"{result['operation']}, {result['environment']['device']}\nmedian and quartiles, less is better"
        figure.suptitle(title, x=0.02, ha="left", fontsize=10)
        handles, legend = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, legend, loc="outside right upper", fontsize=7)
        partial = folder / f".{result['operation']}.png.part"  # whole or not at all, as with the other files
        figure.savefig(partial, dpi=120, format="png")
        partial.replace(folder / f"{result['operation']}.png")
    return None
