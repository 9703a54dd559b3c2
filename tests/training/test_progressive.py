"""Steps halved: what is learnt, in which rounds, and by whom it is taught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from optpass.ir.interface import Interface
from optpass.training.courses import Lesson
from optpass.training.denoising import Denoising
from optpass.training.diffusion import Diffusion
from optpass.training.progressive import Progressive

SCHEDULER = DDIMScheduler(
    beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
)


class Weights:
    """A model that answers with its one weight, or with that and the sample."""

    def __init__(self, value: float, share: float = 0.0) -> None:
        self.parameters, self.share = {"weight": torch.nn.Parameter(torch.tensor(value))}, share
        self.asked: list[int] = []

    def runner(self, *, gradients: bool = False) -> Any:
        def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            self.asked.append(int(tensors["timestep"]))
            return {"out": self.parameters["weight"] + self.share * tensors["sample"]}

        return run

    def copied(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def set(self, values: dict[str, Tensor]) -> None:
        self.parameters["weight"].data.copy_(values["weight"])


class Plain(Denoising):
    def inputs(self, lesson: Lesson, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        return {"sample": sample, "timestep": timestep}

    def answer(self, run: Any, lesson: Lesson, sample: Tensor, timestep: Tensor) -> Tensor:
        answer: Tensor = run(self.inputs(lesson, sample, timestep))["out"]
        return answer

    def given(self, lesson: Lesson) -> Tensor:
        return lesson.inputs["sample"]


def objective(student: Weights, halfway: Weights, *, rounds: int, updates: int, share: float = 0.0) -> Progressive:
    made: Any = Plain(Diffusion.of(SCHEDULER, 1), Interface((), ()), None)  # type: ignore[arg-type]
    return Progressive(made, student, halfway, rounds, updates, share)  # type: ignore[arg-type]


LESSON = Lesson({"sample": torch.full((1, 3), 0.5)}, {})


def test_a_prediction_that_never_changes_is_learnt() -> None:
    torch.manual_seed(0)
    made = objective(Weights(0.3), Weights(0.0), rounds=3, updates=3)
    for _ in range(6):
        (loss,) = made.terms(LESSON, Weights(0.3).runner(), Weights(0.3).runner()).values()
        assert float(loss.detach()) < 1e-9
        (loss,) = made.terms(LESSON, Weights(0.4).runner(), Weights(0.3).runner()).values()
        assert float(loss.detach()) > 1e-3


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_who_teaches_which_steps(share: float) -> None:
    torch.manual_seed(0)
    student, halfway, teacher = Weights(0.2, 0.1), Weights(0.0, 0.1), Weights(0.3, 0.1)
    made = objective(student, halfway, rounds=2, updates=4, share=share)
    # Of 4 steps, 999, 749, 499, 249, two each; the student answers at the first of them.
    for _ in range(8):
        student.asked.clear(), teacher.asked.clear()
        made.terms(LESSON, student.runner(), teacher.runner())
        assert teacher.asked in ([999, 749], [499, 249])
        assert student.asked == [999] * int(share) + teacher.asked[:1]
    student.parameters["weight"].data.fill_(0.7)
    for update in range(4):
        assert made.number == (0, 0, 1, 1)[update]
        made.step(update, 1)
    assert float(halfway.copied()["weight"]) == pytest.approx(0.7)
    teacher.asked.clear(), halfway.asked.clear()
    made.terms(LESSON, student.runner(), teacher.runner())
    assert (teacher.asked, halfway.asked) == ([], [999, 499])


def test_a_round_goes_on_where_it_was() -> None:
    made = objective(Weights(0.2), Weights(0.0), rounds=2, updates=2)
    made.step(0, 1)
    again = objective(Weights(0.9), Weights(0.0), rounds=2, updates=2)
    again.restore(made.state())
    assert again.number == 1
    assert float(again.halfway.copied()["weight"]) == pytest.approx(0.2)
