"""Calibration sets: what every entry of a Program is called with, while its pipeline, a dataset or chance drives it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.evaluate.difference import program_calls, program_runners
from optpass.evaluate.given_data import bound, given_items
from optpass.evaluate.trials import random_inputs
from optpass.evaluate.walks import period, walk
from optpass.ir.hashing import tensor_digest
from optpass.ir.interface import Interface
from optpass.ir.program import Program
from optpass.pipeline.target import Runner
from optpass.runtime.folder import build_pipeline
from optpass.runtime.loop import call_runners
from optpass.runtime.looped import engine_module
from optpass.runtime.sampling import Asked, drive

Call = Mapping[str, Tensor]


@dataclass(frozen=True)
class CalibrationSet:
    """What each entry was called with, by name, at most so many calls evenly spaced; where that came from."""

    entries: Mapping[str, Sequence[Call]]
    source: str

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all tensors, in order."""
        found = hashlib.sha256()
        for name, calls in sorted(self.entries.items()):
            for call in calls:
                for key in sorted(call):
                    found.update(f"{name}/{key}/{tensor_digest(call[key])};".encode())
        return found.hexdigest()

    def split(self, count: int) -> tuple[CalibrationSet, CalibrationSet]:
        """Without ``count`` calls of each entry, evenly spaced; those alone. An entry's only call is in both."""
        kept, held = {}, {}
        for name, calls in self.entries.items():
            number = min(count, len(calls) - 1)
            apart = {round((index + 0.5) * len(calls) / number - 0.5) for index in range(number)}
            held[name] = [call for index, call in enumerate(calls) if index in apart] or list(calls)
            kept[name] = [call for index, call in enumerate(calls) if index not in apart]
        return CalibrationSet(kept, self.source), CalibrationSet(held, self.source)


@dataclass
class _Thinned:
    """Items of a stream of unknown length, evenly spaced: of twice as many as asked for, every other goes."""

    count: int
    kept: list[dict[str, Tensor]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, call: Call) -> None:
        if self._seen % self._stride == 0:
            # A pipeline may write into what it gave.
            self.kept.append({name: value.detach().clone() for name, value in call.items()})
        self._seen += 1
        if len(self.kept) == 2 * self.count:
            self.kept = self.kept[::2]
            self._stride *= 2

    def calls(self) -> list[dict[str, Tensor]]:
        places = torch.linspace(0, len(self.kept) - 1, min(self.count, len(self.kept))).round().int().tolist()
        return [self.kept[place] for place in places]


class _Watched:
    """A Program's entries, executed by PyTorch, with note of what they are called with."""

    def __init__(self, program: Program, count: int) -> None:
        self._seen = {name: _Thinned(count) for name in program.entries}
        self.runners = {name: self._noting(name, runner) for name, runner in program_runners(program).items()}

    def _noting(self, name: str, runner: Runner) -> Runner:
        def run(tensors: Call) -> dict[str, Tensor]:
            self._seen[name].add(tensors)
            return runner(tensors)

        return run

    def found(self, source: str) -> CalibrationSet:
        """
        Raises:
            UserError: an entry was never called.
        """
        entries = {name: seen.calls() for name, seen in self._seen.items()}
        if idle := [name for name, calls in entries.items() if not calls]:
            raise UserError(f"calibration never ran the entry {idle[0]!r}: give more samples or more steps")
        return CalibrationSet(entries, source)


def sampled_set(program: Program, folder: Path, asked: Asked, *, count: int, samples: int, seed: int) -> CalibrationSet:
    """What the pipeline in ``folder`` calls every entry with, over all timesteps, while it generates ``samples``.

    Raises:
        UserError: the pipeline's call needs something that ``asked`` has not.
    """
    watched = _Watched(program, count)
    pipeline = build_pipeline(folder, {program.origin.component: engine_module(program, watched.runners)})
    drive(pipeline, samples=samples, asked=asked, seed=seed)
    return watched.found(f"{samples} samples of the pipeline in {asked.steps} steps")


def random_set(program: Program, *, count: int, seed: int) -> CalibrationSet:
    """Random calls in the ranges of the inputs; of a loop, walks through its schedule."""
    watched = _Watched(program, count)
    for name, call in program_calls(program).items():
        run = call_runners(program, watched.runners)[name]
        for inputs in islice(_random_calls(program, call, seed), count):
            run(inputs)
    return watched.found("random inputs")


def given_set(program: Program, data: str, *, count: int) -> CalibrationSet:
    """Calls from ``data``, as :func:`~optpass.evaluate.given_data.given_items` has it.

    Raises:
        UserError: there is no such data, or it does not fit the model's inputs.
    """
    calls = program_calls(program)
    if len(calls) > 1:
        raise UserError("the model has several calls, and a dataset is of one: calibrate components one by one")
    ((name, call),) = calls.items()
    watched = _Watched(program, count)
    run = call_runners(program, watched.runners)[name]
    index = -1
    for index, item in enumerate(islice(given_items(data, program, call), count)):
        run(bound(item, call, f"{data}, item {index}"))
    if index < 0:
        raise UserError(f"data: {data} has no item")
    return watched.found(data)


def _random_calls(program: Program, call: Interface, seed: int) -> Iterator[Call]:
    loop, index = program.loop, 0
    while True:
        if loop is None or loop.stateless:
            yield random_inputs(call.inputs_at(), program.ranges, seed + index)
        else:
            yield from walk(loop, call.inputs_at(), program.ranges, seed + index, period(loop))
        index += 1
