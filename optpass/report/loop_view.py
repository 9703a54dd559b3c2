"""The page's section about the loop: what a step is made of, when which runs, what a generation costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optpass.report import units
from optpass.report.reading import amount, items, plain, section, text

SHOWN = 12
"""States that are listed; a transformer's may be hundreds."""
LONGEST = 200
"""Steps that a timeline can show."""


@dataclass(frozen=True)
class LoopView:
    """``timeline`` pairs each step with its variant; ``shades`` numbers the variants, the computed one 0."""

    schedule: str
    variants: tuple[tuple[str, str, str], ...]
    beside: tuple[tuple[str, str, str], ...]
    states: tuple[tuple[str, str, str], ...]
    more_states: int
    state_size: str
    generation: str
    timeline: tuple[tuple[int, str], ...]
    shades: Mapping[str, int]


def loop_view(report: Mapping[str, Any]) -> LoopView | None:
    """The view of a report's ``loop``; ``None`` where a step is one call."""
    loop = section(report, "loop")
    if not loop:
        return None
    variants = section(loop, "variants")
    states = section(loop, "states")
    chains = {str(name): " → ".join(map(str, items(record, "entries"))) for name, record in variants.items()}
    listed = list(states.items())[:SHOWN]
    timeline = [str(name) for name in items(loop, "timeline")][:LONGEST]
    return LoopView(
        schedule=", ".join(f"{key}: {plain(value)}" for key, value in section(loop, "schedule").items()),
        variants=tuple((name, chain, _macs(variants[name])) for name, chain in chains.items()),
        beside=tuple(
            (str(name), when, units.macs(float(value)))
            for key, when in (("once", "once a generation"), ("tables", "once for each timestep"))
            for name, value in section(loop, key).items()
        ),
        states=tuple((str(name), _shape(record), units.size(amount(record, "bytes") or 0)) for name, record in listed),
        more_states=len(states) - len(listed),
        state_size=units.size(amount(loop, "state_bytes") or 0),
        generation=_generation(section(loop, "before"), section(loop, "after")),
        timeline=tuple(enumerate(timeline)),
        shades={str(name): index for index, name in enumerate(variants)},
    )


def _macs(record: Any) -> str:
    return units.macs(amount(record, "macs") or 0)


def _shape(record: Any) -> str:
    return f"{text(record, 'dtype')} {' × '.join(map(str, items(record, 'shape')))}"


def _generation(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    was, now, steps = amount(before, "macs"), amount(after, "macs"), amount(after, "steps")
    if was is None or now is None or steps is None:
        return ""
    told = f"A generation of {steps:.0f} steps takes {units.macs(now)} instead of {units.macs(was)}"
    if after.get("bound"):
        return f"{told} if every step is computed; the schedule decides at run time."
    return f"{told} ({units.percent(now / was - 1)})." if was else f"{told}."
