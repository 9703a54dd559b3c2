"""Gates of which exactly so many are open in each call, learnt beside whatever else is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.pipeline.target import Runner
from optpass.training.courses import Lesson
from optpass.training.gates import SampledGates
from optpass.training.networks import Network
from optpass.training.objective import Objective


class ExactlyOpen(Objective):
    """``inner``'s losses, with exactly ``count`` of the ``gates`` open in each lesson, the others closed.

    ``gates`` are weights of the student, of one element each. Their importances, which begin at 1 and are what they
    are in the end, learn at the rate ``rate``.

    Source: learned temporal block pruning of MobileVD, arXiv 2412.07583, figure 4; :mod:`optpass.training.gates`.
    """

    def __init__(self, inner: Objective, student: Network, gates: list[str], count: int, rate: float) -> None:
        """
        Raises:
            UserError: there are no ``gates``, or fewer than ``count``.
        """
        if not count <= len(gates):
            raise UserError(
                f"open_gates: {count} gates are to be open, and there are {len(gates)} that are trained; prune-blocks "
                "inserts them with gated: true"
            )
        self._inner, self._gates = inner, {name: student.parameters[name] for name in gates}
        self._sampled = SampledGates(len(gates), count)
        self._optimiser = torch.optim.Adam(self._sampled.parameters(), lr=rate)
        self._drawn: Tensor | None = None
        self.own = frozenset(gates)

    def terms(self, lesson: Lesson, learn: Runner, teach: Runner) -> dict[str, Tensor]:
        self._drawn = self._sampled()
        with torch.no_grad():
            for gate, value in zip(self._gates.values(), self._drawn, strict=True):
                gate.fill_(value)
        return self._inner.terms(lesson, learn, teach)

    def step(self, update: int, lessons: int) -> dict[str, float]:
        assert self._drawn is not None
        slopes = [torch.zeros(()) if g.grad is None else g.grad.sum().cpu() for g in self._gates.values()]
        # The probabilities are those of every lesson of this update, whatever was drawn.
        self._drawn.backward(torch.stack(slopes))  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._optimiser.zero_grad()
        for gate in self._gates.values():
            gate.grad = None
        return self._inner.step(update, lessons)

    def found(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        importances = self._sampled.importances.detach()
        learnt = {name: value.reshape(1).clone() for name, value in zip(self._gates, importances, strict=True)}
        return {**self._inner.found(weights), **learnt}

    def state(self) -> dict[str, Any]:
        return {
            "importances": self._sampled.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "inner": self._inner.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._sampled.load_state_dict(state["importances"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._inner.restore(state["inner"])
