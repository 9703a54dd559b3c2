"""The page's first words and tiles: what the whole recipe changed, and nothing that was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optpass.report import units
from optpass.report.pass_views import PassView
from optpass.report.reading import figure, mappings, section, text, total

PHRASES = (
    ("macs", "fewer MACs", "more MACs"),
    ("parameters", "fewer parameters", "more parameters"),
    ("weight_bytes", "fewer weight bytes", "more weight bytes"),
    ("peak_activation_bytes", "less peak activation memory", "more peak activation memory"),
)


@dataclass(frozen=True)
class Tile:
    """One figure of the page's head. ``tone``: good, bad or plain; ``fill`` is after over before, at most 1."""

    label: str
    value: str
    was: str = ""
    share: str = ""
    ratio: str = ""
    note: str = ""
    tone: str = "plain"
    fill: float | None = None


def lede(report: Mapping[str, Any], passes: Sequence[PassView], changes: Mapping[str, units.Change]) -> list[str]:
    """One to seven sentences."""
    told = [_passes_sentence(passes, changes)]
    if sentence := _latency_sentence(section(report, "latency")):
        told.append(sentence)
    psnr = figure(section(report, "samples"), "psnr")
    if psnr is not None and not math.isnan(psnr):
        same = "is identical to" if psnr == math.inf else f"agrees to {units.decibels(psnr)} PSNR with"
        told.append(f"What it generates {same} what the original generates from the same seeds.")
    if added := report.get("added"):
        names = _listed([str(name) for name in added])
        told.append(f"The original that it is compared with went through {names} too, in plain form.")
    if unhealed := report.get("unhealed"):
        told.append(f"Its quality is undefined until training heals {_listed([str(name) for name in unhealed])}.")
    if dropped := [item.name for item in passes if item.verdict.words.startswith("rolled back")]:
        told.append(f"A gate did not hold, and {_listed(dropped)} was rolled back.")
    elif any(gate.get("held") is False for gate in mappings(report, "gates")):
        told.append("A gate did not hold.")
    if report.get("structure_only"):
        told.append("Captured without weights: costs are counted on the graph, nothing was executed.")
    return told


def _passes_sentence(passes: Sequence[PassView], changes: Mapping[str, units.Change]) -> str:
    modified = [item for item in passes if item.modified]
    if not passes:
        return "The recipe has no passes: what came out computes what went in."
    if not modified:
        some = "The pass" if len(passes) == 1 else f"None of the {len(passes)} passes"
        return f"{some} {'changed nothing' if len(passes) == 1 else 'changed anything'}: the costs are as they were."
    sites = sum(item.sites for item in modified)
    who = (
        f"The pass {modified[0].name}"
        if len(passes) == 1
        else f"{len(modified)} of {len(passes)} passes"
        if len(modified) < len(passes)
        else f"{len(passes)} passes"
    )
    told = f"{who} changed {sites:,} site{'' if sites == 1 else 's'}"
    moved = [
        f"{changes[key].share.lstrip('+' + units.MINUS)} {fewer if changes[key].direction == 'less' else more}"
        for key, fewer, more in PHRASES
        if changes[key].direction in ("less", "more")
    ]
    return f"{told}: {_listed(moved)}." if moved else f"{told}; the costs are as they were."


def _latency_sentence(latency: Mapping[str, Any]) -> str:
    before, after = figure(section(latency, "before"), "median"), figure(section(latency, "after"), "median")
    if not before or not after:
        return ""
    unit = text(latency, "unit") or "ms"
    told = f"One call takes {units.figures(after, 3)} {unit} instead of {units.figures(before, 3)} {unit}"
    certain = section(latency, "ratio").get("certain")
    if certain is False:
        return f"{told}, which this machine’s noise does not tell apart."
    faster = before / after
    pace = (
        f"{faster:.2f} times as fast" if faster >= 1 else f"slower by {units.percent(after / before - 1).lstrip('+')}"
    )
    return f"{told}, {pace}."


def tiles(report: Mapping[str, Any], changes: Mapping[str, units.Change]) -> list[Tile]:
    """Costs first, then what was measured."""
    found = [_cost_tile(label, changes[key], _note(report, key)) for key, label in _COST_LABELS]
    latency = section(report, "latency")
    if latency:
        found.append(_latency_tile(latency))
    found += _fidelity_tiles(report)
    return [tile for tile in found if tile.value != units.NO_VALUE]


_COST_LABELS = (
    ("macs", "MACs a call"),
    ("parameters", "Parameters"),
    ("weight_bytes", "Weights"),
    ("peak_activation_bytes", "Peak activation"),
)


def _note(report: Mapping[str, Any], key: str) -> str:
    if key != "macs":
        return ""
    after = report.get("after")
    macs, attention = total(after, "macs"), total(after, "macs_attention")
    told = "" if macs is None else units.flops(macs)
    if macs and attention is not None:
        told += f", {100 * attention / macs:.1f} % in QKᵀ and AV"
    return told


def _cost_tile(label: str, change: units.Change, note: str) -> Tile:
    tone = {"less": "good", "more": "bad"}.get(change.direction, "plain")
    fill = None if not change.before or change.after is None else min(1.0, change.after / change.before)
    return Tile(label, change.after_text, change.before_text, change.share, change.ratio, note, tone, fill)


def _latency_tile(latency: Mapping[str, Any]) -> Tile:
    unit = text(latency, "unit") or "ms"
    change = units.Change(
        figure(section(latency, "before"), "median"),
        figure(section(latency, "after"), "median"),
        lambda value: f"{units.figures(value, 3)} {unit}",
    )
    tile = _cost_tile("Time of a call", change, "median")
    if section(latency, "ratio").get("certain") is False:
        return Tile(**{**vars(tile), "tone": "plain", "note": "median; within noise"})
    return tile


def _fidelity_tiles(report: Mapping[str, Any]) -> list[Tile]:
    found = []
    psnr = figure(section(report, "samples"), "psnr")
    if psnr is not None:
        found.append(Tile("Samples against the original", units.decibels(psnr), note="PSNR at equal seeds"))
    difference = section(report, "engine_difference")
    error = figure(difference, "relative_error")
    if error is not None:
        snr = figure(difference, "snr")
        note = "largest relative error" + ("" if snr is None else f"; SNR {units.decibels(snr)}")
        found.append(Tile("Engine against PyTorch", units.scientific(error), note=note))
    return found


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
