"""Executing a graph node by node, with values by the names of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node, map_arg

from optpass.ir.graph import Graph

Values = dict[str, Any]
"""What nodes gave, by their names."""


def given(graph: Graph, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Values:
    """What there is before the first operator: ``weights`` and ``inputs`` by name."""
    values: Values = {node.name: weights[str(node.target)] for node in graph.fx.nodes if node.op == "get_attr"}
    for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
        values[node.name] = inputs[spec.name].to(spec.dtype)
    return values


def execute(graph: Graph, values: Values, instead: Mapping[str, Callable[[Node, Values], Any]]) -> dict[str, Tensor]:
    """The outputs of ``graph`` by name, nodes named in ``instead`` giving what that says.

    ``values`` are those that were :func:`given`; what nothing reads any more leaves them.
    """
    drops = last_reads(graph.fx.nodes)
    for node in graph.calls:
        values[node.name] = instead.get(node.name, call)(node, values)
        for name in drops.get(node, ()):
            del values[name]
    return outputs(graph, values)


def side_by_side(
    graph: Graph,
    weights: Mapping[str, Tensor],
    calls: Iterable[Mapping[str, Tensor]],
    instead: Mapping[str, Callable[[Node, list[Values]], list[Any]]],
) -> None:
    """Take all ``calls`` down ``graph`` together, operator by operator, as far as the last that ``instead`` names.

    What those give, in every call, is what ``instead`` says for the values of all.
    """
    values, drops = [given(graph, weights, inputs) for inputs in calls], last_reads(graph.fx.nodes)
    left = set(instead)
    for node in graph.calls:
        if not left:
            return
        left.discard(node.name)
        run = instead.get(node.name)
        results = run(node, values) if run else [call(node, known) for known in values]
        for known, result in zip(values, results, strict=True):
            known[node.name] = result
            for name in drops.get(node, ()):
                del known[name]


def outputs(graph: Graph, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """What ``graph`` returns, by name, once everything is in ``values``."""
    (results,) = bound(graph.output_node, values)[0]
    return dict(zip(graph.signature.outputs, results, strict=True))


def bound(node: Node, *values: Mapping[str, Any]) -> tuple[Any, Any]:
    """Arguments and keywords of ``node`` with values in place of nodes; of several mappings the last that has one."""

    def value(operand: Node) -> Any:
        return next(known[operand.name] for known in reversed(values) if operand.name in known)

    return map_arg(node.args, value), map_arg(node.kwargs, value)


def call(node: Node, *values: Mapping[str, Any]) -> Any:
    """What the operator ``node`` gives for ``values``."""
    arguments, keywords = bound(node, *values)
    return node.target(*arguments, **keywords)  # type: ignore[operator]


def last_reads(nodes: Iterable[Node]) -> dict[Node, list[str]]:
    """By operator, the operators' values that nothing reads after it; what the graph returns is not among them."""
    last = {operand: node for node in nodes for operand in node.all_input_nodes}
    found: dict[Node, list[str]] = {}
    for operand, node in last.items():
        if operand.op == "call_function" and node.op == "call_function":
            found.setdefault(node, []).append(operand.name)
    return found
