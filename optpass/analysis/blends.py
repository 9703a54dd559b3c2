"""Blends a·x + (1 − a)·y: residual additions whose stream is scaled by what the branch leaves to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch.fx import Node

from optpass.analysis.carriers import is_constant
from optpass.analysis.operators import argument, aten
from optpass.analysis.residuals import Residual
from optpass.ir.computed import Computed
from optpass.ir.graph import shape_of
from optpass.ir.weights import Cast, Expression

Factor = Node | float
PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)


@dataclass(frozen=True)
class Blend:
    """The addition ``own``·``stream`` + ``other``·``mixed`` with ``own`` + ``other`` = 1.

    ``mixed`` is computed from ``stream``; the factors are numbers or broadcast tensors.
    """

    stream: Node
    own: Factor
    mixed: Node
    other: Factor


def blend_of(residual: Residual, weights: Mapping[str, Expression]) -> Blend | None:
    """The blend that ``residual`` is; ``None`` where its factors do not sum to one, as far as the graph tells.

    ``weights`` are what constants are made of: a factor that was folded into a weight is still one minus another.
    """
    carrier, branch = scaled(residual.carrier), scaled(residual.branch)
    if carrier is None or branch is None or not _sum_to_one(carrier[1], branch[1], weights):
        return None
    return Blend(*carrier, *branch)


def scaled(node: Node) -> tuple[Node, Factor] | None:
    """The value and the factor of a product with a number, or with what is broadcast over the value."""
    if node.target not in PRODUCTS:
        return None
    left, right = node.args[:2]
    for value, factor in ((left, right), (right, left)):
        if not isinstance(value, Node) or is_constant(value) or shape_of(value) != shape_of(node):
            continue
        if isinstance(factor, (int, float)) or (isinstance(factor, Node) and shape_of(factor) != shape_of(node)):
            return value, factor
    return None


def _sum_to_one(a: Factor, b: Factor, weights: Mapping[str, Expression]) -> bool:
    if not isinstance(a, Node) or not isinstance(b, Node):
        return not isinstance(a, Node) and not isinstance(b, Node) and math.isclose(a + b, 1.0)
    return any(_is_rest(x, y) or _is_weight_of_rest(x, y, weights) for x, y in ((a, b), (b, a)))


def _is_rest(rest: Node, of: Node) -> bool:
    """Whether ``rest`` is 1 − ``of``."""
    if rest.target is not aten.rsub.Scalar:
        return False
    return rest.args[0] is of and argument(rest, "other") == 1 and argument(rest, "alpha") == 1


def _is_weight_of_rest(rest: Node, of: Node, weights: Mapping[str, Expression]) -> bool:
    if rest.op != "get_attr" or of.op != "get_attr":
        return False
    expression = _uncast(weights[str(rest.target)])
    if not isinstance(expression, Computed) or expression.operator is not aten.rsub.Scalar:
        return False
    operand, *numbers = expression.args
    same = _uncast(operand) == _uncast(weights[str(of.target)])
    return same and all(number == 1 for number in numbers) and not expression.kwargs


def _uncast(expression: Expression) -> Expression:
    """Without the casts around it: the factors are rounded each by itself."""
    while isinstance(expression, Cast):
        expression = expression.operand
    return expression


def are_related(a: Factor, b: Factor, weights: Mapping[str, Expression]) -> bool:
    """Whether two weights are computed from the same ones, so that they may sum to one in a way that nobody reads."""
    if not isinstance(a, Node) or not isinstance(b, Node) or a.op != "get_attr" or b.op != "get_attr":
        return False
    first, second = (set(_leaves(weights[str(node.target)])) for node in (a, b))
    return not first.isdisjoint(second)


def _leaves(expression: Expression) -> Iterator[Expression]:
    pending = [expression]
    while pending:
        operands = (current := pending.pop()).operands()
        pending.extend(operands)
        if not operands:
            yield current
