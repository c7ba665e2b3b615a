"""One HTML page that needs nothing but itself: tables and a roofline plot of any set of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastvit.benchmarks.comparisons import comparisons, not_timed
from fastvit.benchmarks.plots import draw_roofline
from fastvit.benchmarks.tables import EVERYBODY, HEADER, cells, everybody
from fastvit.report.html import render_template


def render_page(results: Sequence[dict[str, Any]]) -> str:
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
                "where": describe_run(of_run, source),
                "rooflines": [
                    (dtype, svg)
                    for dtype in dict.fromkeys(record["dtype"] for result in of_run for record in result["records"])
                    if (svg := draw_roofline(of_run, dtype))
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


def describe_run(results: Sequence[dict[str, Any]], source: str) -> str:
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
