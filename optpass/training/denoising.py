"""A denoiser asked for clean samples, whatever it predicts, and how far two of them are apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.ir.interface import Interface
from optpass.ir.loop import Loop
from optpass.pipeline.target import Runner
from optpass.training.clean import CALLS
from optpass.training.courses import Lesson
from optpass.training.diffusion import Diffusion

HUBER = 0.00054
"""c of the pseudo-Huber loss, times √elements: Song & Dhariwal, arXiv 2310.14189, section 3.3."""


@dataclass(frozen=True)
class Denoising:
    """Calls of a denoiser for clean samples, whatever it predicts; ``call`` and ``loop`` are the student's.

    ``guidance`` is the scale of a teacher that is asked without and with its condition.
    """

    diffusion: Diffusion
    call: Interface
    loop: Loop
    guidance: float | None = None

    def inputs(self, lesson: Lesson, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """The call's inputs: the lesson's conditions, ``sample``, and ``timestep`` [1]."""
        spec = next(spec for spec in self.call.inputs if spec.name == self.loop.timestep)
        shape = [size if isinstance(size, int) else 1 for size in spec.shape]
        time = timestep.to(spec.dtype).reshape(-1)[:1].expand(max(1, *shape, 1)).reshape(shape)
        return {**lesson.inputs, self.loop.sample: sample, self.loop.timestep: time}

    def answer(self, run: Runner, lesson: Lesson, sample: Tensor, timestep: Tensor) -> Tensor:
        """What ``run`` answers."""
        return run(self.inputs(lesson, sample, timestep))[self.call.outputs[0].name]

    def taught(self, teach: Runner, lesson: Lesson, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the teacher answers, with guidance where its pipeline asks twice a step (Ho & Salimans 2022).

        Raises:
            UserError: it asks more often, or no scale is known.
        """
        conditions = lesson.batch.get(CALLS, [{}])
        if len(conditions) == 1:
            return self.answer(teach, lesson, sample, timestep)
        if len(conditions) != 2 or self.guidance is None:
            raise UserError(
                f"the teacher is asked {len(conditions)} times a step: distil its guidance first (distill-guidance), "
                "or say the scale of two (guidance)"
            )
        without, conditioned = (
            self.answer(teach, replace(lesson, inputs={**lesson.inputs, **each}), sample, timestep)
            for each in conditions
        )
        return torch.lerp(without, conditioned, self.guidance)

    def clean(self, run: Runner, lesson: Lesson, sample: Tensor, timestep: Tensor) -> Tensor:
        """x_0 by the answer of ``run``."""
        return self.diffusion.clean(sample, self.answer(run, lesson, sample, timestep), timestep)

    def given(self, lesson: Lesson) -> Tensor:
        """The lesson's own clean sample."""
        return lesson.inputs[self.loop.sample]

    def generated(self, run: Runner, lesson: Lesson, step: int) -> tuple[Tensor, Tensor]:
        """What ``run`` makes of noise in so many of the sampler's steps and one, and the timestep of the last.

        Between two steps the clean sample is noised anew (multistep sampling, Song et al., arXiv 2303.01469,
        algorithm 1).
        """
        steps = self.diffusion.timesteps
        sample = torch.randn_like(self.given(lesson))
        timestep = torch.tensor([steps[0]])
        for following in steps[1 : step + 1]:
            with torch.no_grad():
                clean = self.clean(run, lesson, sample, timestep)
            timestep = torch.tensor([following])
            sample = self.diffusion.noised(clean, torch.randn_like(clean), timestep)
        return self.clean(run, lesson, sample, timestep), timestep


def pseudo_huber(one: Tensor, other: Tensor) -> Tensor:
    """√(‖one − other‖² + c²) − c over √elements, c = 0.00054·√elements."""
    root = math.sqrt(one.numel())
    c = HUBER * root
    return (((one - other).square().sum() + c * c).sqrt() - c) / root
