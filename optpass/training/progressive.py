"""A student that makes two of its teacher's steps in one, again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from optpass.pipeline.target import Runner
from optpass.training.courses import Lesson
from optpass.training.denoising import Denoising
from optpass.training.networks import Network
from optpass.training.objective import Objective


@dataclass
class Progressive(Objective):
    """f(x_t) → the clean sample by which one DDIM step ends where two of the teacher's do, halving steps in rounds.

    In each of so many ``rounds``, of equal shares of the ``updates``, the student learns half of the teacher's steps;
    what it is at the end of one is the teacher of the next, ``halfway``. The last round's steps are the sampler's. A
    share of the lessons, ``student_states``, starts from what the student generates. The loss is weighted with
    max(α²/σ², 1).

    Source: progressive distillation, Salimans & Ho, arXiv 2202.00512, algorithm 2 and the truncated SNR of section 4;
    one learning-rate schedule spans all rounds, where they begin anew in each. The student's states, DDIL, arXiv
    2410.11971.
    """

    denoising: Denoising
    student: Network
    halfway: Network
    rounds: int
    updates: int
    student_states: float
    number: int = field(default=0, init=False)
    """That of the round, from 0."""

    def terms(self, lesson: Lesson, learn: Runner, teach: Runner) -> dict[str, Tensor]:
        made = self.denoising
        grid = made.diffusion.refined(2 ** (self.rounds - self.number))
        place = 2 * int(torch.randint(len(grid) // 2, ()))
        first, middle, last = (torch.tensor([t]) for t in (*grid, -1)[place : place + 3])
        with torch.no_grad():
            clean = made.given(lesson)
            if float(torch.rand(())) < self.student_states:
                clean, _ = made.generated(self.student.runner(), lesson, 0)
            sample = made.diffusion.noised(clean, torch.randn_like(clean), first)
            nearer = made.diffusion.stepped(sample, self._taught(teach, lesson, sample, first), first, middle)
            end = made.diffusion.stepped(nearer, self._taught(teach, lesson, nearer, middle), middle, last)
            expected = made.diffusion.leading(sample, end, first, last)
        found = made.clean(learn, lesson, sample, first)
        weight = made.diffusion.signal_to_noise(first).clamp_min(1.0).to(found.device)
        return {"progressive": weight.squeeze() * (found - expected).square().mean()}

    def _taught(self, teach: Runner, lesson: Lesson, sample: Tensor, timestep: Tensor) -> Tensor:
        """What the round's teacher answers."""
        if self.number:
            return self.denoising.answer(self.halfway.runner(), lesson, sample, timestep)
        return self.denoising.taught(teach, lesson, sample, timestep)

    def step(self, update: int, lessons: int) -> dict[str, float]:
        following = min((update + 1) * self.rounds // self.updates, self.rounds - 1)
        if following != self.number:
            self.number = following
            self.halfway.set(self.student.copied())
        return {}

    def state(self) -> dict[str, Any]:
        return {"number": self.number, "halfway": self.halfway.copied()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.number = state["number"]
        self.halfway.set(state["halfway"])
