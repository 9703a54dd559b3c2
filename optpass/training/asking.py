"""How a pipeline is asked for one generation after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Generator

from optpass.runtime.sampling import Asked

STRIDE = 1_000_003
"""Between the seeds of two courses' parts, so that no two of usual runs meet."""
Ranges = Mapping[str, tuple[float, float]]
"""Lowest and highest value, by name."""


@dataclass(frozen=True)
class Asking:
    """``asked``, for one class after the other, with the arguments in ``vary`` drawn evenly between two values."""

    asked: Asked
    vary: Ranges = field(default_factory=dict)
    seed: int = 0

    def seed_of(self, index: int) -> int:
        """That of the ``index``-th generation."""
        return self.seed * STRIDE + index

    def generator(self, index: int) -> Generator:
        """What everything is drawn from that is of the ``index``-th generation alone."""
        return torch.Generator().manual_seed(self.seed_of(index))

    def turn(self, index: int, generator: Generator, scales: Mapping[str, float] | None = None) -> Asked:
        """What is asked for the ``index``-th time; ``scales`` are of guidance, by the names of the pipeline's call."""
        labels, scales = self.asked.labels, scales or {}
        others = {name: value for name, value in scales.items() if name != GUIDANCE}
        return replace(
            self.asked,
            labels=(labels[index % len(labels)],),
            guidance=scales.get(GUIDANCE, self.asked.guidance),
            call={**self.asked.call, **drawn(self.vary, generator), **others},
        )


GUIDANCE = "guidance_scale"
"""What diffusers' pipelines call the scale of classifier-free guidance."""


def drawn(ranges: Ranges, generator: Generator) -> dict[str, float]:
    """A value of each of ``ranges``."""
    return {
        name: float(torch.rand((), generator=generator) * (high - low) + low) for name, (low, high) in ranges.items()
    }
