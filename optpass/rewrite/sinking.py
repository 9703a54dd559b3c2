"""Sinking permutations and reshapes below pointwise operators, to where they meet another and merge with it."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.operators import POINTWISE_BINARY, POINTWISE_UNARY, aten
from optpass.analysis.permutations import PERMUTATIONS, composed, permutation_of
from optpass.ir.graph import Graph, shape_of
from optpass.rewrite.rules import layout, replace
from optpass.rewrite.views import RESHAPES, permuted, spelled


def sink_views(graph: Graph) -> list[Node]:
    """Merge views across the pointwise operators between them; the last operator of every place.

    ``view⁻¹(f(view(x)))`` becomes ``f(x)``, two permutations become one below ``f``, and ``view(x) + view(y)``
    becomes ``view(x + y)``. Only where the values on the way have no other reader, so that nodes become fewer
    each time. Linear: no operator is on the way of two views.
    """
    return [node for node in graph.calls if _is_alive(node) and (_meets_inverse(graph, node) or _joins(graph, node))]


def _is_alive(node: Node) -> bool:
    return bool(node.users)


def _meets_inverse(graph: Graph, last: Node) -> bool:
    """``last(f(first(x)))`` → ``f(x)``, with what both views come to below it."""
    if not last.args or not isinstance(last.args[0], Node):
        return False
    between, first = _chain_above(last.args[0])
    if not between or not _is_only_view(first):
        return False
    order, inner = permutation_of(last), permutation_of(first)
    both_reshape = last.target in RESHAPES and first.target in RESHAPES
    source: Any = first.args[0]
    sizes = spelled(shape_of(last))
    if not (order and inner) and not (both_reshape and (sizes or shape_of(source) == shape_of(last))):
        return False
    with graph.before(last):
        value = source
        for node in reversed(between):
            value = graph.call(node.target, value, *node.args[1:], like=node, **node.kwargs)
        if order and inner:
            value = permuted(graph, value, composed(inner, order), last)
        elif layout(value) != layout(last):
            value = graph.call(aten.reshape.default, value, sizes, like=last)
    replace(last, value)
    return True


def _chain_above(node: Node) -> tuple[list[Node], Node]:
    """The pointwise operators from ``node`` up that have one tensor and one reader, and what the topmost reads."""
    chain = []
    while len(node.users) == 1 and _is_pointwise(node):
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return chain, node


def _is_pointwise(node: Node) -> bool:
    if node.target not in POINTWISE_UNARY | POINTWISE_BINARY or not isinstance(node.args[0], Node):
        return False
    return not any(isinstance(argument, Node) for argument in (*node.args[1:], *node.kwargs.values()))


def _joins(graph: Graph, node: Node) -> bool:
    """``view(x) + view(y)`` → ``view(x + y)``, for every pointwise operator of two tensors of one shape and dtype."""
    if node.target not in POINTWISE_BINARY or len(node.args) != 2 or node.args[0] is node.args[1]:
        return False
    left, right = node.args
    if not _is_only_view(left) or not _is_only_view(right):
        return False
    x, y = left.args[0], right.args[0]  # type: ignore[union-attr]
    if layout(x) != layout(y) or layout(left) != layout(right):  # type: ignore[arg-type]
        return False
    order, sizes = permutation_of(left), spelled(shape_of(node))
    if permutation_of(right) != order or (order is None and sizes is None):
        return False
    with graph.before(node):
        value = graph.call(node.target, x, y, like=node, **node.kwargs)
        if order:
            value = permuted(graph, value, order, node)
        else:
            value = graph.call(aten.reshape.default, value, sizes, like=node)
    replace(node, value)
    return True


def _is_only_view(node: Any) -> bool:
    """Whether ``node`` is a permutation or a reshape with one reader."""
    return isinstance(node, Node) and node.target in PERMUTATIONS | RESHAPES and len(node.users) == 1
