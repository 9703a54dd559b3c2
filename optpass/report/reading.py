"""Careful access to a report's mapping: a missing or odd value reads as absent, never as an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optpass.report.units import number


def section(source: Any, key: str) -> Mapping[str, Any]:
    """The mapping under ``key``, empty where there is none."""
    found = source.get(key) if isinstance(source, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def items(source: Any, key: str) -> Sequence[Any]:
    """The list under ``key``, empty where there is none."""
    found = source.get(key) if isinstance(source, Mapping) else None
    return found if isinstance(found, Sequence) and not isinstance(found, (str, bytes)) else ()


def mappings(source: Any, key: str) -> list[Mapping[str, Any]]:
    """The mappings of the list under ``key``."""
    return [item for item in items(source, key) if isinstance(item, Mapping)]


def text(source: Any, key: str) -> str:
    """What stands under ``key`` as text, empty where there is nothing."""
    found = source.get(key) if isinstance(source, Mapping) else None
    return "" if found is None else str(found)


def figure(source: Any, key: str) -> float | None:
    """The number under ``key``, NaN and infinity included; None where there is none."""
    return number(source.get(key)) if isinstance(source, Mapping) else None


def amount(source: Any, key: str) -> float | None:
    """The number under ``key`` where it is finite and not negative: a cost, a time, a size."""
    found = figure(source, key)
    return found if found is not None and math.isfinite(found) and found >= 0 else None


def total(cost: Any, key: str) -> float | None:
    """A figure of a cost's ``totals``."""
    return amount(section(cost, "totals"), key)


def plain(value: Any) -> str:
    """An option's value on one line, as YAML or JSON would write it."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        return str(value)
