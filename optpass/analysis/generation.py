"""What a whole generation costs: the entries of a loop, as often as its schedule calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from optpass.analysis.cost import Cost, measure
from optpass.ir.loop import Cycle, Listed, Loop, Sampling
from optpass.ir.program import Program


@dataclass(frozen=True)
class GenerationCost:
    """MACs of the ``calls`` (by entry) that ``steps`` steps take; ``macs_attention`` are QKᵀ and AV alone.

    ``bound`` is true where the schedule decides at run time: the figures are then those of a generation
    that computes every step.
    """

    steps: int
    calls: Mapping[str, int]
    macs: int
    macs_attention: int
    bound: bool

    def flops(self, *, attention: bool = True) -> int:
        """2·MAC; ``attention=False`` leaves QKᵀ and AV out."""
        return 2 * (self.macs if attention else self.macs - self.macs_attention)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "calls": dict(self.calls)}


@dataclass(frozen=True)
class SampleCost:
    """What one sample takes of a sampled model.

    An evaluation is a row of a call's batch, and costs the call's ``batch``-th part: ``macs`` in the mean of a period
    of the schedule, of which ``macs_attention`` are QKᵀ and AV. ``total`` and ``total_attention`` are those of all
    evaluations of a sample, ``None`` where no ``sampling`` says how many there are; ``bound`` is as in
    :class:`GenerationCost`.
    """

    batch: int
    macs: int
    macs_attention: int
    sampling: Sampling | None = None
    total: int | None = None
    total_attention: int | None = None
    bound: bool = False

    def as_json(self) -> dict[str, Any]:
        sampling = {**self.sampling.as_json(), "evaluations": self.sampling.evaluations} if self.sampling else None
        return {**asdict(self), "sampling": sampling}


def sample_cost(program: Program, cost: Cost) -> SampleCost | None:
    """That of a sample of ``program``, which costs ``cost``; ``None`` for one without a loop."""
    loop = program.loop
    if loop is None:
        return None
    batch = _batch(loop, program)
    found = SampleCost(batch, cost.totals.macs // batch, cost.totals.macs_attention // batch)
    if loop.sampling is None:
        return found
    generation, share = generation_cost(program, loop.sampling.steps, cost), Fraction(loop.sampling.guidance, batch)
    return replace(
        found,
        sampling=loop.sampling,
        total=round(share * generation.macs),
        total_attention=round(share * generation.macs_attention),
        bound=generation.bound,
    )


def _batch(loop: Loop, program: Program) -> int:
    """Rows of the sample that a call takes, an open batch as it was captured."""
    for entry in program.entries.values():
        for spec in entry.inputs_at():
            if spec.name == loop.sample and spec.shape:
                return spec.shape[0]
    return 1


def generation_cost(program: Program, steps: int, cost: Cost | None = None) -> GenerationCost:
    """That of ``steps`` calls of ``program``, which costs ``cost``; of the first generation after it was loaded.

    Raises:
        ValueError: the Program has no loop.
    """
    if program.loop is None:
        raise ValueError("a Program without a loop makes no generations")
    calls, cost = calls_of(program.loop, steps), cost or measure(program)
    known = all(variant_at(program.loop, step) for step in range(steps))
    totals = {name: cost.entries[name].totals for name in calls}
    return GenerationCost(
        steps,
        calls,
        sum(count * totals[name].macs for name, count in calls.items()),
        sum(count * totals[name].macs_attention for name, count in calls.items()),
        not known,
    )


def calls_of(loop: Loop, steps: int) -> dict[str, int]:
    """How often each entry runs in ``steps`` steps; every one computed where the schedule decides at run time."""
    variants = Counter(variant_at(loop, step) or loop.computed for step in range(steps))
    found = Counter(dict.fromkeys(loop.once, 1) | dict.fromkeys(loop.tables, steps))
    for variant, count in variants.items():
        for entry in loop.variants[variant]:
            found[entry] += count
    return {name: found[name] for name in loop.entries}


def variant_at(loop: Loop, step: int) -> str | None:
    """The variant of a step; ``None`` where it depends on timesteps or on what is measured."""
    match loop.schedule:
        case Cycle(variants, None):
            return variants[step % len(variants)]
        case Listed(computed):
            return loop.computed if step in computed else loop.reused
    return loop.computed if step == 0 else None
