"""Parts of a tensor along one dimension, however they were cut out: by slice, split or chunk."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.ir.graph import shape_of
from optpass.ir.sizes import size_of, sizes_of

SPLITS = frozenset(
    {
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.split.sizes,
        aten.chunk.default,
        aten.tensor_split.sections,
    }
)
"""Operators that cut a tensor into consecutive parts along ``dim``."""
TO_THE_END = (1 << 63) - 1
"""The end that torch gives a slice without one."""


@dataclass(frozen=True)
class Piece:
    """``source[start:stop]`` along ``dim``, which is not negative; open sizes are SymPy expressions."""

    source: Node
    dim: int
    start: Any
    stop: Any

    @property
    def is_whole(self) -> bool:
        return bool(self.start == 0 and self.stop == shape_of(self.source)[self.dim])


def piece_of(node: Any) -> Piece | None:
    """What ``node`` is a part of, if it is one, with every element in between and its place known."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.slice.Tensor:
        source: Any = node.args[0]
        dim = int(argument(node, "dim")) % len(shape_of(source))
        return slice_piece(node, shape_of(source)[dim], shape_of(node)[dim])
    if node.target is operator.getitem:
        return _part(node)
    return None


def cat_dim(node: Node) -> int:
    """The dimension that a ``cat`` joins along, not negative."""
    return int(argument(node, "dim")) % len(shape_of(node))


def extent(part: Node, dim: int) -> Any:
    """The size of a cat's part along ``dim``; of the empty tensor [0], which torch lets into any cat, 0."""
    shape = shape_of(part)
    return 0 if shape == (0,) else shape[dim]


def slice_piece(node: Node, size: Any, length: Any) -> Piece | None:
    """What the slice ``node`` takes, ``length`` elements of the ``size`` that there are."""
    source: Any = node.args[0]
    if argument(node, "step") != 1:
        return None
    dim = int(argument(node, "dim")) % len(shape_of(source))
    start, end = (_size(argument(node, name)) for name in ("start", "end"))
    if end is None or end in (TO_THE_END, size):
        return Piece(source, dim, size - length, size)
    if start is None or start == 0:
        return Piece(source, dim, 0, length)
    if isinstance(start, int) and isinstance(size, int):
        first = max(start + size, 0) if start < 0 else min(start, size)
        return Piece(source, dim, first, first + length)
    # A start that is written out and not negative is the start, unless the source is shorter, and then nothing is left.
    return Piece(source, dim, start, start + length) if isinstance(start, int) and start > 0 and length != 0 else None


def _part(node: Node) -> Piece | None:
    split, index = node.args
    if not isinstance(split, Node) or split.target not in SPLITS or not isinstance(index, int):
        return None
    source: Any = split.args[0]
    dim = int(argument(split, "dim")) % len(shape_of(source))
    lengths = [sizes_of(value)[dim] for value in split.meta["val"]]
    index %= len(lengths)
    start = sum(lengths[:index])
    return Piece(source, dim, start, start + lengths[index])


def _size(value: Any) -> Any:
    """A size argument as a number or an expression."""
    return size_of(value.meta["val"]) if isinstance(value, Node) else value
