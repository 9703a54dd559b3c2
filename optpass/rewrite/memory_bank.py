"""A memory bank of fixed length: frames one after another, neighbours that are most alike merged where it is full.

A bank [batch, length, tokens, channels] takes a frame more; of its length + 1 frames, the two neighbours whose
vectors have the largest cosine become their mean, weighted by how many frames each stands for, at every place of a
frame for itself. The sum of the sizes is the number of frames, and the mean of the bank weighted by them that of the
frames.

Source: MA-LMM, He et al., CVPR 2024, arXiv 2404.05726, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.operators import aten, is_view
from optpass.ir.graph import Graph, shape_of, value_of

SMALLEST = 1e-8
"""Norms that a cosine divides by at least."""


@dataclass(frozen=True)
class Bank:
    """``frames`` [batch, length, tokens, channels] and ``sizes`` [batch, length, tokens], both float32 or float64.

    A size is the number of frames that a vector is the mean of.
    """

    frames: Node
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
        bank = Bank(self._slice(video, 0, self.length), self._ones(video, self.length))
        single = self._ones(video, 1)
        places = self._call(aten.reshape.default, self._call(aten.arange.default, self.length), [1, -1, 1])
        for number in range(self.length, frames):
            joined = self._call(aten.cat.default, [bank.frames, self._slice(video, number, number + 1)], 1)
            bank = self._merged(joined, self._call(aten.cat.default, [bank.sizes, single], 1), places)
        return bank

    def _merged(self, frames: Node, sizes: Node, places: Node) -> Bank:
        """The bank of one frame less than ``frames``; ``places`` [1, length, 1] are those of its own."""
        one, other = self._neighbours(frames)
        most = self._call(aten.argmax.default, self._cosines(frames, one, other), 1, True)
        small, large = self._neighbours(sizes)
        # Of every place before the merged one the frame that stood there, of every place behind it the next.
        small = self._call(aten.mul.Tensor, small, self._cast(self._call(aten.le.Tensor, places, most), sizes))
        large = self._call(aten.mul.Tensor, large, self._cast(self._call(aten.ge.Tensor, places, most), sizes))
        sizes = self._call(aten.add.Tensor, small, large)
        parts = (self._weighted(one, small, sizes), self._weighted(other, large, sizes))
        return Bank(self._call(aten.add.Tensor, *parts), sizes)

    def flat(self, bank: Bank, features: Node) -> Node:
        """``bank`` as [batch, length · tokens, channels] in the dtype of ``features``."""
        batch, length, tokens, channels = shape_of(bank.frames)
        rows = self._call(aten.reshape.default, bank.frames, [batch, length * tokens, channels])
        return rows if value_of(rows).dtype == value_of(features).dtype else self._cast(rows, features)

    def _cosines(self, frames: Node, one: Node, other: Node) -> Node:
        """Of neighbours [batch, length, tokens]."""
        squares = self._call(aten.sum.dim_IntList, self._call(aten.mul.Tensor, frames, frames), [-1])
        norms = self._call(aten.clamp.default, self._call(aten.sqrt.default, squares), SMALLEST)
        products = self._call(aten.sum.dim_IntList, self._call(aten.mul.Tensor, one, other), [-1])
        return self._call(aten.div.Tensor, products, self._call(aten.mul.Tensor, *self._neighbours(norms)))

    def _weighted(self, frames: Node, part: Node, whole: Node) -> Node:
        share = self._call(aten.unsqueeze.default, self._call(aten.div.Tensor, part, whole), -1)
        return self._call(aten.mul.Tensor, frames, share)

    def _neighbours(self, value: Node) -> tuple[Node, Node]:
        return self._slice(value, 0, self.length), self._slice(value, 1, self.length + 1)

    def _slice(self, value: Node, start: int, stop: int) -> Node:
        return self._call(aten.slice.Tensor, value, 1, start, stop)

    def _ones(self, frames: Node, count: int) -> Node:
        batch, _, tokens, _ = shape_of(frames)
        return self._call(aten.full.default, [batch, count, tokens], 1.0, dtype=value_of(frames).dtype)

    def _cast(self, value: Node, like: Node) -> Node:
        return self._call(aten.to.dtype, value, value_of(like).dtype)

    def _call(self, operator: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call(operator, *args, like=self.like, **kwargs)


MARK = 8
"""Operators from a bank's frames back to the choice of the pair that was merged."""


def is_bank(node: Node) -> bool:
    """Whether ``node`` is a bank that has merged frames, past views and casts."""
    while is_view(node) or node.target is aten.to.dtype:
        node = node.all_input_nodes[0]
    level = {node}
    for _ in range(MARK):
        if any(each.target is aten.argmax.default for each in level):
            return True
        level = {operand for each in level for operand in each.all_input_nodes}
    return False
