"""Policies decide by what was measured; the counts are those that follow from the released scheduler of AdaCache."""

from __future__ import annotations

import math

import pytest

from optpass.errors import UserError
from optpass.ir.loop import CHANGE, MOTION
from optpass.pipeline.registry import policy_class
from optpass.runtime.policies import RateCodebook, Threshold
from optpass.runtime.policy import Moment, Policy

FAST = {0.08: 6, 0.16: 5, 0.24: 4, 0.32: 3, 0.40: 2, 1: 1}


def computed(policy: Policy, steps: int, metrics: dict[str, float] | list[dict[str, float]]) -> list[int]:
    """The computed steps, from 1 as the paper counts, where the metrics are always the same, or those of each step."""
    told = {step: metrics if isinstance(metrics, dict) else metrics[step] for step in range(steps)}
    found = [0]
    for step in range(1, steps):
        known = {index: told[index] for index in found}
        if policy.computes(Moment(step, steps, tuple(found), known, told[step])):
            found.append(step)
    return [step + 1 for step in found]


@pytest.mark.parametrize(
    ("steps", "rate", "count"),
    [
        *[(30, 6, 8), (30, 5, 9), (30, 4, 10), (30, 3, 12), (30, 2, 17), (30, 1, 30)],
        *[(100, 12, 12), (100, 10, 13), (100, 8, 16), (100, 6, 20), (100, 4, 28), (100, 3, 36)],
    ],
)
def test_constant_rates_compute_as_many_steps_as_the_papers_table_follows_from(steps, rate, count):
    found = computed(RateCodebook(codebook={1.0: rate}), steps, {CHANGE: 0.1})
    assert len(found) == count
    assert found[:2] == [1, 2]
    assert found[-2:] == [steps - 1, steps]


def test_the_steps_of_rate_six():
    assert computed(RateCodebook(codebook={1.0: 6}), 30, {CHANGE: 0.1}) == [1, 2, 8, 14, 20, 26, 29, 30]


def rate_of(change: float, distance: int = 1, **options: object) -> int:
    policy = RateCodebook(codebook=FAST, **options)  # type: ignore[arg-type]
    last = 10
    metrics = {last - distance: {CHANGE: 0.0, MOTION: 0.385}, last: {CHANGE: change, MOTION: 0.385}}
    return policy.rate(Moment(last + 1, 30, (0, last - distance, last), metrics))


def test_the_first_larger_bound_gives_the_rate():
    assert [rate_of(change) for change in (0.0, 0.0799, 0.08, 0.2, 0.399, 0.4, 0.9, 5.0)] == [6, 6, 5, 4, 2, 1, 1, 1]


def test_the_change_is_by_step():
    assert rate_of(0.3, distance=1) == 3
    assert rate_of(0.3, distance=4) == 6


def test_what_is_no_number_gets_the_last_rate():
    assert rate_of(math.nan) == 1
    assert rate_of(math.inf) == 1


def test_motion_scales_the_change():
    """Motion of the scale itself counts 1; a still clip counts nothing, and its change of motion ten times."""
    policy = RateCodebook(codebook=FAST, motion=True, motion_steps=(2, 29))

    def rate(before: float, now: float) -> int:
        metrics = {4: {CHANGE: 0.0, MOTION: before}, 5: {CHANGE: 0.1, MOTION: now}}
        return policy.rate(Moment(6, 30, (0, 4, 5), metrics))

    assert rate(0.385, 0.385) == rate_of(0.1) == 5
    assert rate(0.1, 0.1) == 6
    # (0.42 / 0.385)^8 = 2.006, and ten times its distance from 1.
    assert rate(0.385, 0.42) == 1
    assert rate_of(0.1, motion=True, motion_steps=(20, 25)) == 5


@pytest.mark.parametrize("book", [{}, {0.1: 0}, {-1.0: 2}, {math.nan: 2}])
def test_what_is_no_codebook(book):
    with pytest.raises(UserError, match="codebook"):
        RateCodebook.from_options({"codebook": book}, owner="policy")


def test_json_keys_are_numbers_again():
    policy = RateCodebook.from_options({"codebook": {"1": 1, "0.08": 6}}, owner="policy")
    assert list(policy.codebook.items()) == [(0.08, 6), (1.0, 1)]


def test_a_threshold():
    changes = [0.0, 0.05, 0.2, 0.05, 0.05, 0.05, math.nan, 0.1]
    told = [{CHANGE: change} for change in changes]
    assert computed(Threshold(threshold=0.1), 8, told) == [1, 3, 7, 8]
    assert computed(Threshold(threshold=0.1, warmup=2), 8, told) == [1, 2, 3, 7, 8]
    assert computed(Threshold(threshold=0.1, max_reuse=2), 8, told) == [1, 3, 6, 7, 8]
    assert computed(Threshold(threshold=9.0, cooldown=3), 8, [{CHANGE: 0.0}] * 8) == [1, 6, 7, 8]
    assert computed(Threshold(threshold=0.0), 8, [{CHANGE: 0.0}] * 8) == list(range(1, 9))


def test_policies_have_names():
    assert policy_class("threshold") is Threshold
    with pytest.raises(UserError, match="did you mean 'rate-codebook'"):
        policy_class("rate-codebok")
