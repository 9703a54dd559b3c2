"""The pass ``cache-adaptive``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch.fx import Node

from optpass.analysis.block_ranges import BlockRange, NoRangeError, block_range
from optpass.analysis.blocks import stacks
from optpass.analysis.boundaries import depending_on
from optpass.analysis.module_paths import matches
from optpass.analysis.residuals import Residual, residuals, with_inner
from optpass.errors import UserError, nearest
from optpass.ir.graph import Graph, example_shape
from optpass.ir.loop import CHANGE, MOTION, PAST, PRESENT, Adaptive, Loop, metric, past, present
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.block_caches import interval_entries, stream_changes
from optpass.rewrite.change_metrics import mean, motion, relative_change
from optpass.rewrite.shortcuts import NotCarriedError
from optpass.rewrite.stepping import computed_entry, stepped, unique_name, without_loop
from optpass.runtime.policies import RateCodebook

aten = torch.ops.aten
FULL, REUSE = "full", "reuse"
PRESETS: dict[str, dict[float, int]] = {
    "open-sora-30-fast": {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1.0: 1},
    "open-sora-30-slow": {0.08: 3, 0.16: 2, 0.24: 1, 0.32: 1, 0.40: 1, 1.0: 1},
    "open-sora-100": {0.03: 12, 0.05: 10, 0.07: 8, 0.09: 6, 0.11: 4, 1.0: 3},
}
"""The codebooks of the released configurations for Open-Sora 1.2, of 30 and of 100 steps."""


class CacheAdaptive(Pass):
    """A step computes every block and how much one of them changed; that decides how many steps reuse what they added.

    full: h → blocks → h', R = h' − h and a residual p kept, metric ‖p' − p‖₁ / ‖p‖₁ against the last computed
    step's told; reuse: h' = h + R. The rates come from ``codebook``, a preset or a mapping of upper bounds to
    rates, by the policy ``rate-codebook``. The paper keeps two tensors for each block, what attention and what the
    rest adds, and adds them one by one; their sum over the blocks is one tensor, and all that a step that reuses needs.
    ``measure`` chooses whose residual is p (several are averaged); by default it is the middle attention over
    frames of the range, or the middle self-attention where there is none. ``motion`` makes the rates depend on
    how much p differs from frame to frame.

    Leaves alone, with the reason: Programs whose steps are split already, and what ``cache-blocks`` leaves alone.
    Refuses ``motion`` where the measured residual has no axis of frames, unless ``tokens_per_frame`` tells one.

    Source: Kahatapitiya et al. 2024 (AdaCache, arXiv 2411.02397) and its released code, from which it departs in
    no decision: residuals after the gate, one rate for all blocks, the first two and the last two steps computed.
    """

    codebook: str | dict[float, int] = Field(description="a preset's name, or rates by upper bounds of the change")
    of: int | None = Field(None, ge=2, description="steps of a generation; else the module is told at run time")
    blocks: str = Field("", description='the range: "3-24", or patterns of module paths; all by default')
    measure: str = Field("", description="patterns of the modules whose residuals are measured")
    motion: bool = Field(False, description="scale the change by motion in the frames (MoReg)")
    motion_steps: tuple[int, int] | None = Field(None, description="steps, from 1, that motion counts in")
    tokens_per_frame: int | None = Field(None, ge=1, description="tokens of a frame in [batch, tokens, channels]")

    contract = approximate()

    @field_validator("codebook")
    @classmethod
    def _known(cls, book: str | dict[float, int]) -> str | dict[float, int]:
        if isinstance(book, str) and book not in PRESETS:
            raise ValueError(f"no preset {book!r}{nearest(book, PRESETS)}")
        RateCodebook.model_validate({"codebook": PRESETS[book] if isinstance(book, str) else book})
        return book

    def requires(self, program: Program) -> list[str]:
        return without_loop(program)

    def run(self, program: Program, context: Context) -> Program:
        assert program.loop is not None
        entry = computed_entry(program.loop)
        if entry is None:
            context.decline("(root)", f"the steps are split already: {', '.join(program.loop.variants)}")
            return program
        try:
            after, span = self._split(program, program.loop, entry)
        except (NoRangeError, NotCarriedError) as reason:
            context.decline("(root)", str(reason), entry)
            return program
        for block in span.blocks:
            context.rewrote(block.path, entry)
        return after

    def _split(self, program: Program, loop: Loop, entry: str) -> tuple[Program, BlockRange]:
        # A refusal comes after the first insertions: the Program stays as it was.
        graph = program.entries[entry].copy()
        found = residuals(graph)
        sampled = depending_on(graph, [loop.sample])
        span = block_range(graph, stacks(graph, found), sampled, self.blocks, 0)
        measured = self._measured(span)
        by_add = {residual.add: residual for residual in found.found}
        changes = stream_changes(graph, span, by_add, list(loop.states))
        tells, reads = self._metrics(graph, measured, [*loop.states, *(change.name for change in changes)])
        full, reuse = interval_entries(graph, changes, reads=reads, tells=tells)
        zeros = [name.removeprefix(PAST) for name in reads]
        variants = {FULL: (entry,), REUSE: (REUSE,)}
        schedule = Adaptive("rate-codebook", self._policy(), self.of)
        return stepped(program, entry, {entry: full, REUSE: reuse}, variants, schedule, zeros), span

    def _measured(self, span: BlockRange) -> list[Residual]:
        """The residuals whose change decides.

        Raises:
            UserError: ``measure`` names none.
        """
        inside = [residual for block in span.blocks for residual in with_inner(block.residuals)]
        if self.measure:
            patterns = self.measure.replace(",", " ").split()
            named = [residual for residual in inside if matches(residual.branch_path, patterns)]
            if not named:
                raise UserError(f"measure: no residual is of {self.measure!r}{nearest(self.measure, _paths(inside))}")
            return named
        temporal = [residual for residual in inside if residual.kind == "temporal-attention"]
        attentions = temporal or [residual for residual in inside if residual.kind == "self-attention"]
        candidates = attentions or inside
        # Block 13 of 28, counted from 0, in the released configurations.
        return [candidates[(len(candidates) - 1) // 2]]

    def _metrics(
        self, graph: Graph, measured: Sequence[Residual], taken: Sequence[str]
    ) -> tuple[dict[str, Node], dict[str, Node]]:
        """What the computed step tells and keeps of them, and stand-ins for what it kept before, by port."""
        reads: dict[str, Node] = {}
        kept: dict[str, Node] = {}
        changes, motions = [], []
        with graph.before(graph.output_node):
            for residual in measured:
                value = residual.branch
                name = unique_name(f"{residual.branch_path}.measured", [*taken, *map(_state, kept)])
                reads[past(name)] = graph.call(aten.zeros_like.default, value, like=value)
                kept[present(name)] = value
                changes.append(relative_change(graph, value, reads[past(name)]))
                if self.motion:
                    motions.append(motion(graph, value, *self._frames(residual)))
            told = {metric(CHANGE): mean(graph, changes)}
            if motions:
                told[metric(MOTION)] = mean(graph, motions)
        return {**told, **kept}, reads

    def _frames(self, residual: Residual) -> tuple[int, int]:
        """The axis along which frames follow one another, and the elements of one.

        Raises:
            UserError: nothing tells.
        """
        if self.tokens_per_frame is not None:
            axis, stride = 1, self.tokens_per_frame
        elif residual.kind == "temporal-attention":
            axis, stride = 1, 1
        else:
            raise UserError(
                f"motion: {residual.branch_path} mixes no frames alone; tokens_per_frame says how many a frame has"
            )
        shape = example_shape(residual.branch)
        if len(shape) != 3 or shape[axis] <= stride:
            raise UserError(f"motion: {residual.branch_path} is {list(shape)}, not several frames of {stride} tokens")
        return axis, stride

    def _policy(self) -> dict[str, Any]:
        book = PRESETS[self.codebook] if isinstance(self.codebook, str) else self.codebook
        options: dict[str, Any] = {"codebook": {str(bound): rate for bound, rate in sorted(book.items())}}
        if self.motion:
            options["motion"] = True
            if self.motion_steps is not None:
                options["motion_steps"] = list(self.motion_steps)
        return options


def _paths(found: Sequence[Residual]) -> list[str]:
    return [residual.branch_path for residual in found]


def _state(port: str) -> str:
    return port.removeprefix(PRESENT)
