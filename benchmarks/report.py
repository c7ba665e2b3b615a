"""From the files of results to what a person reads: tables, CSV, plots, one page, what became slower, the README.

A file of results is JSON: `environment` and `ceilings` of the run, and `records`, one for each shape, dtype, pass and
provider, with its `status`:

    timed, measured   it was right, and was timed, or only its memory measured
    wrong             its results were further off than PyTorch's may be: not timed
    failed            it raised an error, the `reason`
    missing           it is not installed, or not for this device
    left out          it would have taken too long
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from fastvit.errors import InputError
from fastvit.files import write_text
from fastvit.report.charts import Axes
from fastvit.report.html import render_template

SCHEMA = 1
MARKERS = (
    "<!-- benchmarks: `fastvit benchmark readme` writes what is between these two lines -->",
    "<!-- /benchmarks -->",
)
COLUMNS = ("operation", "shape", "dtype", "pass", "provider", "status", "reason")
NUMBERS = (
    "host_us", "gb_per_s", "tflop_per_s", "images_per_s", "floor_ms", "of_floor", "first_call_s", "peak_bytes",
    "kept_bytes", "error",
)  # fmt: skip
QUANTILES = ("min", "p05", "q25", "median", "q75", "p95", "max", "samples")

# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write(result: dict[str, Any], folder: Path) -> None:
    name = result["operation"] + ("-memory" if result["options"]["memory_only"] else "")
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / f"{name}.csv", as_csv([result]))


def load(paths: Iterable[Path], *, may_be_empty: bool = False) -> list[dict[str, Any]]:
    """Results of all files given, and of all in the folders given; `source` says where each was.

    A file holds the results of one operation, or a list of them.
    """
    results = []
    for path in paths:
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        found = 0
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise InputError(f"{file}: cannot be read as results ({error})") from None
            for result in content if isinstance(content, list) else [content]:
                if not isinstance(result, dict) or "records" not in result or "environment" not in result:
                    if file is path:
                        raise InputError(f"{file}: expected results of `fastvit benchmark`, got other JSON")
                    continue  # other reports lie beside results
                if result.get("schema") != SCHEMA:
                    raise InputError(f"{file}: expected results of schema {SCHEMA}, got {result.get('schema')}")
                results.append(result | {"source": str(file.parent)})
                found += 1
        if not found and not may_be_empty:
            raise InputError(f"{path}: expected a folder with results of `fastvit benchmark`, found none")
    return results


def as_csv(results: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["device", "date", "commit", *COLUMNS, *(f"ms_{name}" for name in QUANTILES), *NUMBERS])
    for result in results:
        about = [result["environment"].get(name) for name in ("device", "date", "commit")]
        for record in result["records"]:
            times = record.get("ms") or {}
            writer.writerow(
                about
                + [record.get(name) for name in COLUMNS]
                + [times.get(name) for name in QUANTILES]
                + [record.get(name) for name in NUMBERS]
            )
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Ours beside the best of the others
# ---------------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """One shape, dtype and pass: the fastest of ours and of the rivals that were timed, and everybody."""

    result: dict[str, Any]
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
    groups: dict[tuple, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for index, result in enumerate(results):
        for record in result["records"]:
            key = (index, record["operation"], record["shape"], record["dtype"], record["pass"])
            groups.setdefault(key, (result, []))[1].append(record)
    found = []
    for result, records in groups.values():
        timed = sorted((record for record in records if record.get("ms")), key=lambda record: record["ms"]["median"])
        ours = next((record for record in timed if record["ours"]), None)
        rival = next((record for record in timed if not record["ours"]), None)
        found.append(Comparison(result, records[0], ours, rival, records))
    return found


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


HEADER = (
    "operation",
    "shape",
    "dtype",
    "pass",
    "ours ms",
    "best other ms",
    "",
    "ours is",
    "our rate",
    "of floor",
    "memory",
    "target",
)


def cells(comparison: Comparison) -> list[str]:
    record, ours, rival = comparison.record, comparison.ours, comparison.rival
    least = sorted((one for one in comparison.everybody if memory(one) != "–"), key=lambda one: bytes_of(one) or 0)
    ours = ours or next((one for one in least if one["ours"]), None)
    rival = rival or next((one for one in least if not one["ours"]), None)
    needs = " : ".join((memory(ours), memory(rival))) if memory(ours) != "–" else "–"
    return [
        record["operation"],
        record["shape"],
        record["dtype"],
        record["pass"],
        milliseconds(ours),
        milliseconds(rival),
        rival["provider"] if rival else "",
        times(comparison.speed_up),
        rate(ours),
        percent(ours.get("of_floor") if ours else None),
        needs,
        against_targets(comparison),
    ]


def table(results: Sequence[dict[str, Any]]) -> str:
    """For a terminal: a line for each shape and pass, then everybody who was not timed and why."""
    rows = [list(HEADER)] + [row for row in map(cells, comparisons(results)) if {row[4], row[5], row[10]} != {"–"}]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    right = {4, 5, 7, 8, 9, 10}
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.append("\n'ours is': times as fast as the best other. Memory, ours : the best other's, is the peak on a GPU;")
    lines.append("elsewhere the bytes kept for backward, in the line of the last pass.")
    if reasons := not_timed(results):
        lines.append("\nnot timed:")
        lines += [f"  {what}: {status}: {reason}" for what, status, reason in reasons]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What became slower
# ---------------------------------------------------------------------------------------------------------------------


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], threshold: float) -> tuple[str, bool]:
    """What changed, as text, and whether something of ours became worse by more than `threshold`.

    Slower means that the median grew by more than the threshold and that the middle halves of the samples do not
    overlap. What was timed before and is wrong, fails or is gone now is worse too. Others' changes tell of the machine.
    """

    def by_key(results: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, Any]]:
        found: dict[tuple[str, ...], dict[str, Any]] = {}
        for result in results:
            for record in result["records"]:
                key = tuple(record[name] for name in ("operation", "shape", "dtype", "pass", "registered"))
                if key not in found or record["status"] != "measured":  # times count more than memory alone
                    found[key] = record
        return found

    old, new = by_key(before), by_key(after)
    measured = [key for key, record in old.items() if record["status"] in ("timed", "measured")]
    if not any(key in new and old[key]["ours"] for key in measured):
        raise InputError("nothing of ours that was measured in the first is in the second: they have no case in common")
    worse, better, gone = [], [], []
    drift = []
    for key in measured:
        was, now = old[key], new.get(key)
        name = " | ".join((*key[:-1], was["provider"]))
        if now is None or now["status"] == "left out":
            if was["ours"]:
                gone.append(f"  {name}")
            continue
        if now["provider"] != was["provider"]:  # the kernel and its plain PyTorch have the same place in the list
            name += f" -> {now['provider']}"
        if now["status"] not in ("timed", "measured"):
            if was["ours"]:
                worse.append(f"  {name}: {now['status']} ({now['reason']})")
            continue
        if was.get("ms") and now.get("ms"):
            ratio = now["ms"]["median"] / was["ms"]["median"]
            if not was["ours"]:
                drift.append(ratio)
                continue
            line = f"  {name}: {milliseconds(was)} -> {milliseconds(now)} ms ({ratio - 1:+.1%})"
            if ratio > 1 + threshold and now["ms"]["q25"] > was["ms"]["q75"]:
                worse.append(line)
            elif ratio < 1 / (1 + threshold) and now["ms"]["q75"] < was["ms"]["q25"]:
                better.append(line)
        if was["ours"]:
            for kind in ("peak_bytes", "kept_bytes"):
                if was.get(kind) and now.get(kind) is not None and now[kind] > (1 + threshold) * was[kind]:
                    worse.append(f"  {name}: {kind.replace('_', ' ')} {size(was[kind])} -> {size(now[kind])}")
    lines = []
    devices = [sorted({result["environment"]["device"] for result in results}) for results in (before, after)]
    if devices[0] != devices[1]:
        lines.append(f"note: other devices ({', '.join(devices[0])}; {', '.join(devices[1])})")
    if drift:
        lines.append(
            f"others, whose code is the same, take {statistics.median(drift):.3f}x the time: that is the machine"
        )
    for title, found in (("worse", worse), ("better", better), ("not measured again", gone)):
        lines += [f"{title}:", *found] if found else []
    compared = sum(old[key]["ours"] for key in measured) - len(gone)
    lines.append(f"{len(worse)} worse, {len(better)} better of {compared} compared, beyond {threshold:.0%} and noise")
    return "\n".join(lines), bool(worse)


# ---------------------------------------------------------------------------------------------------------------------
# The README
# ---------------------------------------------------------------------------------------------------------------------


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
        parts.append(f"{device}, {summary(of_device)}:\n\n{readme_table(of_device)}")
    return "\n\n".join(parts)


def summary(results: Sequence[dict[str, Any]]) -> str:
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


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


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


def roofline_svg(results: Sequence[dict[str, Any]], dtype: str) -> Markup:
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
        axes.frame("FLOP per byte that must be moved", "TFLOP/s"),
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


def draw(results: Sequence[dict[str, Any]], folder: Path) -> str | None:
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


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def page(results: Sequence[dict[str, Any]]) -> str:
    """One HTML page that needs nothing but itself."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        runs.setdefault((result["environment"]["device"], result.get("source", "")), []).append(result)
    return render_template(
        "benchmarks.html",
        header=HEADER[1:],
        everybody_header=EVERYBODY,
        runs=[
            {
                "device": device,
                "where": where(of_run, source),
                "rooflines": [
                    (dtype, svg)
                    for dtype in dict.fromkeys(record["dtype"] for result in of_run for record in result["records"])
                    if (svg := roofline_svg(of_run, dtype))
                ],
                "operations": [
                    {
                        "name": result["operation"],
                        "rows": [cells(comparison)[1:] for comparison in comparisons([result])],
                        "everybody": everybody(result),
                    }
                    for result in of_run
                ],
                "not_timed": not_timed(of_run),
            }
            for (device, source), of_run in runs.items()
        ],
    )


def where(results: Sequence[dict[str, Any]], source: str) -> str:
    about = results[0]["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    text = [about["date"], packages, f"Python {about['python']}", about["platform"]]
    if about.get("driver"):
        text.append(f"driver {about['driver']}")
    text.append(
        f"commit {about['commit']}{'' if about['commit_is_all'] else ' and changes'}" if about["commit"] else ""
    )
    text += [f"{name}={value}" for name, value in about["settings"].items()]
    if measured := results[0].get("ceilings"):
        products = ", ".join(f"{name} {value:,.4g}" for name, value in measured["matmul_tflop_per_s"].items())
        text.append(f"copy {measured['copy_gb_per_s']:,.4g} GB/s; matrix product TFLOP/s: {products}")
    if results[0]["options"]["quick"]:
        text.append("a quick run: toy shapes, few samples")
    return "; ".join(filter(None, [*text, source]))


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
            record["shape"],
            record["dtype"],
            record["pass"],
            record["provider"],
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
