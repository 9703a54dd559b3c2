"""Token merging: the r most alike pairs of tokens become one token each, by bipartite soft matching.

Tokens at even places (A) and at odd ones (B) are compared by the cosine of their keys, averaged over heads. Every
token of A has its nearest in B; the r with the nearest are added to it, weighted by how many tokens each stands for.

Source: Bolya et al., ICLR 2023, arXiv 2210.09461, section 3, and the authors' code. A sum over what goes into one token
is a product with a matrix of zeros and ones, where the code scatters: the same numbers, on operators that engines have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.attention import Attention
from optpass.analysis.operators import argument, aten
from optpass.ir.graph import Graph, shape_of, value_of
from optpass.rewrite.token_rows import RowWriter

SHORTEST = 1e-12
"""Length below which a key has no direction, as in torch's ``normalize``."""


@dataclass(frozen=True)
class Merged:
    """Tokens [batch, tokens, d] and how many of the first ones each stands for [batch, tokens, 1]; 1 where ``None``."""

    rows: Node
    sizes: Node | None = None


def most(count: int, protected: int) -> int:
    """How many of ``count`` tokens can be merged away at once."""
    return max(0, (count - protected) // 2)


def key_layout(attention: Attention, batch: Any) -> str:
    """Why keys cannot be read as those of ``batch`` sequences; empty where they can."""
    keys, shape = attention.core.key, shape_of(attention.core.key.node)
    heads = [dim for dim in keys.batch if dim != 0]
    if (
        0 in keys.batch
        and len(heads) <= 1
        and (shape[0] == batch or (not heads and shape[0] == _folded(attention, batch)))
    ):
        return ""
    return "its keys are not laid out as those of batch and heads"


def _folded(attention: Attention, batch: Any) -> Any:
    return batch * attention.key_heads


def key_directions(graph: Graph, attention: Attention, like: Node) -> Node:
    """Keys averaged over heads, of length 1: [batch, tokens, c], at the insertion point; ``like`` is their stream."""
    write, batch = RowWriter(graph, like), shape_of(like)[0]
    keys = attention.core.key
    node, shape = keys.node, shape_of(keys.node)
    heads = [dim for dim in keys.batch if dim != 0]
    if not heads and shape[0] != batch:
        node = write.call(aten.reshape.default, node, [batch, attention.key_heads, *shape[1:]])
        heads = [1]
    if heads:
        node = write.call(aten.mean.dim, node, heads)
    if keys.tokens > keys.channels:
        node = write.call(aten.transpose.int, node, 1, 2)
    length = write.call(aten.clamp.default, write.call(aten.linalg_vector_norm.default, node, 2, [-1], True), SHORTEST)
    return write.call(aten.div.Tensor, node, length)


@dataclass(frozen=True)
class _Pairs:
    """``index`` [batch, k] are the places of the candidates of A: those that stay, and the last ``going``, which go.

    ``target`` [batch, going] says into which of the ``others`` candidates of B these go.
    """

    index: Node
    going: int
    target: Node
    others: int


class Merger:
    """Merges pairs at the insertion point, in the module of ``like``; the first ``protected`` tokens stay."""

    def __init__(self, graph: Graph, like: Node, protected: int) -> None:
        self.write, self.protected = RowWriter(graph, like), protected
        self.call = self.write.call
        # Of the protected tokens, those at even places are in A.
        self.even, self.odd = (protected + 1) // 2, protected // 2

    def merged(self, tokens: Merged, directions: Node, count: int) -> Merged:
        """``tokens`` with ``count`` fewer; which are alike is what ``directions`` [batch, tokens, c] say."""
        pairs, rows = self._pairs(directions, count), tokens.rows
        staying, going = self._parted(rows, pairs)
        weights = self._weights(pairs, value_of(rows).dtype)
        odd = self._odd(rows)
        if tokens.sizes is None:
            before, sizes = None, self._ones(pairs, odd)
        else:
            sizes, those = self._parted(tokens.sizes, pairs)
            weights = self.call(aten.mul.Tensor, weights, self.call(aten.transpose.int, those, 1, 2))
            before = self._odd(tokens.sizes)
            odd = self.call(aten.mul.Tensor, odd, before)
        total = self.call(aten.sum.dim_IntList, weights, [-1], True)
        total = self.call(aten.add.Tensor, total, 1.0 if before is None else before)
        gained = self.call(aten.add.Tensor, odd, self.call(aten.matmul.default, weights, going))
        return Merged(
            self.write.joined([*staying, self.call(aten.div.Tensor, gained, total)]),
            self.write.joined([*sizes, total]),
        )

    def _pairs(self, directions: Node, count: int) -> _Pairs:
        even = self.write.sliced(directions, 2 * self.even, step=2)
        odd = self._odd(directions)
        likeness = self.call(aten.matmul.default, even, self.call(aten.transpose.int, odd, 1, 2))
        candidates, others = (int(size) for size in shape_of(likeness)[1:])
        best = self.call(aten.max.dim, likeness, -1)
        value, nearest = (self.write.item(best, number) for number in (0, 1))
        order = self.write.item(self.call(aten.topk.default, value, candidates), 1)
        going = self.write.sliced(order, 0, count)
        target = self.call(aten.gather.default, nearest, 1, going)
        index = self.write.joined([*self._staying(order, count), going])
        index = self.call(aten.mul.Tensor, index, 2)
        if self.even:
            index = self.call(aten.add.Tensor, index, 2 * self.even)
        return _Pairs(index, count, target, others)

    def _staying(self, order: Node, count: int) -> list[Node]:
        if shape_of(order)[1] == count:
            return []
        staying = self.write.sliced(order, count)
        # As the code does behind a class token: which of the next layer's places are even depends on it.
        return [self.write.item(self.call(aten.sort.default, staying), 0) if self.protected else staying]

    def _weights(self, pairs: _Pairs, dtype: torch.dtype) -> Node:
        """[batch, others, going]: 1 where one goes into the other."""
        places = self.call(aten.unsqueeze.default, self.call(aten.arange.default, pairs.others), 1)
        onto = self.call(aten.eq.Tensor, self.call(aten.unsqueeze.default, pairs.target, 1), places)
        return self.call(aten.to.dtype, onto, dtype)

    def _odd(self, value: Node) -> Node:
        return self.write.sliced(value, 2 * self.odd + 1, step=2)

    def _parted(self, value: Node, pairs: _Pairs) -> tuple[list[Node], Node]:
        """Of ``value`` [batch, tokens, c], the rows that stay as they are, and those that go."""
        found, count = self.write.taken(value, pairs.index), int(shape_of(pairs.index)[1]) - pairs.going
        staying = [self.write.sliced(value, 0, self.protected)] if self.protected else []
        staying += [self.write.sliced(found, 0, count)] if count else []
        return staying, self.write.sliced(found, count)

    def _ones(self, pairs: _Pairs, like: Node) -> list[Node]:
        count = self.protected + int(shape_of(pairs.index)[1]) - pairs.going
        return [self.write.ones(shape_of(like)[0], count, like)] if count else []


def mean_of_all(graph: Graph, mean: Node, sizes: Node, start: int, count: int) -> None:
    """Have ``mean`` over merged tokens, without the first ``start``, be that of the ``count`` that they were."""
    write = RowWriter(graph, mean)
    with graph.before(mean):
        weighted = write.call(aten.mul.Tensor, mean.args[0], write.sliced(sizes, start))
        total = write.call(aten.sum.dim_IntList, weighted, argument(mean, "dim"), argument(mean, "keepdim"))
        mean.replace_all_uses_with(write.call(aten.div.Tensor, total, float(count)))
