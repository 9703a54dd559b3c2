"""The pass ``bank-memory``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch.fx import Node

from optpass.analysis.attention import attentions
from optpass.analysis.attention_choice import Choice
from optpass.analysis.axes import axes_of
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.remembered_keys import Remembered, remember, remembered


class BankMemory(Pass):
    """Cross-attention to all frames of a video → to a memory bank of `length` frames, neighbours that are alike merged.

    Frames enter the bank one after another. Where it is full, at each place of a frame the two neighbours in time with
    the largest cosine become their mean, weighted by how many frames each stands for. The keys are then what a
    stream's bank holds after its last frame, and keys and values are projected of `length` frames instead of all. No
    parameters, no training. Equal frames are merged without a loss, and the mean over all frames stays what it is.

    `match` says which cross-attentions; those that read the same features share one bank. How many frames there are,
    the axis analysis says of a video [batch, channels, frames, height, width]; `frames` says it of features
    [batch, frames, tokens, channels] or in one row. The merges are unrolled, so that their number has to be known.

    Leaves alone, with the reason: videos that fit into the bank; self-attention; masks; keys and values that are not
    projections of one value, or to which something is added afterwards for every key (rotary embeddings).

    Source: MA-LMM, He et al., CVPR 2024, arXiv 2404.05726, section 3, the visual bank in the released form. The
    paper's bank of queries, which grows with a stream's answers, has no place in a call that sees a whole video.
    """

    match: tuple[str, ...] = Field(min_length=1, description="modules whose cross-attentions read the bank")
    length: int = Field(ge=1, description="frames that the bank holds: 10 and 20 in the paper")
    frames: Annotated[int, Field(ge=1)] | None = Field(None, description="frames of the video, where it is not found")

    contract = approximate()

    def run(self, program: Program, context: Context) -> Program:
        axes = axes_of(program)
        choice = Choice(attentions(program, axes), None, self.match)
        for where, reason in choice.missed:
            context.decline(where, reason)
        sites: dict[tuple[str, Node], list[Remembered]] = {}
        for each in choice.chosen:
            site = remembered(each, axes, self.frames)
            if isinstance(site, Remembered) and site.frames <= self.length:
                site = f"its {site.frames} frames fit into a bank of {self.length}"
            if isinstance(site, str):
                context.decline(each.core.result.node, site, each.entry)
                continue
            sites.setdefault((each.entry, site.features), []).append(site)
            context.rewrote(each.path, each.entry)
        for (entry, _), group in sites.items():
            remember(program.entries[entry], axes, group, self.length)
        for graph in program.entries.values():
            graph.remove_dead_code()
        return program
