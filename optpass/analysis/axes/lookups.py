"""Axis rules of what reads or replaces elements by their place."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.axes.rules import Dims, Results, Walk, axis_rule, dimension
from optpass.analysis.axes.structure import UNIT
from optpass.analysis.operators import argument, aten
from optpass.ir.graph import value_of


@axis_rule(aten.select.int)
def select(node: Node, walk: Walk) -> Dims:
    """Without a dimension, of which one element is taken."""
    dims = walk.of(node.args[0])
    dim = dimension(node, "dim", len(dims))
    walk.fix(dims[dim], "one element is picked from it")
    return dims[:dim] + dims[dim + 1 :]


@axis_rule(aten.unbind.int)
def unbind(node: Node, walk: Walk) -> Results:
    """Every element of a dimension by itself."""
    dims = walk.of(node.args[0])
    dim = dimension(node, "dim", len(dims))
    walk.fix(dims[dim], "is taken apart element by element")
    return [dims[:dim] + dims[dim + 1 :]] * len(node.meta["val"])


@axis_rule(aten.index.Tensor)
def index(node: Node, walk: Walk) -> Dims:
    """Dimensions that are looked up in go; consecutive ones are replaced by those of the indices."""
    dims, indices = walk.of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    if any(isinstance(value, Node) and value_of(value).dtype == torch.bool for value in indices):
        return _masked(node, walk)
    places = [place for place, value in enumerate(indices) if value is not None]
    for place in places:
        walk.fix(dims[place], "is looked up in")
    if any(value_of(indices[place]).dtype == torch.bool for place in places):
        for place in places:
            walk.fix_all(walk.of(indices[place]), "is a mask")
        return tuple(walk.algebra.fixed_new(size, "is what a mask leaves") for size in walk.shape(node))
    looked_up = walk.broadcast(*(indices[place] for place in places))
    rest = [structure for place, structure in enumerate(dims) if place not in places]
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    return (*rest[:at], *looked_up, *rest[at:])


def _masked(node: Node, walk: Walk) -> Dims:
    """A mask takes as many dimensions as it has, and gives one, as long as the mask says."""
    reason = "is looked up in by a mask"
    for operand in node.all_input_nodes:
        walk.fix_all(walk.of(operand), reason)
    return tuple(walk.algebra.fixed_new(size, reason) for size in walk.shape(node))


@axis_rule(aten.index_select.default)
def index_select(node: Node, walk: Walk) -> Dims:
    """Elements at given places, as many as there are indices."""
    dims, places = walk.of(node.args[0]), walk.operand(node, "index")
    dim = dimension(node, "dim", len(dims))
    walk.fix(dims[dim], "is looked up in")
    return walk.replaced(dims, {dim: places[0] if places else UNIT})


@axis_rule(aten.embedding.default)
def embedding(node: Node, walk: Walk) -> Dims:
    """Rows of a table."""
    table = walk.of(node.args[0])
    walk.fix(table[0], "is looked up in")
    walk.role(node.args[0], 1, "out")
    return (*walk.of(node.args[1]), table[1])


@axis_rule(aten.gather.default, aten.take_along_dim.default)
def gather(node: Node, walk: Walk) -> Dims:
    """Along one dimension, for each place of the others, elements that indices name."""
    dims, indices = walk.of(node.args[0]), walk.operand(node, _INDICES[node.target])
    if argument(node, "dim") is None:
        walk.fix_all(dims, "is looked up in")
        return indices
    dim = dimension(node, "dim", len(dims))
    walk.fix(dims[dim], "is looked up in")
    _beside(walk, dims, indices, dim)
    pairs = zip(dims, indices, walk.shape(node), strict=True)
    return walk.replaced(tuple(a if a.size == size else b for a, b, size in pairs), {dim: indices[dim]})


_INDICES: dict[Any, str] = {aten.gather.default: "index", aten.take_along_dim.default: "indices"}


def _beside(walk: Walk, dims: Dims, other: Dims, dim: int) -> None:
    """Both have the same dimensions beside ``dim``; where one is shorter, only a part of the other is met."""
    for index, (one, two) in enumerate(zip(dims, other, strict=True)):
        if index != dim and one.size == two.size:
            walk.unify(one, two)
        elif index != dim:
            walk.fix_all((one, two), "meets a part of another dimension")


@axis_rule(
    *(aten.scatter.src, aten.scatter.value, aten.scatter_add.default),
    *(aten.index_add.default, aten.index_copy.default, aten.index_fill.int_Scalar),
)
def scatter(node: Node, walk: Walk) -> Dims:
    """A value with elements replaced at given places along one dimension."""
    dims = walk.of(node.args[0])
    dim = dimension(node, "dim", len(dims))
    walk.fix(dims[dim], "is replaced at given places")
    for operand in node.all_input_nodes[1:]:
        part = walk.of(operand)
        if len(part) == len(dims):
            _beside(walk, dims, part, dim)
        walk.fix_all(part[dim : dim + 1] if len(part) == len(dims) else part, "goes to given places")
    return dims


@axis_rule(aten.select_scatter.default)
def select_scatter(node: Node, walk: Walk) -> Dims:
    """A value with one element of a dimension replaced."""
    dims, part = walk.of(node.args[0]), walk.of(node.args[1])
    dim = dimension(node, "dim", len(dims))
    walk.fix(dims[dim], "one element of it is replaced")
    rest = walk.unified(dims[:dim] + dims[dim + 1 :], part)
    return (*rest[:dim], dims[dim], *rest[dim:])


@axis_rule(aten.one_hot.default)
def one_hot(node: Node, walk: Walk) -> Dims:
    """One more dimension, which counts."""
    return (*walk.of(node.args[0]), walk.algebra.fixed_new(walk.shape(node)[-1], "is counted along"))
