"""Bundles side by side: latency, throughput and memory, in alternating turns, one process each.

Contestants take turns, A B C A B C …, and only one of them computes at a time. A turn is a few calls in a row, of
which the first warms what the others left cold. Two contestants are compared turn by turn
(:class:`~optpass.evaluate.latency.Ratio`), so that what slows the machine for a while slows both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from optpass.errors import OptpassError, UserError
from optpass.evaluate.bench_machine import Moment, machine_state
from optpass.evaluate.bench_process import Contestant, Process
from optpass.evaluate.latency import NOISE, RUNS, WARMUP, Latency, Ratio
from optpass.pipeline.progress import DETAIL, Progress

TURN = 100.0
"""Milliseconds of calls in a turn, at least."""
MOST = 100
"""Calls in a turn, at most."""
PATIENCE = 10.0
"""Seconds of calls that warm a contestant, at most: whole generations need no three."""
DRIFT = 0.1
"""By how much a contestant's second half may differ from its first before it is told."""
OTHERS = 0.1
"""Cores that other processes may keep busy before it is told."""
SCHEMA = 1


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``runs`` turns of each, or as many as ``seconds`` (of all contestants together) allow.

    ``warmup`` are calls before the first turn; ``threads`` are those of every contestant (``None``: its own).
    """

    runs: int = RUNS
    warmup: int = WARMUP
    seconds: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Row:
    """One contestant: milliseconds of its calls, items a second, memory in bytes.

    ``memory`` is the resident peak beyond what the process held before its engine came, ``None`` where the system
    keeps no count; ``device_memory`` that of a device of its own. ``drift`` is the median of the second half of the
    turns over that of the first. ``ratio`` is the time over the first contestant's, ``None`` for that one.
    """

    latency: Latency
    throughput: float
    memory: int | None
    device_memory: int | None
    drift: float
    ratio: Ratio | None
    fastest: bool
    facts: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.latency),
            "throughput": self.throughput,
            "memory": self.memory,
            "device_memory": self.device_memory,
            "drift": self.drift,
            "ratio": self.ratio.as_dict() if self.ratio else None,
            "note": NOISE if self.ratio and not self.ratio.certain else "",
            "fastest": self.fastest,
            "facts": dict(self.facts),
        }


@dataclass(frozen=True)
class Bench:
    """What was found. ``fastest`` rows are those that noise does not tell from the one with the least median.

    ``left_out`` are contestants that could not be loaded, each with the reason.
    """

    rows: tuple[Row, ...]
    effort: Effort
    machine: Mapping[str, Any]
    notes: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA,
            "unit": "ms",
            "effort": asdict(self.effort),
            "contestants": [row.as_json() for row in self.rows],
            "machine": dict(self.machine),
            "notes": list(self.notes),
            "left_out": dict(self.left_out),
        }


@dataclass
class _Entrant:
    """A contestant's process, and what was measured of it: calls, and the median of each turn."""

    process: Process
    calls: int = 1
    times: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)

    def turn(self) -> None:
        found = self.process.time(self.calls, untimed=1 if self.calls > 1 else 0)
        self.times += found
        self.turns.append(median(found))


def bench(
    contestants: Sequence[Contestant],
    effort: Effort = Effort(),
    *,
    progress: Progress = lambda stage, fraction: None,
    leave_out: bool = False,
) -> Bench:
    """Measure ``contestants`` in turn; ``leave_out`` those that cannot be loaded, where others can.

    Raises:
        UserError: one cannot be loaded, or two take or return different tensors.
        OptpassError: one failed.
    """
    before = Moment.now()
    with ExitStack() as stack:
        entrants, left_out = _loaded(contestants, effort, stack, progress, leave_out)
        _check_interfaces([entrant.process for entrant in entrants])
        began = time.process_time()
        for entrant in entrants:
            _warm(entrant, effort.warmup)
        _take_turns(entrants, effort, progress)
        memory = [entrant.process.memory() for entrant in entrants]
        own = time.process_time() - began + sum(found["cpu_seconds"] for found in memory)
    rows = _rows(entrants, memory)
    machine = machine_state(before, Moment.now(), own)
    return Bench(rows, effort, machine, tuple(_notes(rows, machine)), left_out)


