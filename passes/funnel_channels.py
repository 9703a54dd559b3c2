"""The pass ``funnel-channels``."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from typing import Literal

from pydantic import Field

from optpass.analysis.affine_pairs import Pair, Pairs, Scope, UnpairedError, scope_of
from optpass.analysis.axes import Group, axes_of
from optpass.analysis.module_paths import matches
from optpass.errors import nearest_paths
from optpass.ir.decompositions import Coupled
from optpass.ir.program import Program
from optpass.ir.weights import Expression, WeightStore
from optpass.pipeline.contract import Contract, approximate, retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.cutting import cut
from optpass.rewrite.funnels import Funnel, insert_adaptors


class FunnelChannels(Pass):
    """W₂·σ(W₁·x) → (W₂·F₂)·σ((F₁·W₁)·x), the channels between two layers becoming `ratio` times as many.

    A funnel cuts no channel away: F₁ and F₂ mix all of them into fewer, the ones that the singular values of W₂·W₁
    say (coupled singular initialisation, which ignores σ). Pairs are, by `scope`, the query's and the key's projection
    of an attention (for each head Wqᵀ·Wk), the value's and the output's (for each head Wo·Wv), and two convolutions
    with nothing but a norm, an activation and added embeddings between. Biases and embeddings are columns of W₁. The
    number of heads stays, and so does the scale that attention had with the original width.

    Between the projections of an attention is nothing that is not linear: the result is the best of its rank, and
    exact where the rank suffices; the contract is `approximate`. Between convolutions it is a start for training, and
    the contract is `retrain`; the norm between gets the mean of its parameters, and the width is rounded up to a
    multiple of its groups.

    `merged: false` is the form for training: the original layers stay, F₁ and F₂ stand beside them as layers without
    bias (`funnel`), of which each head's part is a block on the diagonal. `reparameterize` merges them.

    Leaves alone, with the reason: projections that are one weight, or whose heads are shared; rotary positions and
    norms between query and key; an attention with one key; a batch norm between convolutions (`reparameterize` folds
    it away), more than one convolution on a side, and concatenations; what is a funnel already.

    Source: MobileVD, arXiv 2412.07583, section "channel funnels"; there the layers of self-attention, with ratio 0.5.
    The initialisation of norms between convolutions is ours.
    """

    ratio: float = Field(0.5, gt=0, le=1, description="the fun-factor: width of the funnel by the original width")
    scope: tuple[Scope, ...] = Field(
        ("attention-qk", "attention-vo"), min_length=1, description="attention-qk, attention-vo, conv"
    )
    axis: Literal["spatial", "temporal", "both"] = Field("both", description="layers that mix frames alone, or others")
    match: tuple[str, ...] = Field((), description="only pairs of which a layer matches, e.g. '*.attn1.*'; empty: all")
    merged: bool = Field(True, description="narrow weights; false: the original ones with adaptors, for training")

    contract = approximate()

    @property
    def promise(self) -> Contract:
        return retrain() if "conv" in self.scope else approximate()

    def requires(self, program: Program) -> list[str]:
        if not self.match:
            return []
        groups = [group for group in axes_of(program).groups if scope_of(group) in self.scope]
        paths = {path for group in groups for path in group.paths}
        return [
            f"match: {pattern!r} matches no layer of {', '.join(self.scope)}{nearest_paths(pattern, paths)}"
            for pattern in self.match
            if not any(matches(path, [pattern]) for path in paths)
        ]

    def run(self, program: Program, context: Context) -> Program:
        found, originals = axes_of(program), program.weights
        funnels: list[Funnel] = []
        weights = originals
        for pair in self._pairs(Pairs(program, found), found.groups, context):
            if reason := self._refusal(pair, originals):
                context.decline(pair.path, reason)
                continue
            # A layer between two funnels is in both: the second is made of what the first one left.
            funnel = Funnel(pair, self._width(pair), weights)
            weights = weights.updated(funnel.merged())
            funnels.append(funnel)
            context.rewrote(pair.path)
        context.facts["pruning"] = [
            {"group": each.pair.group.label, "before": each.pair.width, "after": each.rank} for each in funnels
        ]
        changed = {name: expression for name, expression in weights.items() if expression is not originals[name]}
        kept = {each.pair.group.atom: tuple(range(each.rank)) for each in funnels}
        program = cut(program, found, kept, changed)
        return program if self.merged else insert_adaptors(program, funnels, originals)

    def _pairs(self, pairs: Pairs, groups: tuple[Group, ...], context: Context) -> Iterator[Pair]:
        for group in groups:
            matched = not self.match or any(matches(path, self.match) for path in group.paths)
            if scope_of(group) not in self.scope or not matched:
                continue
            try:
                pair = pairs.around(group)
            except UnpairedError as error:
                context.decline(group.path, str(error))
                continue
            if self.axis == "both" or pair.is_temporal == (self.axis == "temporal"):
                yield pair

    def _width(self, pair: Pair) -> int:
        # As it is written: 0.1 of 30 are 3, and not a bit more.
        wanted = Fraction(str(self.ratio)) * pair.width / pair.multiple
        return ceil(wanted) * pair.multiple

    def _refusal(self, pair: Pair, weights: WeightStore) -> str:
        if any(_is_funnel(weights[name]) for name in (*pair.writers, *pair.readers)):
            return "it is a funnel already; for a narrower one apply a lower ratio to the original"
        if self._width(pair) == pair.width and (self.merged or self.ratio < 1):
            groups = f", a multiple of {pair.multiple}" if pair.multiple > 1 else ""
            return f"{self.ratio:g} of {pair.width} channels{groups}, are all of them"
        return ""


def _is_funnel(expression: Expression) -> bool:
    return isinstance(expression, Coupled) or any(map(_is_funnel, expression.operands()))
