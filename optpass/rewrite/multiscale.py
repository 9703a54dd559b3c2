"""A stretch of a graph computed at half the size along some axes: frames, or height and width.

What enters the stretch is sampled down, what leaves it is repeated; everything between is computed by the same
operators and weights on fewer elements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from optpass.analysis.axes import Axes, Concatenation, Structure
from optpass.analysis.axes.structure import Size, factors
from optpass.analysis.boundaries import depending_on
from optpass.analysis.operators import argument, aten
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.rewrite.resizing import ResizeError, Sizes, propagate

Down = Literal["average", "first"]
Layout = list[list[Structure]]
"""The factors of each dimension of a value."""


class HalvedBeforeError(ResizeError):
    """A stretch that runs at half the size already."""


def halved(
    graph: Graph, found: Axes, region: Sequence[Node], names: Collection[str], down: Down
) -> tuple[list[Node], list[Node]]:
    """Compute ``region``, consecutive operators of ``graph``, at half the size along the axes called ``names``.

    ``found`` is the analysis of the graph. Of what enters, values that depend on an input with such an axis are
    sampled ``down``: the mean of two neighbours, or the first of them. Of others (what is repeated for every frame)
    the first is taken; and what depends on no input (positions of frames) is computed anew for the fewer elements.
    What leaves is repeated for its neighbour. Returns the values that entered and those that left, as they were.

    Raises:
        HalvedBeforeError: all that enters is sampled so already.
        ResizeError: nothing that enters has such an axis; the size is odd and ``average`` is asked for; or an operator
            or a weight does not go with the smaller size.
    """
    return _Stretch(graph, found, region, names, down).run()


class _Stretch:
    """The operators of ``region`` and what crosses their border."""

    def __init__(self, graph: Graph, found: Axes, region: Sequence[Node], names: Collection[str], down: Down) -> None:
        self.graph, self.found, self.names, self.down = graph, found, frozenset(names), down
        self.region, self.inside, self.sizes = region, set(region), Sizes(found)
        inputs = list(zip(graph.signature.inputs, graph.placeholders, strict=True))
        self.moving = depending_on(graph, [name for name, node in inputs if self._has_axis(node)])
        self.given = depending_on(graph, graph.signature.inputs)
        self.remade: dict[Node, Node] = {}

    def run(self) -> tuple[list[Node], list[Node]]:
        entering = [node for node in self._with_axis(self.graph.fx.nodes) if self._enters(node)]
        leaving = [node for node in self._with_axis(self.region) if not self.inside.issuperset(node.users)]
        features = [node for node in entering if node in self.moving]
        if not features:
            raise ResizeError(f"nothing that enters has an axis of {' or '.join(sorted(self.names))}")
        if all(map(self._is_sampled, features)):
            raise HalvedBeforeError("what enters is sampled already")
        stop = self.region[-1].next
        for node in entering:
            self._halve(node)
        for node in entering:
            self._exchange(node, self.inside.__contains__, self.region[0], self._entered)
        propagate(self.graph, self.region, self.sizes)
        for node in leaving:
            self._exchange(node, lambda user: user not in self.inside, stop, self._repeated)
        return entering, leaving

    def _with_axis(self, nodes: Iterable[Node]) -> list[Node]:
        return [node for node in nodes if node.op != "output" and self._has_axis(node)]

    def _has_axis(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), Tensor) and any(map(self._is_named, self.found.of(node)))

    def _is_named(self, structure: Structure) -> bool:
        return not self.names.isdisjoint(self.found.names(structure))

    def _enters(self, node: Node) -> bool:
        return node not in self.inside and not self.inside.isdisjoint(node.users)

    def _is_sampled(self, node: Node) -> bool:
        """Whether every reader of ``node`` takes every second element along one of the axes, or the mean of two."""
        return all(map(self._samples, (user for user in node.users if user in self.inside)))

    def _samples(self, node: Node) -> bool:
        while node.target is aten.reshape.default and len(node.users) == 1:
            node = next(iter(node.users))
        source: Any = node.args[0]
        if node.target is aten.mean.dim:
            dims = argument(node, "dim")
            return all(shape_of(source)[dim] == 2 and self._is_named(self.found.of(source)[dim]) for dim in dims)
        if node.target is aten.slice.Tensor and argument(node, "step") == 2:
            return self._is_named(self.found.of(source)[argument(node, "dim")])
        return False

    def _halve(self, node: Node) -> None:
        """Let the axes of ``node`` have half their size from now on."""
        place = f"%{node.name} ({path_of(node)})"
        named = [factor for dim in self._layout(node) for factor in dim if self._is_named(factor)]
        for name in self.names:
            if sum(name in self.found.names(factor) for factor in named) > 1:
                raise ResizeError(f"{place}: the axis of {name} is in two parts: some of it was halved before")
        for factor in named:
            if isinstance(factor, Concatenation):
                raise ResizeError(f"{place}: the axis is put together of several, and a pair may span two of them")
            if not isinstance(factor.size, int):
                raise ResizeError(f"{place}: an axis that is open ({factor.size}) cannot be halved: give it a size")
            if factor.size % 2 and self.down == "average":
                raise ResizeError(f"{place}: {factor.size} elements have no pairs to average: use down: first")
            self.sizes.assign(factor, _half(factor.size), place)

    def _exchange(
        self, node: Node, concerns: Callable[[Node], bool], before: Node, make: Callable[[Node, Node], Node]
    ) -> None:
        """Give those users of ``node`` that are concerned what ``make`` makes of it, in front of ``before``."""
        users = [user for user in node.users if concerns(user)]
        with self.graph.before(before):
            made = make(node, users[0])
        for user in users:
            user.replace_input_with(node, made)

    def _entered(self, node: Node, like: Node) -> Node:
        if node not in self.given and node.op == "call_function":
            return self._remade(node)
        sampled = self._sampled(node, like)
        self.found.walk.values[sampled] = self.found.walk.values[node]
        return sampled

    def _remade(self, node: Node) -> Node:
        """A copy of ``node``, and of what it is computed from as far as that has the axes, at the new size."""
        if node not in self.remade:
            sources = {source: self._remade(source) for source in self._with_axis(node.all_input_nodes)}
            copy = self.graph.fx.node_copy(node, lambda source: sources.get(source, source))
            self.found.walk.values[copy] = self.found.walk.values[node]
            propagate(self.graph, [copy], self.sizes)
            self.remade[node] = copy
        return self.remade[node]

    def _layout(self, node: Node) -> Layout:
        return [factors(structure) for structure in self.found.of(node)]

    def _sampled(self, node: Node, like: Node) -> Node:
        """Every second element of ``node``, or the mean of two."""
        layout = self._layout(node)
        flat = [factor for dim in layout for factor in dim]
        merged = [self._size(dim) for dim in layout]
        average = self.down == "average" and node in self.moving
        if average:
            pairs = [[_half(f.size), 2] if self._is_named(f) else [f.size] for f in flat]
            shape = [size for sizes in pairs for size in sizes]
            ends = [sum(map(len, pairs[: index + 1])) - 1 for index, sizes in enumerate(pairs) if len(sizes) == 2]
            value = self._shaped(node, shape, like)
            return self._shaped(self.graph.call(aten.mean.dim, value, ends, like=like), merged, like)
        value = self._shaped(node, [factor.size for factor in flat], like)
        for index, factor in enumerate(flat):
            if self._is_named(factor):
                value = self.graph.call(aten.slice.Tensor, value, index, 0, factor.size, 2, like=like)
        return self._shaped(value, merged, like)

    def _repeated(self, node: Node, like: Node) -> Node:
        """Every element of ``node`` twice; of an odd axis the last one once."""
        layout = self._layout(node)
        flat = [factor for dim in layout for factor in dim]
        apart = [[self.sizes.of(f), 1] if self._is_named(f) else [self.sizes.of(f)] for f in flat]
        twice = [[sizes[0], 2] if len(sizes) == 2 else sizes for sizes in apart]
        value = self._shaped(node, [size for sizes in apart for size in sizes], like)
        value = self.graph.call(aten.expand.default, value, [size for sizes in twice for size in sizes], like=like)
        odd = [index for index, factor in enumerate(flat) if self._is_named(factor) and factor.size % 2]
        if odd:
            value = self._shaped(value, [2 * sizes[0] if len(sizes) == 2 else sizes[0] for sizes in twice], like)
        for index in odd:
            value = self.graph.call(aten.slice.Tensor, value, index, 0, flat[index].size, like=like)
        return self._shaped(value, [_product(factor.size for factor in dim) for dim in layout], like)

    def _size(self, dim: Sequence[Structure]) -> Size:
        return _product(map(self.sizes.of, dim))

    def _shaped(self, node: Node, shape: list[Any], like: Node) -> Node:
        return node if list(shape_of(node)) == shape else self.graph.call(aten.reshape.default, node, shape, like=like)


def _half(size: int) -> int:
    return (size + 1) // 2


def _product(sizes: Iterable[Size]) -> Size:
    total: Size = 1
    for size in sizes:
        total = total * size
    return total
