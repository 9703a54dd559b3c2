"""Common subexpressions: one node for all that compute the same thing from the same things."""

from __future__ import annotations

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


def merge_common_subexpressions(graph: Graph, weights: WeightStore) -> list[Node]:
    """Let every node that computes what an earlier one computes give way to it; the nodes that went.

    Two nodes are the same if operator and arguments are: nodes by what they were merged into, literals by
    type and value (1 is not 1.0), arguments left out by the operator's defaults, weights by name or by
    equal expression. Linear in the nodes. Reads of one weight become one read, which counts as no change.
    """
    merged: list[Node] = []
    seen: dict[Any, Node] = {}
    for node in list(graph.fx.nodes):
        key = _key(node, weights)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node:
            continue
        node.replace_all_uses_with(first)
        graph.fx.erase_node(node)
        if node.op != "get_attr" or node.target != first.target:
            merged.append(node)
    return merged


def is_deterministic(node: Node) -> bool:
    """Whether a call gives the same result every time; attention does in a dialect without dropout."""
    if node.target in UNDEFINED:
        return False
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return True
    return node.target is aten.scaled_dot_product_attention.default and argument(node, "dropout_p") == 0


def _key(node: Node, weights: WeightStore) -> Any:
    """What the node computes, hashable; ``None`` for what is never merged."""
    if node.op == "get_attr":
        return ("weight", _weight_key(str(node.target), weights))
    if node.op != "call_function" or not is_deterministic(node):
        return None
    arguments = _arguments(node)
    if node.target is aten.mul.Tensor or (node.target is aten.add.Tensor and argument(node, "alpha") == 1):
        # Either order of the operands gives the same bits.
        arguments = (*sorted(arguments[:2], key=repr), *arguments[2:])
    return (node.target, arguments)


def _weight_key(name: str, weights: WeightStore) -> Any:
    expression = weights[name]
    if isinstance(expression, Constant) and expression.computed and expression.nbytes <= LARGEST:
        # A table that the code made twice is equal by its bytes; parameters that happen to be equal stay two.
        return tensor_digest(expression.value)
    return expression


def _arguments(node: Node) -> tuple[Any, ...]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return (_literal(node.args), _literal(sorted(node.kwargs.items())))
    return tuple(_literal(argument(node, item.name)) for item in node.target._schema.arguments)


def _literal(value: Any) -> Any:
    """A hashable stand-in that is equal only for equal type and value, -0.0 and 0.0 told apart."""
    if isinstance(value, Node):
        return ("node", value.name)
    if isinstance(value, (list, tuple)):
        return tuple(map(_literal, value))
    return (type(value).__name__, repr(value) if isinstance(value, float) else value)