def _loaded(
    contestants: Sequence[Contestant], effort: Effort, stack: ExitStack, progress: Progress, leave_out: bool
) -> tuple[list[_Entrant], dict[str, str]]:
    """Those that are loaded, and why others are not."""
    entrants: list[_Entrant] = []
    left_out: dict[str, str] = {}
    for index, contestant in enumerate(contestants):
        progress(f"load{DETAIL}{contestant.label}", index / len(contestants))
        process = stack.enter_context(Process(contestant, effort.threads))
        try:
            process.load()
        except OptpassError as error:
            if not leave_out or len(left_out) + 1 == len(contestants):
                raise
            left_out[contestant.label] = str(error)
        else:
            entrants.append(_Entrant(process))
    progress("load", 1.0)
    return entrants, left_out


def _check_interfaces(processes: Sequence[Process]) -> None:
    first, *others = [process for process in processes if process.interface] or processes[:1]
    for other in others:
        if other.interface != first.interface:
            sides = "\n".join(
                f"  {process.contestant.label}: {', '.join(process.interface.values()) or 'nothing'}"
                for process in (first, other)
            )
            raise UserError(f"{first.contestant.label} and {other.contestant.label} have different tensors:\n{sides}")


def _warm(entrant: _Entrant, calls: int) -> None:
    """Call it before anything counts, for :data:`PATIENCE` at most, and see from that how many calls make a turn."""
    began = time.monotonic()
    taken = math.inf
    for _ in range(max(calls, 1)):
        last = time.monotonic()
        entrant.process.time(1)
        taken = 1e3 * (time.monotonic() - last)
        if time.monotonic() - began > PATIENCE:
            break
    entrant.calls = min(MOST, max(1, math.ceil(TURN / taken)))


def _take_turns(entrants: Sequence[_Entrant], effort: Effort, progress: Progress) -> None:
    began = time.monotonic()
    done = 0.0
    while done < 1.0:
        for entrant in entrants:
            entrant.turn()
        turns = len(entrants[0].turns)
        done = turns / effort.runs
        if effort.seconds is not None:
            done = (time.monotonic() - began) / effort.seconds
        progress("measure", min(done, 1.0))


def _rows(entrants: Sequence[_Entrant], memory: Sequence[Mapping[str, Any]]) -> tuple[Row, ...]:
    best = min(entrants, key=lambda entrant: median(entrant.turns))
    first = entrants[0]
    rows = []
    for entrant, found in zip(entrants, memory, strict=True):
        latency = Latency.of(entrant.process.contestant.label, entrant.times)
        half = len(entrant.turns) // 2
        rows.append(
            Row(
                latency,
                throughput=entrant.process.items * 1e3 / latency.median,
                memory=max(0, found["peak"] - found["process"]) if found["peak"] else None,
                device_memory=found["device"],
                drift=median(entrant.turns[half:]) / median(entrant.turns[:half]) if half else 1.0,
                ratio=None if entrant is first else Ratio.of(first.turns, entrant.turns),
                fastest=entrant is best or not Ratio.of(best.turns, entrant.turns).certain,
                facts=entrant.process.facts,
            )
        )
    return tuple(rows)


def _notes(rows: Sequence[Row], machine: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures has to know of how they came about."""
    notes = []
    if machine["others"] is not None and machine["others"] > OTHERS:
        notes.append(f"other processes kept {machine['others']:.1f} of {machine['cores']} cores busy meanwhile")
    for row in rows:
        if abs(row.drift - 1) > DRIFT:
            change = f"{abs(row.drift - 1):.0%} {'slower' if row.drift > 1 else 'faster'}"
            notes.append(f"{row.latency.label} was {change} in the second half than in the first")
    counts = {row.facts.get("threads") for row in rows}
    if len(counts) > 1:
        listed = ", ".join(f"{row.latency.label} {row.facts.get('threads')}" for row in rows)
        notes.append(f"threads differ: {listed}; --threads makes them equal")
    return notes
