"""The pass ``calibrate-cache``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from optpass.analysis.generation import generation_cost
from optpass.analysis.schedules import computed_steps
from optpass.errors import UserError
from optpass.evaluate.calibration import Calibration, Request, Trial
from optpass.ir.loop import Adaptive, Cycle, Listed, Loop, Schedule, schedule_from_json
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.registry import policy_class
from optpass.runtime.sampling import LABELS, Asked

OCTAVES, PER_OCTAVE = 6, 8
"""Factors on a policy's thresholds that are tried: 2⁻⁶ … 2⁶, eight to a doubling."""


class CalibrateCache(Pass):
    """A schedule chosen by hand → the one that keeps most within a budget, measured on the pipeline's own samples.

    The pipeline runs with every step computed, and how far the values that a step would reuse lie from those of
    every earlier step is measured (mean relative L1 distance over states and samples). Of a schedule with two
    outcomes, the computed steps become those that leave the least change unseen, found by dynamic programming;
    of an adaptive one, a common factor on the policy's thresholds is sought. ``speedup: 2`` asks for half the MACs
    of a generation; ``psnr: 30`` for the fewest MACs whose samples are that near, in dB, to computed ones at
    equal seeds (fidelity is taken to fall as more is reused, and found by bisection). What was chosen goes into
    the lock file as ``schedule``, with which no sample is needed again.

    Refuses a loop that does not reuse, and one with more than two ways to make a step; checkpoints that are no
    pipeline; a budget that no schedule of this loop meets.

    Source: calibrated schedules as in SmoothCache (arXiv 2411.10510) and MagCache (arXiv 2506.09045), which measure
    changes from step to step and take thresholds; the choice by dynamic programming is derived.
    """

    speedup: float | None = Field(None, gt=1, description="MACs of a computed generation over those of the schedule's")
    psnr: float | None = Field(None, gt=0, description="fidelity to computed samples at equal seeds, in dB")
    samples: int = Field(4, ge=1, description="samples that are generated for each schedule that is tried")
    steps: int = Field(20, ge=2, description="sampling steps: a listed schedule serves no other number")
    guidance: float | None = Field(None, description="guidance scale; the pipeline's own by default")
    seed: int = Field(0, description="the first sample's seed; the others' follow")
    prompt: str | None = Field(None, description="what a text-to-image pipeline is asked for")
    labels: tuple[int, ...] = Field(LABELS, min_length=1, description="classes, in turn")
    call: dict[str, Any] = Field(default_factory=dict, description="further arguments of the pipeline's call")
    schedule: dict[str, Any] | None = Field(None, description="what an earlier run chose: nothing is measured")

    contract = approximate()
    executes = True
    needs = "samples of the pipeline"

    @field_validator("schedule")
    @classmethod
    def _is_schedule(cls, schedule: dict[str, Any] | None) -> dict[str, Any] | None:
        if schedule is None:
            return None
        try:
            schedule_from_json(schedule, ("full", "reuse"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no schedule as a manifest has it: {error!r}") from error
        return schedule

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.schedule is None and (self.speedup is None) == (self.psnr is None):
            raise ValueError("give one budget: speedup or psnr")
        return self

    @property
    def executing(self) -> bool:
        return self.schedule is None

    def requires(self, program: Program) -> list[str]:
        if program.loop is None or len(program.loop.variants) == 1:
            return ["no step reuses anything: run a caching pass before it"]
        if len(program.loop.variants) > 2:
            return [f"steps are made in {len(program.loop.variants)} ways, and a budget chooses between two"]
        if self.schedule is None and not program.origin.pipeline:
            return ["calibration runs the pipeline, and the checkpoint is a model alone: name the pipeline's folder"]
        return []

    def run(self, program: Program, context: Context) -> Program:
        loop = program.loop
        assert loop is not None
        if self.schedule is not None:
            schedule = schedule_from_json(self.schedule, tuple(loop.variants))
        else:
            schedule = self._calibrated(program, loop, context)
            context.settle(schedule=schedule.as_json())
        if schedule == loop.schedule:
            return program
        context.rewrote("schedule", loop.computed)
        return replace(program, loop=replace(loop, schedule=schedule))

    def _calibrated(self, program: Program, loop: Loop, context: Context) -> Schedule:
        asked = Asked(self.prompt, self.labels, None, self.steps, self.guidance, self.call)
        calibration = Calibration(program, Request(asked, self.samples, self.seed))
        computed = calibration.computed
        adaptive = _Scaled(loop.schedule) if isinstance(loop.schedule, Adaptive) else None
        chosen = _Search(adaptive or _Spread(program, computed.changes), calibration).within(self.speedup, self.psnr)
        context.facts["calibration"] = {
            "budget": {"speedup": self.speedup} if self.psnr is None else {"psnr": self.psnr},
            "schedule": chosen.schedule.as_json(),
            "speedup": chosen.speedup,
            "psnr": chosen.psnr,
            "steps": computed.steps,
            "samples": self.samples,
            "computed": list(chosen.computed),
            "states": computed.changes.diagonal(1).tolist(),
            "blocks": {path: list(values) for path, values in computed.blocks.items()},
        }
        return chosen.schedule


class _Family(ABC):
    """Schedules of one kind, numbered from the one that reuses least, 0, to ``last``."""

    last: int

    @abstractmethod
    def schedule(self, index: int) -> Schedule:
        """The schedule of a number."""

    def speedup(self, index: int) -> float | None:
        """What it saves, where that is known without a trial."""
        return None


class _Spread(_Family):
    """Schedules of two outcomes, by how many steps reuse."""

    def __init__(self, program: Program, changes: Tensor) -> None:
        assert program.loop is not None
        self._program, self._loop, self._changes = program, program.loop, changes
        self.last = len(changes) - 1
        self._whole = self._macs(Cycle((self._loop.computed,)))

    def schedule(self, index: int) -> Schedule:
        steps = len(self._changes)
        return Listed(computed_steps(self._changes, steps - index), steps)

    def speedup(self, index: int) -> float:
        return self._whole / self._macs(self.schedule(index))

    def _macs(self, schedule: Schedule) -> int:
        program = replace(self._program, loop=replace(self._loop, schedule=schedule))
        return generation_cost(program, len(self._changes)).macs


class _Scaled(_Family):
    """An adaptive schedule, the thresholds of its policy scaled."""

    last = 2 * OCTAVES * PER_OCTAVE

    def __init__(self, schedule: Adaptive) -> None:
        self._schedule = schedule
        self._policy = policy_class(schedule.policy).from_options(schedule.options, owner=f"policy {schedule.policy!r}")
        if self._policy.scaled(1.0) is None:
            raise UserError(f"policy {schedule.policy!r} has nothing that calibration could scale")

    def schedule(self, index: int) -> Schedule:
        scaled = self._policy.scaled(2.0 ** (index / PER_OCTAVE - OCTAVES))
        assert scaled is not None
        return replace(self._schedule, options=scaled.as_options())


class _Search:
    """Looks for the schedule of a family that meets a budget; each is tried once."""

    def __init__(self, family: _Family, calibration: Calibration) -> None:
        self._family, self._calibration = family, calibration
        self._tried: dict[int, Trial] = {}

    def within(self, speedup: float | None, psnr: float | None) -> Trial:
        """The trial that reuses least for ``speedup``, or most for ``psnr``.

        Raises:
            UserError: none does.
        """
        if speedup is not None:
            if (most := self._speedup(self._family.last)) < speedup:
                # Rounded down, or 1.1 would be out of reach of 1.1.
                found = math.floor(1000 * most) / 1000
                raise UserError(f"a speed-up of {speedup:g} is out of reach: reusing most, this loop has {found:g}")
            return self._trial(1 + self._boundary(lambda index: self._speedup(index) < speedup))
        assert psnr is not None
        if (least := self._trial(1).psnr) < psnr:
            raise UserError(f"{psnr:g} dB are out of reach: reusing least, the samples are at {least:.1f} dB")
        return self._trial(max(1, self._boundary(lambda index: self._trial(index).psnr >= psnr)))

    def _boundary(self, holds: Callable[[int], bool]) -> int:
        """The last index at which ``holds`` does; taken to do so up to somewhere, and at 0."""
        low, high = 0, self._family.last + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    def _speedup(self, index: int) -> float:
        known = self._family.speedup(index)
        return self._trial(index).speedup if known is None else known

    def _trial(self, index: int) -> Trial:
        if index not in self._tried:
            self._tried[index] = self._calibration.trial(self._family.schedule(index))
        return self._tried[index]
