"""What a student is taught with: courses of calls in a row, each course made from its number and the seed alone."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from optpass.errors import UserError
from optpass.evaluate.given_data import bound
from optpass.evaluate.trials import random_inputs
from optpass.evaluate.walks import compared_calls, walk
from optpass.ir.hashing import file_digest, tensor_digest, text_digest
from optpass.ir.interface import Interface
from optpass.ir.program import InputRange, Program
from optpass.pipeline.target import Runner
from optpass.quiet import first_lines
from optpass.training.asking import STRIDE, Asking
from optpass.training.networks import Network
from optpass.training.watched import WatchedPipeline

LOOKED_AT = 64
"""Items of a dataset that its hash is taken of, evenly spaced, beside their number."""
MIXED = 4
"""Generations in a course whose steps hand nothing on. Their calls come in a random order: those of one are alike."""


@dataclass(frozen=True)
class Lesson:
    """One call: ``inputs`` by name; ``batch``, what the task's loss is told; the teacher's answer, if it is known."""

    inputs: Mapping[str, Tensor]
    batch: Mapping[str, Any]
    expected: Mapping[str, Tensor] | None = None


class Courses(ABC):
    """Courses by their number. ``source`` says in words where they come from, ``digest`` is a SHA-256 of that."""

    source: str
    digest: str

    @abstractmethod
    def course(self, index: int, student: Callable[[], Runner], teacher: Callable[[], Runner]) -> list[Lesson]:
        """The calls of a course, in order. ``student`` and ``teacher`` give what answers them, without gradients."""


class GivenCourses(Courses):
    """A dataset in a new order for each epoch, so many calls a course; rows become calls of the captured batch."""

    def __init__(self, items: Any, call: Interface, data: str, *, calls: int, seed: int) -> None:
        """
        Raises:
            UserError: the items have no number to be asked for by, there is none, or they do not fit.
        """
        if not isinstance(items, Sequence):
            raise UserError(f"data: {data} can only be gone through once: training takes items by number (len, [])")
        if not len(items):
            raise UserError(f"data: {data} has no item")
        self._items, self._call, self._data, self._calls, self._seed = items, call, data, calls, seed
        rows = _rows(call)
        # Items are all of one kind, and to look at one may take time.
        with seeded(seed):
            self._rows = rows if rows and not _is_batch(items[0], call, rows) else None
        self._order: tuple[int, Tensor] = -1, torch.empty(0)
        self.source, self.digest = data, self._digest()

    def course(self, index: int, student: Callable[[], Runner], teacher: Callable[[], Runner]) -> list[Lesson]:
        return [self._lesson(index * self._calls + number) for number in range(self._calls)]

    def _lesson(self, number: int) -> Lesson:
        if self._rows is None:
            return self._whole(self._place(number))
        rows = [self._row(self._place(number * self._rows + row)) for row in range(self._rows)]
        try:
            inputs = {name: torch.cat([row.inputs[name] for row in rows]) for name in rows[0].inputs}
            batch: Mapping[str, Any] = default_collate([dict(row.batch) for row in rows])
        except (RuntimeError, TypeError, KeyError) as error:
            raise UserError(f"data: items of {self._data} make no batch: {first_lines(error)}") from error
        return Lesson(inputs, {**batch, **inputs})

    def _whole(self, place: int) -> Lesson:
        item = self._items[place]
        inputs = bound(item, self._call, f"{self._data}, item {place}")
        return Lesson(inputs, {**_beside(item, self._call), **inputs})

    def _row(self, place: int) -> Lesson:
        specs = tuple(replace(spec, shape=(1, *spec.shape[1:])) for spec in self._call.inputs)
        item, one = self._items[place], replace(self._call, inputs=specs)
        return Lesson(bound(item, one, f"{self._data}, item {place}"), _beside(item, self._call))

    def _place(self, number: int) -> int:
        """The item that comes as the ``number``-th."""
        epoch, place = divmod(number, len(self._items))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * STRIDE + epoch)
            self._order = epoch, torch.randperm(len(self._items), generator=generator)
        return int(self._order[1][place])

    def _digest(self) -> str:
        found = hashlib.sha256(f"{len(self._items)}\n".encode())
        count = min(LOOKED_AT, len(self._items))
        for place in torch.linspace(0, len(self._items) - 1, count).round().int().tolist():
            with seeded(self._seed + place):
                lesson = self._row(place) if self._rows else self._whole(place)
            for name in sorted(lesson.inputs):
                found.update(f"{place}/{name}/{tensor_digest(lesson.inputs[name])}\n".encode())
        return found.hexdigest()


class RandomCourses(Courses):
    """Random calls in the ranges of the inputs; of a model whose steps hand something on, walks by its schedule."""

    def __init__(self, program: Program, call: Interface, *, calls: int, seed: int) -> None:
        self._loop, self._call, self._calls, self._seed = program.loop, call, calls, seed
        self._ranges: Mapping[str, InputRange] = program.ranges
        self.source = "random inputs"
        self.digest = text_digest(f"{self.source}, {seed}")

    def course(self, index: int, student: Callable[[], Runner], teacher: Callable[[], Runner]) -> list[Lesson]:
        return [Lesson(inputs, inputs) for inputs in self._inputs(index)]

    def _inputs(self, index: int) -> Iterator[dict[str, Tensor]]:
        seed, specs, loop = self._seed * STRIDE + index * self._calls, self._call.inputs_at(), self._loop
        if loop is not None and not loop.stateless:
            yield from walk(loop, specs, self._ranges, seed, compared_calls(loop))
        else:
            yield from (random_inputs(specs, self._ranges, seed + number) for number in range(self._calls))


class Trajectories(Courses):
    """A generation of the pipeline each, driven by the teacher or, in a share of them, by the student itself.

    Who drives decides which states come; the teacher's answer to each is what the student is to learn. The calls of
    several generations come in a random order, unless the student's steps hand something on.

    Source: DAgger (arXiv 1011.0686) as DDIL (arXiv 2410.11971) has it: states of the student mixed in.
    """

    def __init__(
        self, folder: Path, teacher: Network, asking: Asking, *, student_states: float, in_order: bool
    ) -> None:
        """
        Raises:
            UserError: the folder's pipeline cannot be built.
        """
        self._asking, self._share, self._call, self._in_order = asking, student_states, teacher.call, in_order
        self._pipeline = WatchedPipeline(folder, teacher)
        self.source = f"trajectories of the pipeline in {asking.asked.steps or 'its own number of'} steps"
        self.digest = folder_digest(folder)

    def course(self, index: int, student: Callable[[], Runner], teacher: Callable[[], Runner]) -> list[Lesson]:
        if self._in_order:
            return self._generation(index, student, teacher())
        learns, teaches = student(), teacher()
        return mixed(index, lambda number: self._generation(number, lambda: learns, teaches))

    def _generation(self, number: int, student: Callable[[], Runner], teach: Runner) -> list[Lesson]:
        generator = self._asking.generator(number)
        student_drives = float(torch.rand((), generator=generator)) < self._share
        drives = student() if student_drives else None
        lessons: list[Lesson] = []

        def answer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            # A pipeline may write into what it gave.
            inputs = {name: value.clone() for name, value in tensors.items()}
            expected = teach(inputs)
            lessons.append(Lesson(inputs, inputs, expected))
            given = drives(inputs) if drives is not None else expected
            return {spec.name: given[spec.name].cpu() for spec in self._call.outputs}

        self._pipeline.drive(answer, self._asking.turn(number, generator), self._asking.seed_of(number))
        return lessons


def mixed(index: int, generation: Callable[[int], list[Lesson]]) -> list[Lesson]:
    """The ``index``-th course of :data:`MIXED` generations, in an order that PyTorch's generator draws."""
    lessons = [lesson for number in range(index * MIXED, (index + 1) * MIXED) for lesson in generation(number)]
    return [lessons[place] for place in torch.randperm(len(lessons)).tolist()]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, every generator that data may be drawn with begins at ``seed``; afterwards they are as they were."""
    numpy_state, state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(state)


def folder_digest(folder: Path) -> str:
    """SHA-256 of the files in a pipeline's folder, by name and content: a copy elsewhere is the same data."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n".encode())
    return found.hexdigest()


