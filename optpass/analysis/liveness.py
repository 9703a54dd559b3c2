"""Peak activation memory of a graph that runs its nodes in order."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import is_view
from optpass.ir.graph import Graph
from optpass.ir.sizes import example_sizes


def peak_activation_bytes(graph: Graph) -> int:
    """The most bytes that are alive at once, in the graph's own order.

    A node's result is allocated while its operands are still alive, and freed after its last use.
    Views share their base's storage and keep it alive; no operator works in place. Inputs stay for
    the whole call, because the caller holds them, and outputs to its end. Weights are not counted.
    """
    base = storages(graph)
    end = len(graph.fx.nodes)
    last: dict[Node, int] = {}
    for index, node in enumerate(graph.fx.nodes):
        for operand in (*node.all_input_nodes, node):
            last[base[operand]] = end if node.op == "output" else max(index, last.get(base[operand], 0))
    last |= dict.fromkeys(graph.placeholders, end)
    freed: dict[int, int] = {}
    alive = peak = sum(result_bytes(node) for node in graph.placeholders)
    for index, node in enumerate(graph.fx.nodes):
        if node.op == "call_function" and base[node] is node:
            size = result_bytes(node)
            alive += size
            freed[last[node]] = freed.get(last[node], 0) + size
            peak = max(peak, alive)
        alive -= freed.pop(index, 0)
    return peak


def storages(graph: Graph) -> dict[Node, Node]:
    """For every node, the node whose storage it lives in."""
    base: dict[Node, Node] = {}
    for node in graph.fx.nodes:
        viewed = node.op == "call_function" and is_view(node) and node.all_input_nodes
        base[node] = base[node.all_input_nodes[0]] if viewed else node
    return base


def result_bytes(node: Node) -> int:
    """Bytes of what a node gives, of several tensors together; of a size 0."""
    return _bytes(node.meta["val"])


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return prod(example_sizes(value)) * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 0
