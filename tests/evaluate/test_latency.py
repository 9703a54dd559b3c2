"""When a difference of times is called one."""

from __future__ import annotations

import math
import random

import pytest

from optpass.evaluate.latency import Ratio, compare_latency, median_interval


def test_the_interval_lies_between_the_ranks_of_the_sign_test():
    """At 20 values, P(heads ≤ 3 of 20) = 0.0013 and P(heads ≤ 4) = 0.0059: the fourth from each end, at 99 %."""
    values = [float(value) for value in range(1, 21)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == (4.0, 17.0)
    assert median_interval(values, confidence=0.95) == (6.0, 15.0)


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_few_pairs_tell_nothing(count):
    assert median_interval([0.5] * count) == (0.0, math.inf)
    ratio = Ratio.of([1.0] * count, [0.5] * count)
    assert not ratio.certain
    assert "low" not in ratio.as_dict()


def test_eight_pairs_tell_the_most_obvious():
    assert Ratio.of([1.0] * 8, [0.5] * 8).certain


def test_equal_engines_are_hardly_ever_told_apart():
    """Of 1,000 pairs of equal engines under heavy-tailed noise, at most 2 % are called different."""
    noise = random.Random(1)

    def times() -> list[float]:
        return [1.0 + noise.paretovariate(2) for _ in range(20)]

    assert sum(Ratio.of(times(), times()).certain for _ in range(1000)) <= 20


def test_a_tenth_is_seen_through_noise():
    noise = random.Random(2)
    before = [10 + noise.gauss(0, 0.4) for _ in range(20)]
    after = [9 + noise.gauss(0, 0.4) for _ in range(20)]
    ratio = Ratio.of(before, after)
    assert ratio.certain
    assert ratio.low < 0.9 < ratio.high


def test_what_is_too_small_is_none():
    """Though every pair agrees: two processes of one program differ by as much."""
    assert not Ratio.of([1.0] * 20, [0.995] * 20).certain
    assert Ratio.of([1.0] * 20, [0.98] * 20).certain


def test_pairs_alternate_and_warm_up():
    order: list[str] = []

    def runner(name):
        return lambda tensors: order.append(name) or {}

    found = compare_latency(("a", runner("a")), ("b", runner("b")), [{}], after_calls=[{}, {}], runs=2, warmup=1)
    assert "".join(order) == "abb" * 3
    assert (found.before.runs, found.after.runs) == (2, 2)
