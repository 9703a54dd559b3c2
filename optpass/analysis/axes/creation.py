"""Axis rules of what makes tensors from nothing: their dimensions are whatever they meet later."""

from __future__ import annotations

from torch.fx import Node

from optpass.analysis.axes.rules import Dims, Walk, axis_rule
from optpass.analysis.operators import aten

UNIFORM = frozenset(
    {
        *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.scalar_tensor.default),
    }
)
"""Every element is the same, so that any of them may go."""
COUNTED = frozenset(
    {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.eye.default}
)


@axis_rule(*UNIFORM)
def uniform(node: Node, walk: Walk) -> Dims:
    """New dimensions."""
    return tuple(map(walk.new, walk.shape(node)))


@axis_rule(*COUNTED)
def counted(node: Node, walk: Walk) -> Dims:
    """New dimensions, whose elements say their own place."""
    return tuple(walk.algebra.fixed_new(size, "is counted along") for size in walk.shape(node))


@axis_rule(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default)
def like(node: Node, walk: Walk) -> Dims:
    """The dimensions of its operand."""
    return walk.of(node.args[0])


@axis_rule(aten.tril.default, aten.triu.default)
def triangle(node: Node, walk: Walk) -> Dims:
    """Elements count their distance from the diagonal."""
    dims = walk.of(node.args[0])
    for structure in dims[-2:]:
        walk.fix(structure, "is counted along")
    return dims
