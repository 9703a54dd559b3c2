"""Attention within inward windows: every pixel sees its neighbours in all frames, and all tokens that are no pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import aten
from optpass.ir.graph import shape_of
from optpass.rewrite.inward_windows import Tiles, in_frames, neighbours, over
from optpass.rewrite.sparse_attention import SparseWriter, numbers


class WindowWriter:
    """Of the attention that ``writer`` is about; sizes in tokens, rows before columns."""

    def __init__(self, writer: SparseWriter, radius: tuple[int, int], tile: tuple[int, int]) -> None:
        self.writer, self.radius, self.tile = writer, radius, tile
        self.frames, self.sizes = int(writer.grid.frames), (int(writer.grid.height), int(writer.grid.width))

    @cached_property
    def tiles(self) -> Tiles:
        return over(self.sizes, self.tile, self.radius)

    @property
    def products(self) -> int:
        """Pairs of a query and a key that :meth:`gathered` multiplies; of all tokens they are the square of them."""
        (count, tile), reach = self.tiles.queries.shape, self.tiles.keys.shape[1]
        others = len(self.writer.others)
        tokens = self.writer.tokens
        return count * self.frames * tile * (self.frames * reach + others) + others * tokens

    def masked(self) -> Node:
        """All tokens with all, and a mask."""
        size, start = self.sizes[0] * self.sizes[1], int(self.writer.grid.start)

        def seen() -> Tensor:
            # One class more, for what is no pixel.
            whole = torch.ones(1, size + 1, size + 1, dtype=torch.bool)
            whole[0, :size, :size] = neighbours(self.sizes, self.radius)
            return whole

        def classes() -> Tensor:
            found = torch.full((self.writer.tokens,), size)
            found[start : start + self.frames * size] = torch.arange(size).repeat(self.frames)
            return found

        table = self.writer.table("neighbours", self.radius, seen)
        return self.writer.masked(table, classes, "windows")

    def gathered(self) -> Node:
        """Tiles of queries with the keys that one of them sees, and a mask among these."""
        writer, size, start = self.writer, self.sizes[0] * self.sizes[1], int(self.writer.grid.start)
        count, others = len(self.tiles.queries), writer.others

        def queries() -> Tensor:
            return in_frames(self.tiles.queries, self.frames, size).flatten() + start

        def keys() -> Tensor:
            own = in_frames(self.tiles.keys, self.frames, size) + start
            return torch.cat([own, numbers(others).expand(count, -1)], 1).flatten()

        def back() -> Tensor:
            # Where each is, for the first time: a token may be in two tiles.
            order = (found := queries()).argsort(stable=True)
            return order[torch.searchsorted(found[order], torch.arange(start, start + self.frames * size))]

        query, key, value = writer.matrices
        query = self._rows(query, self._table("queries", queries), count)
        shared = self._table("keys", keys)
        key, value = self._rows(key, shared, count), self._rows(value, shared, count)
        mask = self._seen(len(others))
        if writer.unhidden is not None:
            visible = writer.call(aten.mT.default, self._rows(writer.unhidden, shared, count))
            mask = writer.call(aten.logical_and.default, mask, visible)
        result = writer.attend(query, key, value, mask)
        batch, _, tile, width = shape_of(result)
        result = writer.call(aten.reshape.default, result, [batch, count * tile, width])
        return writer.whole(writer.call(aten.index_select.default, result, 1, self._table("back", back)))

    def _table(self, name: str, make: Callable[[], Tensor]) -> Node:
        return self.writer.table(name, (self.radius, self.tile), make)

    def _rows(self, value: Node, table: Node, count: int) -> Node:
        """``value`` [batch, tokens, channels] at the numbers in ``table``, in tiles."""
        batch, _, width = shape_of(value)
        rows = self.writer.call(aten.index_select.default, value, 1, table)
        shape = [batch, count, shape_of(table)[0] // count, width]
        return self.writer.call(aten.reshape.default, rows, shape)

    def _seen(self, others: int) -> Node:
        """Which of a tile's keys are in a query's window: stored for one frame, and repeated for all."""
        seen = self.tiles.seen
        if self.frames == 1 and not others:
            return self._table("seen", lambda: seen)

        def stored() -> Tensor:
            return torch.nn.functional.pad(seen, (0, 1), value=True)

        def columns() -> Tensor:
            own = torch.arange(seen.shape[2]).repeat(self.frames)
            return torch.cat([own, torch.full((others,), seen.shape[2])])

        table = self._table("seen", stored)
        rows = self._table("seen_rows", lambda: torch.arange(seen.shape[1]).repeat(self.frames))
        table = self.writer.call(aten.index_select.default, table, 2, self._table("seen_columns", columns))
        return self.writer.call(aten.index_select.default, table, 1, rows)
