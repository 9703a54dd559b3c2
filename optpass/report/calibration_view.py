"""The page's section about a calibrated cache: how much every block changes from step to step, and what is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optpass.report import units
from optpass.report.reading import amount, items, mappings, plain, section

LONGEST = 200
"""Steps that a strip can show."""
SMALLEST = 0.01
"""The change at which a bar begins; above it heights are logarithmic."""
BAR = 20
"""Pixels of the tallest bar."""


@dataclass(frozen=True)
class Bar:
    """A rectangle: ``start`` and ``length`` in percent of the width, ``height`` in pixels."""

    start: float
    length: float
    height: float


@dataclass(frozen=True)
class Strip:
    """A block's changes, a bar a step; ``largest`` in words."""

    name: str
    largest: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class CalibrationView:
    """``columns`` are the computed steps, behind all strips; their ``height`` is the share of samples that did."""

    words: str
    note: str
    columns: tuple[Bar, ...]
    strips: tuple[Strip, ...]


def calibration_view(report: Mapping[str, Any]) -> CalibrationView | None:
    """Of the last pass that calibrated a schedule; ``None`` where none did."""
    records = [section(record, "calibration") for record in mappings(report, "passes")]
    record = next((found for found in reversed(records) if found), None)
    steps = int(amount(record, "steps") or 0) if record else 0
    if not record or not 1 < steps <= LONGEST:
        return None
    blocks = {str(path): _numbers(values) for path, values in section(record, "blocks").items()}
    rows = {"what is reused": _numbers(record.get("states")), **blocks}
    known = [value for values in rows.values() for value in values if math.isfinite(value)]
    top = max(known, default=1.0)
    shares = _numbers(record.get("computed"))
    width = 100 / steps
    return CalibrationView(
        _words(record, steps),
        "bar: ‖r − r′‖₁ / ‖r‖₁ of what a block adds (r), against the step before;"
        f" log scale, {SMALLEST:g} to {top:.2g}; shaded: computed steps",
        tuple(Bar(step * width, width, share) for step, share in enumerate(shares[:steps]) if share),
        tuple(_strip(name, values, width, top) for name, values in rows.items() if values),
    )


def _strip(name: str, values: list[float], width: float, top: float) -> Strip:
    span = math.log(max(top, 2 * SMALLEST) / SMALLEST)
    bars = []
    # The first step has none before it.
    for step, value in enumerate(values, start=1):
        if math.isfinite(value) and value > SMALLEST:
            bars.append(Bar(step * width, 0.8 * width, BAR * math.log(value / SMALLEST) / span))
    finite = [value for value in values if math.isfinite(value)]
    return Strip(name, units.figures(max(finite), 2) if finite else units.NO_VALUE, tuple(bars))


def _words(record: Mapping[str, Any], steps: int) -> str:
    budget = ", ".join(f"{key} {plain(value)}" for key, value in section(record, "budget").items())
    speedup, psnr, samples = (amount(record, key) for key in ("speedup", "psnr", "samples"))
    told = f"Asked for {budget}" if budget else "Calibrated"
    if speedup is not None and psnr is not None and samples is not None:
        told += f": {speedup:.2f} times fewer MACs, {units.decibels(psnr)} over {samples:.0f} samples of {steps} steps"
    return f"{told}."


def _numbers(values: Any) -> list[float]:
    listed = items({"values": values}, "values")
    return [float(value) if isinstance(value, (int, float)) else math.nan for value in listed]
