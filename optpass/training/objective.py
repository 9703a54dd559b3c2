"""What a student is trained for: losses of single calls, and whatever else learns or follows beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optpass.pipeline.target import Runner
from optpass.training.courses import Lesson
from optpass.training.losses import Criterion


class Objective(ABC):
    """Losses of lessons; a discriminator or a running mean that goes with them has its state here.

    ``own`` are weights of the student that it moves itself.
    """

    own: frozenset[str] = frozenset()

    @abstractmethod
    def terms(self, lesson: Lesson, learn: Runner, teach: Runner) -> dict[str, Tensor]:
        """The weighted losses of one call by name, float32 scalars, whose sum the student is to make smaller.

        ``learn`` is the student with gradients, ``teach`` the teacher without. Random numbers come from PyTorch's own
        generator, which is seeded for each course.
        """

    def step(self, update: int, lessons: int) -> dict[str, float]:
        """After the student's update from so many ``lessons``: that of everything else, and figures to be told."""
        return {}

    def found(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The result of a training that ends with ``weights``."""
        return dict(weights)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it: tensors, numbers, names."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        return


@dataclass
class Supervised(Objective):
    """The teacher's answer to the same call, compared by ``criterion``."""

    criterion: Criterion

    def terms(self, lesson: Lesson, learn: Runner, teach: Runner) -> dict[str, Tensor]:
        expected = lesson.expected
        if expected is None:
            with torch.no_grad():
                expected = teach(lesson.inputs)
        return self.criterion.terms(learn(lesson.inputs), expected, lesson.batch)


def share_gradients(parameters: Iterable[Tensor], count: int) -> None:
    """Gradients that sum over ``count`` calls → their mean."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= count
