"""The pass ``sparse-attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.fx import Node

from optpass.analysis.attention import Attention, attentions
from optpass.analysis.attention_choice import Choice
from optpass.analysis.operators import argument, aten
from optpass.analysis.token_grids import Grid
from optpass.ir.graph import Graph, shape_of, value_of
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.draft_attention import DraftWriter
from optpass.rewrite.sparse_attention import SparseWriter, Tables
from optpass.rewrite.window_attention import WindowWriter

Pair = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class SparseAttention(Pass):
    """softmax(q·kᵀ)·v over a grid of tokens → the same over some of the keys: a window, or blocks that a draft keeps.

    `pattern: window` (FreeSwim): a pixel sees those within `radius` rows and columns, in all frames; at a border the
    window is shifted inward and stays as large. `pattern: draft` (DraftAttention): patches of `pool` tokens are
    blocks; a softmax over their mean queries and keys says which blocks attend to which, and the int(`sparsity` ·
    blocks²) least of each head are dropped, save the largest of these and its equals (`per: head`, as released), or
    the int(`sparsity` · blocks) least of each block of queries (`per: row`, ours). Text and other tokens that are
    no pixels attend to all and are attended to by all, save what a mask of keys hides, such as a text's padding.

    `form: blocks` reads the keys that a tile or block of queries needs, and multiplies no others: it is faster, the
    more so the longer the sequence. `form: mask` multiplies all and masks: the reference, **no faster than dense
    attention** (slower in ONNX Runtime). Drafts per head leave every row a number of blocks of its own and have this
    form alone: they show what a draft costs in quality, and `per: row` is what saves time.

    Leaves alone, with the reason: cross-attention, attention over time or within windows, causal attention and other
    masks, products that are written out, heads that share keys; grids of open size, and such as `pool` does not
    divide (the released form has no padding either); windows or blocks that would multiply as much as all tokens do.

    Source: FreeSwim, arXiv 2511.14712, and DraftAttention, Shen et al., arXiv 2505.14708, in the released forms;
    both without training.
    """

    pattern: Literal["window", "draft"] = Field(description="a window around each pixel, or blocks by a draft")
    radius: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        (15, 26), description="of a window: rows and columns to either side; half of Wan's 30 × 52 tokens by default"
    )
    tile: Pair = Field((8, 8), description="of windows in blocks: rows and columns of queries that share keys")
    pool: Pair = Field((8, 16), description="of a draft: rows and columns of a block")
    sparsity: float = Field(0.9, ge=0, lt=1, description="of a draft: share of blocks that are dropped")
    per: Literal["head", "row"] = Field("head", description="of a draft: whose blocks are ranked together")
    form: Literal["blocks", "mask"] | None = Field(
        None, description="only the products that are needed, or a mask; blocks by default, mask of drafts per head"
    )
    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="frames, rows and columns of the tokens, where the inputs do not say it"
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="only layers of these numbers, from 0 in each stack"
    )
    match: tuple[str, ...] = Field((), description="only attentions of these modules, e.g. '*.attn1'")

    contract = approximate()

    @model_validator(mode="after")
    def _has_form(self) -> Self:
        if self.form == "blocks" and self.is_ragged:
            raise ValueError("a draft per head leaves every row a number of blocks of its own: per: row, or form: mask")
        return self

    @property
    def is_ragged(self) -> bool:
        """Whether rows keep different numbers of blocks, which no tensor of a fixed shape holds."""
        return self.pattern == "draft" and self.per == "head"

    @property
    def is_masked(self) -> bool:
        return self.form == "mask" or self.is_ragged

    def run(self, program: Program, context: Context) -> Program:
        found = attentions(program)
        choice, tables = Choice(found, self.layers, self.match), Tables(program)
        for where, reason in choice.missed:
            context.decline(where, reason)
        for each in choice.chosen:
            site = self._site(each)
            result = site if isinstance(site, str) else self._written(program.entries[each.entry], site, tables)
            if isinstance(result, str):
                context.decline(each.core.result.node, result, each.entry)
            else:
                each.core.result.node.replace_all_uses_with(result)
                context.rewrote(each.path, each.entry)
        for graph in program.entries.values():
            graph.remove_dead_code()
        return program.with_weights(tables.made).pruned()

    def _site(self, each: Attention) -> _Site | str:
        node = each.core.result.node
        for reason in (_unfit(each), _unwritable(node)):
            if reason:
                return reason
        grid = self._grid(each)
        if isinstance(grid, str):
            return grid
        sizes = (grid.start, grid.stop, grid.frames, grid.height, grid.width, shape_of(node)[2])
        if not all(isinstance(size, int) for size in sizes):
            return "the sizes of its grid are open, and windows and blocks are of one grid"
        return _Site(node, grid)

    def _grid(self, each: Attention) -> Grid | str:
        if self.grid is None:
            return each.queries.image or "its tokens are no grid of rows and columns that inputs say: give it as grid"
        frames, height, width = self.grid
        start: Any = 0
        for part in each.queries.parts:
            if part.size == frames * height * width:
                return Grid(start, start + part.size, frames, height, width)
            start = start + part.size
        stated = " × ".join(map(str, self.grid))
        return f"its tokens are {' + '.join(str(part.size) for part in each.queries.parts)}, none of them {stated}"

    def _written(self, graph: Graph, site: _Site, tables: Tables) -> Node | str:
        """What takes the attention's place, or why nothing does."""
        writer = SparseWriter(graph, site.node, site.grid, tables)
        return self._windows(writer) if self.pattern == "window" else self._draft(writer)

    def _windows(self, writer: SparseWriter) -> Node | str:
        windows = WindowWriter(writer, self.radius, self.tile)
        if all(2 * radius + 1 >= size for radius, size in zip(self.radius, windows.sizes, strict=True)):
            return f"a window of this radius is the whole grid of {' × '.join(map(str, windows.sizes))}"
        if not self.is_masked and windows.products >= writer.tokens**2:
            return "tiles with the windows around them multiply as much as all tokens do: smaller radius or tile"
        with writer.graph.before(writer.dense):
            return windows.masked() if self.is_masked else windows.gathered()

    def _draft(self, writer: SparseWriter) -> Node | str:
        height, width = writer.grid.height, writer.grid.width
        if height % self.pool[0] or width % self.pool[1]:
            return f"blocks of {self.pool[0]} × {self.pool[1]} do not divide its grid of {height} × {width}"
        draft = DraftWriter(writer, self.pool, self.sparsity)
        if int(self.sparsity * draft.blocks ** (2 if self.per == "head" else 1)) == 0:
            return f"of its {draft.blocks} blocks none would be dropped"
        with writer.graph.before(writer.dense):
            return draft.masked(of_rows=self.per == "row") if self.is_masked else draft.gathered()


