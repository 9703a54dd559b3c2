"""Selections along a stream: behind each there are fewer tokens, and all that reads them follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from optpass.analysis.attention import Attention
from optpass.analysis.attention_cores import Core
from optpass.analysis.operators import argument, aten
from optpass.analysis.token_flow import Rows, TokenFlow
from optpass.ir.graph import Graph, shape_of, value_of
from optpass.rewrite.attention_received import attention_map, received
from optpass.rewrite.dropped_tokens import Protected, kept_rows
from optpass.rewrite.merged_tokens import Merged, Merger, key_directions, mean_of_all
from optpass.rewrite.token_counts import with_count
from optpass.rewrite.token_rows import RowWriter


@dataclass(frozen=True)
class Place:
    """The ``stream`` [batch, tokens, d] behind ``attention``, of which ``kept`` tokens are to stay of all ``total``."""

    stream: Node
    attention: Attention
    kept: int
    total: int


class FewerTokens(ABC):
    """Selects at ``places``, in order, of tokens that go where ``flow`` says. Subclasses say how."""

    def __init__(self, graph: Graph, places: Sequence[Place], flow: TokenFlow) -> None:
        self.graph, self.places, self.flow = graph, places, flow
        self.counts = {number: place.kept for number, place in enumerate(places, 1)}

    def write(self) -> None:
        """Everything, in one walk over the graph."""
        numbers = {place.stream: number for number, place in enumerate(self.places, 1)}
        for node in self.graph.calls:
            self.before(node)
            if number := numbers.get(node):
                node.meta["val"] = self.graph.infer(node)
                self._select(node, number)
            elif node in self.flow.rows:
                with_count(self.graph, node, self.flow, self.counts)

    def _select(self, stream: Node, number: int) -> None:
        following = stream.next
        with self.graph.before(following):
            result = self.selected(self.places[number - 1], number)
        made, node = set(), stream.next
        while node is not following:
            made.add(node)
            node = node.next
        stream.replace_all_uses_with(result, delete_user_cb=lambda user: user not in made)

    @abstractmethod
    def before(self, node: Node) -> None:
        """Write what ``node`` needs, whose operands are up to date."""

    @abstractmethod
    def selected(self, place: Place, number: int) -> Node:
        """The tokens that stay [batch, kept, d], at the insertion point."""


class MergedTokens(FewerTokens):
    """Merges the most alike. Attention counts a token as often as it stands for others, and so does a mean."""

    def __init__(
        self,
        graph: Graph,
        places: Sequence[Place],
        flow: TokenFlow,
        protected: int,
        attentions: Collection[Attention],
    ) -> None:
        super().__init__(graph, places, flow)
        self.protected = protected
        self.sizes: dict[int, Node] = {}
        self.biases: dict[tuple[int, int], Node] = {}
        self.counting = {each.core.softmax or each.core.result.node: each for each in attentions}

    def before(self, node: Node) -> None:
        attention = self.counting.get(node)
        if attention is not None and (rows := self.flow.rows.get(attention.core.key.node)):
            self._count(node, attention, self._bias(rows))
        elif rows := self.flow.means.get(node):
            # Dead from here on; its operands have fewer rows.
            total = self.places[rows.level - 1].total
            mean_of_all(self.graph, node, self.sizes[rows.level], rows.start, total - rows.start)

    def selected(self, place: Place, number: int) -> Node:
        directions = key_directions(self.graph, place.attention, place.stream)
        merger = Merger(self.graph, place.stream, self.protected)
        gone = int(shape_of(place.stream)[1]) - place.kept
        before = self.sizes.get(self.flow.arriving[place.stream])
        merged = merger.merged(Merged(place.stream, before), directions, gone)
        assert merged.sizes is not None
        self.sizes[number] = merged.sizes
        return merged.rows

    def _bias(self, rows: Rows) -> Node:
        """log(size) [batch, 1, 1, tokens] of keys with ``rows``; the attentions behind one selection share it."""
        key = (rows.level, rows.start)
        if key not in self.biases:
            sizes = self.sizes[rows.level]
            batch, count, _ = shape_of(sizes)
            write = RowWriter(self.graph, sizes)
            with self.graph.before(sizes.next):
                logarithms = write.call(aten.log.default, write.sliced(sizes, rows.start))
                shape = [batch, 1, 1, count - rows.start]
                self.biases[key] = write.call(aten.reshape.default, logarithms, shape)
        return self.biases[key]

    def _count(self, node: Node, attention: Attention, bias: Node) -> None:
        """Add ``bias`` to the scores of an attention, at its softmax or in the operator that is all of it."""
        with self.graph.before(node):
            if attention.core.softmax is None:
                _set(node, 3, "attn_mask", self._cast(bias, node))
                return
            scores: Any = node.args[0]
            shape = shape_of(scores)
            if len(shape) == 3:
                bias = self._folded(bias, shape, attention.heads)
            node.update_arg(0, self.graph.call(aten.add.Tensor, scores, self._cast(bias, scores), like=node))

    def _cast(self, value: Node, like: Node) -> Node:
        dtype = value_of(like).dtype
        return value if value_of(value).dtype == dtype else self.graph.call(aten.to.dtype, value, dtype, like=like)

    def _folded(self, bias: Node, shape: tuple[Any, ...], heads: int) -> Node:
        """Of scores [batch · heads, queries, keys], or [batch, queries, keys] of one head."""
        batch, _, _, count = shape_of(bias)
        each = self.graph.call(
            aten.expand.default, bias, [batch, 1 if shape[0] == batch else heads, 1, count], like=bias
        )
        return self.graph.call(aten.reshape.default, each, [shape[0], 1, count], like=bias)


def countable(core: Core, batch: Any, heads: int) -> bool:
    """Whether the scores are [batch, heads, queries, keys], with batch and heads folded perhaps."""
    if core.softmax is None:
        shape = shape_of(core.key.node)
        return core.result.node.target is aten.scaled_dot_product_attention.default and _is_whole(shape, batch)
    shape = shape_of(core.softmax)
    if int(argument(core.softmax, "dim")) % len(shape) != len(shape) - 1:
        return False
    return _is_whole(shape, batch) or (len(shape) == 3 and shape[0] in (batch, batch * heads))


def _is_whole(shape: tuple[Any, ...], batch: Any) -> bool:
    return len(shape) == 4 and shape[0] == batch


class DroppedTokens(FewerTokens):
    """Drops those that receive least. ``weight`` is that of the queries of a protected frame."""

    def __init__(
        self,
        graph: Graph,
        places: Sequence[Place],
        flow: TokenFlow,
        protected: Protected,
        weight: float,
    ) -> None:
        super().__init__(graph, places, flow)
        self.protected, self.weight = {0: protected}, weight
        self.maps: dict[Node, Node] = {}
        self.fused = {each.attention.core.result.node: each.attention.core for each in places}

    def before(self, node: Node) -> None:
        if node in self.fused and node not in self.maps:
            core = self.fused[node]
            self.maps[node] = attention_map(self.graph, core)

    def selected(self, place: Place, number: int) -> Node:
        weights = self.maps[place.attention.core.result.node]
        protected = self.protected[self.flow.arriving[place.stream]]
        self.protected[number] = protected.gathered
        scores = received(self.graph, weights, place.stream, frame=protected.frame, weight=self.weight)
        return kept_rows(self.graph, place.stream, scores, place.kept, protected)


def _set(node: Node, position: int, name: str, value: Node) -> None:
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
