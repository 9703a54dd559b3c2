"""The pass ``distill-guidance``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Self

from pydantic import Field, model_validator

from optpass.errors import UserError
from optpass.ir.loop import Sampling, usual_steps
from optpass.ir.program import InputRange, Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context
from optpass.rewrite.guided import time_layers, with_scales
from optpass.training.asking import GUIDANCE
from optpass.training.guided import GuidedTrajectories
from optpass.training.losses import Criterion, OutputLoss
from optpass.training.networks import Network, Values
from optpass.training.objective import Supervised
from optpass.training.trainable import chosen
from optpass.training.trainer import accelerated
from optpass.training.training_pass import STEPS, TrainingPass


class DistillGuidance(TrainingPass):
    """a model that guidance asks two or three times a step → one that takes the scales as inputs and is asked once.

    Each of `scales` becomes an input, embedded like the time and added, behind a linear layer and a nonlinearity that
    are zero at first, at every layer through which the time reaches the sample: untrained, the model is the one it
    was. Then it is trained on the pipeline's own generations, whose scales are drawn evenly from `scales`, towards
    the answer that the pipeline puts together from all of a step's calls. Engines take the scales with every call, and
    where a pipeline does not know of them `defaults`; `optpass run --guidance` sets them.

    All weights are trained, with `new` only those that are new. A share of the generations, `student_states`,
    goes on with the student's answers.

    Leaves alone: nothing; it is one model, and one rewrite. Refuses a model without a loop or with a cache (put it in
    front of the caching), one that was captured for several rows (`--inputs sample=1x…`: the distilled model is asked
    once), and one whose time comes in through no linear layer.

    Source: MoViE, arXiv 2412.06578, section 3.3; guidance distilled, Meng et al., CVPR 2023, arXiv 2210.03142.
    """

    scales: dict[str, tuple[float, float]] = Field(
        {GUIDANCE: (1.0, 7.5)}, min_length=1, description="lowest and highest scale, by the pipeline's own names"
    )
    defaults: dict[str, float] = Field(
        default_factory=dict, description="scales where nobody says; by default the middle of each range"
    )
    width: int = Field(256, ge=2, multiple_of=2, description="of the scales' embeddings")
    new: bool = Field(False, description="only the new weights are trained")
    loss: OutputLoss = Field("mse", description="of outputs")
    student_states: float = Field(0.25, ge=0, le=1, description="share of generations that the student drives")

    contract = approximate()
    needs = "generations of the pipeline"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, (low, high) in self.scales.items():
            if not low < high:
                raise ValueError(f"scales: {name} goes from {low:g} to {high:g}, which is no range")
        for name, value in self.defaults.items():
            if name not in self.scales:
                raise ValueError(f"defaults: {name} is none of scales")
            low, high = self.scales[name]
            if not low <= value <= high:
                raise ValueError(f"defaults: {name} {value:g} is outside of {low:g} … {high:g}, which is trained")
        return self

    def requires(self, program: Program) -> list[str]:
        return list(self._refusals(program))

    def _refusals(self, program: Program) -> Iterator[str]:
        yield from self.unsteppable(program, "distill-guidance")
        loop = program.loop
        if loop is None or not loop.stateless:
            return
        if loop.signature.defaults:
            yield "it takes scales already: guidance is distilled once"
        rows = program.entries[loop.entries[0]].inputs[loop.signature.inputs.index(loop.sample)].shape[0]
        if rows != 1:
            yield (
                f"it was captured for {rows} rows, and the distilled model is asked once: capture one row "
                f"(--inputs {loop.sample}=1x…); guidance of the original is then two calls"
            )

    def run(self, program: Program, context: Context) -> Program:
        assert program.loop is not None
        student, learnt = self._with_scales(program.copy(), context)
        names = self.trained_names(student, learnt if self.new else chosen(student, "all", ()), context)
        with accelerated(self.precision, self.device) as accelerator:
            values = Values(accelerator.device)
            networks = Network(student, values, names), Network(program, values)
            assert program.origin.path is not None
            share, asking = self.student_states, self.asking(program)
            courses = GuidedTrajectories(program.origin.path, networks[1], asking, self.scales, student_states=share)
            return self.trained(
                student,
                networks,
                courses,
                lambda: Supervised(Criterion(self.loss)),
                accelerator,
                context,
                models=(student, program),
            )

    def _with_scales(self, program: Program, context: Context) -> tuple[Program, list[str]]:
        """``program`` with the new inputs, and the names of the weights that are new.

        Raises:
            UserError: the time reaches the sample through no linear layer.
        """
        loop = program.loop
        assert loop is not None
        entry = loop.entries[0]
        graph = program.entries[entry]
        layers = time_layers(graph, loop)
        if not layers:
            raise UserError(f"{loop.timestep} reaches {loop.sample} through no linear layer: scales have no place")
        middle = {name: (low + high) / 2 for name, (low, high) in self.scales.items()}
        defaults = {**middle, **self.defaults}
        learnt, tables = with_scales(graph, layers, defaults, self.width)
        context.facts["scales"] = {
            "defaults": defaults,
            "ranges": {name: list(span) for name, span in self.scales.items()},
            "layers": len(layers),
        }
        ranges = {name: InputRange(low, high, "uniform") for name, (low, high) in self.scales.items()}
        sampling = Sampling(usual_steps(loop, self.steps or STEPS), 1)
        made = replace(
            program.with_weights(tables).with_untrained(learnt),
            loop=replace(loop, signature=graph.signature, sampling=sampling),
            ranges={**program.ranges, **ranges},
        )
        return made, list(learnt)
