"""Results for readers: a table in the terminal, the README's tables, one HTML page, PNG bar charts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from fastvit.benchmarks.records import (
    Comparison,
    Record,
    Result,
    compare_providers,
    format_bytes,
    format_ms,
    format_number,
    format_rate,
    format_targets,
    list_untimed,
    load_results,
)
from fastvit.errors import InputError
from fastvit.report.charts import Axes
from fastvit.report.html import render_template

HEADER = (
    "operation", "shape", "dtype", "pass", "ours ms", "best other ms", "best other", "speed-up", "our rate",
    "of roofline", "memory", "target",
)  # fmt: skip
NUMBERS = (4, 5, 7, 8, 9, 10)  # columns that are aligned to the right
NOTE = """
memory, ours : the best other's, is the peak of a call on a GPU, and elsewhere the bytes saved for backward (last pass)
"""
PROVIDERS = (
    "shape", "dtype", "pass", "provider", "ms", "quartiles", "rate", "of roofline", "host µs", "first call s", "peak",
    "saved", "error",
)  # fmt: skip
MARKERS = (
    "<!-- benchmarks: `fastvit benchmark readme` writes what is between these two lines -->",
    "<!-- /benchmarks -->",
)
README_ROWS = 6
NO_GPU = "Not measured on a GPU yet: `fastvit benchmark` on one writes its results to `benchmarks/results`."


def format_row(comparison: Comparison) -> list[str]:
    """Returns a row under `HEADER`; without times it shows those that need the least memory."""

    def get_bytes(record: Record | None) -> float | None:
        peak = record.get("peak_bytes") if record else None
        return record.get("kept_bytes") if record and peak is None else peak

    by_memory = sorted((one for one in comparison.records if get_bytes(one) is not None), key=get_bytes)  # type: ignore[arg-type]
    ours = comparison.ours or next((one for one in by_memory if one["ours"]), None)
    rival = comparison.rival or next((one for one in by_memory if not one["ours"]), None)
    memory = [format_bytes(get_bytes(record)) for record in (ours, rival)]
    return [
        *(comparison.records[0][name] for name in HEADER[:4]),
        format_ms(ours),
        format_ms(rival),
        rival["provider"] if rival else "",
        format_number(comparison.speed_up, ".2f", "x"),
        format_rate(ours),
        format_number((ours or {}).get("of_floor"), ".0%"),
        " : ".join(memory) if memory[0] != "–" else "–",
        format_targets(comparison),
    ]


def list_rows(results: Sequence[Result], *, missed_first: bool = False) -> list[list[str]]:
    """Returns a row under `HEADER` for each shape and pass that was measured."""
    rows = [row for row in map(format_row, compare_providers(results)) if {row[4], row[5], row[10]} != {"–"}]
    return sorted(rows, key=lambda row: 0 if "missed" in row[-1] else 1 if row[-1] else 2) if missed_first else rows


def print_table(results: Sequence[Result], *, missed_first: bool = False) -> None:
    """Prints a line for each shape and pass, then the providers that were not timed and why."""
    console = Console(width=None if sys.stdout.isatty() else 1000, markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="right" if number in NUMBERS else "left")
    for row in list_rows(results, missed_first=missed_first):
        table.add_row(*row)
    console.print(table, NOTE)
    for untimed in list_untimed(results):
        console.print("not timed:", ": ".join(untimed), soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------------------
# README
# ---------------------------------------------------------------------------------------------------------------------


def update_tables(text: str, folder: Path, *, max_rows: int | None = None) -> str:
    """Returns the text of a document with tables of the results in `folder` between the two markers."""
    begin, end = (text.find(marker) for marker in MARKERS)
    if not 0 <= begin < end:
        raise InputError(f"expected a document with the lines {MARKERS[0]} and {MARKERS[1]}")
    return f"{text[: begin + len(MARKERS[0])]}\n\n{render_tables(folder, max_rows)}\n\n{text[end:]}"


def render_tables(folder: Path, max_rows: int | None = None) -> str:
    """Returns tables of the first shapes on every device, GPUs first; quick runs do not count.

    Args:
        folder: with result files.
        max_rows: show only the model on the device that was measured last, and this many of its rows.
    """
    by_device: dict[tuple[bool, str], list[Result]] = {}
    for result in load_results([folder], may_be_empty=True) if folder.is_dir() else []:
        environment = result["environment"]
        if not any(result["options"][name] for name in ("quick", "interpreted", "memory_only")):
            by_device.setdefault((environment["device_type"] != "cuda", environment["device"]), []).append(result)
    parts = [] if any(not is_cpu for is_cpu, _ in by_device) else [NO_GPU]
    devices = sorted(by_device.items())
    if max_rows is not None and devices:
        devices = [max(devices, key=lambda item: (not item[0][0], max(get_date(result) for result in item[1])))]
    for (is_cpu, device), results in devices:
        sources = {f"PyTorch {result['environment']['packages'].get('torch')}" for result in results}
        if not is_cpu:
            sources |= {f"Triton {result['environment']['packages'].get('triton')}" for result in results}
        source = ", ".join([*sorted(sources), " and ".join(sorted({get_date(result) for result in results}))])
        if max_rows is not None:
            results = [result for result in results if result["operation"] == "model"] or results
        parts.append(f"{device}, {source}:\n\n{render_table(results, max_rows)}")
    return "\n\n".join(parts)


def get_date(result: Result) -> str:
    return result["environment"]["date"][:10]


def render_table(results: Sequence[Result], max_rows: int | None = None) -> str:
    columns = ["operation", "pass", "fastvit ms", "best other ms", "speed-up", "of roofline", "target"]
    rows = [columns, ["---", "---", "---:", "---", "---:", "---:", "---"]]
    for comparison in compare_providers(results):
        record = comparison.records[0]
        is_sum = record["pass"] == "forward + backward" and not record.get("targets")  # of the two lines above
        if record["headline"] and comparison.ours and not is_sum:
            *case, name, ours, other, provider, speed_up, _, share, _, targets = format_row(comparison)
            other = f"{other} ({provider})" if comparison.rival else "–"
            rows.append([", ".join(case), name, ours, other, speed_up, share, targets])
    if max_rows is not None:  # the larger the model and the batch, the less the overhead: the last rows count
        rows = [row[:-1] for row in rows[:2] + rows[2:][-max_rows:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# HTML page
# ---------------------------------------------------------------------------------------------------------------------


def render_page(results: Sequence[Result]) -> str:
    """Returns one self-contained HTML page: tables, and a roofline plot for each run and dtype."""
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        runs.setdefault((result["environment"]["device"], result.get("source", "")), []).append(result)
    return render_template(
        "benchmarks.html",
        header=HEADER[1:],
        providers_header=PROVIDERS,
        runs=[
            {
                "device": device,
                "source": describe_source(of_run[0]),
                "rooflines": [
                    (dtype, svg)
                    for dtype in dict.fromkeys(record["dtype"] for result in of_run for record in result["records"])
                    if (svg := draw_roofline(of_run, dtype))
                ],
                "operations": [
                    {
                        "name": result["operation"],
                        "rows": [format_row(comparison)[1:] for comparison in compare_providers([result])],
                        "providers": list(map(format_provider, filter(is_measured, result["records"]))),
                    }
                    for result in of_run
                ],
                "not_timed": list_untimed(of_run),
            }
            for (device, _), of_run in runs.items()
        ],
    )


def is_measured(record: Record) -> bool:
    return record["status"] in ("timed", "measured")


def format_provider(record: Record) -> list[str]:
    """Returns a row under `PROVIDERS`."""
    ms = record.get("ms")
    return [
        *(record[name] for name in PROVIDERS[:4]),
        format_ms(record),
        f"{ms['q25']:.4g} to {ms['q75']:.4g}" if ms else "–",
        format_rate(record),
        format_number(record.get("of_floor"), ".0%"),
        format_number(record.get("host_us"), ".0f"),
        format_number(record.get("first_call_s"), ".3g"),
        format_bytes(record.get("peak_bytes")),
        format_bytes(record.get("kept_bytes")),
        format_number(record.get("error"), ".1e"),
    ]


def describe_source(result: Result) -> str:
    environment, measured = result["environment"], result.get("ceilings")
    parts = [environment["date"], f"Python {environment['python']}", environment["platform"]]
    parts += [f"{name} {version}" for name, version in environment["packages"].items() if version]
    parts += [f"{name} {environment[name]}" for name in ("driver", "commit") if environment.get(name)]
    parts += [] if environment["commit_is_all"] else ["local changes"]
    parts += [f"{name}={value}" for name, value in environment["settings"].items()]
    if measured:
        parts.append(f"copy {measured['copy_gb_per_s']:,.4g} GB/s")
        parts += [f"{name} matmul {speed:,.4g} TFLOP/s" for name, speed in measured["matmul_tflop_per_s"].items()]
    if result["options"]["quick"]:
        parts.append("a quick run: toy shapes, few samples")
    return "; ".join([*parts, result.get("source", "")])


def draw_roofline(results: Sequence[Result], dtype: str) -> Markup:
    """Draws ours and the best others under the run's ceilings, both axes logarithmic; empty without points."""
    ceilings = [result["ceilings"] for result in results if result.get("ceilings")]
    ceilings = [one for one in ceilings if dtype in one["matmul_tflop_per_s"]]
    records = [
        record
        for comparison in compare_providers(results)
        for record in (comparison.rival, comparison.ours)
        if record and record["dtype"] == dtype and record.get("bytes") and record.get("flops")
    ]
    if not records or not ceilings:
        return Markup("")
    bandwidth, matmul = ceilings[0]["copy_gb_per_s"] / 1e3, ceilings[0]["matmul_tflop_per_s"][dtype]
    ridge = matmul / bandwidth
    intensities = [record["flops"] / record["bytes"] for record in records]
    xs, ys = [ridge, *intensities], [matmul, *(record["tflop_per_s"] for record in records)]
    axes = Axes((min(xs), max(xs)), (min(ys), max(ys)), width=760, height=420, left=64, log=True)
    start = max(axes.x_range[0], axes.y_range[0] / bandwidth)  # where the slope enters the plot
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="roofline, {}">').format(
            axes.width, axes.height, dtype
        ),
        axes.draw_frame("FLOP per byte", "TFLOP/s"),
        Markup('<path class="roof" d="M{:.1f} {:.1f}L{:.1f} {:.1f}H{}"><title>{}</title></path>').format(
            axes.x(start), axes.y(start * bandwidth), axes.x(ridge), axes.y(matmul), axes.width - axes.right,
            f"copy {bandwidth * 1e3:,.4g} GB/s, matmul {matmul:,.4g} TFLOP/s",
        ),
    ]  # fmt: skip
    for record, intensity in sorted(zip(records, intensities, strict=True), key=lambda pair: pair[0]["ours"]):
        parts.append(
            Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"><title>{}</title></circle>').format(
                "ours" if record["ours"] else "other", axes.x(intensity), axes.y(record["tflop_per_s"]),
                f"{record['provider']}: {record['operation']}, {record['shape']}, {record['pass']}: "
                f"{format_rate(record)}",
            )
        )  # fmt: skip
    return Markup("").join([*parts, Markup("</svg>")])


