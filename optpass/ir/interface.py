"""The tensors that an entry takes and gives, whatever it is: a graph, or an engine of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from optpass.ir.dimensions import FIXED, Dimensions
from optpass.ir.graph import FixedSpec, Graph, TensorSpec
from optpass.ir.loop import CLOCK, METRIC, PAST, PRESENT, Loop


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of an entry, in the order of its call; their open sizes are those of ``dimensions``."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: Dimensions = FIXED

    @staticmethod
    def of(graph: Graph) -> Interface:
        """That of a graph."""
        return Interface(graph.inputs, graph.outputs, graph.dimensions)

    def inputs_at(self, sizes: Mapping[str, int] | None = None) -> tuple[FixedSpec, ...]:
        """The inputs with open dimensions at ``sizes``, or as they were captured."""
        chosen = {**self.dimensions.examples, **(sizes or {})}
        return tuple(spec.at(chosen) for spec in self.inputs)

    @property
    def reads(self) -> list[str]:
        """The states that it reads."""
        return _after(PAST, self.inputs)

    @property
    def writes(self) -> list[str]:
        """The states that it writes."""
        return _after(PRESENT, self.outputs)

    @property
    def metrics(self) -> list[str]:
        """The metrics that it tells."""
        return _after(METRIC, self.outputs)

    @property
    def clocks(self) -> list[str]:
        """The clocks that it asks for."""
        return _after(CLOCK, self.inputs)


def _after(prefix: str, specs: tuple[TensorSpec, ...]) -> list[str]:
    return [spec.name.removeprefix(prefix) for spec in specs if spec.name.startswith(prefix)]


def call_interface(loop: Loop, entries: Mapping[str, Interface]) -> Interface:
    """That of the whole module: the call's own inputs and outputs, from whichever entry has them."""
    running = [entries[name] for name in loop.entries]
    inputs = {spec.name: spec for entry in running for spec in entry.inputs}
    outputs = {spec.name: spec for entry in running for spec in entry.outputs}
    return Interface(
        tuple(inputs[name] for name in loop.signature.inputs),
        tuple(outputs[name] for name in loop.signature.outputs),
        Dimensions.joined(entry.dimensions for entry in running),
    )
