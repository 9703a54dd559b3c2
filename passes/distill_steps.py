"""The pass ``distill-steps``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from optpass.errors import UserError
from optpass.evaluate.given_data import given_items
from optpass.ir.loop import Listed, Sampling
from optpass.ir.program import Program
from optpass.pipeline.contract import approximate
from optpass.pipeline.passes import Context
from optpass.training.adversarial import Adversarial, discriminator_for
from optpass.training.asking import GUIDANCE
from optpass.training.clean import Generated, given_clean
from optpass.training.consistency import Consistency
from optpass.training.courses import Courses
from optpass.training.denoising import Denoising
from optpass.training.diffusion import Diffusion
from optpass.training.matching import Matching
from optpass.training.networks import Network, Values
from optpass.training.objective import Objective
from optpass.training.progressive import Progressive
from optpass.training.trainable import chosen
from optpass.training.trainer import accelerated
from optpass.training.training_pass import TrainingPass
from optpass.training.watched import WatchedPipeline

Method = Literal["consistency", "progressive", "matching", "adversarial"]


class DistillSteps(TrainingPass):
    """a model that is sampled in many steps → the same graph, trained to be sampled in `into` of them.

    `consistency` learns to answer as it does one step of the teacher's further on; `progressive` learns to make two of
    the teacher's steps in one, and is then the teacher of half as many, until `into` are left; `matching` lets the
    distribution of its samples follow the gradient between two scores, the teacher's and that of its own samples;
    `adversarial` trains against heads on the features of the teacher's encoder, at noised samples, and against the
    clean sample itself (`reconstruction`). All weights are trained.

    What is trained on are clean samples with their conditions: `data` (a folder of tensors, or a dataset by import
    path or in a Python file, whose items are the model's inputs by name but for the time), or `samples` generations
    of the teacher's, in `steps` steps. The teacher is the model as it goes into this pass, or as it was before
    (`teacher`). The student is asked once a step: guidance is distilled before (distill-guidance), and its scales stay
    at their defaults, or the pipeline asks for none. A teacher that the pipeline asks twice a step is guided by that
    scale, or by `guidance`: a smaller one keeps more variety where the student seeks modes.

    Afterwards the Program is made for `into` steps: `optpass run`, samples and gates take so many.

    Leaves alone: nothing; it is one model. Refuses a model without a loop or with a cache, a model of a pipeline whose
    schedule preserves no variance, and one whose first step of `into` would not start from noise.

    Source: consistency distillation, arXiv 2303.01469, as LCM, arXiv 2310.04378, has it, with the student's states
    of DDIL, arXiv 2410.11971; progressive distillation, arXiv 2202.00512; distribution matching, arXiv 2311.18828;
    SF-V, arXiv 2406.04324, and MoViE, arXiv 2412.06578, algorithm 2.
    """

    method: Method = Field(description="what the student is trained by")
    into: int = Field(1, ge=1, le=64, description="sampling steps afterwards")
    teacher: str | None = Field(
        None, description="the original, or the model as it went into this pass; by default as it comes in here"
    )
    data: str | None = Field(
        None, description="a folder of tensors, module:name or file.py:name of a dataset of clean samples"
    )
    samples: int = Field(256, ge=1, description="generations of the teacher's, where there is no data")
    ladder: int = Field(
        50,
        ge=2,
        description="consistency: timesteps in all, of which one step is learnt at a time; progressive: most of the "
        "steps that are halved, in rounds of equal shares of the updates",
    )
    student_states: float = Field(
        0.25, ge=0, le=1, description="consistency, progressive: share that starts from its own samples"
    )
    features: tuple[str, ...] = Field(
        ("down_blocks.?", "mid_block"), description="adversarial: modules whose outputs the discriminator sees"
    )
    noise: tuple[float, float] = Field(
        (-1.0, 1.0), description="adversarial: mean and deviation of the logit of the timestep that it sees them at"
    )
    reconstruction: float = Field(0.1, ge=0, description="adversarial: weight of the loss against the clean sample")
    penalty: float = Field(1e-4, ge=0, description="adversarial: weight of R1 on the features")
    critic_rate: float | None = Field(
        None, gt=0, description="learning rate of the discriminator (10 times its own), or of its own score (1.5 times)"
    )
    critic_updates: int = Field(
        4, ge=1, description="matching: updates of its own score for one of the student, each from a share of the calls"
    )

    contract = approximate()
    needs = "generations of the pipeline, or data"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "consistency" and self.ladder < self.into:
            raise ValueError(f"ladder: {self.ladder} timesteps are fewer than the {self.into} that are to be sampled")
        if self.method == "progressive" and self.updates < self._rounds():
            steps = self.into * 2 ** self._rounds()
            raise ValueError(f"{steps} steps are {self._rounds()} times halved in {self.updates} updates: give more")
        return self

    def _rounds(self) -> int:
        """How often steps are halved; at least once."""
        return max(1, (self.ladder // self.into).bit_length() - 1)

    def requires(self, program: Program) -> list[str]:
        return list(self._refusals(program))

    def _refusals(self, program: Program) -> Iterator[str]:
        yield from self.unsteppable(program, "distill-steps")
        loop = program.loop
        if loop is None:
            return
        if isinstance(loop.schedule, Listed):
            yield f"the schedule lists steps of {loop.schedule.of}"
        if loop.sampling and loop.sampling.guidance > 1 and self.guidance != 1:
            yield (
                f"it is sampled with guidance, {loop.sampling.guidance} evaluations a step, and would be without: put "
                "distill-guidance in front, or say guidance: 1"
            )

    def run(self, program: Program, context: Context) -> Program:
        assert program.loop is not None
        names = self.trained_names(program, chosen(program, "all", ()), context)
        with accelerated(self.precision, self.device) as accelerator:
            values = Values(accelerator.device)
            before = program if self.teacher is None else self.earlier(self.teacher, program, context)
            networks = Network(program, values, names), Network(before, values)
            assert program.origin.path is not None
            pipeline = WatchedPipeline(program.origin.path, networks[1])
            schedule, guidance = Diffusion.of(pipeline.scheduler, self.into), self._guidance(program)
            denoising = Denoising(schedule, networks[0].call, program.loop, guidance)
            courses = self._courses(program, networks[1], pipeline, program.origin.path)
            self.hold(courses, self.data)
            made = self.trained(
                program,
                networks,
                courses,
                lambda: self._objective((program, before), denoising, networks[0], values, accelerator.device),
                accelerator,
                context,
                models=(program, before),
            )
        return replace(made, loop=replace(program.loop, sampling=Sampling(self.into, 1)))

    def _guidance(self, program: Program) -> float | None:
        """The scale of a teacher that is asked twice: as said, or the one that the student stands for."""
        assert program.loop is not None
        return program.loop.signature.defaults.get(GUIDANCE) if self.guidance is None else self.guidance

    def _courses(self, program: Program, teacher: Network, pipeline: WatchedPipeline, folder: Path) -> Courses:
        assert program.loop is not None
        if self.data is not None:
            items = given_items(self.data, program, teacher.call)
            return given_clean(items, teacher, program.loop, self.data, calls=self.calls, seed=self.seed)
        asking = self.asking(program)
        if self.method == "matching":
            # Of the generations it takes the conditions alone.
            asking = replace(asking, asked=replace(asking.asked, steps=1))
        return Generated(pipeline, folder, asking, program.loop, number=self.samples, calls=self.calls)

    def _objective(
        self,
        programs: tuple[Program, Program],
        denoising: Denoising,
        student: Network,
        values: Values,
        device: torch.device,
    ) -> Objective:
        (program, teacher), names = programs, list(student.parameters)
        if self.method == "consistency":
            places = torch.linspace(denoising.diffusion.timesteps[0], 0, self.ladder + 1)[:-1].round().int().tolist()
            return Consistency(denoising, student, Network(program, values, names), places, self.student_states)
        if self.method == "progressive":
            halfway, rounds = Network(program, values, names), self._rounds()
            return Progressive(denoising, student, halfway, rounds, self.updates, self.student_states)
        if self.method == "matching":
            rate, every = self.critic_rate or 1.5 * self.learning_rate, max(1, self.calls // self.critic_updates)
            return Matching(denoising, Network(program, values, names), rate, every)
        try:
            seen = discriminator_for(teacher, self.features, values, seed=self.seed)
        except ValueError as error:
            raise UserError(f"features: {error}") from None
        rate = self.critic_rate or 10 * self.learning_rate
        return Adversarial(denoising, seen.to(device), rate, self.noise, self.reconstruction, self.penalty)
