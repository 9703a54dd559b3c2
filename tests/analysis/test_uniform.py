from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.analysis.uniform import uniform_value
from optpass.ir.algebra import Full
from optpass.ir.weights import Constant, WeightStore


class Made(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x).cos() * x.sum()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: torch.zeros(3), 0),
        (lambda x: torch.ones_like(x), 1),
        (lambda x: torch.full((2, 3), 0.5).t()[:2].expand(4, 2, 2).reshape(4, 4), 0.5),
        (lambda x: torch.ones(3, dtype=torch.bool), True),
        (lambda x: torch.zeros(3) + 1, None),
        (lambda x: torch.arange(3.0), None),
        (lambda x: x, None),
    ],
)
def test_values_that_show(capture_module, make, expected):
    program, _ = capture_module(lambda: Made(make), x=torch.randn(2, 2))
    cosine = next(node for node in program.entries["full"].calls if node.target is torch.ops.aten.cos.default)
    found = uniform_value(cosine.args[0], program.weights)
    assert found == expected
    assert isinstance(found, bool) == isinstance(expected, bool)


def test_weights(capture_module):
    program, _ = capture_module(lambda: nn.Linear(2, 2), input=torch.randn(1, 2))
    [bias] = [node for node in program.entries["full"].fx.nodes if node.target == "bias"]

    def value(expression):
        return uniform_value(bias, WeightStore({"bias": expression}))

    assert value(Full((2,), 0.25, torch.float32)) == 0.25
    assert value(Constant(torch.full((2,), 3.0), computed=True)) == 3.0
    assert value(Constant(torch.tensor([3.0, 2.0]), computed=True)) is None
    assert value(Constant(torch.tensor([float("nan")] * 2), computed=True)) is None
    # A parameter that is uniform now is a parameter.
    assert value(Constant(torch.zeros(2))) is None
    assert uniform_value(7, program.weights) == 7
