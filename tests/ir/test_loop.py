"""Loops as records, and what makes one illegal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loops import cached, denoiser

from optpass.errors import DialectError, UserError
from optpass.ir.dialect import verify
from optpass.ir.loop import Adaptive, Cycle, Listed, Loop, State, every, schedule_from_json, single_step
from optpass.ir.program import Program
from optpass.ir.signature import Signature
from optpass.ir.text import program_text

BOTH = ("full", "reuse")


@pytest.mark.parametrize(
    "schedule",
    [
        every(3, BOTH),
        Cycle(("full", "reuse"), within=(100.0, 800.0)),
        Listed((0, 2, 3), of=9),
        Adaptive("threshold", {"threshold": 0.1}),
        Adaptive("rate-codebook", {"codebook": {"0.1": 3, "1.0": 1}}, of=30),
    ],
)
def test_a_schedule_reads_as_it_was_written(schedule):
    assert schedule_from_json(schedule.as_json(), BOTH) == schedule


def test_a_cycle_of_several_variants_is_written_out():
    cycle = Cycle(("full", "a", "b", "a"))
    assert cycle.as_json() == {"cycle": ["full", "a", "b", "a"]}
    assert schedule_from_json(cycle.as_json(), ("full", "a", "b")) == cycle
    assert every(2, BOTH).as_json() == {"every": 2}


def test_a_loop_reads_as_it_was_written():
    program, _ = cached()
    assert program.loop is not None
    assert Loop.from_json(program.loop.as_json()) == program.loop


def test_what_a_denoiser_is():
    assert single_step("full", Signature.flat(["hidden_states", "timestep"], ["output"])) is not None
    assert single_step("full", Signature.flat(["pixel_values"], ["logits"])) is None


def test_conditioning_is_everything_else():
    loop = denoiser()[0].loop
    assert loop is not None
    assert loop.conditioning == ("context",)
    assert loop.stateless


def test_the_text_tells_the_loop_once_there_is_one():
    text = program_text(cached()[0])
    assert "loop every=2:\n  full: full\n  reuse: reuse\n  state deep: f32[2, 4] (written)" in text
    assert "reuse(sample: f32[2, 4], timestep: f32[], past.deep: f32[2, 4]):" in text
    assert "loop" not in program_text(denoiser()[0])


@pytest.mark.parametrize("within", [[], [1], [1, 2, 3], 5, ["low", "high"]])
def test_a_damaged_span_is_no_schedule(within):
    with pytest.raises((TypeError, ValueError)):
        schedule_from_json({"every": 2, "within": within}, BOTH)


@pytest.mark.parametrize("period", [-1, 0, 10**9, 10**30])
def test_a_period_that_no_sampler_has_is_refused(period):
    """Before it is written out step by step."""
    with pytest.raises(UserError, match=f"every: {period} is no number of steps"):
        every(period, BOTH)


def test_the_split_is_legal():
    verify(cached()[0])


def edited(**changes: object) -> Program:
    program, _ = cached()
    assert program.loop is not None
    return replace(program, loop=replace(program.loop, **changes))  # type: ignore[arg-type]


def deep(**changes: object) -> dict[str, State]:
    state = State("deep", (2, 4), torch.float32)
    return {"deep": replace(state, **changes)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (edited(variants={"full": ("full",)}, schedule=Cycle(("full",))), "never runs the entry 'reuse'"),
        (edited(variants={"full": ("full",), "reuse": ("other",)}), "the entry 'other', which is not there"),
        (edited(schedule=Cycle(("full",))), "never comes to the variant 'reuse'"),
        (edited(schedule=Cycle(("full", "again"))), "the variant 'again', which is not there"),
        (edited(schedule=Cycle(("reuse", "full"))), "has to be 'full'"),
        (edited(schedule=Cycle(("full", "reuse"), within=(9.0, 1.0))), "is empty"),
        (edited(schedule=Listed((1, 2), of=4)), r"computes the steps \[1, 2\] of 4"),
        (edited(schedule=Listed((0, 4), of=4)), r"computes the steps \[0, 4\] of 4"),
        (edited(schedule=Listed((0, 1), of=2)), "never comes to the variant 'reuse'"),
        (edited(states={}), "past.deep.*no input of the call, no state"),
        (edited(states=deep(shape=(2, 5))), r"full writes present.deep: f32\[2, 4\].*the state is deep: f32\[2, 5\]"),
        (edited(states=deep(dtype=torch.float16)), "the state is deep: f16"),
        (edited(states={**deep(), "idle": State("idle", (1,), torch.float32)}), "the state 'idle' is never read"),
        (
            edited(variants={"reuse": ("reuse",), "full": ("full",)}, schedule=Cycle(("reuse", "full"))),
            "reuse reads the state 'deep' before anything has written it",
        ),
        (edited(once=("reuse",)), "reuse runs once a generation and takes sample"),
        (edited(tables=("reuse",)), "reuse runs once for each timestep and takes sample"),
        (edited(sample="latents"), "the sample is 'latents', which is no input of the call"),
        (edited(timestep="time"), "the timestep is 'time', which is no input of the call"),
        (edited(variants={"full": ("full",), "reuse": ("full", "reuse")}), "gives the output 'output' 2 times"),
    ],
)
def test_what_is_not_legal(program, message):
    with pytest.raises(DialectError, match=message):
        verify(program)


def test_two_batches_in_one_loop_are_not_legal():
    program, _ = cached()
    other, _ = cached(batch=3)
    mixed = replace(program, entries={"full": program.entries["full"], "reuse": other.entries["reuse"]})
    with pytest.raises(DialectError, match=r"full takes sample: f32\[2, 4\] and reuse sample: f32\[3, 4\]"):
        verify(mixed)


def test_an_input_of_the_call_that_nothing_takes_is_not_legal():
    program, _ = cached()
    alone = {"full": ("reuse",)}
    states = deep(initial="zeros")
    assert program.loop is not None
    loop = replace(program.loop, variants=alone, schedule=Cycle(("full",)), states=states)
    with pytest.raises(DialectError, match="no entry takes the call's input 'context'"):
        verify(replace(program, entries={"reuse": program.entries["reuse"]}, loop=loop))
