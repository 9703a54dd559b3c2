"""A student that answers as it does itself nearer to the clean sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optpass.pipeline.target import Runner
from optpass.training.courses import Lesson
from optpass.training.denoising import Denoising, pseudo_huber
from optpass.training.networks import Network
from optpass.training.objective import Objective

STEADY = 0.95


@dataclass
class Consistency(Objective):
    """f(x_t, t) → f⁻(x_s, s), where the teacher's DDIM step leads from x_t to x_s; f⁻ is a running mean of f.

    f is the clean sample by the model's answer, t one of ``ladder``, s the next. A share of the lessons,
    ``student_states``, starts from what the student generates, and not from the given sample.

    Source: consistency distillation, Song et al., arXiv 2303.01469, algorithm 2, with the skipped steps of LCM,
    arXiv 2310.04378; the student's states, DDIL, arXiv 2410.11971.
    """

    denoising: Denoising
    student: Network
    target: Network
    ladder: Sequence[int]
    student_states: float
    decay: float = STEADY

    def terms(self, lesson: Lesson, learn: Runner, teach: Runner) -> dict[str, Tensor]:
        made, follow = self.denoising, self.target.runner()
        clean = made.given(lesson)
        place = int(torch.randint(len(self.ladder), ()))
        timestep = torch.tensor([self.ladder[place]])
        following = torch.tensor([self.ladder[place + 1] if place + 1 < len(self.ladder) else -1])
        with torch.no_grad():
            if float(torch.rand(())) < self.student_states:
                clean, _ = made.generated(follow, lesson, 0)
            sample = made.diffusion.noised(clean, torch.randn_like(clean), timestep)
            answer = made.taught(teach, lesson, sample, timestep)
            nearer = made.diffusion.stepped(sample, answer, timestep, following)
            expected = nearer if int(following) < 0 else made.clean(follow, lesson, nearer, following)
        return {"consistency": pseudo_huber(made.clean(learn, lesson, sample, timestep), expected)}

    def step(self, update: int, lessons: int) -> dict[str, float]:
        with torch.no_grad():
            for name, value in self.target.parameters.items():
                value.lerp_(self.student.parameters[name], 1 - min(self.decay, (update + 1) / (update + 10)))
        return {}

    def state(self) -> dict[str, Any]:
        return {"target": self.target.copied()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.target.set(state["target"])
