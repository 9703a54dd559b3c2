"""What is wrong with a loop: checked after every pass, before lowering, and when a manifest is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from optpass.ir.graph import TensorSpec
from optpass.ir.interface import Interface
from optpass.ir.loop import CLOCK, ELAPSED, INTERVALS, METRIC, PAST, PRESENT, Adaptive, Cycle, Listed, Loop

CLOCKS = (ELAPSED, INTERVALS)


def loop_problems(loop: Loop, entries: Mapping[str, Interface]) -> list[str]:
    """Everything that forbids ``loop`` over ``entries``; empty when nothing does.

    Entries that are missing or never run; a schedule of unknown variants, of one that it never comes to, or whose
    first step does not compute; ports without a meaning; a state that is read before it is written, or never, or in
    another shape or dtype than it was written in; a sample or a timestep that is no input of the call; an input of
    the call in two shapes (two batches), or one that nothing reads; an output of the call that a step does not
    produce, or produces twice.
    """
    problems = [*_entry_problems(loop, entries), *_schedule_problems(loop)]
    if problems:
        # What follows looks entries and variants up by name.
        return problems
    return [*_port_problems(loop, entries), *_call_problems(loop, entries), *_flow_problems(loop, entries)]


def _entry_problems(loop: Loop, entries: Collection[str]) -> Iterator[str]:
    for name in loop.entries:
        if name not in entries:
            yield f"the loop runs the entry {name!r}, which is not there"
    for name in entries:
        if name not in loop.entries:
            yield f"the loop never runs the entry {name!r}"


def _schedule_problems(loop: Loop) -> Iterator[str]:
    if loop.sampling and min(loop.sampling.steps, loop.sampling.guidance) < 1:
        yield f"a sample takes {loop.sampling.steps} steps of {loop.sampling.guidance} evaluations, which is none"
    match loop.schedule:
        case Cycle(variants, within):
            if not variants or variants[0] != loop.computed:
                yield f"the schedule's first step is {variants[:1]}, and has to be {loop.computed!r}, which computes"
            for name in dict.fromkeys(variants):
                if name not in loop.variants:
                    yield f"the schedule names the variant {name!r}, which is not there"
            idle = set(loop.variants) - set(variants)
            if within is not None and not within[0] <= within[1]:
                yield f"the schedule holds within {within[0]:g} … {within[1]:g}, which is empty"
        case Listed(computed, of):
            if not loop.schedule.in_order:
                yield f"the schedule computes the steps {list(computed)} of {of}: it takes 0 and later ones, in order"
            idle = set(loop.variants) - {loop.computed, loop.reused if len(computed) < of else loop.computed}
        case Adaptive():
            idle = set(loop.variants) - {loop.computed, loop.reused}
    for name in sorted(idle):
        yield f"the schedule never comes to the variant {name!r}"


def _port_problems(loop: Loop, entries: Mapping[str, Interface]) -> Iterator[str]:
    known = set(loop.signature.inputs)
    for name, entry in entries.items():
        for spec in entry.inputs:
            kind, state = _port(spec.name, PAST)
            if spec.name in known or (spec.name.startswith(CLOCK) and spec.name.removeprefix(CLOCK) in CLOCKS):
                continue
            if not kind or state not in loop.states:
                yield f"{name} takes {spec}, which is no input of the call, no state and no clock"
            elif _drifts(loop, state, spec):
                yield f"{name} reads {spec}, and the state is {_state_text(loop, state)}"
        for spec in entry.outputs:
            kind, state = _port(spec.name, PRESENT)
            if spec.name in loop.signature.outputs or spec.name.startswith(METRIC):
                continue
            if not kind or state not in loop.states:
                yield f"{name} gives {spec}, which is no output of the call, no state and no metric"
            elif _drifts(loop, state, spec):
                yield f"{name} writes {spec}, and the state is {_state_text(loop, state)}"
    read = {state for entry in entries.values() for state in entry.reads}
    for state in loop.states:
        if state not in read:
            yield f"the state {state!r} is never read"


def _port(name: str, prefix: str) -> tuple[bool, str]:
    return name.startswith(prefix), name.removeprefix(prefix)


def _drifts(loop: Loop, state: str, spec: TensorSpec) -> bool:
    return (spec.shape, spec.dtype) != (loop.states[state].shape, loop.states[state].dtype)


def _state_text(loop: Loop, state: str) -> str:
    found = loop.states[state]
    return str(TensorSpec(state, found.shape, found.dtype))


def _call_problems(loop: Loop, entries: Mapping[str, Interface]) -> Iterator[str]:
    first: dict[str, tuple[str, TensorSpec]] = {}
    for name, entry in entries.items():
        for spec in entry.inputs:
            if spec.name not in loop.signature.inputs:
                continue
            other, found = first.setdefault(spec.name, (name, spec))
            if found != spec:
                yield f"{other} takes {found} and {name} {spec}: one call, with one batch, serves both"
    for role, name in (("sample", loop.sample), ("timestep", loop.timestep)):
        if name not in loop.signature.inputs:
            yield f"the {role} is {name!r}, which is no input of the call"
    for name in loop.signature.inputs:
        if name not in first:
            yield f"no entry takes the call's input {name!r}"


def _flow_problems(loop: Loop, entries: Mapping[str, Interface]) -> Iterator[str]:
    written = {name for name, state in loop.states.items() if state.initial == "zeros"}
    for name in loop.once:
        for spec in entries[name].inputs:
            if spec.name in (loop.sample, loop.timestep):
                yield f"{name} runs once a generation and takes {spec.name}, which is of a step"
        yield from _unwritten(name, entries[name], written)
        written |= set(entries[name].writes)
    for name in loop.tables:
        for spec in entries[name].inputs:
            if spec.name == loop.sample:
                yield f"{name} runs once for each timestep and takes {spec.name}, which is another in each generation"
        yield from _unwritten(name, entries[name], written)
    written |= {state for name in loop.tables for state in entries[name].writes}
    for variant, chain in loop.variants.items():
        # The computed variant comes first, and makes the first step; what it wrote stays.
        available = written if variant == loop.computed else set(written)
        made: list[str] = []
        for name in chain:
            yield from _unwritten(name, entries[name], available)
            available |= set(entries[name].writes)
            made += [spec.name for spec in entries[name].outputs if spec.name in loop.signature.outputs]
        for output in loop.signature.outputs:
            if made.count(output) != 1:
                yield f"a step by {variant} gives the output {output!r} {made.count(output)} times"


def _unwritten(name: str, entry: Interface, written: Collection[str]) -> Iterator[str]:
    for state in entry.reads:
        if state not in written:
            yield f"{name} reads the state {state!r} before anything has written it"
