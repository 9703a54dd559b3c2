"""Random calls to compare Programs on: at the captured sizes, and at the ends of those that are open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from optpass.ir.dimensions import Dimensions
from optpass.ir.graph import FixedSpec
from optpass.ir.program import InputRange

LARGER = 4
"""Times the captured inputs' elements, beyond which an end of open ranges is not tried."""


class Sized(Protocol):
    """What has inputs of open sizes: a graph, an engine."""

    def inputs_at(self, sizes: Mapping[str, int] | None = None) -> tuple[FixedSpec, ...]:
        """The inputs with open dimensions at ``sizes``, or as they were captured."""


def trial_inputs(
    interface: Sized, dimensions: Dimensions, ranges: Mapping[str, InputRange], seed: int, trials: int = 1
) -> list[dict[str, Tensor]]:
    """Random inputs of each of :func:`trial_specs`."""
    specs = trial_specs(interface, dimensions, trials)
    return [random_inputs(each, ranges, seed + index) for index, each in enumerate(specs)]


def trial_specs(interface: Sized, dimensions: Dimensions, trials: int = 1) -> list[tuple[FixedSpec, ...]]:
    """The inputs at the captured sizes, ``trials`` times, and once at each end of the open ranges.

    An end that makes the inputs more than :data:`LARGER` times as large is left out.
    """
    captured = interface.inputs_at()
    limit = LARGER * elements(captured)
    ends = [interface.inputs_at(sizes) for sizes in dimensions.alternatives()]
    return [captured] * trials + [end for end in ends if elements(end) <= limit]


def elements(specs: Sequence[FixedSpec]) -> int:
    """Elements of all ``specs`` together."""
    return sum(map(_elements, specs))


def _elements(spec: FixedSpec) -> int:
    return math.prod(spec.shape)


def random_inputs(specs: Sequence[FixedSpec], ranges: Mapping[str, InputRange], seed: int) -> dict[str, Tensor]:
    """Seeded inputs within the captured ranges: floats normal (or uniform), integers uniform in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: _random_tensor(spec, ranges.get(spec.name), generator) for spec in specs}


def _random_tensor(spec: FixedSpec, span: InputRange | None, generator: torch.Generator) -> Tensor:
    if spec.dtype == torch.bool:
        return torch.ones(spec.shape, dtype=torch.bool)
    span = span or InputRange(0.0, 2.0 if not spec.dtype.is_floating_point else 1.0)
    if not spec.dtype.is_floating_point:
        return torch.randint(int(span.low), max(int(span.high), int(span.low) + 1), spec.shape, generator=generator).to(
            spec.dtype
        )
    if span.distribution == "uniform":
        return (torch.rand(spec.shape, generator=generator) * (span.high - span.low) + span.low).to(spec.dtype)
    return torch.randn(spec.shape, generator=generator).to(spec.dtype)
