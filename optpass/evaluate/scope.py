"""What a metric is measured on: a Program beside the one that was captured, or beside that before a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optpass.ir.program import Program
from optpass.pipeline.target import Target


@dataclass(frozen=True)
class Scope:
    """What a gate looks at: the Program as captured and the Program after the pass.

    ``before`` is the Program before the pass, if there was one, ``modified`` whether that changed anything, and
    ``target`` what it will be lowered to; ``allow_nonfinite`` lets weights hold NaN and Inf then.
    """

    reference: Program
    program: Program
    progress: Callable[[str, float], None] = lambda stage, fraction: None
    before: Program | None = None
    modified: bool = True
    target: Target | None = None
    allow_nonfinite: bool = False
