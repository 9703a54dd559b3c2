"""Clean samples with their conditions: of a dataset, or the teacher's own generations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optpass.ir.interface import Interface
from optpass.ir.loop import Loop
from optpass.pipeline.target import Runner
from optpass.training.asking import Asking
from optpass.training.courses import Courses, GivenCourses, Lesson, folder_digest
from optpass.training.guided import conditioned
from optpass.training.networks import Network
from optpass.training.watched import WatchedPipeline

CALLS = "calls"
"""In what a lesson tells besides: the conditions of each call that the teacher's pipeline makes in a step."""


def without_time(call: Interface, loop: Loop) -> Interface:
    """What is given for a clean sample: the call's inputs but for the time, and what a call may leave out."""
    left_out = {loop.timestep, *loop.signature.defaults}
    return replace(call, inputs=tuple(spec for spec in call.inputs if spec.name not in left_out))


def given_clean(items: Any, network: Network, loop: Loop, data: str, *, calls: int, seed: int) -> Courses:
    """Courses of a dataset whose items are clean samples with their conditions, by the names of the inputs.

    Raises:
        UserError: as :class:`~optpass.training.courses.GivenCourses`.
    """
    return GivenCourses(items, without_time(network.call, loop), data, calls=calls, seed=seed)


class Generated(Courses):
    """What the teacher generates: ``number`` samples with their conditions, made when they come first, then again.

    Source: as MoViE, arXiv 2412.06578, algorithm 2, whose real samples are its teacher's.
    """

    def __init__(
        self, pipeline: WatchedPipeline, folder: Path, asking: Asking, loop: Loop, *, number: int, calls: int
    ) -> None:
        self._pipeline, self._asking, self._loop = pipeline, asking, loop
        self._number, self._calls = number, calls
        self._made: dict[int, Lesson] = {}
        self.source = f"{number} generations of the model before, in {asking.asked.steps} steps each"
        self.digest = folder_digest(folder)

    def course(self, index: int, student: Callable[[], Runner], teacher: Callable[[], Runner]) -> list[Lesson]:
        places = torch.randint(self._number, (self._calls,)).tolist()
        return [self._lesson(place, teacher) for place in places]

    def _lesson(self, place: int, teacher: Callable[[], Runner]) -> Lesson:
        if place not in self._made:
            asked = self._asking.turn(place, self._asking.generator(place))
            # Whatever comes next must not depend on whether this sample is made now or was before.
            with torch.random.fork_rng():
                steps = self._pipeline.steps(teacher(), asked, self._asking.seed_of(place))
            conditions = [
                {name: value for name, value in call.items() if name in self._loop.conditioning}
                for call in steps[0].calls
            ]
            last = steps[-1].sample
            assert last is not None
            inputs = {**conditions[conditioned(len(conditions))], self._loop.sample: last}
            self._made[place] = Lesson(inputs, {CALLS: conditions})
        return self._made[place]
