"""Fewer sampling steps: what a student is trained for that is to reach the clean sample at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from optpass.errors import UserError
from optpass.ir.interface import Interface
from optpass.ir.loop import Loop
from optpass.pipeline.target import Runner
from optpass.training.clean import CALLS
from optpass.training.courses import Lesson
from optpass.training.diffusion import Diffusion
from optpass.training.networks import Network
from optpass.training.objective import Objective

HUBER = 0.00054
"""c of the pseudo-Huber loss, times √elements: Song & Dhariwal, arXiv 2310.14189, section 3.3."""
STEADY = 0.95


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
        return {"target": _values(self.target)}

    def restore(self, state: Mapping[str, Any]) -> None:
        _set(self.target, state["target"])


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
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self._waiting
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
        return {"other": _values(self.other), "optimiser": self._optimiser.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        _set(self.other, state["other"])
        self._optimiser.load_state_dict(state["optimiser"])


def _between(count: int, low: float, high: float) -> Tensor:
    """A timestep [1] of ``count``, drawn evenly between two shares of them."""
    return torch.randint(int(low * count), max(int(high * count), int(low * count) + 1), (1,))


def _values(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in network.parameters.items()}


def _set(network: Network, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in network.parameters.items():
            value.copy_(values[name])
