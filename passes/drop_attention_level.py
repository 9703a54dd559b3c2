"""The pass ``drop-attention-level``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from pydantic import Field

from optpass.analysis.places import Forest, Place, Places, forest, places
from optpass.analysis.units import ATTENTION, Unit, with_inner
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.unit_removal import removable, report, without_units

STEP = 2
"""Positions of one level over those of the next, at least: text tokens beside image tokens are no level."""


class DropAttentionLevel(Pass):
    """x + transformer(x) → x for every transformer at the highest resolution: attention, feed-forward and projections.

    What goes is the whole residual branch, with its norms, its embeddings and what projects the context for it.
    Levels are found from the graph: the resolutions at which residual branches work, from the highest, 0; in SD 1.5
    the 64×64 of `down_blocks.0` and `up_blocks.3`, 5 transformers, 859.5 M → 846.8 M parameters. The highest resolution
    counts whether it has attention or not, so a second run finds nothing more.

    Leaves alone, with the reason: levels where every residual branch attends (DiT, Swin), for nothing would be left;
    transformers over frames alone (prune-blocks has kind temporal); units that a cache keeps for later steps. The
    difference is measured and reported; a model wants a fine-tuning afterwards.

    Sources: Mobile-Pix2Pix in MoViE, arXiv 2412.06578, section 3; the Efficient UNet of Clockwork Diffusion, arXiv
    2312.08128, section 5; after SnapFusion, arXiv 2306.00980.
    """

    levels: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="resolutions by number, from the highest, 0"
    )

    contract = approximate()

    def run(self, program: Program, context: Context) -> Program:
        found = forest(program)
        tops = _tops(found)
        chosen: Places = {}
        for level in self.levels:
            if level >= len(tops):
                context.decline("(root)", f"there is no level {level}: the levels are 0 to {len(tops) - 1}")
                continue
            branches = places(found, partial(_is_at, tops=tops, level=level))
            transformers = {path: members for path, members in branches.items() if _attends(members)}
            if not transformers:
                context.decline("(root)", f"nothing attends at level {level} ({tops[level]} positions)")
            elif len(transformers) == len(branches):
                reason = f"every residual branch at level {level} ({tops[level]} positions) attends: none would be left"
                context.decline("(root)", reason)
            else:
                chosen |= transformers
        chosen = removable(program, self._spatial(chosen, context), context)
        report(chosen, context)
        return without_units(program, chosen)

    def _spatial(self, chosen: Places, context: Context) -> Places:
        found: Places = {}
        for path, members in chosen.items():
            if all(place.unit.mixes == {"temporal"} for place in members):
                context.decline(path, "it attends over frames alone: prune-blocks has kind temporal", members[0].entry)
            else:
                found[path] = members
        return found


def _tops(found: Forest) -> list[int]:
    """The most positions of each level, from the highest resolution on."""
    tops: list[int] = []
    nested = (unit for roots in found.values() for unit in with_inner(roots))
    for positions in sorted({unit.positions for unit in nested}, reverse=True):
        if not tops or positions * STEP <= tops[-1]:
            tops.append(positions)
    return tops


def _attends(members: Sequence[Place]) -> bool:
    return any(not place.unit.kinds.isdisjoint(ATTENTION) for place in members)


def _is_at(unit: Unit, tops: Sequence[int], level: int) -> bool:
    """Whether ``unit`` works at ``level``, with all that lies inside of it."""
    at = max(index for index, top in enumerate(tops) if top >= min(unit.positions, tops[0]))
    return at == level and all(_is_at(inner, tops, level) for inner in unit.inner)
