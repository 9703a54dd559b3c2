"""Rules of shape: operators that move values and come to nothing, or two that come to one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.analysis.permutations import composed, permutation_of
from optpass.analysis.pieces import Piece, cat_dim, extent, piece_of
from optpass.ir.graph import Graph, shape_of
from optpass.ir.weights import Shape
from optpass.rewrite.pattern import Match
from optpass.rewrite.rules import Rule, layout

RESHAPES = frozenset(
    {aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
)
"""Operators that keep the values in their order and change the shape."""


def permuted(graph: Graph, node: Node, order: tuple[int, ...], like: Node) -> Node:
    """``node`` with its dimensions in ``order``; itself where they are in that order."""
    if order == tuple(range(len(order))):
        return node
    return graph.call(aten.permute.default, node, list(order), like=like)


def spelled(shape: Shape) -> list[int] | None:
    """``shape`` as reshape takes it without a node that computes a size: one open size stands as -1, two do not."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return sizes if sizes.count(-1) < 2 and (-1 not in sizes or 0 not in sizes) else None


def _permute(x: Any, dims: Any) -> Any:
    return aten.permute.default(x, dims)


def _transpose(x: Any, dim0: Any, dim1: Any) -> Any:
    return aten.transpose.int(x, dim0, dim1)


def _t(x: Any) -> Any:
    return aten.t.default(x)


def _matrix_transpose(x: Any) -> Any:
    return aten.mT.default(x)


def _numpy_transpose(x: Any) -> Any:
    return aten.numpy_T.default(x)


def _reshape(x: Any, shape: Any) -> Any:
    return aten.reshape.default(x, shape)


def _unsqueeze(x: Any, dim: Any) -> Any:
    return aten.unsqueeze.default(x, dim)


def _squeeze(x: Any) -> Any:
    return aten.squeeze.default(x)


def _squeeze_dim(x: Any, dim: Any) -> Any:
    return aten.squeeze.dim(x, dim)


def _squeeze_dims(x: Any, dims: Any) -> Any:
    return aten.squeeze.dims(x, dims)


def _expand(x: Any, size: Any, implicit: Any) -> Any:
    return aten.expand.default(x, size, implicit=implicit)


def _repeat(x: Any, repeats: Any) -> Any:
    return aten.repeat.default(x, repeats)


def _slice(x: Any, dim: Any, start: Any, end: Any, step: Any) -> Any:
    return aten.slice.Tensor(x, dim, start, end, step)


def _chunk(x: Any, count: Any, dim: Any, index: Any) -> Any:
    return aten.chunk.default(x, count, dim)[index]


def _split(x: Any, size: Any, dim: Any, index: Any) -> Any:
    return aten.split.Tensor(x, size, dim)[index]


def _split_with_sizes(x: Any, sizes: Any, dim: Any, index: Any) -> Any:
    return aten.split_with_sizes.default(x, sizes, dim)[index]


Spellings = tuple[Callable[..., Any], ...]
PERMUTATION: Spellings = (_permute, _transpose, _t, _matrix_transpose, _numpy_transpose)
RESHAPE: Spellings = (_reshape, _unsqueeze, _squeeze, _squeeze_dim, _squeeze_dims)
PART: Spellings = (_chunk, _split, _split_with_sizes)


class _Spelled(Rule):
    """A rule about one operator, spelt in several ways, on ``x``."""

    spellings: Spellings

    def pattern(self, x: Any) -> Any:
        return self.spellings[0](x)

    def patterns(self) -> Sequence[Callable[..., Any]]:
        return self.spellings


class IdleView(_Spelled):
    """reshape, expand, slice, repeat or permutation to what the value is already → the value."""

    spellings = (*PERMUTATION, *RESHAPE, _expand, _repeat, _slice)

    def concerns(self, match: Match) -> bool:
        root = match.root
        if layout(match["x"]) != layout(root):
            return False
        if root.target is aten.slice.Tensor:
            return bool(match["step"] == 1)
        order = permutation_of(root)
        return order is None or order == tuple(range(len(order)))

    def rewrite(self, graph: Graph, match: Match) -> Node:
        x: Node = match["x"]
        return x


class IdleSplit(_Spelled):
    """The only part of a split or chunk into one → the value."""

    spellings = PART

    def concerns(self, match: Match) -> bool:
        piece = piece_of(match.root)
        return piece is not None and piece.is_whole

    def rewrite(self, graph: Graph, match: Match) -> Node:
        x: Node = match["x"]
        return x


class ComposedPermutations(_Spelled):
    """Two permutations → one, or none where the second undoes the first.

    One for two only where nobody else reads the first: else nothing would be saved.
    """

    spellings = PERMUTATION

    def concerns(self, match: Match) -> bool:
        order = self._order(match)
        if order is None:
            return False
        return order == tuple(range(len(order))) or len(match["x"].users) == 1

    def rewrite(self, graph: Graph, match: Match) -> Node:
        order = self._order(match)
        assert order is not None
        return permuted(graph, match["x"].args[0], order, match.root)

    def _order(self, match: Match) -> tuple[int, ...] | None:
        first, second = permutation_of(match["x"]), permutation_of(match.root)
        return composed(first, second) if first and second else None


