"""What of an engine's operators the device itself runs, and what falls to something else, place by place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optpass.report.reading import amount, mappings, section, text


@dataclass(frozen=True)
class Fallen:
    """Operators of one kind that run elsewhere, for one reason."""

    operator: str
    reason: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class CoverageView:
    """One engine's coverage: ``words`` sum it up."""

    entry: str
    words: str
    fallen: tuple[Fallen, ...]


def coverage_view(engine: Mapping[str, Any]) -> CoverageView | None:
    """Of an engine's record in the report; ``None`` where its compiler does not tell."""
    found = section(section(engine, "details"), "coverage")
    operators, native = amount(found, "operators"), amount(found, "native")
    if operators is None or native is None:
        return None
    groups: dict[tuple[str, str], list[str]] = {}
    for item in mappings(found, "elsewhere"):
        groups.setdefault((text(item, "operator"), text(item, "reason")), []).append(text(item, "path"))
    fallen = tuple(Fallen(operator, reason, tuple(paths)) for (operator, reason), paths in groups.items())
    return CoverageView(text(engine, "entry"), coverage_words(found), fallen)


def coverage_words(coverage: Mapping[str, Any]) -> str:
    """``"142 of 144 operators native, 2 elsewhere"``."""
    operators, native = int(amount(coverage, "operators") or 0), int(amount(coverage, "native") or 0)
    if native >= operators:
        return f"all {operators:,} operators native"
    return f"{native:,} of {operators:,} operators native, {operators - native:,} elsewhere"
