"""Exact contracts of half-precision Programs are held to float32's resolution, not drowned in rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optpass.capture.export import build_fake, export_program
from optpass.errors import ContractError
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant
from optpass.pipeline.contract import exact
from optpass.pipeline.manager import run_passes
from optpass.pipeline.passes import Context, Pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.verification import Verification

aten = torch.ops.aten


class ThreeTimesAThird(Pass):
    """x → (x·3)·⅓: the same function, and in float16 the same to a thousandth."""

    contract = exact(1e-5)
    factor: float = 1 / 3

    def run(self, program: Program, context: Context) -> Program:
        graph = program.entries["full"]
        node = graph.calls[0]
        with graph.before(graph.calls[1]):
            tripled = graph.call(aten.mul.Tensor, node, 3.0, like=node)
            back = graph.call(aten.mul.Tensor, tripled, self.factor, like=node)
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not tripled)
        context.rewrote(node)
        return program


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def half(request: pytest.FixtureRequest, tiny_classifier: Any) -> Program:
    torch.manual_seed(0)
    real = tiny_classifier().to(request.param)
    fake, mode = build_fake(tiny_classifier, request.param)
    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    example = {"input": torch.zeros(2, 6, dtype=request.param)}
    return export_program(fake, mode, example, weights, Origin("test"))


def test_an_exact_pass_over_half_precision_holds(half: Program) -> None:
    _, [record] = run_passes(half, [Step("thirds", ThreeTimesAThird())], [Verification()])
    assert 0 < record.facts["difference"]["relative_error"] < 1e-6
    assert record.facts["verified"].startswith("held")


def test_an_error_below_half_precision_s_rounding_is_found(half: Program) -> None:
    with pytest.raises(ContractError, match="exact to 1e-05"):
        run_passes(half, [Step("thirds", ThreeTimesAThird(factor=1.0001 / 3))], [Verification()])