class ComposedReshapes(_Spelled):
    """reshape, unsqueeze, squeeze in a row → one reshape, or none where the shape is what it was.

    One for two only where nobody else reads the first, and where it takes no node that computes a size.
    """

    spellings = RESHAPE

    def concerns(self, match: Match) -> bool:
        first = match["x"]
        if not isinstance(first, Node) or first.target not in RESHAPES:
            return False
        if layout(first.args[0]) == layout(match.root):  # type: ignore[arg-type]
            return True
        return len(first.users) == 1 and self._shape(match.root) is not None

    def rewrite(self, graph: Graph, match: Match) -> Node:
        source: Node = match["x"].args[0]
        if layout(source) == layout(match.root):
            return source
        return graph.call(aten.reshape.default, source, self._shape(match.root), like=match.root)

    def _shape(self, root: Node) -> list[Any] | None:
        if root.target is aten.reshape.default:
            given: Any = argument(root, "shape")
            return list(given)
        return spelled(shape_of(root))


class ComposedExpands(Rule):
    """expand, expand → one expand."""

    def pattern(self, x: Any, inner: Any, size: Any, a: Any, b: Any) -> Any:
        return aten.expand.default(aten.expand.default(x, inner, implicit=a), size, implicit=b)

    def rewrite(self, graph: Graph, match: Match) -> Node:
        return graph.call(aten.expand.default, match["x"], list(shape_of(match.root)), like=match.root)


class JoinedPieces(Rule):
    """cat of all pieces of a value in their order → the value; of one value → that value."""

    def pattern(self, parts: Any, dim: Any) -> Any:
        return aten.cat.default(parts, dim)

    def concerns(self, match: Match) -> bool:
        return len(match["parts"]) == 1 or len(self._joined(match)) < len(match["parts"])

    def check(self, match: Match) -> str | None:
        dtypes = {part.meta["val"].dtype for part in match["parts"]}
        return None if len(dtypes) == 1 else "the parts differ in dtype: the cat converts"

    def rewrite(self, graph: Graph, match: Match) -> Node:
        parts = self._joined(match)
        return parts[0] if len(parts) == 1 else graph.call(aten.cat.default, parts, match["dim"], like=match.root)

    def _joined(self, match: Match) -> list[Node]:
        """The parts, with every run of pieces that makes up its source replaced by the source."""
        parts, dim = match["parts"], cat_dim(match.root)
        pieces = [piece_of(part) for part in parts]
        joined: list[Node] = []
        index = 0
        while index < len(parts):
            length = _whole_run(pieces, index, dim)
            piece = pieces[index]
            joined.append(piece.source if length and piece else parts[index])
            index += max(length, 1)
        return joined


def _whole_run(pieces: Sequence[Piece | None], begin: int, dim: int) -> int:
    """How many pieces from ``begin`` make up their source along ``dim``, from its start to its end; 0 for none."""
    first = pieces[begin]
    if first is None or first.dim != dim or first.start != 0:
        return 0
    position: Any = 0
    for count, piece in enumerate(itertools.islice(pieces, begin, None), 1):
        if piece is None or piece.source is not first.source or piece.dim != dim or piece.start != position:
            return 0
        position = piece.stop
        if position == shape_of(first.source)[dim]:
            return count
    return 0


class PieceOfCat(_Spelled):
    """A piece of a cat that is one of its parts, or some in a row → those parts."""

    spellings = (_slice, *PART)

    def concerns(self, match: Match) -> bool:
        return self._parts(match) is not None

    def check(self, match: Match) -> str | None:
        parts = self._parts(match) or ()
        same = {part.meta["val"].dtype for part in parts} == {match.root.meta["val"].dtype}
        return None if same else "the parts differ in dtype: the cat converts"

    def rewrite(self, graph: Graph, match: Match) -> Node:
        parts = self._parts(match) or ()
        if len(parts) == 1:
            return parts[0]
        dim = cat_dim(match["x"])
        return graph.call(aten.cat.default, list(parts), dim, like=match.root)

    def _parts(self, match: Match) -> Sequence[Node] | None:
        piece = piece_of(match.root)
        if piece is None or piece.source.target is not aten.cat.default or cat_dim(piece.source) != piece.dim:
            return None
        parts: Any = piece.source.args[0]
        edges = list(_edges(parts, piece.dim))
        if piece.start not in edges or piece.stop not in edges:
            return None
        first, last = edges.index(piece.start), edges.index(piece.stop)
        # Several parts are worth another cat only where the first one goes.
        worth = last - first == 1 or (last - first > 1 and len(piece.source.users) == 1)
        return parts[first:last] if worth else None


def _edges(parts: Sequence[Node], dim: int) -> Iterator[Any]:
    """Where the parts of a cat begin, and its end."""
    position: Any = 0
    yield position
    for part in parts:
        position = position + extent(part, dim)
        yield position


def view_rules() -> tuple[Rule, ...]:
    """All rules of this file."""
    return (
        IdleView(),
        IdleSplit(),
        ComposedPermutations(),
        ComposedReshapes(),
        ComposedExpands(),
        JoinedPieces(),
        PieceOfCat(),
    )
