"""Where the elements along an axis stood before a value was rearranged: axes as factors with strides.

A stream of a factorised video model is [batch·frames, tokens, channels] at one attention and
[batch·tokens, frames, channels] at the next. Which axis is which no shape says; how it was folded does.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import argument, aten, is_view
from optpass.analysis.permutations import permutation_of
from optpass.ir.graph import Graph
from optpass.ir.sizes import example_sizes

Axis = tuple[tuple[int, int], ...]
"""Factors (size, stride) from the outermost in; strides count elements of the origin, 0 where they are unknown."""


@dataclass(frozen=True)
class Layout:
    """The axes of a value in terms of ``origin``, the earlier value that it is a rearrangement of.

    "Rearrangement" is about places, not numbers: a ``linear`` keeps every axis but the last one's.
    """

    origin: Node
    axes: tuple[Axis, ...]


def layouts(graph: Graph) -> dict[Node, Layout]:
    """The layout of every value with one result, and of splits (that of what they split); linear time."""
    found: dict[Node, Layout] = {}
    order: dict[Node, int] = {}
    for index, node in enumerate(graph.fx.nodes):
        order[node] = index
        if node.op == "output":
            continue
        layout = _rearranged(node, found, order) if node.op == "call_function" else None
        if layout is None and isinstance(node.meta["val"], Tensor):
            layout = Layout(node, contiguous(_shape(node)))
        if layout is not None:
            found[node] = layout
    return found


def contiguous(shape: Sequence[int]) -> tuple[Axis, ...]:
    """The axes of a value in terms of itself."""
    return tuple(_merged([(size, prod(shape[dim + 1 :]))]) for dim, size in enumerate(shape))


def regrouped(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """The axes of a reshape to ``shape``; ``None`` where an axis begins inside a factor that it does not divide."""
    pending = [factor for axis in reversed(axes) for factor in reversed(axis)]
    result = []
    for size in shape:
        taken: list[tuple[int, int]] = []
        while size > 1:
            if not pending:
                return None
            length, stride = pending.pop()
            if size % length == 0:
                taken.append((length, stride))
                size //= length
            elif length % size == 0:
                inner = length // size
                taken.append((size, stride * inner))
                pending.append((inner, stride))
                size = 1
            else:
                return None
        result.append(_merged(taken))
    return tuple(result)


def mixes_outer_axis(layout: Layout, axis: int) -> bool:
    """Whether ``axis``, seen from the origin, lies outside of one that is folded into the batch (axis 0) here.

    The axis that attention mixes is then not the innermost row: frames, where pixels are folded into the batch.
    """
    mixed = [stride for _, stride in layout.axes[axis] if stride]
    folded = [stride for _, stride in layout.axes[0] if stride]
    return bool(mixed and folded) and min(folded) < min(mixed)


def _merged(factors: list[tuple[int, int]]) -> Axis:
    merged: list[tuple[int, int]] = []
    for size, stride in factors:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return tuple(merged)


def _shape(node: Node) -> tuple[int, ...]:
    value: Any = node.meta["val"]
    return example_sizes(value)


def _rearranged(node: Node, found: dict[Node, Layout], order: dict[Node, int]) -> Layout | None:
    operands = [operand for operand in node.all_input_nodes if operand in found]
    if not operands:
        return None
    layout = found[operands[0]]
    if not isinstance(node.meta["val"], Tensor):
        return layout if is_view(node) else None
    shape, before = _shape(node), _axis_sizes(layout)
    permutation = permutation_of(node)
    if permutation:
        return Layout(layout.origin, tuple(layout.axes[dim] for dim in permutation))
    if node.target in (operator.getitem, aten.slice.Tensor, aten.cat.default, aten.concat.default):
        return _cut(layout, shape, before)
    if node.target is aten.select.int:
        dim = int(argument(node, "dim")) % len(before)
        return Layout(layout.origin, layout.axes[:dim] + layout.axes[dim + 1 :])
    if is_view(node) and prod(shape) == prod(before):
        axes = regrouped(layout.axes, shape)
        return Layout(layout.origin, axes) if axes else None
    if node.target is aten.linear.default:
        return Layout(layout.origin, (*layout.axes[:-1], _merged([(shape[-1], 0)])))
    same = [found[operand] for operand in operands if _axis_sizes(found[operand]) == shape and operand.op != "get_attr"]
    return min(same, key=lambda candidate: order[candidate.origin]) if same else None


def _axis_sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(prod(size for size, _ in axis) for axis in layout.axes)


def _cut(layout: Layout, shape: tuple[int, ...], before: tuple[int, ...]) -> Layout | None:
    """A part of a value, or several joined: where that changed an axis, nobody can place it any more."""
    if len(shape) != len(before):
        return None
    pairs = zip(layout.axes, shape, before, strict=True)
    return Layout(layout.origin, tuple(axis if new == old else _merged([(new, 0)]) for axis, new, old in pairs))