@dataclass(frozen=True)
class _Site:
    """A dense attention over [batch, heads, tokens, channels], and which of its tokens are pixels."""

    node: Node
    grid: Grid


def _unfit(each: Attention) -> str:
    if each.kind == "cross" or each.queries.size != each.keys.size:
        return "cross-attention: its keys are no grid that queries have a place in"
    if each.core.is_causal or not all(_is_of_keys(mask, each) for mask in each.core.masks):
        return "it has a mask already (simplify drops one that hides nothing)"
    if each.queries.is_windowed:
        return "it is among the tokens of a window already"
    return "its heads share keys" if each.key_heads != each.heads else ""


def _is_of_keys(mask: Node, each: Attention) -> bool:
    """Whether ``mask`` hides the same keys from all queries and in all heads."""
    shape = shape_of(mask)
    is_row = len(shape) == 4 and shape[1:3] == (1, 1) and shape[3] == each.keys.size
    return is_row and value_of(mask).dtype == torch.bool


def _unwritable(node: Node) -> str:
    if node.target is not aten.scaled_dot_product_attention.default:
        return "it is written out as products, and only scaled_dot_product_attention has the form that is needed"
    if len(shape_of(node)) != 4 or argument(node, "enable_gqa"):
        return f"it gives {list(shape_of(node))}, and not [batch, heads, tokens, channels] of equal heads"
    return ""
