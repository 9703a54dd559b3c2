"""The pass ``cast``."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from optpass.analysis.module_paths import matches
from optpass.ir.graph import PATH
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.conversion import convert


class CastFloats(Pass):
    """float32 weights and compute → float16 or bfloat16 (or back).

    Every floating weight becomes a lazy cast of itself, and every operator that depends on a weight
    computes in the new dtype. The graph's inputs and outputs keep their dtypes; the casts stand inside
    (``boundary: cast`` changes the interface instead).

    Leaves alone: what is computed from the inputs and constants alone, up to the first operator that
    meets a weight or a value made from one. Sinusoidal time embeddings and position tables are of that
    kind: bfloat16 has 8 bits, and timestep 999 needs 10. Casts to a dtype that no weight had (a
    float32 island in a float16 model) stay too. Modules that match ``keep`` keep weights and compute. A
    finite literal beyond the new range (a mask's -3.4e38) becomes the largest number of that range.
    Where all weights have the dtype already, nothing changes, and ``boundary`` is not looked at.

    A weight that overflows float16 is refused when the weights are written, by name.

    Source: common practice (``module.half()``), except that it leaves the time embedding alone, as
    diffusers' models do inside.
    """

    dtype: Literal["float16", "bfloat16", "float32"] = Field(description="what weights and compute become")
    boundary: Literal["keep", "cast"] = Field("keep", description="whether graph inputs and outputs keep their dtypes")
    keep: tuple[str, ...] = Field((), description="patterns of module paths that stay as they are, e.g. '*.norm*'")

    contract = approximate()

    def requires(self, program: Program) -> list[str]:
        modules = {str(node.meta.get(PATH, "")) for graph in program.entries.values() for node in graph.calls}
        return [
            f"keep: {pattern!r} matches no module of the model"
            for pattern in self.keep
            if not any(matches(module, (pattern,)) for module in modules)
        ]

    def run(self, program: Program, context: Context) -> Program:
        dtype = getattr(torch, self.dtype)
        result, changed = convert(
            program, dtype, lambda path: matches(path, self.keep), boundary=self.boundary == "cast"
        )
        for name in changed:
            context.rewrote(name)
        return result
