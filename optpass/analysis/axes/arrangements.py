"""Axis rules of what only moves elements: views, permutations, parts, joins, repetitions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.axes.rules import Dims, Results, Walk, axis_rule, dimension, dimensions, number
from optpass.analysis.axes.structure import (
    UNIT,
    Concatenation,
    Structure,
    concatenation,
    is_unit,
    product,
    quotient,
)
from optpass.analysis.operators import argument, aten
from optpass.analysis.permutations import PERMUTATIONS, permutation_of
from optpass.analysis.pieces import SPLITS, Piece, piece_of
from optpass.ir.graph import shape_of
from optpass.ir.sizes import sizes_of


@axis_rule(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(node: Node, walk: Walk) -> Dims:
    """Row-major: dimensions multiply out and are split."""
    return tuple(walk.algebra.reshaped(walk.of(node.args[0]), walk.shape(node)))


@axis_rule(*PERMUTATIONS)
def permute(node: Node, walk: Walk) -> Dims:
    """Other places."""
    dims = walk.of(node.args[0])
    return tuple(dims[dim] for dim in permutation_of(node) or ())


@axis_rule(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.swapaxes.default, aten.swapdims.default)
def move(node: Node, walk: Walk) -> Dims:
    """Other places, which torch knows."""
    dims: Dims = walk.of(node.args[0])
    target: Any = node.target
    moved = target(torch.empty(tuple(range(len(dims))), device="meta"), *node.args[1:], **node.kwargs)
    return tuple(dims[dim] for dim in moved.shape)


@axis_rule(aten.unsqueeze.default)
def unsqueeze(node: Node, walk: Walk) -> Dims:
    """One more dimension, of size 1."""
    dims = list(walk.of(node.args[0]))
    dims.insert(dimension(node, "dim", len(dims) + 1), UNIT)
    return tuple(dims)


@axis_rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(node: Node, walk: Walk) -> Dims:
    """Without dimensions of size 1."""
    dims = walk.of(node.args[0])
    asked = dimensions(node.args[1] if len(node.args) > 1 else None, len(dims))
    return tuple(s for index, s in enumerate(dims) if not (index in asked and is_unit(s)))


@axis_rule(aten.expand.default)
def expand(node: Node, walk: Walk) -> Dims:
    """Dimensions of size 1 become new ones."""
    dims, shape = walk.of(node.args[0]), walk.shape(node)
    wide = (UNIT,) * (len(shape) - len(dims)) + dims
    return tuple(
        walk.new(size) if is_unit(structure) else structure for structure, size in zip(wide, shape, strict=True)
    )


@axis_rule(aten.repeat.default, aten.tile.default)
def repeat(node: Node, walk: Walk) -> Dims:
    """The whole, over and over: repetitions × dimension."""
    dims, repeats = walk.of(node.args[0]), list(map(number, node.args[1]))  # type: ignore[arg-type]
    rank = max(len(dims), len(repeats))
    wide = (UNIT,) * (rank - len(dims)) + dims
    counts = [1] * (rank - len(repeats)) + repeats
    return tuple(product([walk.new(count), structure]) for count, structure in zip(counts, wide, strict=True))


@axis_rule(aten.repeat_interleave.self_int)
def repeat_interleave(node: Node, walk: Walk) -> Dims:
    """Each element several times: dimension × repetitions."""
    dims = walk.of(node.args[0])
    if argument(node, "dim") is None:
        dims = (product(list(dims)),)
    dim = 0 if argument(node, "dim") is None else dimension(node, "dim", len(dims))
    repeated = product([dims[dim], walk.new(number(argument(node, "repeats")))])
    return walk.replaced(dims, {dim: repeated})


@axis_rule(aten.hstack.default)
def hstack(node: Node, walk: Walk) -> Dims:
    """Parts after one another along the second dimension; along the only one of vectors."""
    return _joined(node, walk, min(1, len(walk.shape(node)) - 1))


@axis_rule(aten.cat.default, aten.concat.default)
def cat(node: Node, walk: Walk) -> Dims:
    """Parts after one another; what they have beside that is the same."""
    return _joined(node, walk, dimension(node, "dim", len(walk.shape(node))))


def _joined(node: Node, walk: Walk, dim: int) -> Dims:
    parts: Any = node.args[0]
    # torch lets the empty tensor [0] into any cat.
    found = [walk.of(part) for part in parts if shape_of(part) != (0,) or len(walk.shape(node)) == 1]
    others = [walk.replaced(dims, {dim: UNIT}) for dims in found]
    shared = walk.unified(*others)
    return walk.replaced(shared, {dim: concatenation([dims[dim] for dims in found])})


@axis_rule(aten.stack.default)
def stack(node: Node, walk: Walk) -> Dims:
    """A new dimension, of one element for each part."""
    parts: Any = node.args[0]
    dims = list(walk.unified(*(walk.of(part) for part in parts)))
    joined = UNIT if len(parts) == 1 else Concatenation((UNIT,) * len(parts))
    dims.insert(dimension(node, "dim", len(dims) + 1), joined)
    return tuple(dims)


@axis_rule(*SPLITS)
def split(node: Node, walk: Walk) -> Results:
    """Consecutive parts."""
    dims = walk.of(node.args[0])
    dim = dimension(node, "dim", len(dims))
    sizes = [sizes_of(part)[dim] for part in node.meta["val"]]
    return [walk.replaced(dims, {dim: part}) for part in walk.algebra.cut(dims[dim], sizes)]


@axis_rule(operator.getitem)
def getitem(node: Node, walk: Walk) -> Dims:
    """One of several results."""
    source: Any
    place: Any
    source, place = node.args
    results: Any = walk.values[source]
    return results[place] if isinstance(results, list) else ()


@axis_rule(aten.slice.Tensor)
def slice_(node: Node, walk: Walk) -> Dims:
    """A part; what lies outside of it is a part too."""
    dims = walk.of(node.args[0])
    dim = dimension(node, "dim", len(dims))
    size, piece = walk.shape(node)[dim], piece_of(node)
    if (row := _every_nth(node, walk, dims[dim])) is not None:
        return walk.replaced(dims, {dim: row})
    if piece is None or not isinstance(piece.start, int):
        return walk.replaced(dims, {dim: walk.resampled(dims[dim], size, "elements apart are picked from it")})
    if piece.is_whole:
        return dims
    if _overlaps(node, walk, dims[dim], piece):
        return walk.replaced(dims, {dim: walk.resampled(dims[dim], size, "rows of a table are read from it")})
    parts = walk.algebra.cut(dims[dim], [piece.start, size, dims[dim].size - piece.start - size])
    return walk.replaced(dims, {dim: parts[1]})


def _overlaps(node: Node, walk: Walk, structure: Structure, piece: Piece) -> bool:
    """Whether this is part of a stored table, of which another part was read that overlaps it.

    Such are beginnings of a table of positions, one for each axis, which have nothing in common.
    """
    source: Any = node.args[0]
    if source not in walk.stored:
        return False
    read = walk.parts.setdefault(structure, [])
    if any(
        (start, stop) != (piece.start, piece.stop) and piece.start < stop and start < piece.stop for start, stop in read
    ):
        return True
    read.append((piece.start, piece.stop))
    return False


def _every_nth(node: Node, walk: Walk, structure: Structure) -> Structure | None:
    """Of a dimension that is rows of ``step`` elements, the one at ``start`` in each: rotary pairs lie like this."""
    start, step = argument(node, "start") or 0, argument(node, "step")
    end, size = argument(node, "end"), structure.size
    if step == 1 or not isinstance(start, int) or not 0 <= start < step or (rows := quotient(size, step)) is None:
        return None
    if isinstance(end, Node) or (end is not None and end < size - step + 1 + start):
        return None
    outer, row = walk.algebra.split(structure, rows, step)
    walk.fix(row, "one element of each row is picked from it")
    return outer


@axis_rule(aten.narrow.default)
def narrow(node: Node, walk: Walk) -> Dims:
    """A part."""
    dims, start = walk.of(node.args[0]), number(argument(node, "start"))
    dim = dimension(node, "dim", len(dims))
    size = walk.shape(node)[dim]
    if not isinstance(start, int):
        return walk.replaced(dims, {dim: walk.resampled(dims[dim], size, "a part of it is picked at run time")})
    start = start + dims[dim].size if start < 0 else start
    parts = walk.algebra.cut(dims[dim], [start, size, dims[dim].size - start - size])
    return walk.replaced(dims, {dim: parts[1]})


@axis_rule(aten.glu.default)
def glu(node: Node, walk: Walk) -> Dims:
    """One half times the sigmoid of the other."""
    dims = walk.of(node.args[0])
    dim = dimension(node, "dim", len(dims))
    half = walk.shape(node)[dim]
    return walk.replaced(dims, {dim: walk.unify(*walk.algebra.cut(dims[dim], [half, half]))})


@axis_rule(aten.slice_scatter.default)
def slice_scatter(node: Node, walk: Walk) -> Dims:
    """A value with a part of it replaced."""
    dims, part = walk.of(node.args[0]), walk.of(node.args[1])
    dim = dimension(node, "dim", len(dims))
    walk.unified(walk.replaced(dims, {dim: UNIT}), walk.replaced(part, {dim: UNIT}))
    if (row := _every_nth(node, walk, dims[dim])) is not None:
        walk.unify(row, part[dim])
    elif part[dim].size == dims[dim].size:
        walk.unify(dims[dim], part[dim])
    else:
        if (start := scattered_from(node, dims[dim].size)) is not None:
            rest = dims[dim].size - start - part[dim].size
            walk.unify(walk.algebra.cut(dims[dim], [start, part[dim].size, rest])[1], part[dim])
        walk.fix(dims[dim], "a part of it is replaced")
        walk.fix(part[dim], "replaces a part of another")
    return dims


def scattered_from(node: Node, size: Any) -> int | None:
    """Where, along ``size`` elements, a ``slice_scatter`` of consecutive ones begins; ``None`` where numbers do not
    say so.
    """
    start = argument(node, "start") or 0
    if argument(node, "step") != 1 or not isinstance(start, int) or (start < 0 and not isinstance(size, int)):
        return None
    return max(start + size, 0) if start < 0 else start


@axis_rule(aten.outer.default)
def outer(node: Node, walk: Walk) -> Dims:
    """Every element of the one with every element of the other."""
    return (*walk.of(node.args[0]), *walk.of(node.args[1]))


@axis_rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(node: Node, walk: Walk) -> Results:
    """Coordinates: every result has the dimensions of all."""
    parts: Any = node.args[0]
    dims = [walk.of(part)[0] if walk.of(part) else UNIT for part in parts]
    if node.target is aten.meshgrid.indexing and argument(node, "indexing") == "xy":
        dims[:2] = reversed(dims[:2])
    return [tuple(dims)] * len(parts)


@axis_rule(aten.flip.default, aten.roll.default)
def reorder(node: Node, walk: Walk) -> Dims:
    """Other places along some dimensions."""
    dims = walk.of(node.args[0])
    for dim in dimensions(argument(node, "dims"), len(dims)):
        walk.fix(dims[dim], "its elements change places")
    return dims
