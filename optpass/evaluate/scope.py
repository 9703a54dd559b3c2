"""What a metric is measured on: a Program beside the one that was captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optpass.ir.program import Program


@dataclass(frozen=True)
class Scope:
    """What a gate looks at: the Program as captured and the Program after the pass."""

    reference: Program
    program: Program
    progress: Callable[[str, float], None] = lambda stage, fraction: None
