"""A memory bank of fixed length: frames one after another, neighbours that are most alike merged where it is full.

A bank takes a frame more; of its length + 1 vectors at each place of a frame, the two neighbours in time with the
largest cosine become their mean, weighted by how many frames each stands for. The sum of the sizes is the number of
frames, and the mean of the bank weighted by them that of the frames.

Every vector of a bank is thus the mean of consecutive frames, and a cosine is that of their sums. So merges are done
on which frames a vector is of, [length, frames] of zeros and ones, with the products of all pairs of frames beside:
both are added where vectors merge, and no vector is read before the end. Beside merging the vectors themselves, that
is another order of summation.

Source: MA-LMM, He et al., CVPR 2024, arXiv 2404.05726, section 3. Merging in coordinates is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.operators import aten, is_view
from optpass.ir.graph import Graph, shape_of, value_of

SMALLEST = 1e-16
"""Squared norms are taken for no less: a vector of zeros is like none."""
MARK = 8
"""Operators from a bank back to the choice of the pair that was merged last."""


@dataclass(frozen=True)
class Bank:
    """``vectors`` [batch, tokens, length, channels] and ``sizes`` [batch, tokens, length, 1], float32 or float64.

    A size is the number of frames that a vector is the mean of.
    """

    vectors: Node
    sizes: Node


@dataclass(frozen=True)
class BankWriter:
    """Writes banks of ``length`` frames into ``graph`` at the insertion point, in the module of ``like``."""

    graph: Graph
    length: int
    like: Node

    def filled(self, features: Node, frames: int) -> Bank:
        """The bank that has taken the ``frames`` of ``features`` [batch, frames · tokens, channels] in order."""
        batch, rows, channels = shape_of(features)
        if value_of(features).dtype.itemsize < torch.float32.itemsize:
            features = self._call(aten.to.dtype, features, torch.float32)
        video = self._call(aten.reshape.default, features, [batch, frames, rows // frames, channels])
        vectors = self._call(aten.permute.default, video, [0, 2, 1, 3])
        members = self._members(vectors)
        sizes = self._call(aten.sum.dim_IntList, members, [-1], True)
        means = self._call(aten.matmul.default, self._call(aten.div.Tensor, members, sizes), vectors)
        return Bank(means, sizes)

    def flat(self, bank: Bank, features: Node) -> Node:
        """``bank`` as [batch, length · tokens, channels], one frame behind the other, in the dtype of ``features``."""
        batch, tokens, length, channels = shape_of(bank.vectors)
        frames = self._call(aten.permute.default, bank.vectors, [0, 2, 1, 3])
        rows = self._call(aten.reshape.default, frames, [batch, length * tokens, channels])
        dtype = value_of(features).dtype
        return rows if value_of(rows).dtype == dtype else self._call(aten.to.dtype, rows, dtype)

    def _members(self, vectors: Node) -> Node:
        """Which frames each vector of the bank is of: [batch, tokens, length, frames] of zeros and ones."""
        batch, tokens, frames, _ = shape_of(vectors)
        order = self._call(aten.arange.default, frames)
        column = self._call(aten.reshape.default, order, [frames, 1])
        single = self._call(aten.to.dtype, self._call(aten.eq.Tensor, column, order), value_of(vectors).dtype)
        single = self._call(aten.expand.default, single, [batch, tokens, frames, frames])
        turned = self._call(aten.transpose.int, vectors, 2, 3)
        products = self._call(aten.matmul.default, vectors, turned)
        both = self._call(aten.cat.default, [single, products], 3)
        bank = self._slice(both, 2, 0, self.length)
        places = self._slice(column, 0, 0, self.length)
        for number in range(self.length, frames):
            joined = self._call(aten.cat.default, [bank, self._slice(both, 2, number, number + 1)], 2)
            bank = self._merged(joined, places, frames)
        return self._slice(bank, 3, 0, frames)

    def _merged(self, bank: Node, places: Node, frames: int) -> Node:
        """A bank [batch, tokens, length + 1, 2 · frames] with the two neighbours as one that are most alike."""
        one, other = self._neighbours(bank)
        most = self._call(aten.argmax.default, self._cosines(bank, frames), 2, True)
        # Of every place before the merged one what stood there, of every place behind it the next, of it both.
        before, behind = (self._call(operator, places, most) for operator in (aten.le.Tensor, aten.ge.Tensor))
        dtype = value_of(bank).dtype
        parts = [
            self._call(aten.mul.Tensor, rows, self._call(aten.to.dtype, stays, dtype))
            for rows, stays in ((one, before), (other, behind))
        ]
        return self._call(aten.add.Tensor, *parts)

    def _cosines(self, bank: Node, frames: int) -> Node:
        """Of neighbours [batch, tokens, length, 1]."""
        members, products = self._slice(bank, 3, 0, frames), self._slice(bank, 3, frames, 2 * frames)
        squares = self._summed(members, products)
        norms = self._call(aten.sqrt.default, self._call(aten.clamp.default, squares, SMALLEST))
        next_to = self._summed(self._neighbours(members)[1], self._neighbours(products)[0])
        return self._call(aten.div.Tensor, next_to, self._call(aten.mul.Tensor, *self._neighbours(norms)))

    def _summed(self, one: Node, other: Node) -> Node:
        return self._call(aten.sum.dim_IntList, self._call(aten.mul.Tensor, one, other), [-1], True)

    def _neighbours(self, value: Node) -> tuple[Node, Node]:
        return self._slice(value, 2, 0, self.length), self._slice(value, 2, 1, self.length + 1)

    def _slice(self, value: Node, dim: int, start: int, stop: int) -> Node:
        return self._call(aten.slice.Tensor, value, dim, start, stop)

    def _call(self, operator: Any, *args: Any) -> Node:
        return self.graph.call(operator, *args, like=self.like)


def is_bank(node: Node) -> bool:
    """Whether ``node`` is a bank that has merged frames, past views and casts."""
    while node.op == "call_function" and (is_view(node) or node.target is aten.to.dtype):
        node = node.all_input_nodes[0]
    level = {node}
    for _ in range(MARK):
        if any(each.target is aten.argmax.default for each in level):
            return True
        level = {operand for each in level for operand in each.all_input_nodes}
    return False
