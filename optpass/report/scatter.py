"""Geometry of plots of one figure against another, such as quality against cost: series of points, joined by lines.

As in :mod:`~optpass.report.charts`, places along x are percent of the width, so that a plot fits a phone and a desk
with one size of type; heights are pixels. ``scatter.jinja`` draws it, in the report and as a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optpass.report.reading import items, mappings, text
from optpass.report.units import figures, number

HEIGHT, TOP, LEFT, RIGHT = 240, 28, 9.0, 97.0
"""Pixels of the plane and above it; percent of the width at its left and right border."""
KINDS = 6
"""Forms that series have in turn: colour, dashes and filling."""
TICKS = 4


@dataclass(frozen=True)
class Point:
    """A mark at ``x`` percent and ``y`` pixels; ``label`` says what it is and its figures."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Series:
    """Points that belong together, in order; ``kind`` counts from 0."""

    name: str
    kind: int
    points: tuple[Point, ...]

    @property
    def lines(self) -> list[tuple[Point, Point]]:
        """From each point to the next."""
        return list(zip(self.points, self.points[1:], strict=False))


@dataclass(frozen=True)
class Tick:
    """A place on an axis, percent or pixels, and the figure there."""

    place: float
    label: str


@dataclass(frozen=True)
class Plot:
    """A titled plot; ``description`` says in words what the points show."""

    key: str
    title: str
    description: str
    x: str
    y: str
    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def bottom(self) -> int:
        """Pixels down to the lower border of the plane."""
        return TOP + HEIGHT

    @property
    def height(self) -> int:
        """Pixels: the plane, what is written under it, and a line for each series."""
        return self.bottom + 44 + 20 * len(self.series)


def plots(report: Mapping[str, Any]) -> tuple[Plot, ...]:
    """Those under ``plots``: mappings with ``title``, ``x``, ``y`` and ``series``.

    A series has a ``name`` and ``points``, each [x, y] or [x, y, label].
    """
    made = (plot_of(f"plot-{index}", record) for index, record in enumerate(mappings(report, "plots")))
    return tuple(plot for plot in made if plot is not None)


def plot_of(key: str, record: Mapping[str, Any]) -> Plot | None:
    """The plot that ``record`` describes; ``None`` where no point has two finite figures."""
    named = [(text(item, "name"), _points(item)) for item in mappings(record, "series")]
    every = [point for _, found in named for point in found]
    if not every:
        return None
    across, up = _Axis([x for x, _, _ in every]), _Axis([y for _, y, _ in every])

    def place(x: float, y: float, label: str) -> Point:
        shown = f"{label}: {figures(x, 3)}, {figures(y, 3)}" if label else f"{figures(x, 3)}, {figures(y, 3)}"
        return Point(LEFT + (RIGHT - LEFT) * across.share(x), TOP + HEIGHT * (1 - up.share(y)), shown)

    filled = [(name, [place(*point) for point in found]) for name, found in named if found]
    series = [Series(name, index % KINDS, tuple(found)) for index, (name, found) in enumerate(filled)]
    told = "; ".join(f"{each.name}: {', '.join(point.label for point in each.points)}" for each in series)
    return Plot(
        key,
        text(record, "title"),
        f"{text(record, 'y')} against {text(record, 'x')}. {told}.",
        text(record, "x"),
        text(record, "y"),
        tuple(series),
        tuple(Tick(LEFT + (RIGHT - LEFT) * across.share(value), figures(value, 3)) for value in across.ticks),
        tuple(Tick(TOP + HEIGHT * (1 - up.share(value)), figures(value, 3)) for value in up.ticks),
    )


def _points(item: Mapping[str, Any]) -> list[tuple[float, float, str]]:
    found = []
    for point in items(item, "points"):
        if isinstance(point, Sequence) and len(point) > 1:
            x, y = number(point[0]), number(point[1])
            if x is not None and y is not None and math.isfinite(x) and math.isfinite(y):
                found.append((x, y, str(point[2]) if len(point) > 2 else ""))
    return found


class _Axis:
    """From one round figure to another, around all values."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        span = high - low or abs(high) or 1.0
        rough = span / TICKS
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
        self.ticks = [index * step for index in range(first, last + 1)]

    def share(self, value: float) -> float:
        """0 at the axis's beginning, 1 at its end."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
