"""What the page says of each pass: its contract and how that was verified, its sites, what it declined."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optpass.report import units
from optpass.report.reading import amount, figure, items, mappings, plain, section, text, total

OPEN_LIMIT = 12
"""Declined places that a pass may have before its groups are shown folded."""

COSTS: tuple[tuple[str, str, Any], ...] = (
    ("macs", "MACs", units.macs),
    ("parameters", "Parameters", units.parameters),
    ("weight_bytes", "Weight bytes", units.size),
    ("peak_activation_bytes", "Peak activation", units.size),
)


@dataclass(frozen=True)
class Verdict:
    """How far a promise was checked: a state for colour, a symbol and the words."""

    state: str
    symbol: str
    words: str


@dataclass(frozen=True)
class Place:
    """A node that a pass left alone."""

    path: str
    node: str
    entry: str


@dataclass(frozen=True)
class DeclinedGroup:
    """All places that were declined for one reason."""

    reason: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class PassView:
    """One pass as the page shows it; ``title`` is its name with its place in the recipe."""

    index: int
    name: str
    summary: str
    options: tuple[tuple[str, str], ...]
    contract: str
    bound: float | None
    verdict: Verdict
    modified: bool
    sites: int
    site_paths: tuple[str, ...]
    declined: tuple[DeclinedGroup, ...]
    seconds: float | None
    changes: Mapping[str, units.Change]
    max_abs: float | None
    relative_error: float | None
    snr: float | None

    @property
    def title(self) -> str:
        return f"{self.index} {self.name}"

    @property
    def declined_count(self) -> int:
        return sum(len(group.places) for group in self.declined)

    @property
    def relative_error_text(self) -> str:
        return units.scientific(self.relative_error)

    @property
    def snr_text(self) -> str:
        return units.decibels(self.snr)

    @property
    def seconds_text(self) -> str:
        return units.NO_VALUE if self.seconds is None else units.seconds(self.seconds)

    @property
    def unfolded(self) -> bool:
        """Whether its declined places are few enough to be read without a click."""
        return self.declined_count <= OPEN_LIMIT


def pass_views(report: Mapping[str, Any]) -> tuple[PassView, ...]:
    """A view of every pass in the report, in order."""
    return tuple(_view(index, record) for index, record in enumerate(mappings(report, "passes"), start=1))


def changes(before: Any, after: Any) -> dict[str, units.Change]:
    """The costs of two reports of one Program, by name."""
    return {key: units.Change(total(before, key), total(after, key), unit) for key, _, unit in COSTS}


def _view(index: int, record: Mapping[str, Any]) -> PassView:
    difference = section(record, "difference")
    paths = tuple(str(path) for path in items(record, "site_paths"))
    sites = amount(record, "sites")
    contract = text(record, "contract")
    return PassView(
        index=index,
        name=text(record, "name") or "unnamed pass",
        summary=text(record, "summary"),
        options=tuple((str(key), plain(value)) for key, value in section(record, "options").items()),
        contract=contract or units.NO_VALUE,
        bound=_bound(contract),
        verdict=verdict(text(record, "verified")),
        modified=bool(record.get("modified")),
        sites=len(paths) if sites is None else int(sites),
        site_paths=paths,
        declined=_grouped(mappings(record, "declined")),
        seconds=amount(record, "seconds"),
        changes=changes(record.get("before"), record.get("after")),
        max_abs=figure(difference, "max_abs"),
        relative_error=figure(difference, "relative_error"),
        snr=figure(difference, "snr"),
    )


def verdict(words: str) -> Verdict:
    """The state that the words of a verification stand for."""
    if words.startswith("held"):
        return Verdict("good", "✓", words)
    if words.startswith("rolled back"):
        return Verdict("open", "↺", words)
    if not words or words.startswith(("not ", "compiled only")):
        return Verdict("open", "○", words or "not verified")
    if words.startswith(("broken", "failed", "violated")):
        return Verdict("bad", "✗", words)
    return Verdict("measured", "≈", words)


def _bound(contract: str) -> float | None:
    found = re.fullmatch(r"exact to (\S+)", contract)
    return units.number(found[1]) if found else None


def _grouped(records: list[Mapping[str, Any]]) -> tuple[DeclinedGroup, ...]:
    groups: dict[str, list[Place]] = {}
    for record in records:
        place = Place(text(record, "path"), text(record, "node"), text(record, "entry"))
        groups.setdefault(text(record, "reason") or "no reason given", []).append(place)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return tuple(DeclinedGroup(reason, tuple(places)) for reason, places in ordered)
