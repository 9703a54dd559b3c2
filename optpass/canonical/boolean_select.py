"""``where`` and ``masked_fill`` of booleans → logic.

    where(c, a, b)           (c & a) | (~c & b)
    masked_fill(a, c, True)  a | c
    masked_fill(a, c, False) a & ~c

ONNX Runtime has no ``Where`` kernel for booleans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import Graph

aten = torch.ops.aten


def boolean_select(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Spell every selection among booleans with ``logical_and``, ``logical_or`` and ``logical_not``."""
    for node in graph.calls:
        if node.target not in RULES or node.meta["val"].dtype != torch.bool:
            continue
        arguments: Any = node.args
        with graph.before(node):
            result = RULES[node.target](graph, node, *arguments)
        node.replace_all_uses_with(result)
        graph.fx.erase_node(node)


def _where(graph: Graph, like: Node, condition: Node, a: Any, b: Any) -> Node:
    otherwise = graph.call(aten.logical_not.default, condition, like=like)
    kept = graph.call(aten.logical_and.default, condition, a, like=like)
    other = graph.call(aten.logical_and.default, otherwise, b, like=like)
    return graph.call(aten.logical_or.default, kept, other, like=like)


def _masked_fill(graph: Graph, like: Node, source: Node, mask: Node, value: Any) -> Node:
    if isinstance(value, Node):
        return _where(graph, like, mask, value, source)
    if value:
        return graph.call(aten.logical_or.default, source, mask, like=like)
    kept = graph.call(aten.logical_not.default, mask, like=like)
    return graph.call(aten.logical_and.default, source, kept, like=like)


RULES = {
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
}
