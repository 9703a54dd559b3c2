"""The pass ``polynomial-attention``."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Annotated

from pydantic import Field, field_validator
from torch.fx import Node

from optpass.analysis.attention import Attention, attentions
from optpass.analysis.attention_choice import Choice, Key, dead_without, hiding, keys_of, output_projection
from optpass.analysis.mac_rules import macs_of
from optpass.analysis.operators import aten
from optpass.analysis.token_grids import Tokens
from optpass.ir.graph import Graph, example_shape, shape_of
from optpass.ir.program import Program
from optpass.ir.weights import Expression, WeightStore
from optpass.pipeline.contract import retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.naming import WeightNames
from optpass.rewrite.polynomial_attention import Lattice, PolynomialWriter, Start, polynomial_macs


class PolynomialAttention(Pass):
    """x + MSA(norm(x)) → x + Z(norm(x)), a polynomial of degree 2 or 3 in the tokens: no softmax, no N² products.

    Yᵢ = Aᵢ(X·Bᵢ), Z₁ = Y₁, Zᵢ₊₁ = Cᵢ(Zᵢ·Dᵢ) ⊙ Yᵢ₊₁, and Z is that of the highest degree. B and D are linear layers over
    channels, A and C depthwise convolutions over the grid of tokens (`kernel` × `kernel`), or along the line that
    tokens without a grid are. The projections of queries, keys, values and result go.
    Rows beside the grid (class and distillation tokens, registers) are mixed as w ⊙ row + m ⊙ mean of the grid, with
    own w and m for every channel; the grid does not see them.

    The parameters are new. `start: zero` lets B of the highest factor be zero, so that the network begins as without
    these attentions and every factor is trained; `random` begins with a polynomial whose factors have the variance of
    its input. Both are deterministic.

    Leaves alone, with the reason: an attention that costs no more MACs than the polynomial would, with the number of
    tokens at which it pays (`allow_more_macs` takes it nevertheless); cross-attention and attention among several
    streams; causal attention and masks, but not learned biases; tokens of several frames or of several kinds;
    projections that are no linear layers of one value, and what enters no residual stream, which degree 1 comes from.

    Source: PADRe, Letourneau et al., ICLR 2025, arXiv 2407.11306. Rows beside the grid and the start are ours.
    """

    degree: int = Field(2, ge=2, le=3, description="of the polynomial; 2 or 3")
    kernel: int = Field(11, ge=1, description="tokens across the window of a convolution, odd")
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="only layers of these numbers, from 0 in each stack"
    )
    match: tuple[str, ...] = Field((), description="only attentions of these modules, e.g. '*.layers.[3-8].*'")
    allow_more_macs: bool = Field(False, description="also where it costs more MACs than the attention")
    start: Start = Field("zero", description="what the polynomial begins as: nothing, or at random")
    seed: int = Field(0, ge=0, description="of what is drawn")

    contract = retrain()

    @field_validator("kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("a window has a middle: give an odd number")
        return value

    def run(self, program: Program, context: Context) -> Program:
        found = attentions(program)
        choice, keys = Choice(found, self.layers, self.match), keys_of(found)
        for where, reason in choice.missed:
            context.decline(where, reason)
        rewriter = _Rewriter(self, program.weights, WeightNames(program))
        for each in choice.chosen:
            if reason := rewriter.rewrite(program.entries[each.entry], each, keys[each]):
                context.decline(each.core.result.node, reason, each.entry)
            else:
                context.rewrote(each.path, each.entry)
        for graph in program.entries.values():
            graph.remove_dead_code()
        return program.with_untrained(rewriter.made).pruned()


@dataclass(frozen=True)
class _Site:
    """What an attention reads, [batch, tokens, d], the projection that gives its result, and how tokens are near."""

    rows: Node
    projection: Node
    lattice: Lattice


@dataclass
class _Rewriter:
    """Puts polynomials into graphs; ``made`` are their parameters, which all entries share."""

    options: PolynomialAttention
    weights: WeightStore
    names: WeightNames
    made: dict[str, Expression] = field(default_factory=dict)
    prefixes: dict[Key, str] = field(default_factory=dict)

    def rewrite(self, graph: Graph, each: Attention, key: Key) -> str:
        """Why nothing was put in the place of ``each``; empty when it was."""
        site = self._site(each)
        if isinstance(site, str):
            return site
        if not self.options.allow_more_macs and (reason := self._dearer(each, site)):
            return reason
        if key not in self.prefixes:
            self.prefixes[key] = self.names.fresh(key[0], "polynomial")
        degree, kernel, start, seed = (getattr(self.options, name) for name in ("degree", "kernel", "start", "seed"))
        with graph.before(site.projection):
            writer = PolynomialWriter(
                graph, self.prefixes[key], site.projection, degree, kernel, start, seed, self.made
            )
            result = writer.write(site.rows, site.lattice)
        site.projection.replace_all_uses_with(result)
        return ""

    def _site(self, each: Attention) -> _Site | str:
        projection, rows, lattice = output_projection(each), _projected(each), _lattice(each.queries)
        if reason := _unfit(each, self.weights):
            return reason
        for found in (projection, rows, lattice):
            if isinstance(found, str):
                return found
        assert isinstance(projection, Node)
        assert isinstance(rows, Node)
        assert isinstance(lattice, Lattice)
        return _Site(rows, projection, lattice)

    def _dearer(self, each: Attention, site: _Site) -> str:
        """That it would cost more than what goes, and from how many tokens on it would not."""
        degree, kernel = self.options.degree, self.options.kernel
        width, tokens = example_shape(site.projection)[-1], example_shape(site.rows)[1]
        cost = polynomial_macs(site.rows, width, site.lattice, degree, kernel)
        gone = sum(map(macs_of, dead_without(site.projection, site.rows)))
        products = sum(map(macs_of, each.core.nodes))
        if cost <= gone:
            return ""
        # The products of tokens with tokens grow with their square, all else as their number.
        enough = ceil(tokens * (cost - (gone - products)) / products)
        return (
            f"{cost / 1e6:.4g} M MACs for {gone / 1e6:.4g} M: with {tokens} tokens degree {degree} and a kernel of "
            f"{kernel} cost more than attention, and pay from {enough} tokens on"
        )


def _unfit(each: Attention, weights: WeightStore) -> str:
    if each.kind == "cross" or each.is_joint:
        return "a polynomial is of the tokens of one stream, and this attends to others"
    if each.residual is None:
        return "its result enters several streams" if each.residuals else "its result enters no residual stream"
    hidden = hiding(each, weights)
    if hidden == "causal":
        return "it is causal, and a convolution looks at all neighbours"
    return "it has a mask (simplify drops one that hides nothing)" if hidden else ""


def _projected(each: Attention) -> Node | str:
    """The value [batch, tokens, d] that queries, keys and values are linear layers of."""
    layers = {
        layer for part in (each.projections.query, each.projections.key, each.projections.value) for layer in part
    }
    sources = {layer.all_input_nodes[0] for layer in layers}
    if len(sources) != 1 or any(layer.target is not aten.linear.default for layer in layers):
        return "its queries, keys and values are no linear layers of one value"
    [rows] = sources
    if len(shape_of(rows)) != 3 or shape_of(rows)[1] != each.queries.size:
        return f"it reads {list(shape_of(rows))}, and not [batch, tokens, channels]"
    return rows


def _lattice(tokens: Tokens) -> Lattice | str:
    named = [part for part in tokens.parts if part.axes]
    if len(named) > 1:
        kinds = ", ".join(" × ".join(part.axes) for part in named)
        return f"its tokens are of several kinds ({kinds}), and neighbours are of one"
    if (grid := tokens.image) is not None:
        if grid.frames != 1:
            return f"its tokens are of {grid.frames} frames, and a window over rows and columns would part them"
        return Lattice(grid.start, grid.stop, (grid.height, grid.width))
    start = 0
    for part in tokens.parts:
        if part.axes:
            return Lattice(start, start + part.size, (part.size,))
        start = start + part.size
    return Lattice(0, tokens.size, (tokens.size,))
