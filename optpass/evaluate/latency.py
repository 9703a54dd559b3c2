"""Latency of engines side by side: warmed up, alternating in one run, medians with their spread.

Whether a difference is one is asked of the pairs' ratios, and answered by the sign test: the interval of their
median is that between two of the ratios themselves, and holds whatever their distribution (Conover, *Practical
Nonparametric Statistics*, section 3.2). It knows nothing of what a process brings along (where its memory lies,
which core its threads met first), so a difference below :data:`RESOLUTION` is none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles

from torch import Tensor

from optpass.pipeline.target import Runner

RUNS, WARMUP = 20, 3
"""Timed calls of each engine, and those before them that are not."""
CONFIDENCE = 0.99
"""Of the interval of a ratio."""
RESOLUTION = 0.01
"""The smallest relative difference that is called one."""
NOISE = "the difference lies within the noise of this machine"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one engine's call over ``runs`` timed calls."""

    label: str
    median: float
    p10: float
    p90: float
    runs: int

    @staticmethod
    def of(label: str, times: Sequence[float]) -> Latency:
        """That of measured ``times``, in milliseconds."""
        low, middle, high = _spread(times)
        return Latency(label, middle, low, high, len(times))


@dataclass(frozen=True)
class Ratio:
    """The second engine's time over the first's, pair by pair: below 1 the second is faster.

    ``low`` and ``high`` bound the median of such pairs at :data:`CONFIDENCE`; without end where there are too few.
    """

    median: float
    p10: float
    p90: float
    low: float
    high: float

    @staticmethod
    def of(before: Sequence[float], after: Sequence[float]) -> Ratio:
        """That of times that were measured in pairs."""
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        low, middle, high = _spread(ratios)
        return Ratio(middle, low, high, *median_interval(ratios))

    @property
    def certain(self) -> bool:
        """Whether the interval leaves out 1, and the difference is not too small: noise does not cover it."""
        return (self.low > 1 or self.high < 1) and abs(self.median - 1) >= RESOLUTION

    def exceeds(self, bound: float) -> bool:
        """Whether the second engine takes more than ``bound`` times the first's time, beyond noise."""
        return self.low > bound and self.median >= bound * (1 + RESOLUTION)

    def as_dict(self) -> dict[str, float | bool]:
        """The figures by name, and whether the difference is ``certain``; an end that is missing is left out."""
        return {
            **{name: value for name, value in asdict(self).items() if 0 < value < math.inf},
            "certain": self.certain,
        }


@dataclass(frozen=True)
class Comparison:
    """Two engines measured in turn, A B A B …, so that a machine that slows down slows both."""

    before: Latency
    after: Latency
    ratio: Ratio

    def as_dict(self) -> dict[str, object]:
        return {
            "unit": "ms",
            "before": asdict(self.before),
            "after": asdict(self.after),
            "ratio": self.ratio.as_dict(),
            "note": "" if self.ratio.certain else NOISE,
        }


def compare_latency(
    before: tuple[str, Runner],
    after: tuple[str, Runner],
    calls: Sequence[Mapping[str, Tensor]],
    *,
    after_calls: Sequence[Mapping[str, Tensor]] | None = None,
    runs: int = RUNS,
    warmup: int = WARMUP,
    progress: Callable[[float], None] = lambda _: None,
) -> Comparison:
    """Time two labelled engines on the same ``calls``, ``runs`` alternating pairs after ``warmup`` pairs.

    Of several calls in a row (a walk through a schedule), the times are those of a call in the mean. ``after_calls``
    are those of the second engine, where its inputs have other sizes.
    """
    times: tuple[list[float], list[float]] = [], []
    sides = (before[1], calls), (after[1], calls if after_calls is None else after_calls)
    for index in range(warmup + runs):
        for (runner, inputs), kept in zip(sides, times, strict=True):
            taken = milliseconds(runner, inputs)
            if index >= warmup:
                kept.append(taken)
        progress((index + 1) / (warmup + runs))
    return Comparison(Latency.of(before[0], times[0]), Latency.of(after[0], times[1]), Ratio.of(*times))


def milliseconds(runner: Runner, calls: Sequence[Mapping[str, Tensor]]) -> float:
    """How long a call takes, in the mean of ``calls``."""
    start = time.perf_counter()
    for inputs in calls:
        runner(inputs)
    return (time.perf_counter() - start) * 1e3 / len(calls)


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of the median of what ``values`` were drawn from; (0, ∞) where they are too few to say.

    Between the k-th value and the k-th from the end, with the largest k for which at most k − 1 of so many tosses of
    a coin are heads with a probability of (1 − ``confidence``) / 2 or less.
    """
    count, ordered = len(values), sorted(values)
    rank, below = 0, 0.0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if below > (1 - confidence) / 2:
            break
        rank += 1
    return (ordered[rank - 1], ordered[-rank]) if rank else (0.0, math.inf)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], median(values), tenths[-1]
