"""Where an axis of a tensor is in what is computed from it, as long as its elements are kept apart."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import POINTWISE_BINARY, POINTWISE_UNARY, argument, aten
from optpass.analysis.permutations import permutation_of
from optpass.analysis.pieces import SPLITS
from optpass.ir.graph import shape_of
from optpass.ir.sizes import sizes_of
from optpass.ir.weights import Shape

Axes = Mapping[Node, int]
"""The place of the axis in every value that has it, not negative; of a split, the place in each part."""


def axis_in_result(node: Node, axes: Axes) -> int | None:
    """Where the axis of ``node``'s operands is in its result, if every element of it is computed apart.

    Element i along the axis of the result depends on element i of the operands alone, in the same way for
    every i. Known are pointwise operators, normalisations and ``linear`` over other axes, permutations,
    reshapes that keep the axis, and cuts along others. ``None`` for everything else.
    """
    if node.target in POINTWISE_UNARY | POINTWISE_BINARY:
        return _pointwise(node, axes)
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or first not in axes or any(other in axes for other in node.all_input_nodes[1:]):
        return None
    if node.target is operator.getitem:
        return axes[first]
    rule = _RULES.get(node.target)
    return rule(node, axes[first], _shape(first)) if rule else None


def _shape(node: Node) -> Shape:
    value = node.meta["val"]
    return sizes_of(value[0] if isinstance(value, (list, tuple)) else value)


def _pointwise(node: Node, axes: Axes) -> int | None:
    rank = len(shape_of(node))
    # Counted from the end, where broadcasting aligns.
    ends = {axes[operand] - len(shape_of(operand)) for operand in node.all_input_nodes if operand in axes}
    if len(ends) != 1:
        return None
    end = ends.pop()
    others = [shape_of(o) for o in node.all_input_nodes if o not in axes and isinstance(o.meta["val"], Tensor)]
    if any(len(shape) >= -end and shape[end] != 1 for shape in others):
        return None
    return rank + end


def _normalisation(node: Node, axis: int, shape: Shape) -> int | None:
    normalised: Any = argument(node, "normalized_shape")
    return axis if axis < len(shape) - len(normalised) else None


def _linear(node: Node, axis: int, shape: Shape) -> int | None:
    return axis if axis < len(shape) - 1 else None


def _permutation(node: Node, axis: int, shape: Shape) -> int | None:
    order = permutation_of(node)
    return order.index(axis) if order else None


def _reshape(node: Node, axis: int, shape: Shape) -> int | None:
    """The axis stands where as many elements as before come before it, and it is as long."""
    after = shape_of(node)
    places = [i for i, size in enumerate(after) if size == shape[axis] and prod(after[:i]) == prod(shape[:axis])]
    return places[0] if len(places) == 1 and shape[axis] != 1 else None


def _unsqueeze(node: Node, axis: int, shape: Shape) -> int | None:
    return axis + (int(argument(node, "dim")) % (len(shape) + 1) <= axis)


def _cut(node: Node, axis: int, shape: Shape) -> int | None:
    return None if int(argument(node, "dim")) % len(shape) == axis else axis


def _dropped(node: Node, axis: int, shape: Shape) -> int | None:
    dim = int(argument(node, "dim")) % len(shape)
    return None if dim == axis else axis - (dim < axis)


_RULES: dict[Any, Callable[[Node, int, Shape], int | None]] = {
    aten.layer_norm.default: _normalisation,
    aten.rms_norm.default: _normalisation,
    aten.linear.default: _linear,
    aten.permute.default: _permutation,
    aten.transpose.int: _permutation,
    aten.mT.default: _permutation,
    aten.reshape.default: _reshape,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _cut,
    aten.select.int: _dropped,
    aten.unbind.int: _dropped,
    **dict.fromkeys(SPLITS, _cut),
}
