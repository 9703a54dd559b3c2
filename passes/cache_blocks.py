"""The pass ``cache-blocks``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Literal, Self

from pydantic import Field, model_validator
from torch.fx import Node

from optpass.analysis.attention_products import attention_products
from optpass.analysis.block_ranges import BlockRange, NoRangeError, block_range
from optpass.analysis.blocks import stacks
from optpass.analysis.boundaries import depending_on
from optpass.analysis.mac_rules import macs_of
from optpass.analysis.residuals import Kind, Residual, Residuals, residuals, with_inner
from optpass.ir.graph import Graph, example_shape, operators
from optpass.ir.loop import Adaptive, Cycle, Listed, Loop, every
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.block_caches import (
    Change,
    branch_entry,
    interval_entries,
    stream_changes,
    taylor_entries,
    threshold_entries,
)
from optpass.rewrite.shortcuts import NotCarriedError
from optpass.rewrite.stepping import computed_entry, stepped, unique_name, without_loop

FULL, REUSE = "full", "reuse"
HEAD, BODY, TAIL = "head", "body", "tail"
LONGEST_CYCLE = 1000
"""Steps after which every attention is computed again, whatever the intervals: models are trained on as many."""
OPTIONS = {
    "interval": {"head", "every", "steps", "of", "within"},
    "taylor": {"head", "every", "steps", "of", "within", "order"},
    "threshold": {"head", "threshold", "warmup", "cooldown", "max_reuse"},
    "attention": {"spatial", "temporal", "cross", "within"},
}
"""What each method listens to, beside ``blocks``."""
KINDS: dict[str, Kind] = {
    "spatial": "self-attention",
    "temporal": "temporal-attention",
    "cross": "cross-attention",
}


class CacheBlocks(Pass):
    """One step computes every block; the steps after it take what the blocks added to the stream from that one.

    `method` says what is kept and when it is computed:

    - `interval`: full: h → blocks → h', R = h' − h kept; reuse: h' = h + R, every `every` steps a full one. Both
      streams of two-stream models (image and text tokens) have their R, and one that puts them together counts
      as going on. The blocks before the range run in every step.
    - `threshold`: first-block caching. head: the blocks before the range, and the relative L1 distance of what they
      added from what they added at the last computed step; below `threshold` the step is head → tail (h' = h + R),
      else head → body (the range, R kept).
    - `taylor`: R is not taken as it was but extrapolated by its finite differences over the last computed steps,
      R + Δ·k (+ Δ²·k²/2 with `order: 2`), k steps on. The differences are computed where R is, in the full step.
    - `attention`: what attentions add is kept and reused one by one, each kind with its own interval (`spatial`: all
      self-attention that is not temporal, `temporal`, `cross`); an entry for each set of kinds that is
      reused at some step. The gate of the computed step's time is part of what is kept, and so is a feed-forward
      that is one branch with an attention (Flux's single blocks).

    A computed step gives what the model gave, to the bit. `blocks` chooses the range: by default every block of the
    costliest stack but the first `head` (of attentions, all); "3-24" by number (from 0, both included), else patterns
    of module paths, in any stack. Blocks are found by structure (analysis.blocks), not by the names of models.
    `within` bounds the timesteps in which anything is reused.

    Leaves alone, with the reason: Programs whose steps are split already; stacks that hold less than half of the
    products where none is named (UNets: name blocks, or cut by `cache-features`); ranges whose stream is
    computed on along the way (post-norm, projections, strides); ranges that save nothing.

    Sources: DeepCache's interval (Ma et al., arXiv 2312.00858) on residuals, as Δ-DiT (arXiv 2406.01125); first-block
    caching: ParaAttention and diffusers' FirstBlockCache, whose metric is over the image stream of the first block;
    TaylorSeer (Liu et al., arXiv 2503.06923), with differences per step between computed ones as in diffusers'
    TaylorSeerCache; PAB (Zhao et al., arXiv 2408.12588), with the residual after the gate.
    """

    method: Literal["interval", "threshold", "taylor", "attention"] = Field(
        "interval", description="what is kept of a computed step, and how it is reused"
    )
    blocks: str = Field("", description='the range: "3-24", or patterns of module paths; all but the first by default')
    head: int = Field(1, ge=0, description="blocks that run in every step, where no range is given")
    every: int = Field(2, ge=1, description="interval, taylor: one step of so many is computed")
    order: int = Field(1, ge=1, le=2, description="taylor: differences that the extrapolation uses")
    threshold: float = Field(0.05, ge=0, description="threshold: relative change from which on a step is computed")
    warmup: int = Field(1, ge=1, description="threshold: steps at the beginning that are all computed")
    cooldown: int = Field(0, ge=0, description="threshold: steps at the end that are all computed")
    max_reuse: int = Field(0, ge=0, description="threshold: steps in a row that reuse at most; 0 for any number")
    steps: tuple[int, ...] | None = Field(None, description="interval, taylor: the computed steps, in place of every")
    of: int | None = Field(None, ge=1, description="how many steps a generation has, with steps")
    spatial: int = Field(2, ge=1, description="attention: steps per computed self-attention; 1 to leave it alone")
    temporal: int = Field(4, ge=1, description="attention: steps per computed attention over frames")
    cross: int = Field(6, ge=1, description="attention: steps per computed cross-attention")
    within: tuple[float, float] | None = Field(None, description="timesteps in which a step may reuse; not threshold")

    contract = approximate()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        fields = type(self).model_fields
        given = {name for name, field in fields.items() if getattr(self, name) != field.default}
        if stray := sorted(given - {"method", "blocks"} - OPTIONS[self.method]):
            known = ", ".join(sorted(OPTIONS[self.method]))
            raise ValueError(f"{', '.join(stray)} is no option of method: {self.method}, which has {known}")
        if (self.steps is None) != (self.of is None):
            raise ValueError("steps and of belong together: steps: [0, 3, 5], of: 20")
        if self.steps is not None and ("every" in given or self.within is not None):
            raise ValueError("steps lists what is computed; every and within are another schedule")
        if self.steps is not None and self.of is not None and not Listed(self.steps, self.of).in_order:
            raise ValueError("steps has 0 and later steps below of, in order: steps: [0, 3, 5], of: 20")
        if self.within is not None and not self.within[0] <= self.within[1]:
            raise ValueError("within has the lower timestep first: within: [100, 800]")
        if self.blocks and "head" in given:
            raise ValueError("blocks says where the range begins, and head would: give one")
        return self

    def requires(self, program: Program) -> list[str]:
        return without_loop(program)

    def run(self, program: Program, context: Context) -> Program:
        assert program.loop is not None
        entry = computed_entry(program.loop)
        if entry is None:
            context.decline("(root)", f"the steps are split already: {', '.join(program.loop.variants)}")
            return program
        graph = program.entries[entry].copy()
        site = _Site(program, program.loop, entry, graph, residuals(graph))
        if self.method == "attention":
            return self._attention(site, context)
        try:
            return self._range(site, context)
        except (NoRangeError, NotCarriedError) as reason:
            context.decline("(root)", str(reason), entry)
            return program

    def _range(self, site: _Site, context: Context) -> Program:
        """The methods that keep what a range of blocks adds to its streams."""
        if self.method != "threshold" and _always_computes(self._schedule()):
            raise NoRangeError("every step is computed, so none would reuse")
        span = block_range(site.graph, stacks(site.graph, site.found), site.sampled, self.blocks, self.head)
        if self.method == "threshold" and not span.before:
            raise NoRangeError("a threshold is measured on blocks in front of the range, and there are none")
        changes = stream_changes(site.graph, span, site.by_add, site.states)
        if not changes:
            raise NoRangeError("nothing behind the range reads its streams")
        made = {"interval": self._interval, "taylor": self._taylor, "threshold": self._threshold}[self.method]
        after = made(site, span, changes)
        if _macs(after, REUSE) >= _macs(after, FULL):
            raise NoRangeError("reusing the range spares nothing: what follows reads its insides too")
        for block in span.blocks:
            context.rewrote(block.path, site.entry)
        return after

    def _interval(self, site: _Site, span: BlockRange, changes: Sequence[Change]) -> Program:
        full, reuse = interval_entries(site.graph, changes)
        variants = {FULL: (site.entry,), REUSE: (REUSE,)}
        return stepped(site.program, site.entry, {site.entry: full, REUSE: reuse}, variants, self._schedule())

    def _taylor(self, site: _Site, span: BlockRange, changes: Sequence[Change]) -> Program:
        full, reuse, zeros = taylor_entries(site.graph, changes, self.order)
        variants = {FULL: (site.entry,), REUSE: (REUSE,)}
        return stepped(site.program, site.entry, {site.entry: full, REUSE: reuse}, variants, self._schedule(), zeros)

    def _schedule(self) -> Cycle | Listed:
        if self.steps is not None and self.of is not None:
            return Listed(self.steps, self.of)
        return every(self.every, (FULL, REUSE), self.within)

    def _threshold(self, site: _Site, span: BlockRange, changes: Sequence[Change]) -> Program:
        taken = [*site.states, *(change.name for change in changes)]
        front = stream_changes(site.graph, BlockRange((), span.before), site.by_add, taken)
        dependent = site.dependent()
        sampled = [change for change in front if change.before in dependent]
        if not sampled:
            raise NoRangeError("the blocks in front of the range add nothing to the sample's stream")
        # Where text and image come out of one embedding, both depend on the sample: the image is the larger one.
        head = max(sampled, key=lambda change: prod(example_shape(change.after)))
        start, body, tail, then = threshold_entries(site.graph, span, changes, head, taken)
        entries = {HEAD: start, BODY: body, TAIL: tail}
        variants = {FULL: (HEAD, BODY), REUSE: (HEAD, TAIL)}
        options = self.model_dump(include={"threshold", "warmup", "cooldown", "max_reuse"})
        return stepped(site.program, site.entry, entries, variants, Adaptive("threshold", options), [then])

    def _attention(self, site: _Site, context: Context) -> Program:
        """The branch of every chosen attention is a state; an entry for each set of kinds that a step reuses."""
        chosen = self._attentions(site, context)
        if not chosen:
            context.decline("(root)", "no attention of these kinds is added to a residual stream", site.entry)
            return site.program
        branches: dict[str, Node] = {}
        kind_of: dict[str, Kind] = {}
        for residual in chosen:
            name = unique_name(residual.branch_path, [*site.states, *branches])
            branches[name], kind_of[name] = residual.branch, residual.kind
            context.rewrote(residual.branch_path, site.entry)
        words = [word for word, kind in KINDS.items() if kind in kind_of.values()]
        entries: dict[str, Graph] = {}
        variants: dict[str, tuple[str, ...]] = {}
        cycle = []
        for step in range(min(lcm(*(getattr(self, word) for word in words)), LONGEST_CYCLE)):
            reused = [word for word in words if step % getattr(self, word)]
            variant = "-".join([REUSE, *reused]) if reused else FULL
            entry = variant if reused else site.entry
            cycle.append(variant)
            if variant not in variants:
                variants[variant] = (entry,)
                taken = [name for name, kind in kind_of.items() if kind in {KINDS[word] for word in reused}]
                entries[entry] = branch_entry(site.graph, branches, taken)
        return stepped(site.program, site.entry, entries, variants, Cycle(tuple(cycle), self.within))

    def _attentions(self, site: _Site, context: Context) -> list[Residual]:
        """The attentions whose branches are reused at some step; the others are declined."""
        inside = None
        if self.blocks:
            span = block_range(site.graph, stacks(site.graph, site.found), site.sampled, self.blocks, 0)
            inside = {residual for block in span.blocks for residual in with_inner(block.residuals)}
        chosen = []
        for word, kind in KINDS.items():
            for residual in site.found.of_kind(kind):
                if residual.add not in site.sampled:
                    continue
                if getattr(self, word) == 1:
                    context.decline(residual.branch_path, f"with {word}: 1 it is computed in every step", site.entry)
                elif inside is not None and residual not in inside:
                    context.decline(residual.branch_path, f"outside of the blocks {self.blocks!r}", site.entry)
                else:
                    chosen.append(residual)
        added = {node for residual in site.found.found for node in residual.nodes}
        alone = attention_products(site.graph) & site.sampled - added
        for node in site.graph.calls:
            if node in alone:
                context.decline(node, "its result is not added to a residual stream", site.entry)
        return chosen


@dataclass(frozen=True)
class _Site:
    """The entry that is split, as a copy, with what the analyses say of it."""

    program: Program
    loop: Loop
    entry: str
    graph: Graph
    found: Residuals

    @property
    def states(self) -> list[str]:
        """The names of states that there are."""
        return list(self.loop.states)

    @cached_property
    def by_add(self) -> Mapping[Node, Residual]:
        """The residuals by their additions."""
        return {residual.add: residual for residual in self.found.found}

    @cached_property
    def sampled(self) -> set[Node]:
        """What depended on the noisy sample before anything was edited."""
        return self.dependent()

    def dependent(self) -> set[Node]:
        """What depends on the noisy sample now."""
        return depending_on(self.graph, [self.loop.sample])


def _always_computes(schedule: Cycle | Listed) -> bool:
    if isinstance(schedule, Listed):
        return len(schedule.computed) == schedule.of
    return REUSE not in schedule.variants


def _macs(program: Program, variant: str) -> int:
    """Multiply-accumulates of a step by ``variant``."""
    assert program.loop is not None
    chain = program.loop.variants[variant]
    return sum(macs_of(node) for entry in chain for node in operators(program.entries[entry]))