def _rows(call: Interface) -> int | None:
    """The rows of a call, where all inputs have as many; ``None`` where an input is for all rows, or there is one."""
    sizes = {spec.shape[0] if spec.shape else 0 for spec in call.inputs_at()}
    size = min(sizes)
    return size if len(sizes) == 1 and size > 1 else None


def _is_batch(item: Any, call: Interface, rows: int) -> bool:
    """Whether every input of an item has so many rows already."""
    values: list[Any] = [item]
    if isinstance(item, Mapping):
        values = [item.get(spec.name) for spec in call.inputs]
    elif isinstance(item, (tuple, list)):
        values = list(item)
    shapes = [tuple(getattr(value, "shape", ())) for value in values]
    pairs = list(zip(shapes, call.inputs, strict=False))
    return all(len(shape) == len(spec.shape) and shape[0] == rows for shape, spec in pairs)


def _beside(item: Any, call: Interface) -> dict[str, Any]:
    """What ``item`` holds beside the inputs: by name, or of a tuple what follows them, as ``target``."""
    names = {spec.name for spec in call.inputs}
    if isinstance(item, Mapping):
        return {str(name): value for name, value in item.items() if name not in names}
    rest = item[len(names) :] if isinstance(item, (tuple, list)) else ()
    return {"target": rest[0] if len(rest) == 1 else tuple(rest)} if rest else {}
