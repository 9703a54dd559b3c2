"""The pass ``sensitivity``."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Self

from pydantic import Field, model_validator
from torch.fx import Node

from optpass.errors import UserError
from optpass.evaluate.calibration_set import CalibrationSet
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.pipeline.passes import Context
from optpass.quantization.budget import Budget, LatencyBudget, SampleBudget, SignalBudget, fewest_real, most_real
from optpass.quantization.options import QuantizingPass
from optpass.quantization.placement import Reason
from optpass.quantization.program import Quantization
from optpass.quantization.sensitivity import ModuleNoise, Sensitivity, group_of, measure_sensitivity
from optpass.runtime.sampling import Asked


class MeasureSensitivity(QuantizingPass):
    """Convolutions and linears in floating point → in integers, but for those whose integers cost most.

    In place of `quantize`, with its options. Every module is measured on calls that were held out of calibration,
    executed by PyTorch: quantised alone, and all but it; the report has both figures of each. With a budget, modules
    stay real until it holds, those first that add most noise for their operations:

    - `snr: 30`: outputs of the model, in dB, on the held-out calls; as few modules stay real as that takes.
    - `psnr: 30`: samples of the pipeline against the real model's at equal seeds, in dB; likewise.
    - `latency: 0.6`: time of the target's engine over that of the real model's; as many stay real as that allows.

    Without one, everything is quantised and the figures are told. What stays real is settled as `real`, with which
    nothing is measured again. `depth: 2` measures `down_blocks.0` and not each module in it.

    Leaves alone what `quantize` leaves alone. Refuses a budget that cannot be kept with anything in integers, or with
    everything, and says how near it comes. That noise falls as more stays real is taken for granted (bisection).

    Source: derived; ranking by what one module's integers cost, as in NNCF's quantisation with accuracy control.
    """

    snr: float | None = Field(None, gt=0, description="budget: signal to noise of outputs, at least, in dB")
    psnr: float | None = Field(None, gt=0, description="budget: fidelity of the pipeline's samples, at least, in dB")
    latency: float | None = Field(None, gt=0, description="budget: the engine's time over the real one's, at most")
    trials: int = Field(2, ge=1, description="calls of each entry that are held out of calibration, to measure on")
    depth: int | None = Field(None, ge=1, description="parts of module paths that are told apart; all by default")
    real: tuple[str, ...] | None = Field(None, description="modules that stay real, as an earlier run settled them")

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if sum(budget is not None for budget in (self.snr, self.psnr, self.latency)) > 1:
            raise ValueError("give one budget: snr, psnr or latency")
        return self

    @property
    def executing(self) -> bool:
        return self.scheme == "int8" or self.real is None

    def requires(self, program: Program) -> list[str]:
        found = super().requires(program)
        if self.psnr is not None and self.real is None and not program.origin.pipeline:
            found.append("psnr is of a pipeline's samples, and the checkpoint is a model alone: give snr")
        return found

    def run(self, program: Program, context: Context) -> Program:
        if (
            self.latency is not None
            and self.real is None
            and (context.target is None or context.target.runs() != "native")
        ):
            raise UserError("a latency budget needs a target whose engines run on this machine: give snr")
        whole = self.placed(program, context)
        if whole.is_empty:
            self.report(whole, context)
            return program
        held = None
        if self.executing:
            calls, held = self.calls_of(program, self.calls + self.trials).split(self.trials)
            self.settle_set(calls, context)
            if whole.form is not None:
                whole = self.calibrate(program, whole, calls, context)
        real = self.real
        if real is None:
            assert held is not None
            real = self._chosen(program, whole, held, context)
            context.settle(real=real)
        found = self._without(program, whole, real)
        self.report(found, context)
        return found.applied(program)

    def _without(self, program: Program, whole: Quantization, real: Collection[str]) -> Quantization:
        """``whole`` but for the modules ``real``, and for additions that fed them alone."""
        chosen = frozenset(real)

        def reason(graph: Graph) -> Reason:
            asked = self.reason(graph)

            def why(node: Node) -> str:
                return asked(node) or ("its integers cost too much" if group_of(node, self.depth) in chosen else "")

            return why

        return whole.placed_again(program, reason)

    def _chosen(self, program: Program, whole: Quantization, held: CalibrationSet, context: Context) -> tuple[str, ...]:
        """The modules that stay real."""
        found = measure_sensitivity(program, whole, held.entries, depth=self.depth)
        if unclear := next((m.path for m in found.modules if not math.isfinite(m.alone.power)), None):
            raise UserError(f"the noise of {unclear} is no number: nothing can be chosen by it")
        order = [module.path for module in found.ranked()]

        def applied(count: int) -> Program:
            return self._without(program, whole, order[:count]).applied(program)

        budget = self._budget(program, held, context)
        count, tried = 0, dict[int, float]()
        if budget is not None:
            search = most_real if isinstance(budget, LatencyBudget) else fewest_real
            count, tried = search(budget, applied, len(order))
        context.facts["sensitivity"] = {
            "budget": budget.as_json() if budget else None,
            "figure": tried.get(count),
            "tried": [{"real": number, "figure": figure} for number, figure in sorted(tried.items())],
            "calls": {name: len(calls) for name, calls in held.entries.items()},
            "together": found.together.as_json(),
            "modules": _rows(found, order[:count]),
        }
        return tuple(order[:count])

    def _budget(self, program: Program, held: CalibrationSet, context: Context) -> Budget | None:
        if self.snr is not None:
            return SignalBudget(self.snr, program, held.entries)
        if self.psnr is not None:
            asked = Asked(self.prompt, self.labels, None, self.steps, self.guidance, self.call)
            # Not the samples that the ranges were found on.
            return SampleBudget(self.psnr, program, asked, self.samples, self.seed + self.samples)
        if self.latency is not None:
            assert context.target is not None
            return LatencyBudget(self.latency, program, context.target)
        return None


def _rows(found: Sensitivity, real: Sequence[str]) -> list[dict[str, Any]]:
    """A record of each module, the noisiest first."""

    def row(module: ModuleNoise) -> dict[str, Any]:
        return {
            "path": module.path,
            "operations": module.operations,
            "alone": module.alone.as_json(),
            "without": module.without.as_json(),
            "real": module.path in real,
        }

    return [row(module) for module in sorted(found.modules, key=lambda module: -module.alone.power)]
