"""The pass ``pool-memory``."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from optpass.analysis.attention import Attention, attentions
from optpass.analysis.attention_choice import Choice
from optpass.analysis.axes.structure import quotient
from optpass.analysis.token_grids import Part
from optpass.ir.graph import shape_of
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.pooled_keys import Segment, pool_keys, unpoolable

GRIDS = (("height", "width"), ("frames", "height", "width"))
Side = Annotated[int, Field(ge=1)]


class PoolMemory(Pass):
    """softmax(q·kᵀ)·v → softmax(q·k̄ᵀ + log 4)·v̄, where k̄ and v̄ are the means of 2 × 2 keys and values of a grid.

    Made for attention to a memory of frames, as SAM 2's: neighbours are alike, so that a mean, counted as often as
    what it stands for, does for all of them, and keys are a fourth. Exact where each window is constant. Keys are
    pooled as the attention sees them, after their rotary embeddings. Keys beside the grid (pointers to objects,
    class tokens) stay, and count once. The constant is in the logits, as the mask of the fused operator; where all
    keys are pooled it changes nothing and is left out.

    `match` says which attentions, cross- or self-. What the grid is, the axis analysis says; where it
    does not know (a memory that is an input in one row), `grid: [height, width]` does, of each of as many frames as
    there are, and `unpooled`, how many keys behind them are none of the grid.

    Leaves alone, with the reason: keys without a known grid, or with one that windows do not fill; causal
    attention, masks and biases of keys; keys that are means already; attention that is written out with the number
    of keys in it. The paper leaves a memory of one frame as it is, and trains with pooling: the error is measured.

    Source: EfficientTAM, Xiong et al., arXiv 2411.18933, section 3, in the released form without fused attention
    (the one with adds the constant to the keys' elements, which is another function).
    """

    match: tuple[str, ...] = Field(min_length=1, description="modules whose attentions pool, as '*.cross_attn_image'")
    grid: tuple[Side, Side] | None = Field(None, description="height and width of a frame, where it is not found")
    unpooled: int = Field(0, ge=0, description="keys behind the frames that are none of the grid, with grid")
    window: int = Field(2, ge=2, description="side of a window")

    contract = approximate()

    @model_validator(mode="after")
    def _unpooled_of_grid(self) -> Self:
        if self.unpooled and self.grid is None:
            raise ValueError("unpooled belongs to grid: [height, width]")
        return self

    def run(self, program: Program, context: Context) -> Program:
        choice = Choice(attentions(program), None, self.match)
        for where, reason in choice.missed:
            context.decline(where, reason)
        for each in choice.chosen:
            segments = unpoolable(each.core) or self._segments(each)
            if isinstance(segments, str):
                context.decline(each.core.result.node, segments, each.entry)
                continue
            pool_keys(program.entries[each.entry], each.core, segments, self.window)
            context.rewrote(each.path, each.entry)
        for graph in program.entries.values():
            graph.remove_dead_code()
        return program

    def _segments(self, each: Attention) -> list[Segment] | str:
        """What the keys are, in order, or why they cannot be pooled."""
        if self.grid is not None:
            return self._given(shape_of(each.core.key.node)[each.core.key.tokens], *self.grid)
        segments = [self._segment(part) for part in each.keys.parts]
        if reason := next((found for found in segments if isinstance(found, str)), None):
            return reason
        if all(isinstance(segment, Segment) and segment.rows is None for segment in segments):
            return f"its {each.keys.size} keys are no grid of rows and columns that is known: say grid: [height, width]"
        return [segment for segment in segments if isinstance(segment, Segment)]

    def _segment(self, part: Part) -> Segment | str:
        if tuple(part.axes) not in GRIDS:
            return Segment(part.size)
        height, width = part.axes["height"], part.axes["width"]
        rows = part.axes.get("frames", 1) * height
        return self._odd(height, width) or Segment(part.size, rows, width)

    def _given(self, keys: Any, height: int, width: int) -> list[Segment] | str:
        if reason := self._odd(height, width):
            return reason
        frames = quotient(keys - self.unpooled, height * width)
        if frames is None or frames == 0:
            return f"its {keys} keys are not frames of {height} × {width} and {self.unpooled} others: say unpooled"
        behind = [Segment(self.unpooled)] if self.unpooled else []
        return [Segment(keys - self.unpooled, frames * height, width), *behind]

    def _odd(self, height: Any, width: Any) -> str:
        if all(quotient(side, self.window) is not None for side in (height, width)):
            return ""
        return f"windows of {self.window} × {self.window} do not fill a grid of {height} × {width}"
