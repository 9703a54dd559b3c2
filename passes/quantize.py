"""The pass ``quantize``."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from optpass.analysis.module_paths import matches
from optpass.ir.graph import path_of
from optpass.ir.program import Program
from optpass.pipeline.passes import Context
from optpass.quantization.options import QuantizingPass
from optpass.quantization.scopes import facts
from optpass.rewrite.conversion import convert

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Quantize(QuantizingPass):
    """Convolutions and linears in floating point → in integers, calibrated on what the model really sees.

    `int8`: weights (symmetric, a scale for each output channel) and activations (a scale for each tensor), the form
    being the target's: x86 runtimes get unsigned activations, int32 biases and integer additions where a residual
    stream feeds convolutions; NPUs get integers around every value; other compilers symmetric int8 at convolutions and
    matrix products. `form` overrides it. `activations: 16` gives activations 65,536 steps beside int8 weights.
    `w8` and `w4`: weights of linears alone, in groups along their rows; activations stay real, nothing is executed.
    `fp16` and `bf16`: weights and compute in half precision, as `cast` has it, with the same scopes as the others.

    Ranges are found by NNCF over a calibration set: what each entry is called with while the checkpoint's pipeline
    generates (all timesteps, seeded), a dataset or folder (`data`), or, where there is neither, random inputs, which
    the report says. The set's hash goes into the lock; a given set that has changed since is refused.

    `search` chooses the steps of bridge blocks, where convolutions hand over to attention (or of `bridge`), by the
    error that they add to their outputs. It is kept if outputs of calls that it did not see are no worse.

    Leaves alone: what `match` leaves out or `keep` and `keep_facts` name, with that reason; norms, softmax and
    everything else without weights stays real by itself. Transposed convolutions of several groups. Batch norms must
    have been folded (`reparameterize`), or their convolutions would be quantised with other weights than run.

    Source: NNCF 3.4's post-training quantisation, through its torch.fx interface; SmoothQuant (arXiv 2211.10438);
    weight-only groups as in its `compress_weights`; bridge blocks: Q-HyViT (arXiv 2303.12557).
    """

    scheme: Literal["int8", "w8", "w4", "fp16", "bf16"] = Field(  # type: ignore[assignment]
        "int8", description="int8 weights and activations; weights alone; or half precision"
    )

    of_activations = (*QuantizingPass.of_activations, "data", "calibration")

    @property
    def executing(self) -> bool:
        return self.scheme == "int8"

    def run(self, program: Program, context: Context) -> Program:
        if self.scheme in HALVES:
            return self._halved(program, context)
        quantization = self.placed(program, context)
        self.report(quantization, context)
        if quantization.is_empty:
            return program
        if quantization.form is not None:
            calls = self.calls_of(program, self.calls)
            self.settle_set(calls, context)
            quantization = self.calibrate(program, quantization, calls, context)
        return quantization.applied(program)

    def _halved(self, program: Program, context: Context) -> Program:
        """Half precision, but for the modules that the scopes leave real."""
        real = {
            path_of(node)
            for graph in program.entries.values()
            for reason in (self.reason(graph),)
            for node in facts(graph)
            if reason(node)
        }
        result, changed = convert(program, HALVES[self.scheme], lambda path: path in real or matches(path, self.keep))
        for name in changed:
            context.rewrote(name)
        for path in sorted(real):
            context.decline(path, "left real, as asked")
        return result
