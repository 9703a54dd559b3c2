"""The pass ``quantize``."""

from __future__ import annotations

from optpass.ir.program import Program
from optpass.pipeline.passes import Context
from optpass.quantization.options import QuantizingPass


class Quantize(QuantizingPass):
    """Convolutions and linears in floating point → in integers, calibrated on what the model really sees.

    `int8`: weights (symmetric, a scale for each output channel) and activations (a scale for each tensor), the form
    being the target's: x86 runtimes get unsigned activations, int32 biases and integer additions where a residual
    stream feeds convolutions; other compilers symmetric int8 at convolutions and matrix products. `form` overrides
    it. `w8` and `w4`: weights of linears alone, in groups along their rows; activations stay real, nothing is executed.

    Ranges are found by NNCF over a calibration set: what each entry is called with while the checkpoint's pipeline
    generates (all timesteps, seeded), a dataset or folder (`data`), or, where there is neither, random inputs, which
    the report says. The set's hash goes into the lock; a given set that has changed since is refused.

    Leaves alone: what `match` leaves out or `keep` and `keep_facts` name, with that reason; norms, softmax and
    everything else without weights stays real by itself. Transposed convolutions of several groups. Batch norms must
    have been folded (`reparameterize`), or their convolutions would be quantised with other weights than run.

    Source: NNCF 3.4's post-training quantisation, through its torch.fx interface; SmoothQuant (arXiv 2211.10438);
    weight-only groups as in its `compress_weights`.
    """

    of_activations = (*QuantizingPass.of_activations, "data", "calibration")

    @property
    def executing(self) -> bool:
        return self.scheme == "int8"

    def run(self, program: Program, context: Context) -> Program:
        quantization = self.placed(program, context)
        self.report(quantization, context)
        if quantization.is_empty:
            return program
        if quantization.form is not None:
            calls = self.calls_of(program, self.calls)
            self.settle_set(calls, context)
            quantization = quantization.calibrated(program, calls, self.method)
        return quantization.applied(program)
