"""Attention written out: the matrix products on both sides of a softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import Node

from optpass.analysis.operators import MASKING, MATMULS, POINTWISE_BINARY, POINTWISE_UNARY, SOFTMAX, aten, is_view
from optpass.ir.graph import Graph

CARRIERS = POINTWISE_UNARY | POINTWISE_BINARY | MASKING
SDPA = aten.scaled_dot_product_attention.default


def attention_products(graph: Graph) -> set[Node]:
    """The nodes whose MACs are QKᵀ and AV: every SDPA, and the matrix products of two activations
    that reach a softmax, or are reached from it, through pointwise and shape operators alone.

    A classifier's softmax over ``linear`` counts none. Linear time: no node is visited twice.
    """
    found: set[Node] = set()
    before: set[Node] = set()
    after: set[Node] = set()
    for node in graph.calls:
        if node.target is SDPA:
            found.add(node)
        elif node.target in SOFTMAX:
            found |= _reached(node.all_input_nodes, lambda n: n.all_input_nodes, before)
            found |= _reached(node.users, lambda n: n.users, after)
    return found


def _reached(start: Iterable[Node], step: Callable[[Node], Iterable[Node]], seen: set[Node]) -> set[Node]:
    found: set[Node] = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in MATMULS and not reads_weight(node):
            found.add(node)
        elif node.op == "call_function" and (node.target in CARRIERS or is_view(node)):
            pending.extend(step(node))
    return found


def reads_weight(node: Node) -> bool:
    """Whether an operand is a weight, possibly seen through views."""
    return any(_base(operand).op == "get_attr" for operand in node.all_input_nodes)


def _base(node: Node) -> Node:
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node
