"""A loop's entries as one runner: the same call at every step, and what the schedule says inside."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.ir.graph import TensorSpec
from optpass.ir.guards import size_at
from optpass.ir.interface import Interface, call_interface
from optpass.ir.loop import CLOCK, ELAPSED, INTERVALS, LOOP, METRIC, PAST, PRESENT, Adaptive, Cycle, Listed, Loop
from optpass.ir.program import Program
from optpass.pipeline.target import Runner
from optpass.runtime.generations import Generation, Generations
from optpass.runtime.policy import Moment, Policy
from optpass.runtime.tables import Table


class LoopRunner:
    """Runs the entries of ``loop`` by its schedule: tensors of the module's call by name → its outputs by name.

    It keeps the states of each generation apart (:class:`~optpass.runtime.generations.Generations`); a call that
    fails ends its generation. ``statistics`` counts the calls of every entry.
    """

    def __init__(self, loop: Loop, interfaces: Mapping[str, Interface], runners: Mapping[str, Runner]) -> None:
        """
        Raises:
            UserError: the schedule's policy is unknown, or reads a metric that no entry tells.
        """
        self.loop = loop
        self.interfaces = interfaces
        self.runners = runners
        self.generations = Generations(loop)
        self.statistics: Counter[str] = Counter()
        self.steps: int | None = None if isinstance(loop.schedule, Cycle) else loop.schedule.of
        self._call = call_interface(loop, interfaces)
        self._defaults = {name: torch.tensor(value) for name, value in loop.signature.defaults.items()}
        self._policy = _policy(loop, interfaces)
        self._table = Table()

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step; where a loop remembers nothing, whichever. What the call may leave out, it may leave out here.

        Raises:
            UserError: the generation goes on beyond the number of steps that the schedule was made for.
        """
        tensors = {**self._defaults, **tensors}
        if self.loop.stateless:
            (entry,) = self.loop.entries
            return self.runners[entry](tensors)
        generation = self.generations.of(tensors)
        try:
            return self._step(generation, tensors)
        except BaseException:
            self.generations.drop(generation)
            raise

    def reset(self) -> None:
        """The next call starts a generation, whatever it is."""
        self.generations.drop()

    def fork(self) -> LoopRunner:
        """Another runner over the same engines, with generations of its own."""
        other = LoopRunner(self.loop, self.interfaces, self.runners)
        other.steps = self.steps
        other.generations.correlation = self.generations.correlation
        other.generations.ascending = self.generations.ascending
        return other

    def set_steps(self, number: int) -> None:
        """The sampler makes ``number`` steps; of no account to a schedule that serves any number."""
        if self.steps is not None or self._policy is not None:
            self.steps = number

    @property
    def uncounted(self) -> bool:
        """Whether the schedule has to be told the number of steps, and was not."""
        return self.steps is None and self._policy is not None and self._policy.counts

    def _step(self, generation: Generation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_count(generation)
        available = dict(tensors)
        if generation.step == 0:
            generation.sizes = self._sizes(tensors)
            for entry in self.loop.once:
                self._run(entry, generation, available)
        for entry in self.loop.tables:
            generation.states |= self._looked_up(entry, generation, available)
        outputs: dict[str, Tensor] = {}
        begun = self.loop.prefix if self._policy and self._policy.wants() else ()
        for entry in begun:
            outputs |= self._run(entry, generation, available)
        variant = self._variant(generation)
        for entry in self.loop.variants[variant][len(begun) :]:
            outputs |= self._run(entry, generation, available)
        if variant == self.loop.computed:
            generation.computed.append(generation.step)
        return outputs

    def _check_count(self, generation: Generation) -> None:
        steps, listed = self._steps(generation), self.loop.schedule
        if steps is None and self._policy and self._policy.counts:
            raise UserError("this schedule has to know the number of steps: set module.steps to the sampler's")
        if isinstance(listed, Listed) and steps != listed.of:
            raise UserError(f"the schedule lists which of {listed.of} steps are computed, and does not serve {steps}")
        if steps is not None and generation.step >= steps:
            raise UserError(
                f"the schedule was made for {steps} steps, and this generation goes on: set module.steps to the "
                "sampler's number"
            )

    def _steps(self, generation: Generation) -> int | None:
        """The number of steps: as the pipeline says, or as the module was told."""
        counts = self.steps is not None or self._policy is not None
        return generation.said.of if counts and generation.said.of is not None else self.steps

    def _variant(self, generation: Generation) -> str:
        step, loop = generation.step, self.loop
        match loop.schedule:
            case Cycle(variants, within):
                inside = within is None or within[0] <= generation.timestep <= within[1]
                return variants[step % len(variants)] if inside and generation.computed else loop.computed
            case Listed(computed):
                return loop.computed if step in computed else loop.reused
        assert self._policy is not None
        if step == 0:
            return loop.computed
        moment = Moment(
            step, self._steps(generation), generation.computed, generation.metrics, generation.metrics.get(step, {})
        )
        return loop.computed if self._policy.computes(moment) else loop.reused

    def _run(self, entry: str, generation: Generation, available: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one entry, take in what it writes and tells; the call's outputs that it gives."""
        given = {spec.name: self._input(spec.name, entry, generation, available) for spec in self._inputs(entry)}
        self.statistics[entry] += 1
        outputs: dict[str, Tensor] = {}
        for name, value in self.runners[entry](given).items():
            if name.startswith(PRESENT):
                generation.states[name.removeprefix(PRESENT)] = value
            elif name.startswith(METRIC):
                told = generation.metrics.setdefault(generation.step, {})
                told[name.removeprefix(METRIC)] = float(value)
            else:
                outputs[name] = value
        return outputs

    def _inputs(self, entry: str) -> tuple[TensorSpec, ...]:
        return self.interfaces[entry].inputs

    def _input(self, name: str, entry: str, generation: Generation, available: Mapping[str, Tensor]) -> Tensor:
        if name.startswith(PAST):
            state = name.removeprefix(PAST)
            if state not in generation.states:
                generation.states[state] = self._zeros(state, generation)
            return generation.states[state]
        if name.startswith(CLOCK):
            return self._clock(name.removeprefix(CLOCK), entry, generation)
        return available[name]

    def _clock(self, name: str, entry: str, generation: Generation) -> Tensor:
        step, computed = generation.step, generation.computed
        elapsed = float(step - computed[-1]) if computed else math.inf
        if name == ELAPSED:
            return torch.tensor(elapsed)
        spec = next(spec for spec in self._inputs(entry) if spec.name == CLOCK + INTERVALS)
        return torch.tensor([elapsed if index < len(computed) else math.inf for index in range(int(spec.shape[0]))])

    def _zeros(self, state: str, generation: Generation) -> Tensor:
        found = self.loop.states[state]
        assert found.initial == "zeros", f"{state!r} is read before it was written"
        shape = [size if isinstance(size, int) else size_at(size, generation.sizes) for size in found.shape]
        return torch.zeros(shape, dtype=found.dtype)

    def _sizes(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """What this call makes of the open sizes."""
        call = self._call
        shapes = [(spec.name, spec.shape, tuple(tensors[spec.name].shape)) for spec in call.inputs]
        return {**call.dimensions.examples, **call.dimensions.resolve(shapes)}

    def _looked_up(self, entry: str, generation: Generation, available: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What ``entry`` writes, from an earlier call with the same inputs where there was one."""
        given = {spec.name: self._input(spec.name, entry, generation, available) for spec in self._inputs(entry)}

        def made() -> dict[str, Tensor]:
            self.statistics[entry] += 1
            return {name.removeprefix(PRESENT): value for name, value in self.runners[entry](given).items()}

        return self._table.row(entry, given, made)


def call_runners(program: Program, runners: Mapping[str, Runner], steps: int | None = None) -> dict[str, Runner]:
    """What answers calls of ``program``: a loop over ``runners``, its entries', under :data:`LOOP`; or each of them.

    A schedule that has to know the number of steps is told ``steps``, or that of a walk
    (:mod:`optpass.evaluate.walks`).
    """
    from optpass.evaluate.walks import period

    if program.loop is None:
        return dict(runners)
    runner = LoopRunner(program.loop, program.interfaces, runners)
    if runner.uncounted:
        runner.set_steps(steps or period(program.loop))
    return {LOOP: runner}


def _policy(loop: Loop, interfaces: Mapping[str, Interface]) -> Policy | None:
    if not isinstance(loop.schedule, Adaptive):
        return None
    from optpass.pipeline.registry import policy_class

    name = loop.schedule.policy
    policy = policy_class(name).from_options(loop.schedule.options, owner=f"policy {name!r}")
    told = {each for entry in loop.entries for each in interfaces[entry].metrics}
    if missing := sorted(set(policy.wants()) - told):
        raise UserError(f"policy {name!r} reads the metric {missing[0]!r}, which no entry tells")
    return policy
