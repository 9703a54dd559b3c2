"""Values of a graph that depend on weights alone, as expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.affine.expressions import transposed
from optpass.analysis.operators import argument, aten
from optpass.ir.graph import shape_of
from optpass.ir.slots import has_slot
from optpass.ir.weights import Cast, Expression, Permute, Reshape, accumulation_dtype, is_larger

NESTING = 100
"""Levels of a weight's expression beyond which it is taken as it is: Python evaluates and prints them by recursion."""


@dataclass
class Constants:
    """The values of a graph that depend on weights alone, as expressions in accumulation precision.

    A transposed, permuted or reshaped weight is one; other arithmetic on weights is not, nor is a weight that may
    be exchanged after the build (``exchangeable``), for what an exchange writes must not grow.
    """

    weights: Mapping[str, Expression]
    known: dict[Node, Expression | None] = field(default_factory=dict)
    exchangeable: list[Node] = field(default_factory=list)

    def __call__(self, value: Any) -> Expression | None:
        """The expression of ``value``, or None where it is none."""
        if not isinstance(value, Node):
            return None
        if value not in self.known:
            self.known[value] = self._find(value)
        return self.known[value]

    def _find(self, node: Node) -> Expression | None:
        if node.op == "get_attr":
            leaf = self.weights[str(node.target)]
            if has_slot(leaf):
                self.exchangeable.append(node)
                return None
            if leaf.dtype.is_complex or _is_deeper(leaf, NESTING) or is_larger(leaf):
                return None
            wide = accumulation_dtype(leaf.dtype) if leaf.dtype.is_floating_point else torch.float32
            return leaf if wide == leaf.dtype else Cast(leaf, wide)
        if node.op != "call_function" or node.target not in REARRANGED:
            return None
        source = self(node.args[0])
        return None if source is None else REARRANGED[node.target](node, source)


def _is_deeper(expression: Expression, limit: int) -> bool:
    """Whether more than ``limit`` expressions lie within one another."""
    level: Sequence[Expression] = (expression,)
    for _ in range(limit):
        # One that occurs twice on a level is followed once.
        level = list({id(item): item for outer in level for item in outer.operands()}.values())
        if not level:
            return False
    return True


def _transposed(node: Node, source: Expression) -> Expression:
    order = list(range(len(source.shape)))
    if node.target is aten.transpose.int:
        first, second = int(argument(node, "dim0")), int(argument(node, "dim1"))
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return transposed(source) if order == [1, 0] else Permute(source, tuple(order))


def _permuted(node: Node, source: Expression) -> Expression:
    return Permute(source, tuple(int(dim) % len(source.shape) for dim in argument(node, "dims")))


def _reshaped(node: Node, source: Expression) -> Expression:
    return Reshape(source, tuple(map(int, shape_of(node))))


REARRANGED: dict[Any, Callable[[Node, Expression], Expression]] = {
    aten.transpose.int: _transposed,
    aten.t.default: _transposed,
    aten.permute.default: _permuted,
    aten.reshape.default: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
}
"""Operators that move a weight's elements around, and what they make of it."""
