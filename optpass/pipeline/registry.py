"""Passes, targets and recipes by name. All of them arrive through entry points, ours as a stranger's.

Groups: ``optpass.passes``, ``optpass.targets`` and ``optpass.policies`` name a class each, ``optpass.recipes`` a
package that holds YAML files.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from optpass.errors import OptpassError, UserError, nearest
from optpass.pipeline.passes import Pass
from optpass.pipeline.target import Target
from optpass.runtime.policy import Policy

PASSES, TARGETS, RECIPES, POLICIES = "optpass.passes", "optpass.targets", "optpass.recipes", "optpass.policies"
Kind = TypeVar("Kind", Pass, Target, Policy)


def pass_names() -> list[str]:
    """Every installed pass, sorted."""
    return sorted(_points(PASSES))


def target_names() -> list[str]:
    """Every installed target, sorted."""
    return sorted(_points(TARGETS))


def pass_class(name: str) -> type[Pass]:
    """The pass registered as ``name``.

    Raises:
        UserError: no pass has this name; the nearest one is named.
    """
    return _load(PASSES, name, "pass", Pass)  # type: ignore[type-abstract]


def target_class(name: str) -> type[Target]:
    """The target registered as ``name``; its module imports nothing heavy or optional.

    Raises:
        UserError: no target has this name.
    """
    return _load(TARGETS, name, "target", Target)  # type: ignore[type-abstract]


def policy_class(name: str) -> type[Policy]:
    """The policy of adaptive schedules registered as ``name``.

    Raises:
        UserError: no policy has this name.
    """
    return _load(POLICIES, name, "policy", Policy)  # type: ignore[type-abstract]


def recipe_files() -> dict[str, Path]:
    """Every recipe that an installed package offers, by name (the file's, without ``.yaml``)."""
    found: dict[str, Path] = {}
    for point in _points(RECIPES).values():
        for item in files(point.load()).iterdir():
            if item.name.endswith(".yaml"):
                found[item.name.removesuffix(".yaml")] = Path(str(item))
    return dict(sorted(found.items()))


@lru_cache(maxsize=8)
def _points(group: str) -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            raise OptpassError(f"two packages register {point.name!r} in {group}: {other.value} and {point.value}")
    return points


def _load(group: str, name: str, noun: str, base: type[Kind]) -> type[Kind]:
    points = _points(group)
    if name not in points:
        raise UserError(f"unknown {noun} {name!r}{_hint(name, points)}")
    try:
        found = points[name].load()
    except Exception as error:
        raise OptpassError(f"{noun} {name!r} ({points[name].value}) cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise OptpassError(f"{noun} {name!r} ({points[name].value}) is not a {base.__name__} class")
    return found


def _hint(name: str, known: Iterable[str]) -> str:
    return nearest(name, known) or "; none is installed: is optpass installed with its entry points?"
