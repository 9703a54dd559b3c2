"""A student whose samples follow the gradient between two scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optpass.pipeline.target import Runner
from optpass.training.courses import Lesson
from optpass.training.denoising import Denoising
from optpass.training.networks import Network
from optpass.training.objective import Objective, share_gradients


@dataclass
class Matching(Objective):
    """The student's samples → the teacher's distribution: ∇ of KL by the scores of both, noised to every timestep.

    The gradient in the student's sample x is (f_ψ(x_t) − f_teacher(x_t)) / mean|x − f_teacher(x_t)|, where f_ψ, which
    begins as the student, is trained to denoise the student's samples all along, at the rate ``rate``, with an update
    after every ``every`` lessons. Neither needs a sample of the teacher's.

    Source: distribution matching distillation, Yin et al., arXiv 2311.18828, section 3.2, equation 8, without its
    regression. f_ψ has several updates for one of the student, as in DMD2 (arXiv 2405.14867), which has five; here
    they are of shares of its lessons, so that they cost nothing.
    """

    denoising: Denoising
    other: Network
    rate: float
    every: int = 1
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        self._waiting = 0
        self._optimiser = torch.optim.AdamW(
            list(self.other.parameters.values()), lr=self.rate, betas=(0.0, 0.99), weight_decay=0.0
        )
        self._losses: list[float] = []

    def terms(self, lesson: Lesson, learn: Runner, teach: Runner) -> dict[str, Tensor]:
        made = self.denoising
        steps = len(made.diffusion.timesteps)
        sample, _ = made.generated(learn, lesson, int(torch.randint(steps, ())) if steps > 1 else 0)
        fixed = sample.detach()
        self._learn(lesson, fixed)
        timestep = _between(made.diffusion.count, 0.02, 0.98)
        noisy = made.diffusion.noised(fixed, torch.randn_like(fixed), timestep)
        with torch.no_grad():
            answer = made.taught(teach, lesson, noisy, timestep)
            wanted = made.diffusion.clean(noisy, answer, timestep)
            found = made.clean(self.other.runner(), lesson, noisy, timestep)
        gradient = (found - wanted) / (fixed - wanted).abs().mean().clamp_min(1e-4)
        # Its gradient in the sample is the one above; its value is that of half its square.
        return {"matching": 0.5 * (sample - (fixed - gradient)).square().mean()}

    def _learn(self, lesson: Lesson, sample: Tensor) -> None:
        """The gradient of f_ψ's own loss."""
        made = self.denoising
        timestep, noise = _between(made.diffusion.count, 0.0, 1.0), torch.randn_like(sample)
        noisy = made.diffusion.noised(sample, noise, timestep)
        answer = made.answer(self.other.runner(gradients=True), lesson, noisy, timestep)
        loss = (answer - made.diffusion.answer(sample, noise, timestep)).square().mean()
        with torch.enable_grad():
            loss.backward()  # type: ignore[no-untyped-call]
        self._losses.append(float(loss.detach()))
        self._waiting += 1
        if self._waiting == self.every:
            self._update()

    def _update(self) -> None:
        """That of f_ψ, from the lessons since the last one."""
        parameters = list(self.other.parameters.values())
        share_gradients(parameters, self._waiting)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._waiting = 0

    def step(self, update: int, lessons: int) -> dict[str, float]:
        if self._waiting:
            self._update()
        told, self._losses = sum(self._losses) / len(self._losses), []
        return {"own score": told}

    def state(self) -> dict[str, Any]:
        return {"other": self.other.copied(), "optimiser": self._optimiser.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.other.set(state["other"])
        self._optimiser.load_state_dict(state["optimiser"])


def _between(count: int, low: float, high: float) -> Tensor:
    """A timestep [1] of ``count``, drawn evenly between two shares of them."""
    return torch.randint(int(low * count), max(int(high * count), int(low * count) + 1), (1,))
