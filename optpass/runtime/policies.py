"""The adaptive schedules that come with the package."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, field_validator

from optpass.ir.loop import CHANGE, MOTION
from optpass.runtime.policy import Moment, Policy


class Threshold(Policy):
    """Reuse while the first block's residual has changed little since the last computed step.

    ``metric.change`` is the relative L1 distance of what is computed anyway (a first block's residual) from its
    value at the last computed step. Sources: first-block caching of ParaAttention and of diffusers.
    """

    threshold: float = Field(ge=0, description="relative change from which on a step is computed")
    warmup: int = Field(1, ge=1, description="steps at the beginning that are all computed")
    cooldown: int = Field(0, ge=0, description="steps at the end that are all computed; needs the number of steps")
    max_reuse: int = Field(0, ge=0, description="steps in a row that reuse at most; 0 for any number")

    def wants(self) -> tuple[str, ...]:
        return (CHANGE,)

    @property
    def counts(self) -> bool:
        return self.cooldown > 0

    def scaled(self, factor: float) -> Self:
        return self.model_copy(update={"threshold": self.threshold * factor})

    def computes(self, moment: Moment) -> bool:
        last = moment.computed[-1]
        if moment.step < self.warmup or (self.max_reuse and moment.step - last > self.max_reuse):
            return True
        if self.cooldown and moment.of is not None and moment.step >= moment.of - self.cooldown:
            return True
        # Not a number, of a residual that is zero everywhere, is a change that nothing vouches for.
        return not moment.now[CHANGE] < self.threshold


class RateCodebook(Policy):
    """AdaCache: the measured rate of change picks from a codebook after how many steps the next one is computed.

    ``metric.change`` is ‖p_t − p_{t+k}‖₁ / ‖p_{t+k}‖₁ of a block's residual p between computed steps; divided by their
    distance k it is looked up: the first key that is larger gives the rate, the last entry where none is. The steps
    1, N − 1 and N (from 1) are always computed, and so is step 2, which gives the first metric. What is no
    number (a residual that is zero) gets the last entry's rate.

    With ``motion``, ``metric.motion`` m makes the rate depend on what moves: g = (m / scale)^power,
    c ← c · (g + |10 · (g − g') / k|), g' that of the computed step before, between ``motion_steps`` (from 1). The
    paper's equation has no modulus, and its hyper-parameters no third number; both are as in the released code.

    Source: Kahatapitiya et al. 2024 (AdaCache, arXiv 2411.02397), equations 4–9 and code.
    """

    codebook: dict[float, int] = Field(description="rate by the upper bound of the change; the last one for any other")
    motion: bool = Field(False, description="scale the change by motion in the frames (MoReg)")
    motion_steps: tuple[int, int] = Field(
        (1, 1 << 30), description="first and last step, from 1, that motion counts in"
    )
    motion_scale: float = Field(0.385, gt=0, description="motion of a clip that is changed as it is")
    motion_power: float = Field(8.0, gt=0, description="how steeply motion counts")

    slope: ClassVar[float] = 10.0

    @field_validator("codebook")
    @classmethod
    def _is_book(cls, book: dict[float, int]) -> dict[float, int]:
        if not book or any(rate < 1 for rate in book.values()) or any(not key > 0 for key in book):
            raise ValueError("a codebook maps upper bounds above 0 to rates of 1 or more")
        return dict(sorted(book.items()))

    def wants(self) -> tuple[str, ...]:
        return (CHANGE, MOTION) if self.motion else (CHANGE,)

    @property
    def counts(self) -> bool:
        return True

    def scaled(self, factor: float) -> Self:
        return self.model_copy(update={"codebook": {key * factor: rate for key, rate in self.codebook.items()}})

    def computes(self, moment: Moment) -> bool:
        if moment.of is not None and moment.step >= moment.of - 2:
            return True
        return moment.step >= moment.computed[-1] + self.rate(moment)

    def rate(self, moment: Moment) -> int:
        """Steps from the last computed one to the next, by what was measured there."""
        if len(moment.computed) < 2:
            return 1
        before, last = moment.computed[-2:]
        change = moment.metrics[last][CHANGE] / (last - before) * self._factor(moment)
        *bounded, (_, slowest) = self.codebook.items()
        return next((rate for bound, rate in bounded if change < bound), slowest)

    def _factor(self, moment: Moment) -> float:
        before, last = moment.computed[-2:]
        if not self.motion or not self._counts_motion(last):
            return 1.0
        motion = self._motion(moment, last)
        gradient = self.slope * (motion - self._motion(moment, before)) / (last - before)
        return motion + abs(gradient)

    def _motion(self, moment: Moment, step: int) -> float:
        if not self._counts_motion(step):
            return 1.0
        return float((moment.metrics[step][MOTION] / self.motion_scale) ** self.motion_power)

    def _counts_motion(self, step: int) -> bool:
        first, last = self.motion_steps
        return first <= step + 1 <= last
