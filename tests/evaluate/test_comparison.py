"""What two bundles are compared on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from loops import cached, denoiser

from optpass.evaluate.comparison import _trials
from optpass.evaluate.difference import runners_difference
from optpass.evaluate.walks import timed_calls
from optpass.ir.interface import call_interface
from optpass.ir.loop import Adaptive, Listed, Schedule, every
from optpass.runtime.looped import program_module

BOTH = ("full", "reuse")


@pytest.mark.parametrize("other", [None, every(3, BOTH), Listed((0, 2, 5), of=7)])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_list_of_steps_compares_with_any_other_schedule(other: Schedule | None, swapped: bool) -> None:
    """The walk is no longer than the shortest schedule that is of so many steps."""
    program = cached(Listed((0, 2), of=4))[0]
    sides = [program_module(program), program_module(cached(other)[0] if other else denoiser()[0])]
    before, after = reversed(sides) if swapped else sides
    trials, calls = _trials(before, after, program.ranges, 0)
    assert len(calls) == 4
    runners_difference(before.runner, after.runner, trials)
    for _ in range(2):
        runners_difference(before.runner, after.runner, calls)


def test_a_counted_policy_is_timed_over_the_steps_that_it_counts() -> None:
    program = cached(Adaptive("rate-codebook", {"codebook": {"1.0": 1}}, of=3))[0]
    assert program.loop is not None
    loop = replace(program.loop, once=("prepare",))
    assert len(timed_calls(call_interface(program.loop, program.interfaces), program.ranges, 0, loop=loop)) == 3
