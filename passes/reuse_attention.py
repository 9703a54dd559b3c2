"""The pass ``reuse-attention``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field
from torch.fx import Node

from optpass.analysis.attention import Attention, Attentions, attentions
from optpass.analysis.attention_choice import Key, hiding, keys_of, output_projection
from optpass.analysis.module_paths import matches
from optpass.analysis.token_grids import Grid
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.ir.program import Program
from optpass.ir.weights import Expression, WeightStore
from optpass.pipeline.contract import Contract, approximate, retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.naming import WeightNames
from optpass.rewrite.reused_attention import PhiWriter, Reused, Start, taken_apart

FIRST, LAST = 0.25, 0.75
"""Where the layers that reuse begin and end in a stack of any depth: 3 to 8 of 12."""


class ReuseAttention(Pass):
    """x + MSAₗ(norm(x)) → x + Φ(Zₗ₋₁) in the middle layers, Zₗ₋₁ being what attention gave in the layer before.

    Z is the result of the output projection, before gates and the addition. Φ (`phi: conv`) is FC d → 2d, GELU,
    depthwise 5×5 over the grid of tokens, GELU, FC 2d → d and ECA, with own parameters in every layer, each taking what
    the one before gave; rows beside the grid (class and distillation tokens, registers) are those of the last
    attention that was computed. `phi: identity` takes Zₗ₋₁ as it is: no parameters, and worse. Norms and projections
    that nothing reads any more go. Layers are numbered from 0 in each stack; 3 to 8 of 12 are the paper's, of other
    depths the same share. Frames of a video are convolved one by one.

    New parameters are deterministic; they begin near the identity (`start`), which an attention that is like the one
    before asks for, or at random, as in the paper, which trains everything from scratch. With parameters the contract
    is `retrain`, without it is `approximate`.

    Leaves alone, with the reason: layers without an attention in the layer before; cross-attention, attention in
    windows, over frames or among several streams; causal attention and masks, but not learned biases; projections that
    read more than the attention; a stack in which something reuses already.

    Source: SkipAt, Venkataramanan et al., ICLR 2024, arXiv 2301.02240, sections 3 and 4, in the released form.
    """

    layers: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="layers that reuse, from 0 in each stack; the middle half where nothing is said"
    )
    match: tuple[str, ...] = Field((), description="only attentions of these modules, e.g. '*.layers.[3-8].*'")
    phi: Literal["conv", "identity"] = Field("conv", description="what is made of the attention before")
    start: Start = Field("identity", description="what parameters begin as: near the identity, or at random")
    seed: int = Field(0, ge=0, description="of the random start")

    contract = retrain()

    @property
    def promise(self) -> Contract:
        return self.contract if self.phi == "conv" else approximate()

    def run(self, program: Program, context: Context) -> Program:
        found = attentions(program)
        keys = keys_of(found)
        chosen = {keys[each] for each in self._chosen(found, context)}
        rewriter = _Rewriter(self, program.weights, context, WeightNames(program))
        for entry, graph in program.entries.items():
            for row in _rows(found, entry):
                rewriter.rewrite(graph, row, {each: keys[each] for each in row if keys[each] in chosen})
            graph.remove_dead_code()
        return program.with_untrained(rewriter.made).pruned()

    def _chosen(self, found: Attentions, context: Context) -> list[Attention]:
        """The attentions that are to go, of the entry that has most."""
        entries = dict.fromkeys(each.entry for each in found.found)
        entry = max(entries, key=lambda name: len(found.of(name)), default="")
        rows = _rows(found, entry)
        if not self.match and (reader := next(filter(None, map(_reused, rows)), None)):
            reason = f"{path_of(reader)} is read by more than its own addition: which layers count is not known"
            context.decline(reader, f"{reason}; name others with match", entry)
            return []
        for each in found.of(entry):
            if each.stack is None:
                context.decline(each.core.result.node, "its result enters no residual stream", entry)
        for pattern in self.match:
            if not any(matches(each.path, [pattern]) for row in rows for each in row):
                context.decline(pattern, "no attention of a stack is in such a module", entry)
        return [each for row in rows for each in self._of_row(row, context)]

    def _of_row(self, row: Sequence[Attention], context: Context) -> Iterator[Attention]:
        """The attentions of a stack that the options mean."""
        depth = len(row)
        middle = range(depth) if self.match else range(max(1, int(depth * FIRST)), int(depth * LAST))
        numbers: Sequence[int] = middle if self.layers is None else self.layers
        if not numbers:
            context.decline(row[0].path, f"its stack has {depth} such layers, none in the middle", row[0].entry)
        for number in numbers:
            if number >= depth:
                context.decline(row[0].path, f"there is no layer {number} in its stack of {depth}", row[0].entry)
            elif not self.match or matches(row[number].path, self.match):
                yield row[number]


def _rows(found: Attentions, entry: str) -> list[list[Attention]]:
    return [row for row in found.rows if row[0].entry == entry]


@dataclass(frozen=True)
class _Site:
    """A layer's output projection, which goes, that of the layer before, and where the grid of its tokens is."""

    projection: Node
    source: Node
    grid: Grid


