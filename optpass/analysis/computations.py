"""What a node computes, as a key that is equal for equal computations: within a graph, or across several."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.ir.graph import Graph
from optpass.ir.hashing import tensor_digest
from optpass.ir.weights import Constant, WeightStore

UNDEFINED = frozenset({aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default})
"""Operators whose values are whatever the memory held."""
LARGEST = 1 << 20
"""Bytes of a table that the model's code made, up to which it is compared by value."""


def is_deterministic(node: Node) -> bool:
    """Whether a call gives the same result every time; attention does in a dialect without dropout."""
    if node.target in UNDEFINED:
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return True
    return node.target is aten.scaled_dot_product_attention.default and argument(node, "dropout_p") == 0


def computation(node: Node, weights: WeightStore, operand: Callable[[Node], Hashable]) -> Hashable | None:
    """The operator with its arguments, or the weight, that ``node`` stands for; ``None`` for what never equals another.

    Arguments are nodes by what ``operand`` gives for them, literals by type and value (1 is not 1.0), arguments left
    out by the operator's defaults; weights by name or by equal expression. Linear in the arguments.
    """
    if node.op == "get_attr":
        return ("weight", _weight(str(node.target), weights))
    if node.op != "call_function" or not is_deterministic(node):
        return None
    arguments = _arguments(node, operand)
    if node.target is aten.mul.Tensor or (node.target is aten.add.Tensor and argument(node, "alpha") == 1):
        # Either order of the operands gives the same bits.
        arguments = (*sorted(arguments[:2], key=repr), *arguments[2:])
    return (node.target, arguments)


class Numbering:
    """Numbers for values such that equal numbers mean equal values, in all graphs that are asked about.

    Linear in the nodes.
    """

    def __init__(self, weights: WeightStore) -> None:
        self._weights = weights
        self._numbers: dict[Hashable, int] = {}

    def of(self, graph: Graph, given: Mapping[str, int] | None = None) -> dict[Node, int]:
        """The number of every node of ``graph``; inputs have those ``given`` for them, or one of their name."""
        inputs = dict(zip(graph.placeholders, graph.signature.inputs, strict=True))
        found: dict[Node, int] = {}
        for node in graph.fx.nodes:
            if given and inputs.get(node) in given:
                found[node] = given[inputs[node]]
                continue
            if node in inputs:
                key: Hashable = ("input", inputs[node])
            else:
                key = computation(node, self._weights, found.__getitem__)
            # What never equals another has a key of its own.
            found[node] = self._numbers.setdefault(object() if key is None else key, len(self._numbers))
        return found


def _weight(name: str, weights: WeightStore) -> Hashable:
    expression = weights[name]
    if isinstance(expression, Constant) and expression.computed and expression.nbytes <= LARGEST:
        # A table that the code made twice is equal by its bytes; parameters that happen to be equal stay two.
        return tensor_digest(expression.value)
    return expression


def _arguments(node: Node, operand: Callable[[Node], Hashable]) -> tuple[Any, ...]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return (_literal(node.args, operand), _literal(sorted(node.kwargs.items()), operand))
    return tuple(_literal(argument(node, item.name), operand) for item in node.target._schema.arguments)


def _literal(value: Any, operand: Callable[[Node], Hashable]) -> Hashable:
    """A hashable stand-in that is equal only for equal type and value, -0.0 and 0.0 told apart."""
    if isinstance(value, Node):
        return ("node", operand(value))
    if isinstance(value, (list, tuple)):
        return tuple(_literal(item, operand) for item in value)
    return (type(value).__name__, repr(value) if isinstance(value, float) else value)
