"""Calls in a row as a sampler makes them, for modules that remember: a walk through one generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from optpass.evaluate.trials import random_inputs, trial_inputs, trial_specs
from optpass.ir.graph import FixedSpec
from optpass.ir.interface import Interface
from optpass.ir.loop import Adaptive, Cycle, Loop
from optpass.ir.program import InputRange

STRIDE = 0.1
"""How far a sample goes in one call of a walk; 1 would be to another noise."""
UNCOUNTED = 8
"""Calls of a walk where the schedule has no period."""
LONGEST = 50
"""Calls of a period that are made at most: a schedule that computes once in a thousand steps is as good as told by
those of a generation."""


def period(loop: Loop) -> int:
    """Calls after which the schedule begins again, or :data:`LONGEST`."""
    match loop.schedule:
        case Cycle(variants):
            return min(len(variants), LONGEST)
        case Adaptive(of=None):
            return UNCOUNTED
    assert loop.schedule.of is not None
    return loop.schedule.of


def compared_calls(loop: Loop | None) -> int:
    """Calls of each walk on which two loops are compared, if they remember anything; else one."""
    if loop is None or loop.stateless:
        return 1
    return 2 * period(loop) if isinstance(loop.schedule, Cycle) else period(loop)


def timed_length(loop: Loop | None) -> int:
    """Calls whose latency is taken together: whole periods.

    What runs once a generation would be in every call of a walk of one: then there are :data:`UNCOUNTED` at least.
    """
    if loop is None or loop.stateless:
        return 1
    calls, runs_once = period(loop), bool(loop.once or loop.tables)
    return calls * -(-UNCOUNTED // calls) if runs_once and isinstance(loop.schedule, Cycle) else calls


def walk(
    loop: Loop, specs: Sequence[FixedSpec], ranges: Mapping[str, InputRange], seed: int, calls: int
) -> list[dict[str, Tensor]]:
    """``calls`` inputs of one generation: conditioning that stays, timesteps that fall, samples near each other."""
    inputs = random_inputs(specs, ranges, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    span = ranges.get(loop.timestep, InputRange())
    sample, like = inputs[loop.sample], inputs[loop.timestep]
    made = []
    for index in range(calls):
        time = span.high - (span.high - span.low) * (index + 1) / (calls + 1)
        made.append({**inputs, loop.sample: sample, loop.timestep: torch.full_like(like, time)})
        noise = torch.randn(sample.shape, generator=generator).to(sample.dtype)
        sample = (1 - STRIDE**2) ** 0.5 * sample + STRIDE * noise
    return made


def call_trials(
    call: Interface, ranges: Mapping[str, InputRange], seed: int, *, loop: Loop | None = None, trials: int = 1
) -> list[dict[str, Tensor]]:
    """Random calls, at the captured sizes ``trials`` times and then at others that it takes; of a loop, walks."""
    if loop is None or loop.stateless:
        return trial_inputs(call, call.dimensions, ranges, seed, trials)
    calls, each = compared_calls(loop), trial_specs(call, call.dimensions)
    return [step for index, specs in enumerate(each) for step in walk(loop, specs, ranges, seed + index, calls)]


def timed_calls(
    call: Interface,
    ranges: Mapping[str, InputRange],
    seed: int,
    *,
    loop: Loop | None = None,
    sizes: Mapping[str, int] | None = None,
    steps: int | None = None,
) -> list[dict[str, Tensor]]:
    """What a latency is taken of: one random call, or of a loop a walk of :func:`timed_length`.

    Open dimensions are at ``sizes``, or as they were captured. With ``steps`` it is a whole generation of so many.
    """
    specs = call.inputs_at(sizes)
    if loop is None or (loop.stateless and steps is None):
        return [random_inputs(specs, ranges, seed)]
    return walk(loop, specs, ranges, seed, timed_length(loop) if steps is None else steps)
