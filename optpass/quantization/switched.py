"""A quantised graph whose operators can be switched, one by one, between integers and real numbers.

To measure every module of a model takes as many executions as there are modules. Here nothing is built for each: graph
and weights are there once, real and quantised, and what comes before the first operator that is switched is taken
from an earlier execution.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import Graph, example_shape
from optpass.quantization.execution import Values, bound, call, last_reads

KEPT = 2 << 30
"""Bytes of one execution's values that are kept for later ones; where there are more, each begins at the inputs."""


class SwitchedGraph:
    """Executes ``graph`` with any of its operators as they stand in ``quantised``, a copy of it with quantisers.

    ``weights`` has the values of both, by name. The results are those of the graph that has these quantisers alone.
    """

    def __init__(self, graph: Graph, quantised: Graph, weights: Mapping[str, Tensor]) -> None:
        self._graph = graph
        self._nodes = list(graph.fx.nodes)
        self._weights = {node.name: weights[str(node.target)] for node in graph.fx.nodes if node.op == "get_attr"}
        self._integers = dict(_integer_forms(graph, quantised))
        self._constants = self._made_once(weights)
        size = sum(_nbytes(node) for node in self._nodes if node.op == "call_function")
        self._last_reads = {} if size <= KEPT else last_reads(self._nodes)

    @property
    def operators(self) -> list[Node]:
        """What can be switched: nodes of the real graph, in order of execution."""
        return [node for node in self._nodes if node.name in self._integers]

    def run(self, inputs: Mapping[str, Tensor], active: Collection[str]) -> tuple[dict[str, Tensor], Values]:
        """Outputs by name with the ``active`` operators, by names of nodes, in integers; values for :meth:`rerun`."""
        values: Values = dict(self._weights)
        for node, spec in zip(self._graph.placeholders, self._graph.inputs, strict=True):
            values[node.name] = inputs[spec.name].to(spec.dtype)
        given = {} if not self._last_reads else dict(values)
        return self._execute(self._nodes, values, active), given or values

    def rerun(self, values: Values, active: Collection[str], switched: Iterable[Node]) -> dict[str, Tensor]:
        """The outputs where no operator but the ``switched`` differs from the run that gave ``values``."""
        after = _after(switched)
        nodes = self._nodes if self._last_reads else [node for node in self._nodes if node in after]
        return self._execute(nodes, dict(values), active)

    def _execute(self, nodes: Iterable[Node], values: Values, active: Collection[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            for node in nodes:
                if node.op == "call_function":
                    values[node.name] = self._call(node, values, active)
                for name in self._last_reads.get(node, ()):
                    del values[name]
            return self._outputs(values, active)

    def _outputs(self, values: Values, active: Collection[str]) -> dict[str, Tensor]:
        (results,) = self._arguments(self._graph.output_node, values, active)[0]
        return dict(zip(self._graph.signature.outputs, results, strict=True))

    def _call(self, node: Node, values: Values, active: Collection[str]) -> Any:
        arguments, keywords = self._arguments(node, values, active)
        return node.target(*arguments, **keywords)  # type: ignore[operator]

    def _arguments(self, node: Node, values: Values, active: Collection[str]) -> tuple[Any, Any]:
        """What ``node`` is called with: as it stands, or, where it is active, through its quantisers."""
        if node.name not in active:
            return bound(node, values)
        form, *making = reversed(self._integers[node.name])
        made: Values = {}
        for step in reversed(making):
            if step.name in self._constants:
                made[step.name] = self._constants[step.name]
                continue
            made[step.name] = call(step, values, made)
        return bound(form, values, made)

    def _made_once(self, weights: Mapping[str, Tensor]) -> Values:
        """What quantised operators read that depends on weights alone."""
        found: Values = {}
        for *making, _ in self._integers.values():
            for step in making:
                if step.op == "get_attr":
                    found[step.name] = weights[str(step.target)]
                elif all(operand.name in found for operand in step.all_input_nodes):
                    found[step.name] = call(step, found)
        return found


def _integer_forms(graph: Graph, quantised: Graph) -> Iterator[tuple[str, list[Node]]]:
    """Of each operator that reads something else in ``quantised``: what makes that, in order, and last itself."""
    known = {node.name for node in graph.fx.nodes}
    order = {node: index for index, node in enumerate(quantised.fx.nodes)}
    for node in quantised.fx.nodes:
        if node.name not in known:
            continue
        made: set[Node] = set()
        pending = [operand for operand in node.all_input_nodes if operand.name not in known]
        while pending:
            step = pending.pop()
            if step not in made:
                made.add(step)
                pending += [operand for operand in step.all_input_nodes if operand.name not in known]
        if made:
            yield node.name, [*sorted(made, key=order.__getitem__), node]


def _after(nodes: Iterable[Node]) -> set[Node]:
    """``nodes`` and all that depends on them."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.users
    return found


def _nbytes(node: Node) -> int:
    value = node.meta.get("val")
    return math.prod(example_shape(node)) * value.element_size() if isinstance(value, Tensor) else 0
