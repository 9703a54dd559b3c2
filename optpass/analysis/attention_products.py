"""Attention written out: the matrix products on both sides of a softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch.fx import Node

from optpass.analysis.liveness import storages
from optpass.analysis.operators import (
    FUSED_ATTENTION,
    MASKING,
    MATMULS,
    POINTWISE_BINARY,
    POINTWISE_UNARY,
    SOFTMAX,
    is_view,
)
from optpass.ir.graph import Graph

CARRIERS = POINTWISE_UNARY | POINTWISE_BINARY | MASKING


def attention_products(graph: Graph) -> set[Node]:
    """The nodes whose MACs are QKᵀ and AV: every fused one, and the matrix products of two activations
    that reach a softmax, or are reached from it, through pointwise and shape operators alone.

    A classifier's softmax over ``linear`` counts none. Linear time: no node is visited twice.
    """
    found: set[Node] = set()
    before: set[Node] = set()
    after: set[Node] = set()
    base = storages(graph)
    for node in graph.calls:
        if node.target in FUSED_ATTENTION:
            found.add(node)
        elif node.target in SOFTMAX:
            found |= _reached(node.all_input_nodes, lambda n: n.all_input_nodes, before, base)
            found |= _reached(node.users, lambda n: n.users, after, base)
    return found


def _reached(
    start: Iterable[Node], step: Callable[[Node], Iterable[Node]], seen: set[Node], base: Mapping[Node, Node]
) -> set[Node]:
    found: set[Node] = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in MATMULS and not any(base[operand].op == "get_attr" for operand in node.all_input_nodes):
            found.add(node)
        elif node.op == "call_function" and (node.target in CARRIERS or is_view(node)):
            pending.extend(step(node))
    return found
