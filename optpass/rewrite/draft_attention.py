"""DraftAttention: a softmax over pooled queries and keys drafts which blocks of pixels attend to which.

A block is a patch of a frame. The draft keeps the largest entries of the map of blocks by blocks: the ones from a
threshold on, of each head (as released: the largest entry that would be dropped is kept, and so are its equals), or
as many in each row, which is ours, and gives every block of queries as many keys.

Source: DraftAttention, arXiv 2505.14708, in the released form, which pools by the mean.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.ir.graph import shape_of
from optpass.rewrite.sparse_attention import SparseWriter


@dataclass
class DraftWriter:
    """Of the attention that ``writer`` is about; ``pool`` is a block's height and width, which divide the grid's."""

    writer: SparseWriter
    pool: tuple[int, int]
    sparsity: float

    @property
    def blocks(self) -> int:
        grid = self.writer.grid
        return int(grid.frames * (grid.height // self.pool[0]) * (grid.width // self.pool[1]))

    @property
    def kept(self) -> int:
        """Blocks of keys for a block of queries, where every row keeps as many."""
        return self.blocks - int(self.sparsity * self.blocks)

    def masked(self, *, of_rows: bool) -> Node:
        """All tokens with all, and a mask."""
        writer, draft = self.writer, self._draft()
        batch, count, _ = shape_of(draft)
        if of_rows:
            bound = self._smallest(draft, self.kept)
        else:
            flat = writer.call(aten.reshape.default, draft, [batch, 1, count * count])
            bound = self._smallest(flat, min(count * count, count * count - int(self.sparsity * count * count) + 1))
        # One class more, for what is no pixel: more likely than anything.
        padded = writer.call(aten.constant_pad_nd.default, draft, [0, 1], 2.0)
        seen = writer.call(aten.ge.Tensor, padded, bound)
        return writer.masked(self._with_last_row(seen), self._classes, self.pool)

    def gathered(self) -> Node:
        """Blocks of queries with the blocks of keys that their row of the draft keeps."""
        writer, draft = self.writer, self._draft()
        batch, count, _ = shape_of(draft)
        chosen = self._largest(draft, self.kept, 1)
        # Rows of a matrix of all blocks of all heads.
        first = writer.call(aten.arange.default, batch, dtype=torch.int64, device=torch.device("cpu"))
        first = writer.call(aten.mul.Tensor, writer.call(aten.reshape.default, first, [batch, 1, 1]), count)
        chosen = writer.call(aten.add.Tensor, chosen, first)
        chosen = writer.call(aten.reshape.default, chosen, [batch * count * self.kept])
        query, key, value = writer.matrices
        keys, values = self._gathered(key, chosen), self._gathered(value, chosen)
        visible = writer.unhidden and self._call(aten.mT.default, self._gathered(writer.unhidden, chosen))
        blocks = writer.attend(self.in_blocks(self._pixels(query)), keys, values, visible)
        return writer.whole(self.in_order(blocks))

    def in_blocks(self, pixels: Node) -> Node:
        """``pixels`` [batch, frames · height · width, channels], block by block: [batch, blocks, block, channels]."""
        batch, _, width = shape_of(pixels)
        split = self._call(aten.reshape.default, pixels, self._split(batch, width))
        split = self._call(aten.permute.default, split, [0, 2, 1, 3, 4])
        return self._call(aten.reshape.default, split, [batch, self.blocks, math.prod(self.pool), width])

    def in_order(self, blocks: Node) -> Node:
        """The inverse of :meth:`in_blocks`."""
        batch, _, size, width = shape_of(blocks)
        parts, high, across, wide, _ = self._split(batch, width)
        split = self._call(aten.reshape.default, blocks, [parts, across, high, wide, width])
        split = self._call(aten.permute.default, split, [0, 2, 1, 3, 4])
        return self._call(aten.reshape.default, split, [batch, self.blocks * size, width])

    def _split(self, batch: Any, width: Any) -> list[Any]:
        """Rows of blocks, rows of a block, blocks across, columns of a block, channels."""
        grid, (high, wide) = self.writer.grid, self.pool
        return [batch * (grid.frames * (grid.height // high)), high, grid.width // wide, wide, width]

    def _draft(self) -> Node:
        """softmax(q·kᵀ) [batch · heads, blocks, blocks] of means over blocks."""
        query, key, _ = self.writer.matrices
        width = shape_of(query)[-1]
        scale = argument(self.writer.dense, "scale")
        one, other = (self._pooled(self._pixels(each)) for each in (query, key))
        logits = self._call(aten.matmul.default, one, self._call(aten.permute.default, other, [0, 2, 1]))
        logits = self._call(aten.mul.Tensor, logits, width**-0.5 if scale is None else scale)
        return self._call(aten.softmax.int, logits, -1)

    def _pooled(self, pixels: Node) -> Node:
        batch, _, width = shape_of(pixels)
        split = self._call(aten.reshape.default, pixels, self._split(batch, width))
        means = self._call(aten.mean.dim, split, [1, 3])
        return self._call(aten.reshape.default, means, [batch, self.blocks, width])

    def _pixels(self, matrix: Node) -> Node:
        """The rows of ``matrix`` [batch, tokens, channels] that are pixels."""
        grid = self.writer.grid
        if grid.stop - grid.start == self.writer.tokens:
            return matrix
        return self._call(aten.slice.Tensor, matrix, 1, grid.start, grid.stop)

    def _largest(self, values: Node, count: int, part: int) -> Node:
        """Of the last dimension: the ``count`` largest in order (``part`` 0) or their places (1)."""
        return self._call(operator.getitem, self._call(aten.topk.default, values, count, -1), part)

    def _smallest(self, values: Node, count: int) -> Node:
        """The smallest of the ``count`` largest."""
        return self._call(aten.slice.Tensor, self._largest(values, count, 0), 2, count - 1, count)

    def _gathered(self, matrix: Node, chosen: Node) -> Node:
        """For every block the rows of ``matrix`` that it sees, [batch, blocks, rows, channels].

        Those of blocks at ``chosen``, and behind them those that are no pixels.
        """
        blocks = self.in_blocks(self._pixels(matrix))
        batch, count, size, width = shape_of(blocks)
        rows = self._call(aten.reshape.default, blocks, [batch * count, size * width])
        rows = self._call(aten.index_select.default, rows, 0, chosen)
        rows = self._call(aten.reshape.default, rows, [batch, count, self.kept * size, width])
        return self._with_others(rows, matrix)

    def _with_others(self, gathered: Node, matrix: Node) -> Node:
        """And behind them, for every block, the rows of ``matrix`` that are no pixels."""
        writer = self.writer
        if not writer.others:
            return gathered
        batch, count, _, width = shape_of(gathered)
        table = writer.table("others", (), lambda: torch.tensor(writer.others, dtype=torch.int64))
        rows = self._call(aten.index_select.default, matrix, 1, table)
        rows = self._call(aten.unsqueeze.default, rows, 1)
        rows = self._call(aten.expand.default, rows, [batch, count, len(writer.others), width])
        return self._call(aten.cat.default, [gathered, rows], 2)

    def _with_last_row(self, seen: Node) -> Node:
        batch, _, columns = shape_of(seen)
        table = self.writer.table("all_seen", columns, lambda: torch.ones(1, 1, int(columns), dtype=torch.bool))
        row = self._call(aten.expand.default, table, [batch, 1, columns])
        return self._call(aten.cat.default, [seen, row], 1)

    def _classes(self) -> Tensor:
        """The block of every token; tokens that are no pixels are of the last class."""
        grid, (high, wide) = self.writer.grid, self.pool
        frame, row, column = torch.meshgrid(*map(torch.arange, (grid.frames, grid.height, grid.width)), indexing="ij")
        block = (frame * (grid.height // high) + row // high) * (grid.width // wide) + column // wide
        found = torch.full((self.writer.tokens,), self.blocks)
        found[grid.start : grid.stop] = block.flatten()
        return found

    def _call(self, operator: Any, *args: Any) -> Node:
        return self.writer.call(operator, *args)
