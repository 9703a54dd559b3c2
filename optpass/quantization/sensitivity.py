"""What the integers of each module cost a model's outputs: with it alone quantised, and with all but it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from optpass.analysis.mac_rules import macs_of
from optpass.evaluate.difference import IDENTICAL_DB, program_runners
from optpass.ir.graph import example_shape, path_of
from optpass.ir.program import Program
from optpass.quantization.program import Quantization
from optpass.quantization.switched import SwitchedGraph

Calls = Mapping[str, Sequence[Mapping[str, Tensor]]]
"""Inputs by name, for each entry."""


@dataclass(frozen=True)
class Noise:
    """What was added to outputs: the mean of ‖ŷ − y‖² / ‖y‖² over outputs and calls, ``y`` being the real ones."""

    power: float

    @property
    def snr(self) -> float:
        """In dB; of nothing added :data:`~optpass.evaluate.difference.IDENTICAL_DB`."""
        return min(-10 * math.log10(self.power), IDENTICAL_DB) if self.power else IDENTICAL_DB

    @property
    def error(self) -> float:
        """The relative L2 error."""
        return math.sqrt(self.power)

    def as_json(self) -> dict[str, float]:
        return {"snr": self.snr, "error": self.error}


@dataclass(frozen=True)
class ModuleNoise:
    """The noise of the module at ``path``: ``alone`` in integers, and of all others ``without`` it.

    ``operations`` are MACs of a call of each entry, and elements of results where nothing is multiplied.
    """

    path: str
    operations: int
    alone: Noise
    without: Noise


@dataclass(frozen=True)
class Sensitivity:
    """The noise of every module that can be quantised, in order of execution, and of all ``together``."""

    modules: tuple[ModuleNoise, ...]
    together: Noise

    def ranked(self) -> list[ModuleNoise]:
        """Most noise for its operations first: what pays most, if it stays real, for what that costs."""
        return sorted(self.modules, key=lambda module: -module.alone.power / max(1, module.operations))


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
        for name, value in reference.items():
            if value.is_floating_point():
                self.total += _power(value, other[name])
                self.count += 1

    def add_nothing(self, reference: Mapping[str, Tensor]) -> None:
        """As of equal outputs."""
        self.count += sum(value.is_floating_point() for value in reference.values())

    @property
    def noise(self) -> Noise:
        return Noise(self.total / self.count if self.count else 0.0)


@dataclass
class _Group:
    """The operators of one module, by entry, and what was measured of it so far."""

    nodes: dict[str, list[Node]] = field(default_factory=dict)
    alone: _Mean = field(default_factory=_Mean)
    without: _Mean = field(default_factory=_Mean)

    @property
    def operations(self) -> int:
        return sum(_operations(node) for nodes in self.nodes.values() for node in nodes)


def group_of(node: Node, depth: int | None) -> str:
    """The path of the module that ``node`` is measured with: its own, or the first ``depth`` parts of it."""
    path = path_of(node)
    return path if depth is None else ".".join(path.split(".")[:depth])


def measure_sensitivity(
    program: Program,
    quantization: Quantization,
    calls: Calls,
    *,
    depth: int | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Sensitivity:
    """Measure every module of ``quantization``, whose ranges are known, on ``calls``.

    Executes every call once for the real model, once for the quantised one, and for each module from its operators on
    twice. Every weight is in memory, real and quantised.

    Raises:
        MissingValuesError: the Program was captured structure-only.
    """
    quantised = quantization.applied(program)
    read = {name for graph in quantised.entries.values() for name in graph.weight_names}
    read |= {name for graph in program.entries.values() for name in graph.weight_names}
    weights = {name: quantised.weights[name].evaluate() for name in read}
    groups: dict[str, _Group] = {}
    together, done, whole = _Mean(), 0, sum(map(len, calls.values()))
    switched = {}
    for entry, graph in program.entries.items():
        switched[entry] = SwitchedGraph(graph, quantised.entries[entry], weights)
        for node in switched[entry].operators:
            groups.setdefault(group_of(node, depth), _Group()).nodes.setdefault(entry, []).append(node)
    for entry, trials in calls.items():
        for inputs in trials:
            _measure(switched[entry], entry, inputs, groups, together)
            done += 1
            progress(done / whole)
    modules = (ModuleNoise(path, g.operations, g.alone.noise, g.without.noise) for path, g in groups.items())
    return Sensitivity(tuple(modules), together.noise)


def _measure(
    graph: SwitchedGraph, entry: str, inputs: Mapping[str, Tensor], groups: Mapping[str, _Group], together: _Mean
) -> None:
    """Every group in one call of ``entry``."""
    every = {node.name for node in graph.operators}
    expected, real = graph.run(inputs, ())
    found, integer = graph.run(inputs, every)
    together.add(expected, found)
    for group in groups.values():
        if nodes := group.nodes.get(entry):
            own = {node.name for node in nodes}
            group.alone.add(expected, graph.rerun(real, own, nodes))
            group.without.add(expected, graph.rerun(integer, every - own, nodes))
        else:
            group.alone.add_nothing(expected)
            group.without.add(expected, found)


def noise_of(program: Program, other: Program, calls: Calls) -> Noise:
    """The noise in the outputs of ``other``'s entries over ``calls``; executes both, one after the other."""
    return outputs_noise(outputs_of(program, calls), outputs_of(other, calls))


def outputs_of(program: Program, calls: Calls) -> list[dict[str, Tensor]]:
    """What ``program``'s entries give, executed by PyTorch, in the order of ``calls``."""
    runners = program_runners(program)
    return [runners[name](inputs) for name, trials in calls.items() for inputs in trials]


def outputs_noise(reference: Sequence[Mapping[str, Tensor]], other: Sequence[Mapping[str, Tensor]]) -> Noise:
    """The noise in the outputs of several calls."""
    mean = _Mean()
    for expected, found in zip(reference, other, strict=True):
        mean.add(expected, found)
    return mean.noise


def _power(reference: Tensor, other: Tensor) -> float:
    signal = float(reference.double().square().sum())
    noise = float((other.double() - reference.double()).square().sum())
    return noise / signal if signal else (math.inf if noise else 0.0)


def _operations(node: Node) -> int:
    if node.op != "call_function":
        return 0
    return macs_of(node) or math.prod(example_shape(node))
