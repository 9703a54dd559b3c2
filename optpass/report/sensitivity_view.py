"""The page's section about quantisation's noise: what each module's integers cost, and which stayed real for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optpass.report import units
from optpass.report.charts import Chart, Mark, Row
from optpass.report.reading import amount, figure, items, mappings, plain, section, text

CHARTED = 15
"""Modules that the chart shows; the table has all."""
FLOOR = -6
"""log₁₀ of the relative error at which the chart's scale begins; it ends at 1."""


@dataclass(frozen=True)
class ModuleRow:
    """A module's figures in words."""

    path: str
    operations: str
    alone: str
    without: str
    real: bool


@dataclass(frozen=True)
class SensitivityView:
    """What was found in a sentence, the noisiest modules in a chart, all of them in a table."""

    words: str
    chart: Chart
    rows: tuple[ModuleRow, ...]


def sensitivity_view(report: Mapping[str, Any]) -> SensitivityView | None:
    """Of the last pass that measured its modules; ``None`` where none did."""
    records = [section(record, "sensitivity") for record in mappings(report, "passes")]
    record = next((found for found in reversed(records) if mappings(found, "modules")), None)
    if record is None:
        return None
    modules = mappings(record, "modules")
    return SensitivityView(sensitivity_words(record), _chart(modules), tuple(map(module_row, modules)))


def module_row(module: Mapping[str, Any]) -> ModuleRow:
    """The row of one module's record."""
    operations = amount(module, "operations")
    return ModuleRow(
        text(module, "path") or "(root)",
        units.NO_VALUE if operations is None else units.figures(operations / 1e6, 3),
        units.decibels(figure(section(module, "alone"), "snr")),
        units.decibels(figure(section(module, "without"), "snr")),
        bool(module.get("real")),
    )


def sensitivity_words(record: Mapping[str, Any]) -> str:
    """What was asked for, what was found."""
    modules, budget = mappings(record, "modules"), section(record, "budget")
    real = sum(bool(module.get("real")) for module in modules)
    together = units.decibels(figure(section(record, "together"), "snr"))
    told = f"With all {len(modules)} modules in integers, outputs are at {together}."
    if not budget:
        return told
    unit, tried = text(budget, "unit"), len(items(record, "tried"))
    reached = units.figures(figure(record, "figure") or math.nan, 3)
    asked = f"Asked for {text(budget, 'title')} {plain(budget.get('bound'))} {unit}"
    stay = f"{real} {'stays' if real == 1 else 'stay'} real, which gives {reached} {unit}"
    return f"{told} {asked}: {stay} ({tried} {'trial' if tried == 1 else 'trials'})."


def _chart(modules: list[Mapping[str, Any]]) -> Chart:
    shown = modules[:CHARTED]
    rows = tuple(_row(module) for module in shown)
    told = "; ".join(f"{row.name} {row.value}" for row in rows)
    more = f"; the noisiest {len(shown)} of {len(modules)}" if len(shown) < len(modules) else ""
    note = f"relative error of outputs, log scale 1e−{-FLOOR} to 1: ● the module alone in integers, ┃ all but it{more}"
    return Chart("sensitivity", "Noise of a module's integers", f"Signal to noise, alone: {told}.", rows, note)


def _row(module: Mapping[str, Any]) -> Row:
    words, marks = module_row(module), []
    alone, without = (figure(section(module, key), "error") for key in ("alone", "without"))
    if without is not None:
        marks.append(Mark("bound", _place(without)))
    if alone is not None:
        marks.append(Mark("dot", _place(alone)))
    return Row(words.path, f"{words.alone}{', real' if words.real else ''}", tuple(marks))


def _place(error: float) -> float:
    if not error > 0:
        return 100.0 if math.isnan(error) else 0.0
    return 100 * min(1.0, max(0.0, 1 - math.log10(min(error, 1.0)) / FLOOR))
