"""The pass ``slice-ffn``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from optpass.analysis.axes import Atom, Axes, Group, axes_of
from optpass.analysis.feed_forwards import feed_forwards
from optpass.analysis.module_paths import matches
from optpass.errors import UserError, nearest_paths
from optpass.evaluate.channel_scores import channel_scores
from optpass.ir.program import Program
from optpass.pipeline.contract import Contract, approximate, retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.cutting import cut, selection

Fraction = Annotated[float, Field(gt=0, le=1)]


class SliceFfn(Pass):
    """W₂·σ(W₁·x) → W₂[:, :k]·σ(W₁[:k]·x): the first k hidden units of every feed-forward, k = fraction · width.

    Feed-forwards are found in the graph: layers of a residual branch with an activation between them, plain or gated
    (the units of value and gate go together, in one matrix or in two), with a depthwise convolution or without, beside
    an attention or after one. One `fraction` is a MatFormer's granularity; a list has one for each feed-forward that
    matches, in the order in which they run: Mix'n'Match. Widths are rounded down, to one unit at least.

    `order: prefix` takes units as they stand, which is how a MatFormer is trained: its slices share their units, and
    the smaller model is exactly what was trained as such (`trained: true`, and the contract is `approximate`). Of
    other models it is any part of the units, and the contract is `retrain`. `order: importance` first sorts the
    units by the norms of their weights, which changes nothing, so that the first are the largest, and slices of
    slices the same as slices. Without weight values they stay as they are.

    A norm among hidden units has the statistics of those that stay. Fractions are of what is there: a second run
    slices the slice.

    Leaves alone, with the reason: layers whose result enters no residual stream (embeddings of time, heads), units
    that an operator fixes, and what keeps all its units. Other convolutions wider than a pixel are `prune-channels`'.

    Source: MatFormer, Devvrit et al., NeurIPS 2024, arXiv 2310.07707, sections 3.1 and 3.3.
    """

    fraction: Fraction | tuple[Fraction, ...] = Field(
        description="share of the hidden units that stays, or one for each feed-forward in order"
    )
    match: tuple[str, ...] = Field(("*",), min_length=1, description="modules whose feed-forwards are sliced")
    order: Literal["prefix", "importance"] = Field(
        "prefix", description="units as they stand, or by the norms of their weights, the largest first"
    )
    trained: bool = Field(False, description="the model was trained so that its slices are models")

    contract = retrain()

    @property
    def promise(self) -> Contract:
        return approximate() if self.trained else self.contract

    def run(self, program: Program, context: Context) -> Program:
        axes = axes_of(program)
        found = feed_forwards(program, axes)
        chosen = self._chosen(found.found, context)
        for item, reason in found.refused:
            if _is_in(item.paths, self.match):
                context.decline(item.path, reason)
        orders = self._orders(program, axes, chosen, context)
        kept: dict[Atom, tuple[int, ...]] = {}
        for group, fraction in zip(chosen, self._fractions(chosen), strict=True):
            order = orders[group.atom]
            # What a float falls short of a whole number by is no unit.
            units = order[: max(1, int(fraction * group.size + 1e-9 * group.size))]
            if units == tuple(range(group.size)):
                context.decline(group.path, f"all of its {group.size} units stay")
                continue
            kept[group.atom] = units
            context.rewrote(group.path)
        if not kept:
            return program
        sizes = [(group, len(kept[group.atom])) for group in chosen if group.atom in kept]
        context.facts["pruning"] = [{"group": g.label, "before": g.size, "after": count} for g, count in sizes]
        return _sliced(program, axes, kept)

    def _chosen(self, groups: Sequence[Group], context: Context) -> list[Group]:
        for pattern in self.match:
            if not any(_is_in(group.paths, [pattern]) for group in groups):
                context.decline(pattern, f"no feed-forward is in such a module{nearest_paths(pattern, _paths(groups))}")
        return [group for group in groups if _is_in(group.paths, self.match)]

    def _fractions(self, groups: Sequence[Group]) -> Sequence[float]:
        """
        Raises:
            UserError: there is not one for each.
        """
        if isinstance(self.fraction, float):
            return [self.fraction] * len(groups)
        if len(self.fraction) != len(groups):
            places = ", ".join(_paths(groups))
            raise UserError(
                f"slice-ffn: {len(self.fraction)} fractions are given, and {len(groups)} feed-forwards match: {places}"
            )
        return self.fraction

    def _orders(
        self, program: Program, axes: Axes, groups: Sequence[Group], context: Context
    ) -> dict[Atom, tuple[int, ...]]:
        """The units of each group, those that stay longest first."""
        if self.order == "importance" and program.has_values:
            scores = channel_scores(program, axes, groups, "l2")
            return {atom: tuple(each.argsort(descending=True, stable=True).tolist()) for atom, each in scores.items()}
        if self.order == "importance":
            context.facts["scores"] = "none: captured structure-only, units stay in their order"
        return {group.atom: tuple(range(group.size)) for group in groups}


def _paths(groups: Sequence[Group]) -> list[str]:
    return [group.path for group in groups]


def _is_in(paths: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(matches(path, patterns) for path in paths)


def _sliced(program: Program, axes: Axes, units: dict[Atom, tuple[int, ...]]) -> Program:
    """``program`` with these units in this order; graphs know their number alone."""
    names = dict.fromkeys(item.weight for group in axes.groups if group.atom in units for item in group.slices)
    weights = {name: selection(program.weights[name], axes.weight(name), units) for name in names}
    return cut(program, axes, {atom: tuple(range(len(kept))) for atom, kept in units.items()}, weights)
