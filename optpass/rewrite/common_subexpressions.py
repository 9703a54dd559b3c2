"""Common subexpressions: one node for all that compute the same thing from the same things."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.computations import computation
from optpass.ir.graph import Graph
from optpass.ir.weights import WeightStore


def merge_common_subexpressions(graph: Graph, weights: WeightStore) -> list[Node]:
    """Let every node that computes what an earlier one computes give way to it; the nodes that went.

    Two nodes are the same if their :func:`computation` is, nodes among the arguments being what they were merged
    into. Linear in the nodes. Reads of one weight become one read, which counts as no change.
    """
    merged: list[Node] = []
    seen: dict[Any, Node] = {}
    for node in list(graph.fx.nodes):
        key = computation(node, weights, _name)
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


def _name(node: Node) -> str:
    return node.name
