"""Rows of a batch of sequences by index, in operators that engines run as copies of whole rows."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from optpass.analysis.operators import aten
from optpass.analysis.pieces import TO_THE_END
from optpass.ir.graph import Graph, shape_of


@dataclass(frozen=True)
class RowWriter:
    """Writes at the insertion point of ``graph``, in the module of ``like``. Values are [batch, tokens, …]."""

    graph: Graph
    like: Node

    def call(self, operator: Any, *args: Any) -> Node:
        return self.graph.call(operator, *args, like=self.like)

    def sliced(self, value: Node, start: Any, stop: Any = TO_THE_END, step: int = 1) -> Node:
        """Tokens ``start`` to ``stop`` (not included), every ``step``-th."""
        if start == 0 and stop in (TO_THE_END, shape_of(value)[1]) and step == 1:
            return value
        return self.call(aten.slice.Tensor, value, 1, start, stop, *([] if step == 1 else [step]))

    def joined(self, parts: list[Node]) -> Node:
        """``parts`` after one another."""
        return parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, 1)

    def flat(self, index: Node, count: int) -> Node:
        """Positions [batch, k] in sequences of ``count`` tokens, as [batch · k] in all of them after one another."""
        batch, chosen = shape_of(index)
        if batch != 1:
            first = self.call(aten.mul.Tensor, self.call(aten.arange.default, batch), count)
            index = self.call(aten.add.Tensor, index, self.call(aten.unsqueeze.default, first, 1))
        return self.call(aten.reshape.default, index, [batch * chosen])

    def taken(self, value: Node, index: Node) -> Node:
        """The rows of ``value`` [batch, tokens, c] at ``index`` [batch, k]: [batch, k, c].

        A lookup in one dimension copies whole rows; ``gather`` would need an index for each of their elements.
        """
        batch, count, channels = shape_of(value)
        rows = self.call(aten.reshape.default, value, [batch * count, channels])
        found = self.call(aten.index_select.default, rows, 0, self.flat(index, count))
        return self.call(aten.reshape.default, found, [batch, shape_of(index)[1], channels])

    def put_back(self, value: Node, index: Node, rows: Node) -> Node:
        """``value`` [batch, tokens, c] with ``rows`` [batch, k, c] at ``index`` [batch, k], the others as they were."""
        batch, count, channels = shape_of(value)
        flat = self.call(aten.reshape.default, value, [batch * count, channels])
        new = self.call(aten.reshape.default, rows, [batch * shape_of(index)[1], channels])
        written = self.call(aten.index_put.default, flat, [self.flat(index, count)], new)
        return self.call(aten.reshape.default, written, [batch, count, channels])

    def ones(self, batch: Any, count: int, like: Node) -> Node:
        """[batch, count, 1] of the dtype of ``like``."""
        return self.graph.call(aten.full.default, [batch, count, 1], 1.0, dtype=like.meta["val"].dtype, like=self.like)

    def item(self, pair: Node, number: int) -> Node:
        """One result of an operator that has several."""
        return self.call(operator.getitem, pair, number)
