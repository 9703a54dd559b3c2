"""What a student is taught by: its teacher's outputs, what modules inside return, and the task itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from optpass.errors import UserError
from optpass.quiet import first_lines
from optpass.rewrite.probes import PROBE

OutputLoss = Literal["mse", "smooth-l1", "kl"]
Task = Callable[[Mapping[str, Tensor], Mapping[str, Any]], Tensor]
"""The task's own loss, a scalar, from the student's outputs and the batch, both by name."""


@dataclass(frozen=True)
class Criterion:
    """A weighted sum of losses; one of weight 0 is not computed.

    ``kl`` takes outputs […, C] for logits: T²·KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over all but C
    (Hinton et al. 2015). Features are compared by Σ(s − t)² / Σt², the mean over the modules that both ran, so that
    no module's scale counts.
    """

    output: OutputLoss = "mse"
    output_weight: float = 1.0
    temperature: float = 1.0
    feature_weight: float = 0.0
    task: Task | None = None
    task_weight: float = 0.0

    def terms(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The weighted losses by name, each a float32 scalar.

        Raises:
            UserError: the task's loss fails, or is no scalar.
        """
        found = {}
        outputs = {name: value for name, value in student.items() if not name.startswith(PROBE)}
        if self.output_weight:
            compared = [self._output(v, teacher[n]) for n, v in outputs.items() if v.is_floating_point()]
            found["output"] = self.output_weight * torch.stack(compared).mean()
        probed = [name for name in student if name.startswith(PROBE) and name in teacher]
        if self.feature_weight and probed:
            distances = torch.stack([_relative(student[name], teacher[name]) for name in probed])
            found["features"] = self.feature_weight * distances.mean()
        if self.task is not None and self.task_weight:
            found["task"] = self.task_weight * self._of_task(outputs, batch)
        return found

    def _output(self, student: Tensor, teacher: Tensor) -> Tensor:
        one, other = student.float(), teacher.float()
        if self.output == "mse":
            return F.mse_loss(one, other)
        if self.output == "smooth-l1":
            return F.smooth_l1_loss(one, other)
        own, theirs = (F.log_softmax(each.flatten(0, -2) / self.temperature, -1) for each in (one, other))
        return F.kl_div(own, theirs, reduction="batchmean", log_target=True) * self.temperature**2

    def _of_task(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        assert self.task is not None
        try:
            loss = self.task(outputs, batch)
        except Exception as error:
            raise UserError(f"task: the loss fails: {type(error).__name__}: {first_lines(error)}") from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserError(f"task: the loss is {_described(loss)}, and not a tensor of one element")
        return loss.float().reshape(())


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    one, other = student.float(), teacher.float()
    return (one - other).square().sum() / other.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def _described(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
