"""What ``optpass compare --modules`` shows: a row a module, a column a stage. No decisions here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from optpass import console

MISSING = "·"


def show(record: Mapping[str, Any]) -> None:
    """Signal-to-noise ratios in dB, the departures marked; why a stage was not run."""
    stages = [stage["name"] for stage in record["stages"][1:] if not stage["note"]]
    made = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("entry", "module", "size"):
        made.add_column(header, overflow="fold", no_wrap=header == "entry")
    for stage in stages:
        made.add_column(stage, justify="right", no_wrap=True)
    departed = {(item["entry"], item["path"], item["stage"]) for item in record["departures"]}
    for module in record["modules"]:
        size = "×".join(map(str, module["shape"]))
        marked = [(module["entry"], module["path"], stage) in departed for stage in stages]
        cells = [_cell(module["stages"].get(stage), mark) for stage, mark in zip(stages, marked, strict=True)]
        style = "bold red" if any(marked) else None
        made.add_row(escape(module["entry"]), escape(module["path"]), size, *cells, style=style)
    console.out.print(made)
    console.out.print()
    for line in lines(record):
        console.out.print(line, markup=False)


def lines(record: Mapping[str, Any]) -> list[str]:
    """What the columns are, and where a stage departs from the one before it."""
    first, *others = record["stages"]
    against = "the stage before" if first["note"] else f"{first['name']} ({first['how']})"
    told = [f"dB of signal to noise against {against}, the worst of {record['calls']} calls"]
    told += [f"{stage['name']}: {stage['how']}" for stage in others if not stage["note"]]
    told += [f"{stage['name']} was not run: {stage['note']}" for stage in record["stages"] if stage["note"]]
    departures = {item["stage"]: item for item in record["departures"]}
    for stage in others:
        if stage["note"]:
            continue
        item = departures.get(stage["name"])
        if item is None:
            told.append(f"{stage['name']} departs nowhere from the stage before")
            continue
        where = f"{item['entry']}: {item['path']}"
        told.append(
            f"{stage['name']} departs from the stage before at {where}: {_decibels(item['snr'])}, {item['why']}"
        )
    return told


def _cell(stage: Mapping[str, Any] | None, marked: bool) -> str:
    found = (stage or {}).get("reference") or (stage or {}).get("previous")
    text = _decibels(found["snr"]) if found else MISSING
    return f"▶ {text}" if marked else text


def _decibels(snr: float) -> str:
    return "equal" if snr >= 300 else f"{snr:.1f} dB"
