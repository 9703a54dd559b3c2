"""One model of the zoo: its configurations, its example sizes, and what is known not to work, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A row of the table.

    ``config`` is a small ``config.json``, run with random weights; ``factory`` makes the small model
    where a library has none. ``inputs`` are the sizes of the small example, never square. ``full`` is
    the published configuration, captured structure-only at ``full_inputs`` (``None`` where the small one
    says all), and ``published`` the values that the published checkpoint holds. ``dynamic`` names the
    dimensions (as the input builder calls them) that work open from capture to engine, and ``spans`` the
    range that one is tried in, where that is narrower than from half to twice its size. ``limits`` has,
    for a stage that does not work, a regular expression that its error must match.
    """

    name: str
    config: Mapping[str, Any]
    inputs: Sizes = field(default_factory=dict)
    dynamic: tuple[str, ...] = ()
    full: Mapping[str, Any] | None = None
    full_inputs: Sizes = field(default_factory=dict)
    factory: Callable[[], nn.Module] | None = None
    component: str = ""
    limits: Mapping[str, str] = field(default_factory=dict)
    rtol: float = 1e-4
    published: float | None = None
    spans: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    note: str = ""
