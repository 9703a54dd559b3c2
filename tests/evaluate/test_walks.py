"""Walks: calls in a row as a sampler makes them, for schedules of every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from optpass.evaluate.walks import UNCOUNTED, timed_calls
from optpass.ir.graph import TensorSpec
from optpass.ir.interface import Interface
from optpass.ir.loop import Adaptive, Cycle, Listed, State, every, single_step
from optpass.ir.signature import Signature

SIGNATURE = Signature.flat(["sample", "timestep", "context"], ["output"])
SPECS = [
    TensorSpec(name, shape, torch.float32) for name, shape in (("sample", (2, 3)), ("timestep", ()), ("context", (4,)))
]
CALL = Interface(tuple(SPECS), (TensorSpec("output", (2, 3), torch.float32),))
CACHED = replace(
    single_step("full", SIGNATURE),
    variants={"full": ("full",), "reuse": ("reuse",)},
    schedule=every(3, ("full", "reuse")),
    states={"kept": State("kept", (2, 3), torch.float32)},
)
ONCE = replace(CACHED, once=("prepare",))


@pytest.mark.parametrize(
    ("loop", "calls"),
    [
        (None, 1),
        (single_step("full", SIGNATURE), 1),
        (CACHED, 3),
        # What runs once a generation would be in every call of a short walk: whole periods, eight calls at least.
        (ONCE, 9),
        (replace(ONCE, schedule=Cycle(("full",))), UNCOUNTED),
        (replace(ONCE, schedule=Listed((0, 2), 5)), 5),
        (replace(ONCE, schedule=Adaptive("threshold", {}, 6)), 6),
    ],
)
def test_what_is_timed(loop, calls):
    made = timed_calls(CALL, {}, 0, loop=loop)
    assert len(made) == calls
    times = [float(call["timestep"]) for call in made]
    assert times == sorted(times, reverse=True)
    assert all(torch.equal(call["context"], made[0]["context"]) for call in made)
