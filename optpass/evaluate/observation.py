"""What a sampled model computes from step to step, watched while its pipeline runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx import Node

from optpass.errors import UserError
from optpass.evaluate.difference import program_runners
from optpass.ir.graph import Graph
from optpass.ir.loop import Cycle, Loop
from optpass.ir.program import Program
from optpass.ir.signature import Signature
from optpass.pipeline.target import Runner
from optpass.runtime.generations import Generation
from optpass.runtime.loop import LoopRunner
from optpass.runtime.looped import LoopModule, engine_module

WATCH = "watch."
"""Begins the names of outputs that are added to be watched, and that the loop never sees."""
ELEMENTS = 1 << 16
"""Elements of a value that are looked at, evenly strided: enough for a mean; of fifty steps 13 MB a state."""


@dataclass
class Course:
    """One generation: every state at every step, [elements] each; every watched value's change from step to step.

    ``computed`` are the steps that were computed.
    """

    states: list[dict[str, Tensor]] = field(default_factory=list)
    changes: dict[str, list[float]] = field(default_factory=dict)
    computed: list[int] = field(default_factory=list)
    last: dict[str, Tensor] = field(default_factory=dict)

    def changes_of(self, state: str) -> Tensor:
        """[n, n]: the relative L1 distance of the state at step j (column) from that at step i (row)."""
        values = torch.stack([step[state] for step in self.states])
        return torch.stack([_change(row, values) for row in values])


class Observation:
    """A ``module`` that runs ``program`` by its schedule, and what it computed.

    ``runners`` are those of the Program's entries, or of entries with further outputs (:func:`watching_runners`);
    ``states`` are the names of the states to keep.
    """

    def __init__(self, program: Program, runners: Mapping[str, Runner], states: Collection[str] = ()) -> None:
        self._states = states
        self._seen: dict[str, Tensor] = {}
        self._courses: dict[Generation, Course] = {}
        module = engine_module(program, {name: self._watching(runner) for name, runner in runners.items()})
        if not isinstance(module, LoopModule):
            raise ValueError("a model without states has no course")
        module.runner = _Watched(module.runner, self)
        self.module = module

    def saw(self, generation: Generation) -> None:
        """A step of ``generation`` has been made."""
        course = self._courses.setdefault(generation, Course())
        course.states.append({name: _few(generation.states[name]) for name in self._states})
        course.computed = list(generation.computed)
        for name, value in self._seen.items():
            if name in course.last:
                course.changes.setdefault(name, []).append(float(_change(course.last[name], value[None])))
        course.last, self._seen = self._seen, {}

    def courses(self) -> list[Course]:
        """Those of all generations, which had the same number of steps.

        Raises:
            UserError: they had not, or there was none: the pipeline does not call the module step by step.
        """
        found = list(self._courses.values())
        lengths = {len(course.states) for course in found}
        if len(lengths) != 1:
            told = f"{min(lengths)} to {max(lengths)} steps" if lengths else "none"
            raise UserError(f"the pipeline's generations cannot be told apart ({told}); does its conditioning change?")
        return found

    def _watching(self, runner: Runner) -> Runner:
        def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            outputs = runner(tensors)
            self._seen |= {k.removeprefix(WATCH): _few(v) for k, v in outputs.items() if k.startswith(WATCH)}
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


def watching_runners(program: Program, watched: Mapping[str, Mapping[str, Node]]) -> dict[str, Runner]:
    """The entries executed by PyTorch, which tell ``watched`` values besides: by entry and by a name for the record."""
    entries = {name: _with_outputs(graph, watched.get(name, {})) for name, graph in program.entries.items()}
    return program_runners(replace(program, entries=entries))


def computing(loop: Loop) -> Loop:
    """``loop`` with every step computed; its other variants are there and never run."""
    return replace(loop, schedule=Cycle((loop.computed,)))


def _change(reference: Tensor, values: Tensor) -> Tensor:
    """[n]: ‖v − reference‖₁ / ‖v‖₁ of each of ``values`` [n, elements]."""
    return (values - reference).abs().sum(1) / values.abs().sum(1)


def _few(value: Tensor) -> Tensor:
    """At most :data:`ELEMENTS` elements of ``value``, in float32; a copy, for its owner may write into it."""
    flat = value.detach().flatten()
    return flat[:: max(1, -(-flat.numel() // ELEMENTS))].float().clone()


def _with_outputs(graph: Graph, watched: Mapping[str, Node]) -> Graph:
    """A copy of ``graph`` that returns the ``watched`` nodes as well."""
    if not watched:
        return graph
    whole = graph.copy()
    copies = {node.name: node for node in whole.fx.nodes}
    results: tuple[Node, ...] = whole.output_node.args[0]  # type: ignore[assignment]
    whole.output_node.args = ((*results, *(copies[node.name] for node in watched.values())),)
    names = [*graph.signature.outputs, *(WATCH + name for name in watched)]
    return Graph(whole.fx, Signature.flat(graph.signature.inputs, names), whole.dimensions)
