"""The pass ``prune-channels``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from optpass.analysis.axes import Atom, Axes, Fixed, Group, axes_of
from optpass.analysis.axes.costs import Counts, forecast
from optpass.analysis.axes.steps import blocks, norm_groups, removable
from optpass.analysis.module_paths import matches
from optpass.errors import UserError, nearest_paths
from optpass.evaluate.channel_scores import Criterion, channel_scores
from optpass.evaluate.importance import random_calls, taylor_importance
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.cutting import cut

Kind = Literal["conv", "ffn", "heads", "head-dim", "stream"]
HALVINGS = 40
"""Steps of the search for a budget; the shares that it tells apart are far finer than channels."""


class PruneChannels(Pass):
    """W [out, in] → W[kept, kept'] for every group of channels, the least important ones gone everywhere at once.

    What goes together is a fact of the graph (``optpass inspect --groups``): channels between convolutions, widths of
    feed-forwards, heads, the width of each head, residual streams with every layer that writes or reads them. Sizes in
    the graph follow; the result is an ordinary Program, smaller, that lowers, reloads and can be pruned again.

    ``ratio`` is the share of each group's elements that goes, ``macs`` or ``parameters`` the share of the model's
    that may stay. With ``ranking: global`` all groups compete, each one's scores divided by their mean. Never more goes
    than was asked for: ``multiple_of`` and group norms round in favour of what stays. Where a group norm sees one
    group alone, each of its statistics keeps equally many channels, so that none changes its partners.

    Left alone: axes that reach an input or an output, that a softmax or a kernel runs over, or that an operator without
    an axis rule touches; groups without a score (norm-scale, where there is no norm). Attention keeps the scale of its
    former head width. A norm's statistics are those of what is left.

    Source: magnitude, Li et al. (arXiv 1608.08710); norm scales, Liu et al. (arXiv 1708.06519); Taylor, Molchanov et
    al. (arXiv 1906.10771); scores summed over everything that goes together, Fang et al. (arXiv 2301.12900).
    """

    ratio: float | None = Field(None, ge=0, lt=1, description="share of each group's elements that goes")
    macs: float | None = Field(None, gt=0, lt=1, description="share of the MACs of a call that may stay")
    parameters: float | None = Field(None, gt=0, lt=1, description="share of the parameters that may stay")
    criterion: Criterion = Field("l2", description="what makes an element important")
    ranking: Literal["group", "global"] = Field("group", description="whether groups compete")
    kinds: tuple[Kind, ...] = Field(("conv", "ffn", "head-dim", "stream"), min_length=1, description="what is pruned")
    match: tuple[str, ...] = Field(("*",), min_length=1, description="modules whose groups are pruned")
    exclude: tuple[str, ...] = Field((), description="modules none of whose groups are")
    multiple_of: int = Field(1, ge=1, description="what the sizes that stay are multiples of (heads excepted)")
    limit: float = Field(0.9, gt=0, lt=1, description="largest share of a group that goes, for a budget")
    trials: int = Field(4, ge=1, description="random calls that the Taylor criterion is computed on")
    seed: int = Field(0, description="of random scores and of those calls")

    contract = approximate()
    needs = "calls to differentiate"

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if sum(amount is not None for amount in (self.ratio, self.macs, self.parameters)) != 1:
            raise ValueError("give one of ratio, macs and parameters")
        return self

    @property
    def executing(self) -> bool:
        return self.criterion == "taylor"

    def run(self, program: Program, context: Context) -> Program:
        found = axes_of(program)
        chosen = self._chosen(found, context)
        scores = self._scores(program, found, chosen, context)
        plan = _Plan(found, [group for group in chosen if group.atom in scores], scores, self.multiple_of)
        counts = self._counts(plan, program, found)
        pruned = []
        for group in plan.groups:
            if (count := counts.get(group.atom)) is not None:
                pruned.append({"group": group.label, "before": group.size, "after": count})
                context.rewrote(group.label)
            elif self.ratio != 0:
                context.decline(group.path, plan.reason(group))
        if not counts:
            return program
        context.facts["pruning"] = pruned
        return cut(program, found, {atom: plan.kept(atom, count) for atom, count in counts.items()})

    def _chosen(self, found: Axes, context: Context) -> list[Group]:
        """The groups in scope.

        Raises:
            UserError: a pattern matches no module, or only modules none of whose axes may be cut.
        """
        paths = {path for item in (*found.groups, *found.fixed) for path in item.paths}
        for pattern in (*self.match, *self.exclude):
            if not any(matches(path, [pattern]) for path in paths):
                near = nearest_paths(pattern, paths)
                raise UserError(f"prune-channels: no module with weights matches {pattern!r}{near}")
        inside = [g for g in found.groups if self._in_scope(g)]
        if not inside:
            reasons = dict.fromkeys(f"{f.path}: {f.reason}" for f in found.fixed if self._in_scope(f))
            raise UserError(f"prune-channels: nothing that matches may be cut: {'; '.join(list(reasons)[:3])}")
        chosen = [group for group in inside if group.kind in self.kinds]
        if not chosen:
            kinds = ", ".join(sorted({group.kind for group in inside}))
            raise UserError(f"prune-channels: nothing that matches is of the kinds asked for; there are: {kinds}")
        for fixed in found.fixed:
            if self._in_scope(fixed) and any(item.role for item in fixed.slices):
                context.decline(fixed.path, f"an axis of {fixed.atom.size} {fixed.reason}")
        return chosen

    def _in_scope(self, item: Group | Fixed) -> bool:
        within = any(matches(path, self.match) for path in item.paths)
        return within and not any(matches(path, self.exclude) for path in item.paths)

    def _scores(
        self, program: Program, found: Axes, groups: Sequence[Group], context: Context
    ) -> Mapping[Atom, Tensor]:
        if not program.has_values:
            context.facts["scores"] = "none: captured structure-only, the last elements go"
            return {group.atom: -torch.arange(group.size, dtype=torch.float64) for group in groups}
        importance = None
        if self.criterion == "taylor":
            importance = taylor_importance(program, random_calls(program, self.trials, self.seed), seed=self.seed)
        scores = channel_scores(program, found, groups, self.criterion, importance=importance, seed=self.seed)
        for group in groups:
            if group.atom not in scores:
                context.decline(group.path, f"no weight of it has a {self.criterion} score")
        return scores

    def _counts(self, plan: _Plan, program: Program, found: Axes) -> Counts:
        """How many elements of each group stay; groups that stay whole are not named.

        Raises:
            UserError: the budget cannot be met.
        """
        counts = plan.ranked if self.ranking == "global" else plan.even
        if self.ratio is not None:
            return counts(self.ratio, 1.0 if self.ranking == "group" else self.limit)
        costs = forecast(program, found)
        name, budget, cost = (
            ("MACs", self.macs, costs.macs)
            if self.macs is not None
            else ("parameters", self.parameters, costs.parameters)
        )
        assert budget is not None
        return self._within(lambda share: counts(share, self.limit), cost, budget, name)

    def _within(
        self, counts: Callable[[float], Counts], cost: Callable[[Counts], float], budget: float, name: str
    ) -> Counts:
        """The least pruning that meets ``budget``, by bisection: more share, less cost."""
        whole = cost({})
        least = counts(1.0)
        if cost(least) > budget * whole:
            raise UserError(
                f"prune-channels: {budget:.3g} of the {name} cannot be met: with at most {self.limit:g} of each group "
                f"gone, {cost(least) / whole:.3g} stay; widen kinds or match, or raise limit"
            )
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(counts(middle)) <= budget * whole else (middle, high)
        return counts(high)


class _Plan:
    """Which elements of which groups go, for any share of them."""

    def __init__(self, found: Axes, groups: Sequence[Group], scores: Mapping[Atom, Tensor], multiple_of: int) -> None:
        self.groups, self._scores = groups, scores
        self._steps = norm_groups(found)
        self._blocks = blocks(found, self._steps)
        self._multiples = {g.atom: 1 if g.kind == "heads" else multiple_of for g in groups}
        relative = [scores[g.atom] / scores[g.atom].abs().mean().clamp_min(1e-30) for g in groups]
        self._order = _least_first(relative)

    def even(self, share: float, limit: float) -> Counts:
        """The same share of every group."""
        return self._counts({group.atom: min(share, limit) * group.size for group in self.groups})

    def ranked(self, share: float, limit: float) -> Counts:
        """The lowest share of all elements, wherever they are, and at most ``limit`` of a group."""
        going = self._order[: int(share * len(self._order))].bincount(minlength=len(self.groups))
        pairs = zip(self.groups, going.tolist(), strict=True)
        return self._counts({group.atom: min(most, limit * group.size) for group, most in pairs})

    def _counts(self, most: Mapping[Atom, float]) -> Counts:
        found = {}
        for group in self.groups:
            # What a float falls short of a whole number by is no element.
            amount = most[group.atom] + 1e-9 * group.size
            step = self._steps.get(group.atom, 1)
            if gone := removable(group.size, amount, step, self._multiples[group.atom]):
                found[group.atom] = group.size - gone
        return found

    def reason(self, group: Group) -> str:
        """Why nothing of ``group`` goes."""
        step, multiple = self._steps.get(group.atom, 1), self._multiples[group.atom]
        asked = [f"a group norm asks for multiples of {step}"] if step > 1 else []
        asked += [f"what stays is to be a multiple of {multiple}"] if multiple > 1 else []
        return f"too little is asked for to take one of {group.size}: {' and '.join(asked) or 'whole elements'}"

    def kept(self, atom: Atom, count: int) -> tuple[int, ...]:
        """The ``count`` most important indices, equally many of each block that a group norm makes."""
        scores, parts = self._scores[atom], self._blocks.get(atom, 1)
        if count % parts:
            parts = 1
        rows = scores.reshape(parts, -1)
        best = rows.argsort(dim=1, descending=True, stable=True)[:, : count // parts]
        places = best + torch.arange(parts)[:, None] * rows.shape[1]
        return tuple(places.flatten().sort().values.tolist())


def _least_first(scores: Sequence[Tensor]) -> Tensor:
    """The number of the group that each element belongs to, the lowest score first; equal ones go evenly."""
    if not scores:
        return torch.zeros(0, dtype=torch.long)
    shares = torch.cat([torch.arange(len(score), dtype=torch.float64) / len(score) for score in scores])
    numbers = torch.repeat_interleave(torch.tensor([len(score) for score in scores]))
    order = shares.argsort(stable=True)
    values = torch.cat([score.sort().values for score in scores])[order]
    return numbers[order][values.argsort(stable=True)]
