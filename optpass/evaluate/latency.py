"""Latency of engines side by side: warmed up, alternating in one run, medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles

from torch import Tensor

from optpass.pipeline.target import Runner

RUNS, WARMUP = 20, 3
"""Timed calls of each engine, and those before them that are not."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one engine's call over ``runs`` timed calls."""

    label: str
    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True)
class Ratio:
    """The second engine's time over the first's, pair by pair: below 1 the second is faster."""

    median: float
    p10: float
    p90: float

    @property
    def certain(self) -> bool:
        """Whether the p10–p90 range of the pairs leaves out 1, that is, noise does not cover the difference."""
        return self.p10 > 1 or self.p90 < 1


@dataclass(frozen=True)
class Comparison:
    """Two engines measured in turn, A B A B …, so that a machine that slows down slows both."""

    before: Latency
    after: Latency
    ratio: Ratio

    def as_dict(self) -> dict[str, object]:
        certain = self.ratio.certain
        return {
            "unit": "ms",
            "before": asdict(self.before),
            "after": asdict(self.after),
            "ratio": {**asdict(self.ratio), "certain": certain},
            "note": "" if certain else "the difference lies within the noise of this machine",
        }


def compare_latency(
    before: tuple[str, Runner],
    after: tuple[str, Runner],
    calls: Sequence[Mapping[str, Tensor]],
    *,
    runs: int = RUNS,
    warmup: int = WARMUP,
    progress: Callable[[float], None] = lambda _: None,
) -> Comparison:
    """Time two labelled engines on the same ``calls``, ``runs`` alternating pairs after ``warmup`` pairs.

    Of several calls in a row (a walk through a schedule), the times are those of a call in the mean.
    """
    pairs: list[tuple[float, float]] = []
    for index in range(warmup + runs):
        pair = (_milliseconds(before[1], calls), _milliseconds(after[1], calls))
        if index >= warmup:
            pairs.append(pair)
        progress((index + 1) / (warmup + runs))
    low, middle, high = _spread([b / a for a, b in pairs])
    return Comparison(
        _latency(before[0], [a for a, _ in pairs]),
        _latency(after[0], [b for _, b in pairs]),
        Ratio(middle, low, high),
    )


def _latency(label: str, times: list[float]) -> Latency:
    low, middle, high = _spread(times)
    return Latency(label, middle, low, high, len(times))


def _milliseconds(runner: Runner, calls: Sequence[Mapping[str, Tensor]]) -> float:
    start = time.perf_counter()
    for inputs in calls:
        runner(inputs)
    return (time.perf_counter() - start) * 1e3 / len(calls)


def _spread(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[0], median(values), tenths[-1]
