"""What a sampled model computes from step to step, watched while its pipeline runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from optpass.errors import UserError
from optpass.evaluate.difference import program_runners
from optpass.ir.graph import Graph
from optpass.ir.loop import Cycle
from optpass.ir.program import Program
from optpass.ir.signature import Signature
from optpass.pipeline.target import Runner
from optpass.runtime.generations import Generation
from optpass.runtime.loop import LoopRunner
from optpass.runtime.looped import LoopModule, looped_module

WATCH = "watch."
"""Begins the names of outputs that are added to be watched, and that the loop never sees."""
ELEMENTS = 1 << 16
"""Elements of a value that are watched, evenly strided: enough for a mean, and 13 MB for fifty steps."""


@dataclass(frozen=True)
class Trajectory:
    """One generation: what each value was at every step, [steps, elements] by name, states and watched ones apart."""

    states: Mapping[str, Tensor]
    watched: Mapping[str, Tensor]

    @property
    def steps(self) -> int:
        return len(next(iter(self.states.values())))


class Observation:
    """A module that computes every step of ``program``, and remembers what it computed.

    ``watched`` are values of entries, by entry and by a name for the record; states are watched without being asked.
    """

    def __init__(self, program: Program, watched: Mapping[str, Mapping[str, Node]]) -> None:
        assert program.loop is not None
        # The loop's other variants are there, and never run.
        loop = replace(program.loop, schedule=Cycle((program.loop.computed,)))
        entries = {name: _with_outputs(graph, watched.get(name, {})) for name, graph in program.entries.items()}
        runners = program_runners(replace(program, entries=entries))
        self._seen: dict[str, Tensor] = {}
        self._made: dict[Generation, list[dict[str, Tensor]]] = {}
        own = {name: self._watching(runner) for name, runner in runners.items()}
        self.module: LoopModule = looped_module(replace(program, loop=loop), own)
        self.module.runner = _Watched(self.module.runner, self)

    def saw(self, generation: Generation) -> None:
        """A step of ``generation`` has been made."""
        step = {name: _few(value) for name, value in generation.states.items()}
        self._made.setdefault(generation, []).append({**step, **self._seen})
        self._seen = {}

    def trajectories(self) -> list[Trajectory]:
        """All generations, which must have had the same number of steps.

        Raises:
            UserError: they had not, or there was none: the pipeline does not call the module once per step.
        """
        lengths = {len(steps) for steps in self._made.values()}
        if len(lengths) != 1:
            told = "none" if not lengths else f"{min(lengths)} to {max(lengths)} steps"
            raise UserError(f"the pipeline's generations cannot be told apart ({told}): does it change its conditioning?")
        return [_trajectory(steps) for steps in self._made.values()]

    def _watching(self, runner: Runner) -> Runner:
        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = runner(tensors)
            self._seen |= {name: _few(value) for name, value in outputs.items() if name.startswith(WATCH)}
            return {name: value for name, value in outputs.items() if not name.startswith(WATCH)}

        return run


class _Watched(LoopRunner):
    """Tells an observation of every step."""

    def __init__(self, runner: LoopRunner, observation: Observation) -> None:
        super().__init__(runner.loop, runner.interfaces, runner.runners)
        self._observation = observation

    def _step(self, generation: Generation, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = super()._step(generation, tensors)
        self._observation.saw(generation)
        return outputs


def changes(values: Tensor) -> Tensor:
    """[n, n]: the relative L1 distance ‖v_j − v_i‖₁ / ‖v_j‖₁ of every step j of ``values`` [n, elements] from step i."""
    size = values.abs().sum(1)
    return torch.stack([(values - row).abs().sum(1) for row in values]) / size


def step_changes(values: Tensor) -> Tensor:
    """[n − 1]: those of every step but the first from the step before."""
    return (values[1:] - values[:-1]).abs().sum(1) / values[1:].abs().sum(1)


def _trajectory(steps: list[dict[str, Tensor]]) -> Trajectory:
    values = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    watched = {name.removeprefix(WATCH): value for name, value in values.items() if name.startswith(WATCH)}
    return Trajectory({name: value for name, value in values.items() if not name.startswith(WATCH)}, watched)


def _few(value: Tensor) -> Tensor:
    """At most :data:`ELEMENTS` elements of ``value``, in float32; a copy, for the owner may write into it."""
    flat = value.detach().flatten()
    stride = -(-flat.numel() // ELEMENTS)
    return flat[:: max(stride, 1)].float().clone()


def _with_outputs(graph: Graph, watched: Mapping[str, Node]) -> Graph:
    """A copy of ``graph`` that returns the ``watched`` nodes as well."""
    if not watched:
        return graph
    by_name = {node.name: node for node in graph.fx.nodes}
    whole = graph.copy()
    copies = {node.name: node for node in whole.fx.nodes}
    assert all(by_name[node.name] is node for node in watched.values())
    output = whole.output_node
    results: tuple[Node, ...] = output.args[0]  # type: ignore[assignment]
    output.args = ((*results, *(copies[node.name] for node in watched.values())),)
    names = [*graph.signature.outputs, *(WATCH + name for name in watched)]
    return Graph(whole.fx, Signature.flat(graph.signature.inputs, names), whole.dimensions)


def entries_of(program: Program) -> Iterator[str]:
    """The entries that make a computed step."""
    assert program.loop is not None
    yield from program.loop.variants[program.loop.computed]
