"""Moving ``expand`` below the operators that commute with it, and dropping it where broadcasting does its work.

An operator that works on every copy of a repeated value can work on the value once. What sinks is
exact: the same numbers are computed, fewer times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Node

from optpass.analysis.operators import POINTWISE_BINARY, POINTWISE_UNARY, aten
from optpass.ir.graph import Graph, example_shape, shape_of, value_of
from optpass.ir.weights import Shape
from optpass.rewrite.rules import replace

EXPAND = aten.expand.default


@dataclass(frozen=True)
class Repeated:
    """A value that an expand repeats along ``dims`` to ``sizes``, about to be read by ``consumer``."""

    graph: Graph
    source: Node
    dims: frozenset[int]
    sizes: Shape
    consumer: Node
    expand: Node

    @staticmethod
    def of(graph: Graph, expand: Node, consumer: Node) -> Repeated:
        source: Any = expand.args[0]
        sizes, given = shape_of(expand), shape_of(source)
        padded = (1,) * (len(sizes) - len(given)) + given
        dims = frozenset(i for i, (size, old) in enumerate(zip(sizes, padded, strict=True)) if size != old)
        return Repeated(graph, source, dims, sizes, consumer, expand)

    def once(self) -> Node:
        """The value without repetition, of the expand's rank."""
        shape = [1 if dim in self.dims else size for dim, size in enumerate(self.sizes)]
        if list(shape_of(self.source)) == shape:
            return self.source
        return self.graph.call(aten.reshape.default, self.source, shape, like=self.consumer)

    def call(self, *rest: Any) -> Node:
        """The consumer's operator on the unrepeated value."""
        return self.graph.call(
            self.consumer.target, self.once(), *rest, like=self.consumer, **dict(self.consumer.kwargs)
        )

    @property
    def example(self) -> Shape:
        """The repeated shape at the captured sizes."""
        return example_shape(self.expand)

    def is_repeated(self, dim: Any) -> bool:
        return int(dim) % len(self.sizes) in self.dims


def sink_expand(graph: Graph, expand: Node) -> int:
    """Move ``expand`` down through every user that commutes with it, and theirs; how many it passed.

    It goes through transpositions, reshapes that keep the repeated dimension apart, slices, pointwise
    operators with one tensor operand, and ``linear`` unless the features are what is repeated. Where
    the other operand of an addition or product already has the full shape, the expand is dropped. Two
    in a row become one. It stays above everything else.
    """
    passed, pending = 0, [expand]
    while pending:
        current = pending.pop()
        for user in list(current.users):
            with graph.before(user):
                result = _below(graph, current, user)
            if result is None:
                continue
            passed += 1
            replace(user, result)
            if result.target is EXPAND:
                pending.append(result)
    return passed


def expands_above(node: Node) -> list[Node]:
    """The expands that would reach ``node`` by sinking, from the nearest up."""
    found = []
    while node.op == "call_function" and node.target in COMMUTING:
        if node.target is EXPAND:
            found.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return found


def _below(graph: Graph, expand: Node, user: Node) -> Node | None:
    """What ``user`` gives when it reads the unrepeated value, expanded again where needed."""
    if user.op != "call_function":
        return None
    if user.target in POINTWISE_BINARY and isinstance(user.args[1], Node):
        return _broadcast(graph, expand, user)
    rule = COMMUTING.get(user.target)
    if rule is None or user.args[0] is not expand or expand in user.args[1:]:
        return None
    result = rule(Repeated.of(graph, expand, user))
    if result is None or shape_of(result) == shape_of(user):
        return result
    return graph.call(EXPAND, result, list(shape_of(user)), like=user)


def _broadcast(graph: Graph, expand: Node, user: Node) -> Node | None:
    """``x.expand(s) + y`` → ``x + y`` where ``y`` alone gives the sum its shape."""
    source: Any = expand.args[0]
    left, right = user.args[:2]
    other: Any = right if left is expand else left
    if other is expand or not isinstance(other, Node) or value_of(other).dtype != value_of(source).dtype:
        return None
    if _broadcast_shape(shape_of(source), shape_of(other)) != shape_of(user):
        return None
    operands = (source, other) if left is expand else (other, source)
    return graph.call(user.target, *operands, *user.args[2:], like=user, **dict(user.kwargs))


def _broadcast_shape(left: Shape, right: Shape) -> Shape:
    """The shape of a pointwise result of operands that are known to broadcast."""
    rank = max(len(left), len(right))
    padded = [(1,) * (rank - len(shape)) + shape for shape in (left, right)]
    return tuple(b if a == 1 else a for a, b in zip(*padded, strict=True))


Commuting = Callable[[Repeated], Node | None]


def _as_it_is(repeated: Repeated) -> Node:
    return repeated.call(*repeated.consumer.args[1:])


def _merged(repeated: Repeated) -> Node:
    return repeated.graph.call(EXPAND, repeated.once(), list(shape_of(repeated.consumer)), like=repeated.consumer)


def _linear(repeated: Repeated) -> Node | None:
    return None if repeated.is_repeated(-1) else _as_it_is(repeated)


def _slice(repeated: Repeated) -> Node:
    rest = repeated.consumer.args[1:]
    return repeated.once() if repeated.is_repeated(rest[0] if rest else 0) else _as_it_is(repeated)


def _select(repeated: Repeated) -> Node:
    dim, index = repeated.consumer.args[1:]
    return repeated.call(dim, 0 if repeated.is_repeated(dim) else index)


def _reshape(repeated: Repeated) -> Node | None:
    groups = _groups(repeated.example, example_shape(repeated.consumer))
    shape = _unrepeated(repeated.sizes, shape_of(repeated.consumer), repeated.dims, groups)
    return None if shape is None else repeated.call(shape)


def _unrepeated(before: Shape, after: Shape, dims: frozenset[int], groups: list[tuple[int, int]]) -> list[int] | None:
    """``after`` with 1 for what comes from repeated dimensions; ``None`` where they mix with others."""
    if 0 in before:
        return None
    shape: list[int] = []
    position = 0
    for sources, results in groups:
        members = range(position, position + sources)
        position += sources
        sizes = after[len(shape) : len(shape) + results]
        # Open sizes were grouped by their examples, which can agree by chance.
        if prod(sizes) != prod(before[dim] for dim in members):
            return None
        real = [dim for dim in members if before[dim] != 1]
        if not any(dim in dims for dim in real):
            shape.extend(sizes)
        elif all(dim in dims for dim in real):
            shape.extend([1] * results)
        else:
            return None
    return shape


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[int, int]]:
    """The shortest runs of dimensions, ``(of before, of after)``, that hold the same number of elements."""
    groups: list[tuple[int, int]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left = right = 1
        while (i == start_i and j == start_j) or left != right:
            if i < len(before) and (left <= right or j == len(after)):
                left *= before[i]
                i += 1
            else:
                right *= after[j]
                j += 1
        groups.append((i - start_i, j - start_j))
    return groups


COMMUTING: dict[Any, Commuting] = {
    **dict.fromkeys(POINTWISE_UNARY | POINTWISE_BINARY, _as_it_is),
    aten.transpose.int: _as_it_is,
    aten.permute.default: _as_it_is,
    aten.unsqueeze.default: _as_it_is,
    aten.reshape.default: _reshape,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.linear.default: _linear,
    EXPAND: _merged,
}
"""Operators that work on the unrepeated value as well, and how."""
