"""The order that a transposition or permutation puts dimensions in."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.ir.graph import shape_of

PERMUTATIONS = frozenset(
    {aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default}
)


def permutation_of(node: Any) -> tuple[int, ...] | None:
    """The order in which a permutation's result has its operand's dimensions; ``None`` for other operators."""
    if not isinstance(node, Node) or node.target not in PERMUTATIONS:
        return None
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target is aten.permute.default:
        dims: Any = argument(node, "dims")
        return tuple(int(dim) % rank for dim in dims)
    if node.target is aten.numpy_T.default:
        return tuple(reversed(order))
    if rank < 2:
        return tuple(order)
    pair = (argument(node, "dim0"), argument(node, "dim1")) if node.target is aten.transpose.int else (-2, -1)
    order[pair[0]], order[pair[1]] = order[pair[1]], order[pair[0]]
    return tuple(order)


def composed(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """The order that ``first`` and then ``second`` come to."""
    return tuple(first[dim] for dim in second)
