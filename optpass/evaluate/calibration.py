"""Generations of one pipeline under several schedules of one loop: what each saves, and what it costs in fidelity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.cost import measure
from optpass.analysis.residuals import residuals
from optpass.evaluate.difference import IDENTICAL_DB, program_runners
from optpass.evaluate.generation import pipeline_folder
from optpass.evaluate.observation import Course, Observation, computing, watching_runners
from optpass.evaluate.quality import psnr
from optpass.evaluate.widened import widened
from optpass.ir.graph import Graph
from optpass.ir.interface import Interface
from optpass.ir.loop import Loop, Schedule
from optpass.ir.program import Program
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import Asked, Samples, drive


@dataclass(frozen=True)
class Request:
    """What the pipeline is asked for: ``samples`` of them, from ``seed`` on."""

    asked: Asked
    samples: int
    seed: int


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried.

    ``speedup`` is how many times fewer MACs its generations took than computed ones; ``psnr`` is that of its samples
    against theirs, in dB; ``computed`` in which share of the generations each step was computed.
    """

    schedule: Schedule
    speedup: float
    psnr: float
    computed: tuple[float, ...]


@dataclass(frozen=True)
class Computed:
    """Generations that computed every step.

    ``changes`` [n, n] is how far the reused states at step j (column) are from those at step i (row), the mean over
    states and generations of relative L1 distances; ``blocks`` the change of what each block adds, by its path, at
    every step but the first from the step before.
    """

    changes: Tensor
    blocks: Mapping[str, tuple[float, ...]]

    @property
    def steps(self) -> int:
        return len(self.changes)


class Calibration:
    """Runs a Program's pipeline in float32, its weights and the pipeline's other models being read once."""

    def __init__(self, program: Program, request: Request) -> None:
        """
        Raises:
            UserError: the Program is no component of a pipeline folder.
        """
        self._macs = {name: entry.totals.macs for name, entry in measure(program).entries.items()}
        self._folder = pipeline_folder(program)
        # PyTorch computes half precision on a CPU many times slower.
        self.program, self.request = widened(program), request
        assert self.program.loop is not None
        self.loop = self.program.loop
        self._runners = program_runners(self.program)
        self._pipeline: object | None = None
        self.computed = self._observed()

    def trial(self, schedule: Schedule) -> Trial:
        """Generate with ``schedule``."""
        program = replace(self.program, loop=replace(self.loop, schedule=schedule))
        observation = Observation(program, self._runners)
        samples = self._generate(observation)
        courses = observation.courses()
        shares = Counter(step for course in courses for step in course.computed)
        return Trial(
            schedule,
            self._spent / self._cost(observation),
            min(psnr(self._samples.frames, samples.frames), IDENTICAL_DB),
            tuple(shares[step] / len(courses) for step in range(len(courses[0].states))),
        )

    def _observed(self) -> Computed:
        """Generate with every step computed, which is what trials are compared with."""
        program = replace(self.program, loop=computing(self.loop))
        chain = self.loop.variants[self.loop.computed]
        runners = watching_runners(program, {name: block_branches(program.entries[name]) for name in chain})
        observation = Observation(program, runners, reused_states(program, self.loop))
        self._samples = self._generate(observation)
        self._spent = self._cost(observation)
        courses = observation.courses()
        changes = [course.changes_of(state) for course in courses for state in course.states[0]]
        return Computed(torch.stack(changes).mean(0), _by_block(courses))

    def _generate(self, observation: Observation) -> Samples:
        component = self.program.origin.component
        if self._pipeline is None:
            self._pipeline = build_pipeline(self._folder, {component: observation.module})
        setattr(self._pipeline, component, observation.module)
        request = self.request
        return drive(self._pipeline, samples=request.samples, asked=request.asked, seed=request.seed)

    def _cost(self, observation: Observation) -> int:
        return sum(count * self._macs[name] for name, count in observation.module.statistics.items())


def reused_states(program: Program, loop: Loop) -> list[str]:
    """The states by which a step that reuses reads what a computed one wrote."""
    interfaces = {name: Interface.of(program.entries[name]) for name in loop.entries}
    written = {state for name in loop.variants[loop.computed] for state in interfaces[name].writes}
    own: set[str] = set()
    found: list[str] = []
    for name in loop.variants[loop.reused]:
        found += [state for state in interfaces[name].reads if state in written - own and state not in found]
        own |= set(interfaces[name].writes)
    return found


def block_branches(graph: Graph) -> dict[str, Node]:
    """What each residual block adds to its stream, by the block's path, with a number where it adds several times."""
    found = residuals(graph).found
    inner = {each for residual in found for each in residual.inner}
    outer = [residual for residual in found if residual not in inner]
    return {f"{residual.path}#{index}": residual.branch for index, residual in enumerate(outer)}


def _by_block(courses: Sequence[Course]) -> dict[str, tuple[float, ...]]:
    """The mean change at each step, over generations and over the branches of a block."""
    rows: dict[str, list[list[float]]] = {}
    for course in courses:
        for name, values in course.changes.items():
            rows.setdefault(name.rpartition("#")[0], []).append(values)
    return {path: tuple(torch.tensor(values).mean(0).tolist()) for path, values in rows.items()}
