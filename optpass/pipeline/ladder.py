"""The ladder of a recipe: what a sample costs after each pass, as papers on efficient diffusion print it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optpass.analysis.cost import Cost, measure
from optpass.analysis.generation import SampleCost, sample_cost
from optpass.ir.program import Program
from optpass.pipeline.manager import PassRecord

CAPTURED = "captured"


@dataclass(frozen=True)
class Climb:
    """One model on its way: as it was captured, and what each pass made of it."""

    component: str
    original: Program
    records: Sequence[PassRecord]
    cost: Cost = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost", self.records[0].before if self.records else measure(self.original))


@dataclass(frozen=True)
class Rung:
    """A pipeline after a pass: its denoiser's evaluations, and what the other components take beside them.

    ``parameters`` are the denoiser's. ``beside`` are MACs of the others, each of whose methods a sample calls once;
    of these ``beside_attention`` are QKᵀ and AV.
    """

    name: str
    sample: SampleCost
    parameters: int
    beside: int = 0
    beside_attention: int = 0

    def as_json(self) -> dict[str, Any]:
        """``macs`` of an evaluation, ``total`` of a sample in the whole pipeline; QKᵀ and AV of them apart."""
        sample = self.sample
        totals = {
            key: None if own is None else own + beside
            for key, own, beside in (
                ("total", sample.total, self.beside),
                ("total_attention", sample.total_attention, self.beside_attention),
            )
        }
        return {
            "name": self.name,
            "evaluations": sample.sampling.evaluations if sample.sampling else None,
            "macs": sample.macs,
            "macs_attention": sample.macs_attention,
            "beside": self.beside,
            "beside_attention": self.beside_attention,
            **totals,
            "bound": sample.bound,
            "parameters": self.parameters,
        }


def ladder(denoiser: Climb, others: Sequence[Climb] = ()) -> list[Rung]:
    """A rung for the pipeline as captured and one for each pass; none where nothing says how it is sampled.

    Passes of ``others`` come first: what these cost is paid once a sample, whatever becomes of the steps.
    """
    cost, sample = denoiser.cost, sample_cost(_sampled(denoiser), denoiser.cost)
    if sample is None:
        return []
    beside = {part.component: part.cost for part in others}
    found = [_rung(CAPTURED, sample, cost, beside.values())]
    for part in others:
        for record in part.records:
            beside[part.component] = record.after
            found.append(_rung(f"{part.component}: {record.name}", sample, cost, beside.values()))
    for record in denoiser.records:
        assert record.sample is not None
        found.append(_rung(record.name, record.sample, record.after, beside.values()))
    return found if any(rung.sample.sampling for rung in found) else []


def _sampled(climb: Climb) -> Program:
    """The Program as captured, with what a first pass that changes no cost says of how it is sampled."""
    program, first = climb.original, next(iter(climb.records), None)
    if program.loop is None or program.loop.sampling or first is None or first.sample is None:
        return program
    recorded = first.record.promise.kind == "exact" and first.before.totals == first.after.totals
    return replace(program, loop=replace(program.loop, sampling=first.sample.sampling)) if recorded else program


def _rung(name: str, sample: SampleCost, cost: Cost, beside: Collection[Cost]) -> Rung:
    return Rung(
        name,
        sample,
        cost.totals.parameters,
        sum(each.totals.macs for each in beside),
        sum(each.totals.macs_attention for each in beside),
    )
