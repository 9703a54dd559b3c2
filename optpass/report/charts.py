"""Geometry of the report's charts: rows of marks on a track, positions in percent of the chart's width.

Percentages and one text size let a chart fit a phone and a desk without scaling its type; colours are
CSS variables of the page. ``charts.jinja`` draws what is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from optpass.report.units import NO_VALUE, Change, figures, scientific

ROW = 42
NAME_LIMIT = 24
EXPONENTS = (-9, 0)
MarkKind = Literal["total", "rest", "less", "more", "same", "dot", "bound", "spread", "median", "plain"]


@dataclass(frozen=True)
class Mark:
    """One shape on a row's track, from ``start`` over ``length``, both in percent of the width."""

    kind: MarkKind
    start: float
    length: float = 0.0


@dataclass(frozen=True)
class Row:
    """One line of a chart: what it is, its figure in words, and its marks."""

    name: str
    value: str
    marks: tuple[Mark, ...]
    strong: bool = False

    @property
    def short_name(self) -> str:
        """The name with its middle left out where it would run into the figure."""
        if len(self.name) <= NAME_LIMIT:
            return self.name
        half = NAME_LIMIT // 2
        return f"{self.name[:half]}…{self.name[-half + 1 :]}"


@dataclass(frozen=True)
class Chart:
    """A titled chart; ``description`` says in words what the marks show, ``note`` how to read them."""

    key: str
    title: str
    description: str
    rows: tuple[Row, ...]
    note: str = ""

    @property
    def height(self) -> int:
        """Pixels."""
        return ROW * len(self.rows)


@dataclass(frozen=True)
class Step:
    """A quantity before and after one pass."""

    name: str
    change: Change


def waterfall(key: str, title: str, total: Change, steps: Sequence[Step]) -> Chart | None:
    """From the original's total through what each pass took away or added to the final total, on a scale from zero."""
    known = [step for step in steps if step.change.direction != "unknown"]
    if total.before is None or total.after is None:
        return None
    values = [
        total.before,
        total.after,
        *(v for s in known for v in (s.change.before, s.change.after) if v is not None),
    ]
    top = max(values) or 1.0
    rows = [Row("before", total.before_text, (Mark("total", 0, 100 * total.before / top),), strong=True)]
    rows += [_fall(step, top) for step in known]
    rows.append(Row("after", total.after_text, (Mark("total", 0, 100 * total.after / top),), strong=True))
    told = [f"{step.name} {step.change.share}" for step in known if step.change.direction != "same"]
    return Chart(
        key,
        title,
        f"{title}: {total.before_text} before, {total.after_text} after"
        + (f"; {', '.join(told)}." if told else "; no pass changed it."),
        tuple(rows),
    )


def _fall(step: Step, top: float) -> Row:
    before, after = step.change.before or 0.0, step.change.after or 0.0
    low, high = 100 * min(before, after) / top, 100 * max(before, after) / top
    direction = step.change.direction
    kind: MarkKind = "less" if direction == "less" else "more" if direction == "more" else "same"
    change = Mark(kind, low, high - low)
    value = "unchanged" if direction == "same" else f"{step.change.delta} ({step.change.share})"
    return Row(step.name, value, (Mark("rest", 0, low), change))


def errors(items: Sequence[tuple[str, float | None, float | None]]) -> Chart | None:
    """Relative error of each pass, with the bound of its contract where it has one: (name, error, bound)."""
    if not any(error is not None for _, error, _ in items):
        return None
    rows = tuple(Row(name, _error_text(error), _error_marks(error, bound)) for name, error, bound in items)
    told = ", ".join(f"{name} {_error_text(error)}" for name, error, _ in items)
    return Chart(
        "error",
        "Numeric error",
        f"Largest relative error of each pass against the program before it: {told}.",
        rows,
        f"● max|a−b| / max|a| against the program before the pass; ┃ the contract's bound; "
        f"log scale, 1e−{-EXPONENTS[0]} to {10 ** EXPONENTS[1]}",
    )


def _error_text(error: float | None) -> str:
    return "not measured" if error is None else "0, equal" if error == 0 else scientific(error)


def _error_marks(error: float | None, bound: float | None) -> tuple[Mark, ...]:
    marks = [] if bound is None else [Mark("bound", _log_position(bound))]
    return (*marks, *([] if error is None else [Mark("dot", _log_position(error))]))


def _log_position(value: float) -> float:
    low, high = EXPONENTS
    if not value > 0:
        return 100.0 if math.isnan(value) else 0.0
    return 100 * min(1.0, max(0.0, (math.log10(min(value, 1e9)) - low) / (high - low)))


def durations(items: Sequence[tuple[str, float]], unit: Callable[[float], str]) -> Chart | None:
    """Time that each pass took."""
    if not items:
        return None
    top = max(value for _, value in items) or 1.0
    rows = tuple(Row(name, unit(value), (Mark("plain", 0, 100 * value / top),)) for name, value in items)
    told = ", ".join(f"{name} {unit(value)}" for name, value in items)
    return Chart("seconds", "Time of the pass", f"Time that each pass took to rewrite the program: {told}.", rows)


@dataclass(frozen=True)
class Timing:
    """Milliseconds (or ``unit``) of one engine's call: median with its 10th and 90th percentile."""

    label: str
    median: float
    p10: float
    p90: float
    runs: int | None = None


def latencies(timings: Sequence[Timing], unit: str) -> Chart | None:
    """Median and p10–p90 of each engine on one scale from zero."""
    if not timings:
        return None
    top = 1.05 * max(timing.p90 for timing in timings) or 1.0
    rows = tuple(
        Row(
            timing.label,
            f"{figures(timing.median, 3)} {unit}  ({figures(timing.p10, 3)}–{figures(timing.p90, 3)})",
            (
                Mark("rest", 0, 100 * timing.median / top),
                Mark("spread", 100 * timing.p10 / top, 100 * (timing.p90 - timing.p10) / top),
                Mark("median", 100 * timing.median / top),
            ),
            strong=True,
        )
        for timing in timings
    )
    told = "; ".join(f"{row.name or NO_VALUE}: {row.value}" for row in rows)
    runs = ", ".join(f"{timing.runs:,} calls" for timing in timings[-1:] if timing.runs)
    note = "┃ median; band around it: 10th to 90th percentile" + (f" of {runs} each" if runs else "")
    return Chart("latency", "Time of one call", f"Time of one call, median and p10–p90: {told}.", rows, note)
