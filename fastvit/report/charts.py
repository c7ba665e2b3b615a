"""Line charts and axes as inline SVG, for self-contained HTML pages.

The style sheet (`templates/base.html`) sets colours, line widths and fonts, so that charts follow light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

MAX_DOTS = 2000  # in a scatter chart
MAX_POINTS = 400  # per line; longer series are downsampled by averaging neighbours

Points = Sequence[tuple[float, float]]


class Series(NamedTuple):
    """One line of a chart.

    Attributes:
        name: shown in the legend.
        points: (x, y), sorted by x.
        kind: the CSS class, `"first"` or `"second"`.
        dots: draw a dot at each point.
    """

    name: str
    points: Points
    kind: str = "first"
    dots: bool = False


class Axes:
    """Maps values to coordinates of a drawing and draws the grid.

    Args:
        x: (lowest, highest) value on the x axis. The range is extended to the next tick, or power of ten for `log`.
        y: the same for the y axis.
        width: of the drawing, in SVG units; so are `height`, `left` and `bottom`.
        height: of the drawing.
        left: margin for the labels of the y axis.
        bottom: margin for the labels of the x axis.
        log: logarithmic axes.
        round_x: extend the x axis to the next tick.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        width: int,
        height: int,
        left: int = 52,
        bottom: int = 44,
        log: bool = False,
        round_x: bool = True,
    ):
        self.width, self.height, self.left, self.bottom, self.right, self.top = width, height, left, bottom, 20, 20
        self.log = log
        self.x_ticks = list_powers_of_ten(*x) if log else compute_ticks(*x)
        self.y_ticks = list_powers_of_ten(*y) if log else compute_ticks(*y)
        self.x_range = (self.x_ticks[0], self.x_ticks[-1]) if round_x else x
        self.y_range = (self.y_ticks[0], self.y_ticks[-1])

    def _to_fraction(self, value: float, bounds: tuple[float, float]) -> float:
        low, high = bounds
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return (value - low) / (high - low)

    def x(self, value: float) -> float:
        return self.left + self._to_fraction(value, self.x_range) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return (
            self.height - self.bottom - self._to_fraction(value, self.y_range) * (self.height - self.top - self.bottom)
        )

    def draw_frame(self, x_label: str, y_label: str, format_y: Callable[[float], str] = "{:g}".format) -> Markup:
        """Draw grid lines, tick labels and axis labels."""
        floor = self.height - self.bottom
        parts = []
        for tick in self.x_ticks:
            if not self.x_range[0] <= tick <= self.x_range[1]:
                continue
            at = self.x(tick)
            if self.log:
                parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(at, self.top, floor))
            parts.append(
                Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                    at, floor + 17, format_thousands(tick)
                )
            )
        for tick in self.y_ticks:
            at = self.y(tick)
            parts.append(
                Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(self.left, at, self.width - self.right)
            )
            parts.append(
                Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                    self.left - 7, at + 4, format_y(tick)
                )
            )
        parts.append(
            Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                (self.left + self.width - self.right) / 2, self.height - 6, x_label
            )
        )
        parts.append(
            Markup(
                '<text class="axis" transform="translate(12 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>'
            ).format((self.top + floor) / 2, y_label)
        )
        return Markup("").join(parts)


def draw_line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str = "",
    from_zero: bool = True,
    format_y: Callable[[float], str] = "{:g}".format,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Draw a line chart, with a description in words for screen readers.

    Args:
        title: for the description; it is not drawn.
        series: the lines. Those without points are left out.
        x_label: label of the x axis.
        y_label: label of the y axis.
        from_zero: start the y axis at 0.
        format_y: formats a value of the y axis.
        mark: (x, label) of a vertical line.

    Returns:
        An `<svg>` element, or an empty string if no series has a point.
    """
    series = [one for one in series if one.points]
    if not series:
        return Markup("")
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    lowest, highest = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
    axes = Axes((min(0.0, *xs), max(xs)), (lowest, highest), width=360, height=236, round_x=False)
    description = "; ".join(describe_series(one, x_label, format_y) for one in series)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            axes.width, axes.height, f"{title}. {description}."
        ),
        axes.draw_frame(x_label, y_label, format_y),
    ]
    if mark is not None:
        at = axes.x(mark[0])
        anchor, shift = ("end", 4) if at > axes.width / 2 else ("start", -4)
        parts.append(
            Markup(
                '<path class="mark" d="M{0:.1f} {1}V{2}"/><text x="{3:.1f}" y="{4}" text-anchor="{5}">{6}</text>'
            ).format(at, axes.top, axes.height - axes.bottom, at + shift, axes.top - 6, anchor, mark[1])
        )
    for one in series:
        places = [(axes.x(x), axes.y(y)) for x, y in downsample(one.points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(Markup('<path class="line {}" d="{}"/>').format(one.kind, path))
        if one.dots or len(places) == 1:
            parts += [
                Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(one.kind, *p) for p in places
            ]
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def draw_scatter_chart(title: str, points: Points) -> Markup:
    """Draw predicted over true numbers, with the diagonal on which they are equal; of many points some, evenly spaced.

    Args:
        title: for the description; it is not drawn.
        points: (true, predicted), at least one.
    """
    both = [value for point in points for value in point]
    bounds = min(both), max(both)
    axes = Axes(bounds, bounds, width=360, height=330)
    count, step = len(points), -(-len(points) // MAX_DOTS)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            axes.width, axes.height, f"{title}: predicted over true values of {count:,} images."
        ),
        axes.draw_frame("true", "predicted", format_thousands),
        Markup('<path class="mark" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(
            *(place for end in axes.x_range for place in (axes.x(end), axes.y(end)))
        ),
    ]
    for true, predicted in points[::step]:
        parts.append(
            Markup('<circle class="dot first" cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(
                axes.x(true), axes.y(predicted)
            )
        )
    return Markup("").join([*parts, Markup("</svg>")])


def describe_series(series: Series, x_label: str, format_y: Callable[[float], str]) -> str:
    """Describe a line in words: its first and last point and its extremes."""
    (first_x, first), (last_x, last) = series.points[0], series.points[-1]
    if len(series.points) == 1:
        return f"{series.name}: {format_y(first)} at {x_label} {first_x:g}"
    low_x, low = min(series.points, key=lambda point: point[1])
    high_x, high = max(series.points, key=lambda point: point[1])
    return (
        f"{series.name}: from {format_y(first)} at {x_label} {first_x:g} to {format_y(last)} at {x_label} {last_x:g},"
        f" lowest {format_y(low)} at {low_x:g}, highest {format_y(high)} at {high_x:g}"
    )


def downsample(points: Points, count: int = MAX_POINTS) -> Points:
    """Reduce a series to at most `count` points by averaging neighbours."""
    if len(points) <= count:
        return points
    edges = [round(index * len(points) / count) for index in range(count + 1)]
    groups = [points[start:end] for start, end in pairwise(edges)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def compute_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` + 1 evenly spaced round numbers that cover the range from `low` to `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def list_powers_of_ten(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high * 1.01)) + 1)]


def format_thousands(value: float) -> str:
    """Format 1500 as 1,500 and 20000 as 20k; small numbers are unchanged."""
    if abs(value) >= 10_000 and value % 100 == 0:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
