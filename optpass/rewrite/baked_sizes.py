"""Sizes that stand in a graph as arguments, and what they become when axes change: one rule for each operator.

An operator that has no rule here has no size among its arguments, or one that belongs to an axis which no rewrite
may change. An author adds one::

    @size_rule(torch.ops.mine.tiled.default)
    def tiled(node, sizes):
        return {"tile": sizes.of(node)[-1]}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
from torch.fx import Node

from optpass.analysis.axes.arrangements import scattered_from
from optpass.analysis.axes.rules import Walk, dimension, dimensions, number
from optpass.analysis.axes.structure import (
    Concatenation,
    Size,
    Structure,
    factors,
    is_unit,
    product,
    quotient,
    resolved,
)
from optpass.analysis.operators import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, argument, aten
from optpass.analysis.pieces import SPLITS, slice_piece
from optpass.ir.graph import Graph, shape_of
from optpass.ir.sizes import materialise

Arguments = Mapping[str, Any]
Rule = Callable[[Node, "NewSizes"], Arguments]
Function = TypeVar("Function", bound=Rule)

RULES: dict[Any, Rule] = {}
"""Operator → what its arguments become, by their names in the schema."""


def size_rule(*operators: Any) -> Callable[[Function], Function]:
    """Register a function ``(node, sizes) → changed arguments by name`` for ``operators``."""

    def register(rule: Function) -> Function:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


@dataclass(frozen=True)
class NewSizes:
    """Sizes after a rewrite: of a structure by ``size``, of nodes through what ``walk`` knows of them."""

    walk: Walk
    size: Callable[[Structure], Size]

    def of(self, node: Any) -> list[Size]:
        """The new shape of a single tensor."""
        return [self.size(structure) for structure in self.walk.of(node)]

    def parts(self, node: Node, dim: int) -> list[Size]:
        """The new sizes along ``dim`` of several results."""
        return [self.size(dims[dim]) for dims in self.walk.values[node]]  # type: ignore[index]

    def before(self, structure: Structure, offset: Size) -> Size:
        """How many of the first ``offset`` elements of ``structure`` there are, ``offset`` being a border within it."""
        structure = resolved(structure)
        if offset == 0 or offset == structure.size:
            return self.size(structure) if offset != 0 else 0
        if isinstance(structure, Concatenation):
            total: Size = 0
            for part in structure.parts:
                if offset == 0 or not _reaches(offset, part.size):
                    return total + self.before(part, offset)
                total, offset = total + self.size(part), offset - part.size
            return total
        outer, *inner = factors(structure)
        row = product(inner)
        rows = quotient(offset, row.size) if inner else None
        if rows is None:
            raise ValueError(f"{offset} is no border within {structure!r}")
        return self.before(outer, rows) * self.size(row)


def _reaches(offset: Size, size: Size) -> bool:
    gap = offset - size
    return bool(gap >= 0) if isinstance(gap, int) else bool(gap.is_nonnegative)


def with_new_sizes(graph: Graph, node: Node, sizes: NewSizes) -> None:
    """Bring the arguments of ``node`` up to date; its value is the caller's to infer again."""
    rule = RULES.get(node.target)
    if rule is None:
        return
    for name, value in rule(node, sizes).items():
        with graph.before(node):
            _set(node, name, _materialised(graph, value))


def _materialised(graph: Graph, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_materialised(graph, item) for item in value]
    return value if isinstance(value, Node) else materialise(graph.fx, value, graph.annotate)


def _set(node: Node, name: str, value: Any) -> None:
    schema: Any = node.target._schema  # type: ignore[union-attr]
    for index, item in enumerate(schema.arguments):
        if item.name == name and index < len(node.args):
            node.update_arg(index, value)
            return
    node.update_kwarg(name, value)


def _changed(given: Sequence[Any], new: Sequence[Size]) -> list[Any]:
    """``given`` sizes, each replaced where ``new`` says another; -1 is inferred, and stays."""
    return [old if old == -1 or number(old) == size else size for old, size in zip(given, new, strict=True)]


