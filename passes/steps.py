"""The pass ``steps``."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from optpass.ir.loop import Listed, Sampling
from optpass.ir.program import Program
from optpass.pipeline.contract import Contract, exact, retrain
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.stepping import without_loop


class Steps(Pass):
    """a model sampled in its pipeline's way → one that is made for `steps` steps, each of `guidance` evaluations.

    No operator changes: what a call computes is what it computed. The Program, its bundle and its report know
    from now on how a sample is made: `optpass run` takes so many steps where nobody says otherwise, and no guidance
    where there is one evaluation a step; samples for reports and gates are made in this way; and what a sample
    costs is that of `steps · guidance` evaluations, the NFE of papers. Weights that serve few steps, or that have
    guidance distilled into them, have to be trained, so that the contract is `retrain`. With `trained: true` the
    weights are made for it, and it is recorded only: the first entry of a recipe says so of its checkpoint.

    An evaluation is a row of the batch. A pipeline that asks with and without its condition in one call takes a
    batch of two; an engine for a model without guidance has to be built for a batch of one.

    Leaves alone: a model that is sampled so already. Refuses one without a loop, and a schedule that was made for
    another number of steps.

    Source: NFE as in MobileVD, arXiv 2412.07583, Table 1, and MoViE, arXiv 2412.06578, Table 1; steps are distilled
    as in SF-V, arXiv 2406.04324, guidance as in Meng et al., CVPR 2023, arXiv 2210.03142.
    """

    steps: int = Field(ge=1, description="sampling steps")
    guidance: int = Field(
        1, ge=1, le=8, description="evaluations in a step: 1, 2 with guidance, 3 with guidance by image and text"
    )
    trained: bool = Field(False, description="the weights are made for it: it is recorded, nothing is to be trained")

    contract = retrain()

    @property
    def promise(self) -> Contract:
        return exact() if self.trained else self.contract

    def requires(self, program: Program) -> list[str]:
        if program.loop is None:
            return without_loop(program)
        schedule = program.loop.schedule
        if isinstance(schedule, Listed) and schedule.of != self.steps:
            return [f"the schedule lists steps of {schedule.of}, and these are {self.steps}: run it before the caching"]
        return []

    def run(self, program: Program, context: Context) -> Program:
        assert program.loop is not None
        sampling = Sampling(self.steps, self.guidance)
        if program.loop.sampling == sampling:
            context.decline("(root)", f"a sample takes {sampling.evaluations} evaluations already")
            return program
        context.rewrote("(root)")
        return self._sampled(program)

    def reference(self, program: Program) -> Program:
        """What was recorded is true of the original too: it is sampled so where results are compared with it."""
        return self._sampled(program) if self.trained else program

    def _sampled(self, program: Program) -> Program:
        assert program.loop is not None
        return replace(program, loop=replace(program.loop, sampling=Sampling(self.steps, self.guidance)))
