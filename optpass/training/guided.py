"""What a model is taught guidance with: generations with guidance, each in scales of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.pipeline.target import Runner
from optpass.training.asking import Asking, Ranges, drawn
from optpass.training.courses import Courses, Lesson, folder_digest, mixed
from optpass.training.networks import Network
from optpass.training.watched import Watched, WatchedPipeline

CONDITIONED = {1: 0, 2: 1, 3: 0}
"""Which of a step's calls has the whole condition, by how many there are, in diffusers' pipelines.

One is without guidance; two are without and with the condition; three, of InstructPix2Pix, are with text and image,
with the image, and with neither.
"""


class GuidedTrajectories(Courses):
    """Generations with guidance: the call with the whole condition, and the answer that the pipeline makes of all.

    In each the scales are drawn evenly from ``scales``, (lowest, highest) by the names of the pipeline's arguments. A
    share of them, ``student_states``, the sampler is given the student's answers in place of those with guidance.

    Source: guidance distilled, Meng et al., arXiv 2210.03142; several scales, MoViE, arXiv 2412.06578, section 3.3;
    the student's states, DDIL, arXiv 2410.11971.
    """

    def __init__(
        self, folder: Path, teacher: Network, asking: Asking, scales: Ranges, *, student_states: float
    ) -> None:
        """
        Raises:
            UserError: the folder's pipeline cannot be built.
        """
        self._asking, self._scales, self._share = asking, scales, student_states
        answer = teacher.call.outputs[0]
        self._output, self._shape = answer.name, answer.at(teacher.call.dimensions.examples).shape
        self._pipeline = WatchedPipeline(folder, teacher)
        self.source = f"trajectories of the pipeline in {asking.asked.steps} steps, with guidance"
        self.digest = folder_digest(folder)

    def course(self, index: int, student: Callable[[], Runner], teacher: Callable[[], Runner]) -> list[Lesson]:
        learns, teaches = student(), teacher()
        return mixed(index, lambda number: self._generation(number, learns, teaches))

    def _generation(self, number: int, learns: Runner, teaches: Runner) -> list[Lesson]:
        generator = self._asking.generator(number)
        student_drives = float(torch.rand((), generator=generator)) < self._share
        values = drawn(self._scales, generator)
        scales = {name: torch.tensor(value) for name, value in values.items()}

        def student_answers(step: Watched) -> Tensor:
            return learns(self._inputs(step, scales))[self._output].cpu()

        asked, seed = self._asking.turn(number, generator, values), self._asking.seed_of(number)
        steps = self._pipeline.steps(teaches, asked, seed, instead=student_answers if student_drives else None)
        return [self._lesson(step, scales) for step in steps]

    def _inputs(self, step: Watched, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**step.calls[conditioned(len(step.calls))], **scales}

    def _lesson(self, step: Watched, scales: Mapping[str, Tensor]) -> Lesson:
        """
        Raises:
            UserError: the sampler is given something else than the model answers.
        """
        inputs, guided = self._inputs(step, scales), step.guided
        assert guided is not None
        if tuple(guided.shape) != self._shape:
            raise UserError(
                f"the pipeline hands its sampler {list(guided.shape)} of what the model answers, {list(self._shape)}: "
                "guidance can be distilled where that is the whole answer"
            )
        return Lesson(inputs, inputs, {self._output: guided})


def conditioned(calls: int) -> int:
    """The place of the call with the whole condition among the ``calls`` of a step.

    Raises:
        UserError: a step has another number of calls than guidance takes.
    """
    if calls not in CONDITIONED:
        raise UserError(f"the pipeline calls the model {calls} times in a step, and guidance takes two or three")
    return CONDITIONED[calls]
