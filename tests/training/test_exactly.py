"""Exactly n gates open in every call: what is learnt of them, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optpass.errors import UserError
from optpass.ir.program import Program
from optpass.ir.weights import Constant, Scale
from optpass.passes.distill import Distill
from optpass.pipeline.contract import retrain
from optpass.pipeline.manager import run_passes
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.recipe import Step
from optpass.testing import capture_module
from optpass.training.exactly import ExactlyOpen

STRENGTHS = (0.2, 2.0, 0.1, 1.0)


class Branch(nn.Module):
    def __init__(self, strength: float) -> None:
        super().__init__()
        self.prune_gate, self.strength = nn.Parameter(torch.ones(1)), strength

    def forward(self, x: Tensor) -> Tensor:
        return self.prune_gate * torch.tanh(x) * self.strength


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(map(Branch, STRENGTHS))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(branch(x) for branch in self.branches)


class Gated(Pass):
    """gates → 1, and to be trained."""

    contract = retrain()

    def run(self, program: Program, context: Context) -> Program:
        context.rewrote("branches")
        ones = {name: Scale(program.weights[name], 1.0) for name in program.used_weights()}
        return program.with_untrained(ones)


@pytest.fixture(name="program", scope="module")
def _program() -> Program:
    program, _ = capture_module(Branches, x=torch.zeros(4, 6))
    values = {name: torch.ones(1) for name in program.used_weights()}
    return program.with_weights({name: Constant(value) for name, value in values.items()})


def test_the_gates_that_matter_have_the_importance(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[float] = []
    terms = ExactlyOpen.terms

    def watched(self: ExactlyOpen, *given: object) -> dict[str, Tensor]:
        found = terms(self, *given)  # type: ignore[arg-type]
        opened.append(sum(float(gate.detach()) for gate in self._gates.values()))
        return found

    monkeypatch.setattr(ExactlyOpen, "terms", watched)
    distill = Distill(open_gates=2, gate_rate=0.05, updates=120, warmup=0, clip=None, work=tmp_path)
    found, records = run_passes(program, [Step("gated", Gated()), Step("distill", distill)])
    importances = [float(found.weights[f"branches.{index}.prune_gate"].evaluate()) for index in range(4)]
    assert sorted(range(4), key=lambda index: -importances[index])[:2] == [1, 3]
    assert set(opened) == {2.0}
    assert len(records[-1].sites) == 4


def test_more_gates_than_there_are(program: Program, tmp_path: Path) -> None:
    distill = Distill(open_gates=5, updates=2, work=tmp_path)
    with pytest.raises(UserError, match="5 gates are to be open, and there are 4"):
        run_passes(program, [Step("gated", Gated()), Step("distill", distill)])
