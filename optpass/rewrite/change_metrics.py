"""Scalars that tell a policy how much a value has changed, computed inside the entry that computes the value."""

from __future__ import annotations

import torch
from torch.fx import Node

from optpass.ir.graph import Graph, shape_of, value_of

aten = torch.ops.aten


def relative_change(graph: Graph, value: Node, before: Node) -> Node:
    """‖value − before‖₁ / ‖before‖₁ over all elements, f32 []; inserted at the current insertion point."""
    difference = graph.call(aten.sub.Tensor, value, before, like=value)
    return graph.call(aten.div.Tensor, _size(graph, difference), _size(graph, before), like=value)


def motion(graph: Graph, value: Node, axis: int, stride: int) -> Node:
    """‖a − b‖₁ / (‖a‖₁ + ‖b‖₁), f32 [], a and b being ``value`` without its first and last ``stride`` along ``axis``.

    Source: Kahatapitiya et al. 2024 (AdaCache), equation 7 in the normalised form of the released code.
    """
    length = shape_of(value)[axis]
    later = graph.call(aten.slice.Tensor, value, axis, stride, length, like=value)
    earlier = graph.call(aten.slice.Tensor, value, axis, 0, length - stride, like=value)
    difference = graph.call(aten.sub.Tensor, later, earlier, like=value)
    total = graph.call(aten.add.Tensor, _size(graph, later), _size(graph, earlier), like=value)
    return graph.call(aten.div.Tensor, _size(graph, difference), total, like=value)


def mean(graph: Graph, scalars: list[Node]) -> Node:
    """The mean of scalars; the one itself where there is one."""
    total = scalars[0]
    for other in scalars[1:]:
        total = graph.call(aten.add.Tensor, total, other, like=total)
    return total if len(scalars) == 1 else graph.call(aten.div.Tensor, total, float(len(scalars)), like=total)


def _size(graph: Graph, node: Node) -> Node:
    """The mean of its absolute values: the norm, by element, so that sums of large values stay finite."""
    wide = node
    if value_of(node).dtype != torch.float32:
        wide = graph.call(aten.to.dtype, node, torch.float32, like=node)
    return graph.call(aten.mean.default, graph.call(aten.abs.default, wide, like=node), like=node)
