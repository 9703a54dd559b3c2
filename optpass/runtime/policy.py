"""The base class of adaptive schedules' policies: what is known at a step → whether it is computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from optpass.pipeline.options import Options


@dataclass(frozen=True)
class Moment:
    """A step of a generation, before its decision.

    ``step`` counts from 0, ``of`` is the number of steps where it is known. ``computed`` are the earlier steps that
    were computed, ``metrics`` what the entries told at each of them, ``now`` what those told that run before
    the decision.
    """

    step: int
    of: int | None
    computed: Sequence[int]
    metrics: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    now: Mapping[str, float] = field(default_factory=dict)


class Policy(Options):
    """Decides by what :class:`Moment` knows and by nothing else, so that it is the same for every generation."""

    def wants(self) -> tuple[str, ...]:
        """The metrics that it reads."""
        return ()

    @property
    def counts(self) -> bool:
        """Whether it has to know the number of steps."""
        return False

    def scaled(self, factor: float) -> Self | None:
        """The policy that bears ``factor`` times the change before it computes; ``None`` where none is meant.

        A larger factor reuses at least as much: what calibration turns.
        """
        return None

    @abstractmethod
    def computes(self, moment: Moment) -> bool:
        """Whether the step is computed; never asked at step 0, which is."""
