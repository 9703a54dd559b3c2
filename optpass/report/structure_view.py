"""Charts of what pruning took: channels of every group, and blocks by their importance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optpass.report import units
from optpass.report.charts import Chart, Mark, Row
from optpass.report.reading import amount, mappings, text

MOST = 40
"""Rows that a chart shows; of more, those that changed most, or matter most."""


def structure_charts(report: Mapping[str, Any]) -> tuple[Chart, ...]:
    """One for each pass that pruned, in order."""
    return tuple(_charts(report))


def _charts(report: Mapping[str, Any]) -> Iterator[Chart]:
    for index, record in enumerate(mappings(report, "passes"), start=1):
        name = f"{index} {text(record, 'name')}"
        groups = [_group(item) for item in mappings(record, "pruning")]
        if rows := [row for row in groups if row]:
            yield _chart(
                f"groups-{index}", f"Channels after {name}", rows, "elements of each group: what stays, of what was"
            )
        if blocks := mappings(record, "blocks"):
            yield _chart(
                f"blocks-{index}", f"Blocks at {name}", _blocks(blocks), "importance of each block; hatched: removed"
            )


def _chart(key: str, title: str, rows: list[Row], note: str) -> Chart:
    shown, more = rows[:MOST], len(rows) - MOST
    told = ", ".join(f"{row.name} {row.value}" for row in shown)
    return Chart(
        key, title, f"{title}: {told}.", tuple(shown), note + (f"; {more} more are not shown" if more > 0 else "")
    )


def _group(item: Mapping[str, Any]) -> Row | None:
    before, after = amount(item, "before"), amount(item, "after")
    if not before or after is None:
        return None
    share = 100 * after / before
    marks = (Mark("rest", 0, share), Mark("less", share, 100 - share))
    return Row(text(item, "group"), f"{before:.0f} → {after:.0f}", marks)


def _blocks(items: list[Mapping[str, Any]]) -> list[Row]:
    values = [amount(item, "importance") or 0.0 for item in items]
    top = max(values, default=0.0) or 1.0
    ranked = sorted(zip(values, items, strict=True), key=lambda pair: -pair[0])
    return [
        Row(
            text(item, "path"),
            f"{units.figures(value, 3)}{', removed' if item.get('removed') else ''}",
            (Mark("less" if item.get("removed") else "plain", 0, 100 * value / top),),
        )
        for value, item in ranked
    ]
