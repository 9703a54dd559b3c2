"""The pass ``resize-inputs``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from optpass.analysis.axes import axes_of
from optpass.errors import UserError, nearest
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.resizing import ResizeError, resized

Positive = Annotated[int, Field(ge=1)]


class ResizeInputs(Pass):
    """a graph for inputs of one size → the same model's graph for others: resolution, frames, tokens, batch.

    `inputs` gives the new shape of inputs by name. Other inputs that share an axis with them follow, and so does
    what stands in the graph as a size: shapes of views, repetitions, borders of slices, states of the loop. The
    weights are the same. What comes out is what a capture at these sizes gives, unless the model's code computes
    numbers from sizes of which the graph does not say so: `x / tokens`, `x[:, tokens // 2]`, a split into as many
    halves stay, or follow as most models mean it (docs/pruning.md). What the model makes of a resolution that it was
    not trained at is its own affair, so that the contract is `approximate`, and nothing can be compared with the
    Program before. What comes after the pass is compared with the resized one.

    Leaves alone: inputs that have the size already. Refuses, with the place: a size that a weight has (a table of
    positions, a linear over all pixels); a literal that contradicts the new sizes; an axis that is
    open, whose size is given at every call; one of size 1, which the graph may broadcast.

    Source: the reduced resolution of MobileVD, arXiv 2412.07583, Table 1.
    """

    inputs: dict[str, tuple[Positive, ...]] = Field(min_length=1, description="new shapes by the name of an input")

    contract = approximate()

    def requires(self, program: Program) -> list[str]:
        return list(self._refusals(program))

    def _refusals(self, program: Program) -> Iterator[str]:
        known = {spec.name: spec.shape for graph in program.entries.values() for spec in graph.inputs}
        for name, shape in self.inputs.items():
            if name not in known:
                yield f"the model has no input {name!r}{nearest(name, known)}"
            elif len(known[name]) != len(shape):
                yield f"the input {name} is {list(known[name])}, and {list(shape)} has another number of dimensions"

    def run(self, program: Program, context: Context) -> Program:
        before = _shapes(program)
        if all(before[name] == shape for name, shape in self.inputs.items()):
            for name in self.inputs:
                context.decline(name, f"it is {list(before[name])} already")
            return program
        after = self._resized(program)
        for name, shape in _shapes(after).items():
            if shape != before[name]:
                context.rewrote(name)
        return after

    def reference(self, program: Program) -> Program:
        """The model before, at the new sizes."""
        before = _shapes(program)
        same = all(before[name] == shape for name, shape in self.inputs.items())
        return program if same else self._resized(program.copy())

    def _resized(self, program: Program) -> Program:
        try:
            return resized(program, axes_of(program), self.inputs)
        except ResizeError as error:
            raise UserError(f"the model does not take these sizes: {error}") from error


def _shapes(program: Program) -> dict[str, tuple[int | str, ...]]:
    """Of every input, as the first entry that takes it has it."""
    shapes: dict[str, tuple[int | str, ...]] = {}
    for graph in program.entries.values():
        for spec in graph.inputs:
            shapes.setdefault(spec.name, spec.shape)
    return shapes
