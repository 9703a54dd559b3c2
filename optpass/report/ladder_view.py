"""The page's section about the ladder: what a sample costs after each pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optpass.report import units
from optpass.report.reading import amount, mappings, text


@dataclass(frozen=True)
class RungView:
    """A row: evaluations of the denoiser, FLOP of one, of a sample with and without QKᵀ and AV, and how often less."""

    name: str
    evaluations: str
    each: str
    sample: str
    plain: str
    fewer: str
    parameters: str


def ladder_view(report: Mapping[str, Any]) -> tuple[RungView, ...]:
    """The rows of a report's ``ladder``; none where nothing says how the model is sampled."""
    rungs = mappings(report, "ladder")
    first = next((total for rung in rungs if (total := amount(rung, "total"))), None)
    return tuple(_rung(rung, first) for rung in rungs)


def _rung(rung: Mapping[str, Any], first: float | None) -> RungView:
    evaluations, total = amount(rung, "evaluations"), amount(rung, "total")
    most = "at most " if rung.get("bound") else ""
    return RungView(
        text(rung, "name"),
        units.NO_VALUE if evaluations is None else f"{evaluations:,.0f}",
        units.flops(amount(rung, "macs") or 0),
        most + units.flops(total) if total else units.NO_VALUE,
        most + units.flops(total - (amount(rung, "total_attention") or 0)) if total else units.NO_VALUE,
        f"{units.figures(first / total)} ×" if first and total else "",
        units.parameters(amount(rung, "parameters") or 0),
    )
