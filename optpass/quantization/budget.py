"""Budgets of a mixed precision, and the search for what stays real under one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from optpass.errors import UserError
from optpass.evaluate.difference import IDENTICAL_DB
from optpass.evaluate.engine_latency import engine_latency
from optpass.evaluate.generation import pipeline_folder
from optpass.evaluate.latency import RUNS
from optpass.evaluate.quality import psnr
from optpass.evaluate.scope import Scope
from optpass.ir.program import Program
from optpass.pipeline.target import Target
from optpass.quantization.sensitivity import Calls, outputs_noise, outputs_of
from optpass.runtime.looped import program_module
from optpass.runtime.sampling import Asked, generate

Trial = Callable[[int], Program]
"""The quantised Program with so many modules real."""


@dataclass(frozen=True)
class Budget(ABC):
    """A ``bound`` on a figure of a quantised Program beside the ``original``."""

    title: ClassVar[str]
    unit: ClassVar[str]
    bound: float
    original: Program

    @abstractmethod
    def figure(self, program: Program) -> float:
        """Measure ``program``."""

    def holds(self, figure: float) -> bool:
        return figure >= self.bound

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "bound": self.bound, "unit": self.unit}


@dataclass(frozen=True)
class SignalBudget(Budget):
    """Signal to noise of the outputs of ``calls``, in dB, at least."""

    title = "snr"
    unit = "dB"
    calls: Calls

    def figure(self, program: Program) -> float:
        return outputs_noise(self._expected, outputs_of(program, self.calls)).snr

    @cached_property
    def _expected(self) -> list[dict[str, Tensor]]:
        return outputs_of(self.original, self.calls)


@dataclass(frozen=True)
class SampleBudget(Budget):
    """PSNR of ``samples`` of the pipeline from ``seed`` on, in dB, at least."""

    title = "psnr"
    unit = "dB"
    asked: Asked
    samples: int
    seed: int

    def figure(self, program: Program) -> float:
        return min(psnr(self._expected, self._frames(program)), IDENTICAL_DB)

    @cached_property
    def _expected(self) -> Tensor:
        return self._frames(self.original)

    def _frames(self, program: Program) -> Tensor:
        replaced = {program.origin.component: program_module(program)}
        folder = pipeline_folder(program)
        return generate(folder, replaced, samples=self.samples, asked=self.asked, seed=self.seed).frames


@dataclass(frozen=True)
class LatencyBudget(Budget):
    """Time of the engine of ``target`` over that of the original's, at most."""

    title = "latency"
    unit = "×"
    target: Target
    runs: int = RUNS

    def figure(self, program: Program) -> float:
        scope = Scope(self.original, program, before=self.original, target=self.target)
        return engine_latency(scope, runs=self.runs, seed=0).ratio.median

    def holds(self, figure: float) -> bool:
        return figure <= self.bound


def fewest_real(budget: Budget, trial: Trial, modules: int) -> tuple[int, dict[int, float]]:
    """The fewest modules of so many that must be real for ``budget``, and the figure at every number that was tried.

    Raises:
        UserError: with one module left in integers the budget is still not kept.
    """
    tried: dict[int, float] = {}

    def holds(count: int) -> bool:
        tried[count] = budget.figure(trial(count))
        return budget.holds(tried[count])

    if holds(0):
        return 0, tried
    if modules < 2 or not holds(modules - 1):
        best = max(tried.values(), key=lambda value: -math.inf if math.isnan(value) else value)
        raise UserError(_out_of_reach(budget, best, "with all modules real but one"))
    low, high = 0, modules - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high, tried


def most_real(budget: Budget, trial: Trial, modules: int) -> tuple[int, dict[int, float]]:
    """The most modules of so many that can be real within ``budget``, and the figure at every number that was tried.

    Raises:
        UserError: with every module in integers the budget is not kept.
    """
    tried: dict[int, float] = {}

    def holds(count: int) -> bool:
        tried[count] = budget.figure(trial(count))
        return budget.holds(tried[count])

    if not holds(0):
        raise UserError(_out_of_reach(budget, tried[0], "with every module in integers"))
    low, high = 0, modules
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, tried


def _out_of_reach(budget: Budget, best: float, where: str) -> str:
    return f"{budget.title} {budget.bound:g} {budget.unit} is out of reach: {where} it is {best:.3g} {budget.unit}"
