"""The page's section about training: what was trained on what, and how the losses fell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optpass.report import units
from optpass.report.reading import amount, figure, items, mappings, section, text
from optpass.report.scatter import Plot, plot_of

POINTS = 40
"""Points of a curve: means over equal shares of the updates."""
TOTAL = "loss"


@dataclass(frozen=True)
class TrainingView:
    """One training in a sentence or two, and its curves."""

    words: str
    plot: Plot | None


def training_views(report: Mapping[str, Any]) -> tuple[TrainingView, ...]:
    """One for each pass that trained, in order."""
    records = enumerate(mappings(report, "passes"), start=1)
    found = [(f"{index} {text(record, 'name')}", section(record, "training")) for index, record in records]
    return tuple(TrainingView(_words(name, record), _plot(name, record)) for name, record in found if record)


def _words(name: str, record: Mapping[str, Any]) -> str:
    count, parameters, updates = (amount(record, key) or 0 for key in ("weights", "parameters", "updates"))
    first, last = (figure(record, key) for key in ("first", "last"))
    told = f"{name}: {count:,.0f} weights of {parameters:,.0f} parameters, {updates:,.0f} updates on"
    told += f" {text(record, 'source') or 'unnamed data'} (seed {amount(record, 'seed') or 0:.0f},"
    seconds = amount(record, "seconds")
    took = f", in {units.seconds(seconds)}" if seconds else ""
    told += f" {text(record, 'precision')}, {text(record, 'device')}{took})."
    if first is None or last is None:
        return told
    fewer = f", {units.figures(first / last, 3)} times less" if 0 < last < first else ""
    return f"{told} The loss went from {units.figures(first, 3)} to {units.figures(last, 3)}{fewer}."


def _plot(name: str, record: Mapping[str, Any]) -> Plot | None:
    losses = {str(term): _curve(values) for term, values in section(record, "losses").items()}
    if len(losses) == 2:
        # The sum of one term is that term.
        losses.pop(TOTAL, None)
    return plot_of(
        f"training-{name.partition(' ')[0]}",
        {
            "title": f"Losses of {name}",
            "x": "update",
            "y": "log₁₀ of the weighted loss",
            "series": [{"name": term, "points": points} for term, points in losses.items()],
        },
    )


def _curve(values: Any) -> list[tuple[float, float]]:
    """[update, log₁₀ of the mean loss around it] of at most :data:`POINTS` shares; losses of zero have none."""
    known = [float(v) if isinstance(v, (int, float)) else math.nan for v in items({"values": values}, "values")]
    size = max(1, -(-len(known) // POINTS))
    found = []
    for start in range(0, len(known), size):
        share = [value for value in known[start : start + size] if math.isfinite(value)]
        if share and sum(share) > 0:
            found.append((start + (len(share) + 1) / 2, math.log10(sum(share) / len(share))))
    return found
