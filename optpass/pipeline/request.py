"""What :func:`optpass.pipeline.apply.apply` is asked for, beyond the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from optpass.capture.spans import Sizes
from optpass.pipeline.verification import Mode


@dataclass(frozen=True)
class Request:
    """A checkpoint, where the bundle goes, and how much evidence to collect.

    ``unhealed`` takes passes that need training without it. ``command`` is the command line, for the report;
    empty when the library was called. ``dtype`` goes before the recipe's.
    """

    checkpoint: str
    out: Path
    inputs: Sizes = field(default_factory=dict)
    weights: Path | None = None
    component: str | None = None
    structure_only: bool = False
    unhealed: bool = False
    force: bool = False
    verify: Mode = "auto"
    baseline: bool = True
    samples: int = 8
    steps: int = 20
    seed: int = 0
    allow_nonfinite: bool = False
    trust_remote_code: bool = False
    command: str = ""
    dtype: str | None = None