# ---------------------------------------------------------------------------------------------------------------------
# PNG
# ---------------------------------------------------------------------------------------------------------------------


def draw_bars(result: Result, folder: Path) -> None:
    """Writes a PNG with the medians and quartiles of an operation; ImportError without matplotlib."""
    timed = [record for record in result["records"] if record.get("ms")]
    if not timed:
        return
    from matplotlib.figure import Figure

    passes = list(dict.fromkeys(record["pass"] for record in timed))
    figure = Figure(figsize=(10, len(passes) + 0.2 * len(timed)), layout="constrained")
    figure.suptitle(f"{result['operation']}, {result['environment']['device']}: median and quartiles")
    for axes, name in zip(figure.subplots(len(passes), squeeze=False)[:, 0], passes, strict=True):
        records = [record for record in timed if record["pass"] == name][::-1]
        low, median, high = ([record["ms"][key] for record in records] for key in ("q25", "median", "q75"))
        labels = [f"{record['shape']}, {record['dtype']}: {record['provider']}" for record in records]
        colors = ["C0" if record["ours"] else "C7" for record in records]
        axes.barh(labels, median, color=colors)
        axes.hlines(labels, low, high, color="black")
        axes.set_xscale("log")
        axes.set_xlabel(f"{name}, ms")
    partial = folder / f".{result['operation']}.png.part"  # renamed when it is complete, as the other files
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(folder / f"{result['operation']}.png")
