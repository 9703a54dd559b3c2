"""The pass ``prune-blocks``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from optpass.analysis.places import Place, Places, forest, named_places
from optpass.analysis.units import Unit, UnitKind
from optpass.errors import UserError
from optpass.evaluate.generation import pipeline_folder
from optpass.evaluate.importance import Calls, random_calls, sampled_calls
from optpass.evaluate.removal_errors import removal_errors
from optpass.ir.program import Program
from optpass.pipeline.contract import Contract, approximate, exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.unit_removal import drop_gates, gate_of, removable, report, with_gates, without_units
from optpass.runtime.folder import build_pipeline
from optpass.runtime.sampling import LABELS, Asked


class PruneBlocks(Pass):
    """x + f(x) → x for chosen residual branches, and a·x + (1 − a)·y → x where y is computed from x.

    The blend is diffusers' AlphaBlender: of SVD's 38 temporal units (22 residual blocks, 16 transformers) the spatial
    value stays, whole and not times a. What only the branch needed (position embeddings, projections of a context)
    goes with it, in every entry of a loop. Units are found from the graph: one branch, or all branches that one
    module adds (a transformer block's attention and feed-forward together). Candidates are the largest that lie
    in `match` and are of `kind`: `temporal` ones mix frames and nothing else (attention whose batch holds the pixels, a
    kernel over frames alone), `spatial` ones mix, and no frames; the other kinds are single branches (`attention` of
    any sort).

    Of the candidates go: those in `remove`, by path or pattern; or the `count` least important, or all but `keep` (a
    number, or a share below 1). `importance` is

    - `error`: what the output loses without the unit, measured with one removal at a time: the relative L2 error over
      `calls` of the model, which the pipeline makes while it generates, or random ones where there is no pipeline.
      What is removed is settled as `remove`, with which nothing is measured again.
    - `macs`: its multiply-accumulates, so that the cheapest go first (a heuristic: the published temporal prunings of
      SVD lie at that end, most FLOPs left for the number of units). Executes nothing.
    - `gates`: what a training wrote into the gates that an earlier run of the pass inserted with `gated: true`.
      The gates of what stays are dropped: it runs as it was trained to, with a gate of 1.

    `gated: true` removes nothing: each candidate's branch is multiplied by a new weight, `PATH.prune_gate`, which is 1
    (exact). For a trainer: `optpass.training.gates`.

    Leaves alone, with the reason: units that a cache keeps for later steps; scaled streams that are no blend.
    Shortcuts that are projected are no residual branches. A pattern that matches nothing is an error. The error of a
    removal is measured and reported (approximate); most models want a fine-tuning afterwards.

    Source: MobileVD, arXiv 2412.07583, section "learned pruning of temporal blocks" and figure 4.
    """

    match: tuple[str, ...] = Field((), description="patterns of module paths that candidates lie in; all by default")
    kind: UnitKind | None = Field(None, description="what candidates are; anything by default")
    remove: tuple[str, ...] = Field((), description="paths or patterns of the candidates that go")
    keep: int | float | None = Field(None, ge=0, description="how many candidates stay, or which share (below 1)")
    count: int | None = Field(None, ge=1, description="how many candidates go")
    importance: Literal["error", "macs", "gates"] = Field("error", description="the least go, with keep or count")
    gated: bool = Field(False, description="insert gates of 1 in place of removing anything")
    calls: int = Field(8, ge=1, description="error: calls of the model that are measured")
    samples: int = Field(2, ge=1, description="error: samples of the pipeline from which these are taken")
    steps: int = Field(20, ge=1, description="error: sampling steps of each")
    guidance: float | None = Field(None, description="error: guidance scale; the pipeline's own by default")
    seed: int = Field(0, description="error: seed of the first sample, or of the random calls")
    prompt: str | None = Field(None, description="error: what a text-to-image pipeline is asked for")
    labels: tuple[int, ...] = Field(LABELS, min_length=1, description="error: classes, in turn")
    call: dict[str, Any] = Field(default_factory=dict, description="error: further arguments of the pipeline's call")

    contract = approximate()
    executes = True
    needs = "calls of the model"

    @field_validator("match", "remove", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if sum((bool(self.remove), self.keep is not None, self.count is not None, self.gated)) != 1:
            raise ValueError("say what goes in one way: remove, keep or count; or gated: true")
        if isinstance(self.keep, float) and not 0 <= self.keep < 1:
            raise ValueError("keep is a whole number, or a share below 1")
        return self

    @property
    def promise(self) -> Contract:
        return exact() if self.gated else self.contract

    @property
    def executing(self) -> bool:
        return not self.gated and not self.remove and self.importance != "macs"

    def run(self, program: Program, context: Context) -> Program:
        candidates = self._candidates(program, context)
        if self.gated:
            report(candidates, context)
            return with_gates(program, candidates)
        chosen = candidates if self.remove else self._least(program, candidates, context)
        changed = self._places(program, self.match) if self.importance == "gates" else chosen
        report(changed, context)
        if self.importance == "gates":
            for graph in program.entries.values():
                drop_gates(graph, [gate_of(members[0].unit) for members in changed.values()])
        return without_units(program, chosen)

    def _places(self, program: Program, *lists: Sequence[str]) -> Places:
        """The units that are named; with gates as importances, of those that have one."""

        def is_gated(unit: Unit) -> bool:
            return self.gated or self.importance != "gates" or gate_of(unit) in program.weights

        return named_places(forest(program), self.kind, *lists, among=is_gated)

    def _candidates(self, program: Program, context: Context) -> Places:
        """What may go, or of `remove` what is to go; the rest is declined."""
        named = self._places(program, self.match, self.remove)
        if not named:
            kind = f" of kind {self.kind}" if self.kind else ""
            gate = " with a gate (insert them with gated: true)" if self.importance == "gates" else ""
            context.decline("(root)", f"there is no residual branch{kind}{gate}", next(iter(program.entries)))
        candidates = removable(program, named, context)
        if not self.gated:
            return candidates
        for path, members in candidates.items():
            if gate_of(members[0].unit) in program.weights:
                context.decline(path, "it has a gate already", members[0].entry)
        return {path: m for path, m in candidates.items() if gate_of(m[0].unit) not in program.weights}

    def _least(self, program: Program, candidates: Places, context: Context) -> Places:
        """The least important candidates, the earlier of equal ones first; settled, for a replay."""
        number = self._number(len(candidates))
        if not number:
            return {}
        importances = self._importances(program, candidates)
        going = set(sorted(candidates, key=importances.__getitem__)[:number])
        chosen = {path: members for path, members in candidates.items() if path in going}
        context.settle(remove=list(chosen), keep=None, count=None)
        context.facts["blocks"] = [
            {"path": path, "importance": importances[path], "macs": _macs(members), "removed": path in going}
            for path, members in candidates.items()
        ]
        return chosen

    def _number(self, candidates: int) -> int:
        """How many of so many candidates go.

        Raises:
            UserError: more than there are.
        """
        if self.count is not None:
            if self.count > candidates:
                raise UserError(f"count: {self.count} branches are to go, and {candidates} are candidates")
            return self.count
        assert self.keep is not None
        stay = round(self.keep * candidates) if isinstance(self.keep, float) else self.keep
        return max(0, candidates - stay)

    def _importances(self, program: Program, candidates: Places) -> dict[str, float]:
        if self.importance == "macs":
            return {path: float(_macs(members)) for path, members in candidates.items()}
        gates = {path: gate_of(members[0].unit) for path, members in candidates.items()}
        if self.importance == "gates":
            return {path: float(program.weights[name].evaluate()) for path, name in gates.items()}
        trial = program.copy()
        again = self._places(trial, self.match)
        gated = with_gates(trial, {path: again[path] for path in candidates})
        errors = removal_errors(gated, gates.values(), self._measured(program))
        return {path: errors[name] for path, name in gates.items()}

    def _measured(self, program: Program) -> Calls:
        """The calls on which errors are measured: the pipeline's own, where there is one."""
        if program.loop is None or not program.origin.pipeline:
            return random_calls(program, self.calls, self.seed)
        pipeline = build_pipeline(pipeline_folder(program), {})
        asked = Asked(self.prompt, self.labels, None, self.steps, self.guidance, self.call)
        return sampled_calls(program, pipeline, asked, self.calls, samples=self.samples, seed=self.seed)


def _macs(members: Iterable[Place]) -> int:
    return sum(place.unit.macs for place in members)