@size_rule(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def reshape(node: Node, sizes: NewSizes) -> Arguments:
    """The shape."""
    name = "shape" if node.target is aten.reshape.default else "size"
    return {name: _changed(argument(node, name), sizes.of(node))}


@size_rule(
    *(aten.expand.default, aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
    *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
)
def shaped(node: Node, sizes: NewSizes) -> Arguments:
    """The shape."""
    return {"size": _changed(argument(node, "size"), sizes.of(node))}


@size_rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(node: Node, sizes: NewSizes) -> Arguments:
    """The dimensions that are dropped, by number: one that shrinks to size 1 is none of them."""
    dims = sizes.walk.of(node.args[0])
    asked = dimensions(node.args[1] if len(node.args) > 1 else None, len(dims))
    dropped = [dim for dim in asked if is_unit(dims[dim])]
    node.target, node.args, node.kwargs = aten.squeeze.dims, (node.args[0], dropped), {}
    return {}


@size_rule(aten.arange.default)
def counted(node: Node, sizes: NewSizes) -> Arguments:
    """The end, where counting begins at 0."""
    return {"end": _changed([argument(node, "end")], sizes.of(node))[0]}


@size_rule(
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec),
    *(aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_linear1d.vec),
)
def interpolated(node: Node, sizes: NewSizes) -> Arguments:
    """The size, where it is no factor: that of the axis elsewhere, or as many times the operand's as before."""
    source: Any = node.args[0]
    asked = argument(node, "output_size")
    if asked is None:
        return {}
    rank = len(asked)
    # Not as the shapes have it: the operand's is up to date already.
    before = [structure.size for structure in sizes.walk.of(source)[-rank:]]
    operand, after = sizes.of(source)[-rank:], sizes.of(node)[-rank:]
    return {"output_size": [_interpolated(*item) for item in zip(asked, before, operand, after, strict=True)]}


def _interpolated(asked: Any, before: Size, operand: Size, after: Size) -> Any:
    if number(asked) != after or operand == before:
        return asked if number(asked) == after else after
    whole = quotient(number(asked) * operand, before)
    return asked if whole is None else whole


@size_rule(aten.repeat.default, aten.tile.default)
def repeat(node: Node, sizes: NewSizes) -> Arguments:
    """The repetitions, which are a factor of every dimension."""
    name = "repeats" if node.target is aten.repeat.default else "dims"
    given, after = list(argument(node, name)), sizes.of(node)
    before = [1] * len(given) + sizes.of(node.args[0])
    # tile takes fewer repetitions than dimensions.
    pairs = list(zip(reversed(after), reversed(before), strict=False))[: len(given)]
    return {name: _changed(given, [quotient(new, old) for new, old in reversed(pairs)])}


@size_rule(aten.repeat_interleave.self_int)
def repeat_interleave(node: Node, sizes: NewSizes) -> Arguments:
    """The repetitions, and the size that they come to where it is said; of all elements, where no dimension is."""
    before, after = sizes.of(node.args[0]), sizes.of(node)
    dim = argument(node, "dim")
    old, new = (prod(before), after[0]) if dim is None else (before[dim], after[dim])
    repeats: Arguments = {"repeats": _changed([argument(node, "repeats")], [quotient(new, old)])[0]}
    said = argument(node, "output_size")
    return repeats if said is None else {**repeats, "output_size": _changed([said], [new])[0]}


@size_rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(node: Node, sizes: NewSizes) -> Arguments:
    """The dimensions that statistics run over."""
    given = argument(node, "normalized_shape")
    return {"normalized_shape": _changed(given, sizes.of(node)[-len(given) :])}


@size_rule(*CONVOLUTIONS)
def convolution(node: Node, sizes: NewSizes) -> Arguments:
    """Groups: channels in over those of a group."""
    weight = argument(node, "weight")
    return _groups(node, sizes, node.args[0], shape_of(weight), sizes.of(weight)[1])


@size_rule(*TRANSPOSED_CONVOLUTIONS)
def transposed_convolution(node: Node, sizes: NewSizes) -> Arguments:
    """Groups: channels out over those of a group."""
    weight = argument(node, "weight")
    return _groups(node, sizes, node, shape_of(weight), sizes.of(weight)[1])


def _groups(node: Node, sizes: NewSizes, channels: Any, weight: tuple[Any, ...], each: Size) -> Arguments:
    if argument(node, "groups") == 1:
        return {}
    after = sizes.of(channels)
    return {"groups": quotient(after[len(after) - len(weight) + 1], each)}


@size_rule(aten.slice.Tensor)
def slice_(node: Node, sizes: NewSizes) -> Arguments:
    """Start and end."""
    dim = dimension(node, "dim", len(shape_of(node)))
    structure, part = (sizes.walk.of(value)[dim] for value in (node.args[0], node))
    if sizes.size(structure) == structure.size:
        return {}
    # Not as the shapes have it: the operand's is up to date already.
    piece = slice_piece(node, structure.size, part.size)
    if piece is None or (piece.start == 0 and piece.stop == structure.size):
        return {}
    start, stop = (sizes.before(structure, border) for border in (piece.start, piece.stop))
    return {"start": start, "end": stop}


@size_rule(aten.slice_scatter.default)
def slice_scatter(node: Node, sizes: NewSizes) -> Arguments:
    """Start and end of what is replaced."""
    dim = dimension(node, "dim", len(shape_of(node)))
    structure, part = (sizes.walk.of(value)[dim] for value in node.args[:2])
    start = scattered_from(node, structure.size)
    if start is None or sizes.size(structure) == structure.size:
        return {}
    # The part may be as long as before, and lie elsewhere.
    first = sizes.before(structure, start)
    return {"start": first, "end": first + sizes.size(part)}


@size_rule(aten.narrow.default)
def narrow(node: Node, sizes: NewSizes) -> Arguments:
    """Start and length."""
    dim, start = dimension(node, "dim", len(shape_of(node))), argument(node, "start")
    structure = sizes.walk.of(node.args[0])[dim]
    if isinstance(start, Node) or sizes.size(structure) == structure.size:
        return {}
    start = start + structure.size if start < 0 else start
    return {"start": sizes.before(structure, start), "length": sizes.of(node)[dim]}


@size_rule(*SPLITS)
def split(node: Node, sizes: NewSizes) -> Arguments:
    """The sizes of the parts; where an operator makes them equal and they no longer are, another operator."""
    dim = dimension(node, "dim", len(shape_of(node.args[0])))  # type: ignore[arg-type]
    parts = sizes.parts(node, dim)
    if node.target is aten.split_with_sizes.default or "split_sizes" in _names(node):
        return {"split_sizes" if "split_sizes" in _names(node) else "split_size": parts}
    node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], parts, dim), {}
    return {}


def _names(node: Node) -> list[str]:
    target: Any = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return [item.name for item in target._schema.arguments]
