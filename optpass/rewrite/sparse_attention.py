"""What sparse attentions are written with: operands as matrices, tables in weights, masks by the class of a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.analysis.token_grids import Grid
from optpass.ir.graph import Graph, shape_of
from optpass.ir.program import Program
from optpass.ir.weights import Constant, Expression
from optpass.rewrite.naming import WeightNames


class Tables:
    """Constants that attentions read: each once, however many layers of however many entries have the same."""

    def __init__(self, program: Program) -> None:
        self.made: dict[str, Expression] = {}
        self._names, self._known = WeightNames(program), dict[Any, str]()

    def read(self, graph: Graph, name: str, of: Any, make: Callable[[], Tensor], like: Node) -> Node:
        """Insert a read of the table ``name`` that ``of`` describes; ``make`` computes it the first time."""
        if (name, of) not in self._known:
            full = self._known[name, of] = self._names.fresh("sparse_attention", name)
            self.made[full] = Constant(make(), computed=True)
        full = self._known[name, of]
        return graph.weight(full, self.made[full], like=like)


@dataclass
class SparseWriter:
    """Writes what takes the place of ``dense``, a scaled_dot_product_attention of [batch, heads, tokens, channels].

    ``grid`` says which tokens are pixels; all others attend to all and are attended to by all. A mask of ``dense`` is
    one of keys, such as the padding of a text: boolean, [batch or 1, 1, 1, tokens].
    """

    graph: Graph
    dense: Node
    grid: Grid
    tables: Tables
    layout: tuple[Any, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.layout = (self.grid, self.tokens)

    @property
    def tokens(self) -> int:
        return int(shape_of(self.dense)[2])

    @property
    def others(self) -> list[int]:
        """Numbers of the tokens that are no pixels."""
        return [*range(self.grid.start), *range(self.grid.stop, self.tokens)]

    @cached_property
    def matrices(self) -> tuple[Node, Node, Node]:
        """Queries, keys and values, each [batch · heads, tokens, channels]; inserted where they are first asked for."""
        q, k, v = (self._matrix(operand) for operand in self.dense.args[:3])
        return q, k, v

    @property
    def mask(self) -> Node | None:
        found: Node | None = argument(self.dense, "attn_mask")
        return found

    @cached_property
    def unhidden(self) -> Node | None:
        """The mask as a matrix [batch · heads, tokens, 1]; inserted where it is first asked for."""
        if self.mask is None:
            return None
        batch, heads, tokens, _ = shape_of(self.dense)
        column = self.call(aten.permute.default, self.mask, [0, 1, 3, 2])
        column = self.call(aten.expand.default, column, [batch, heads, tokens, 1])
        return self.call(aten.reshape.default, column, [batch * heads, tokens, 1])

    def call(self, operator: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call(operator, *args, like=self.dense, **kwargs)

    def table(self, name: str, of: Any, make: Callable[[], Tensor]) -> Node:
        """A constant that depends on the grid and on ``of``."""
        return self.tables.read(self.graph, name, (self.layout, of), make, self.dense)

    def attend(self, query: Any, key: Any, value: Any, mask: Node | None = None) -> Node:
        scale = argument(self.dense, "scale")
        named = {} if scale is None else {"scale": scale}
        return self.call(aten.scaled_dot_product_attention.default, query, key, value, mask, **named)

    def masked(self, seen: Node, classes: Callable[[], Tensor], of: Any) -> Node:
        """Dense attention with the mask that ``seen`` [1 or batch · heads, n, n] is of classes of tokens.

        ``classes`` makes the class of every token, by number, for which ``of`` stands.
        """
        table = self.table("classes", of, classes)
        mask = self.call(aten.index_select.default, self.call(aten.index_select.default, seen, 2, table), 1, table)
        if shape_of(mask)[0] != 1:
            batch = shape_of(self.dense)[:2]
            mask = self.call(aten.reshape.default, mask, [*batch, self.tokens, self.tokens])
        if self.mask is not None:
            mask = self.call(aten.logical_and.default, mask, self.mask)
        query, key, value = self.dense.args[:3]
        return self.attend(query, key, value, mask)

    def whole(self, pixels: Node) -> Node:
        """``pixels`` [batch · heads, pixels, channels] among what the other tokens see, as ``dense`` gives it."""
        *batch, _, width = shape_of(self.dense)
        result = self.call(aten.reshape.default, pixels, [*batch, self.grid.stop - self.grid.start, width])
        ends = [(0, self.grid.start), (self.grid.stop, self.tokens)]
        before, behind = (self._dense_rows(*end) if end[0] < end[1] else None for end in ends)
        parts = [part for part in (before, result, behind) if part is not None]
        return result if len(parts) == 1 else self.call(aten.cat.default, parts, 2)

    def _dense_rows(self, start: int, stop: int) -> Node:
        query, key, value = self.dense.args[:3]
        return self.attend(self.call(aten.slice.Tensor, query, 2, start, stop), key, value, self.mask)

    def _matrix(self, operand: Any) -> Node:
        batch, heads, tokens, channels = shape_of(operand)
        return self.call(aten.reshape.default, operand, [batch * heads, tokens, channels])


def numbers(values: list[int]) -> Tensor:
    """As a table of indices."""
    return torch.tensor(values, dtype=torch.int64)