@dataclass
class _Rewriter:
    """Puts Φ into stacks; ``made`` are its parameters, which all entries share."""

    options: ReuseAttention
    weights: WeightStore
    context: Context
    names: WeightNames
    made: dict[str, Expression] = field(default_factory=dict)
    prefixes: dict[Key, str] = field(default_factory=dict)

    def rewrite(self, graph: Graph, row: Sequence[Attention], chosen: Mapping[Attention, Key]) -> None:
        reused: Reused | None = None
        for before, each in zip((None, *row), row, strict=False):
            site = self._site(each, before) if each in chosen else None
            if isinstance(site, _Site):
                reused = self._put(graph, chosen[each], site, reused)
                self.context.rewrote(each.path, each.entry)
                continue
            reused = None
            if site is not None:
                self.context.decline(each.path, site, each.entry)

    def _put(self, graph: Graph, key: Key, site: _Site, reused: Reused | None) -> Reused:
        with graph.before(site.projection):
            reused = reused or taken_apart(graph, site.source, site.grid, site.projection)
            if self.options.phi == "conv":
                writer = PhiWriter(graph, self._prefix(key), self.options.seed, self.options.start, self.made)
                reused = replace(reused, rows=writer.write(reused.rows, site.grid))
            result = reused.whole(graph, site.projection)
        site.projection.replace_all_uses_with(result)
        return reused

    def _prefix(self, key: Key) -> str:
        """What the parameters of a layer's Φ are called, the same in all entries."""
        if key not in self.prefixes:
            self.prefixes[key] = self.names.fresh(key[0], "reuse")
        return self.prefixes[key]

    def _site(self, each: Attention, before: Attention | None) -> _Site | str:
        """Where Φ goes, or why none can."""
        if before is None or before.layer is None or each.layer != before.layer + 1:
            return "there is no such attention in the layer before"
        projection, source = output_projection(each), output_projection(before)
        for reason in (_unfit(each), _hidden(each, self.weights)):
            if reason:
                return reason
        for found in (projection, source):
            if isinstance(found, str):
                return found
        assert isinstance(projection, Node)
        assert isinstance(source, Node)
        if shape_of(projection) != shape_of(source):
            return f"it gives {list(shape_of(projection))}, and the layer before {list(shape_of(source))}"
        if self.options.phi == "identity":
            return _Site(projection, source, Grid(0, shape_of(source)[1], 1, 1, 1))
        grid = _grid(each)
        return grid if isinstance(grid, str) else _Site(projection, source, grid)


def _unfit(each: Attention) -> str:
    if each.kind == "cross":
        return "cross-attention: what it gives depends on the tokens that it looks at"
    if len(each.residuals) > 1:
        return "its result enters several streams"
    if each.queries.is_windowed:
        return "it is among the tokens of a window, and windows move from layer to layer"
    return ""


def _hidden(each: Attention, weights: WeightStore) -> str:
    """Why a token may not see all others, of which Φ would know nothing."""
    reasons = {
        "causal": "it is causal, and Φ looks at all neighbours",
        "mask": "it has a mask (simplify drops one that hides nothing)",
    }
    return reasons.get(hiding(each, weights), "")


def _grid(each: Attention) -> Grid | str:
    for part in each.queries.parts:
        if part.axes and not part.is_image:
            return f"among its tokens are {part.size} along {' × '.join(part.axes)}, which are no grid"
    return each.queries.image or "its tokens are no grid of rows and columns"


def _reused(row: Sequence[Attention]) -> Node | None:
    """A projection of the stack that more than its own addition reads."""
    layers = (layer for each in row for layer in each.projections.output)
    return next((layer for layer in layers if len(layer.users) > 1), None)
