"""Noise and clean samples of a diffusion: what a scheduler's schedule and a model's answer say of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from torch import Tensor

from optpass.errors import UserError

Prediction = Literal["epsilon", "v_prediction", "sample"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
NOISY = 0.1
"""Most of the clean sample, α, that the first step of a sampler may see: it starts from noise alone."""


@dataclass(frozen=True)
class Diffusion:
    """x_t = α_t·x_0 + σ_t·ε with α² + σ² = 1, over ``len(alphas)`` timesteps; what a model answers is ``prediction``.

    ``timesteps`` are those of a sampler's steps, from noise to clean. Samples have their batch first, timesteps
    are whole numbers [N].

    Source: Ho et al., arXiv 2006.11239; v-prediction, Salimans & Ho, arXiv 2202.00512, appendix D.
    """

    alphas: Tensor
    sigmas: Tensor
    prediction: Prediction
    timesteps: tuple[int, ...]

    @classmethod
    def of(cls, scheduler: Any, steps: int) -> Self:
        """That of a diffusers scheduler which makes ``steps`` steps.

        Raises:
            UserError: it preserves no variance, its model answers something else, or its first step does not start
                from noise.
        """
        name, cumulated = type(scheduler).__name__, getattr(scheduler, "alphas_cumprod", None)
        prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
        if cumulated is None or prediction not in PREDICTIONS:
            raise UserError(
                f"the schedule of a {name} is none that preserves variance (alphas_cumprod, with a prediction_type of "
                f"{', '.join(PREDICTIONS)}): fewer steps are distilled for those alone"
            )
        scheduler.set_timesteps(steps)
        timesteps = tuple(round(float(t)) for t in scheduler.timesteps)
        alphas = torch.as_tensor(cumulated).double().sqrt()
        made = cls(alphas.float(), (1 - alphas.square()).sqrt().float(), prediction, timesteps)
        if float(alphas[timesteps[0]]) > NOISY:
            raise UserError(
                f"with {steps} steps the {name} starts at timestep {timesteps[0]} of {len(alphas)}, where "
                f"{float(alphas[timesteps[0]]):.0%} of the sample is left: set timestep_spacing to 'trailing' in the "
                "scheduler's config"
            )
        return made

    @property
    def count(self) -> int:
        """Timesteps."""
        return len(self.alphas)

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t; noise alone at the sampler's first timestep, as the sampler has it."""
        alpha, sigma = self._at(timesteps, clean)
        mixed = alpha * clean + sigma * noise
        first = (timesteps == self.timesteps[0]).reshape(-1, *[1] * (clean.ndim - 1)).to(clean.device)
        return torch.where(first, noise, mixed)

    def clean(self, sample: Tensor, answer: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 by the model's answer to x_t."""
        alpha, sigma = self._at(timesteps, sample)
        if self.prediction == "sample":
            return answer
        if self.prediction == "epsilon":
            return (sample - sigma * answer) / alpha
        return alpha * sample - sigma * answer

    def noise(self, sample: Tensor, answer: Tensor, timesteps: Tensor) -> Tensor:
        """ε by the model's answer to x_t."""
        alpha, sigma = self._at(timesteps, sample)
        if self.prediction == "epsilon":
            return answer
        if self.prediction == "sample":
            return (sample - alpha * answer) / sigma.clamp_min(1e-4)
        return sigma * sample + alpha * answer

    def answer(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a model is to answer to x_t."""
        alpha, sigma = self._at(timesteps, clean)
        if self.prediction == "sample":
            return clean
        return noise if self.prediction == "epsilon" else alpha * noise - sigma * clean

    def stepped(self, sample: Tensor, answer: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """The sample at the timestep ``following``, by DDIM (Song et al., arXiv 2010.02502); clean below 0."""
        clean, noise = self.clean(sample, answer, timesteps), self.noise(sample, answer, timesteps)
        alpha, sigma = self._at(following.clamp_min(0), sample)
        over = (following < 0).reshape(-1, *[1] * (sample.ndim - 1)).to(sample.device)
        return torch.where(over, clean, alpha * clean + sigma * noise)

    def leading(self, sample: Tensor, end: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """The clean sample by which the step of :meth:`stepped` leads from ``sample`` to ``end``."""
        (alpha, sigma), (last, left) = self._at(timesteps, sample), self._at(following.clamp_min(0), sample)
        over = (following < 0).reshape(-1, *[1] * (sample.ndim - 1)).to(sample.device)
        ratio = left / sigma
        return torch.where(over, end, (end - ratio * sample) / (last - ratio * alpha))

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """α²/σ² [N]."""
        places = timesteps.long().cpu()
        return self.alphas[places].square() / self.sigmas[places].square()

    def refined(self, pieces: int) -> tuple[int, ...]:
        """The sampler's timesteps with each way from one to the next, and from the last to clean, in ``pieces``."""
        ends = (*self.timesteps, -1)
        return tuple(
            round(here + (there - here) * piece / pieces) for here, there in pairwise(ends) for piece in range(pieces)
        )

    def _at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ, to be broadcast over ``like``."""
        shape = (-1, *[1] * (like.ndim - 1))
        places = timesteps.long().cpu().reshape(-1)
        alpha, sigma = (table[places].reshape(shape).to(like.device) for table in (self.alphas, self.sigmas))
        return alpha, sigma
