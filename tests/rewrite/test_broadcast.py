"""Sinking expand: what commutes, what does not, and always the same values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.evaluate.difference import program_difference
from optpass.ir.dialect import verify, verify_shapes
from optpass.ir.graph import shape_of
from optpass.ir.text import operator_name
from optpass.rewrite.broadcast import sink_expand

aten = torch.ops.aten


class Case(nn.Module):
    """x [3, 1, 4] repeated to [3, 5, 4], then ``body``."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.features, self.rows = nn.Linear(4, 6), nn.Linear(5, 2)

    def forward(self, x, y):
        return self.body(self, x.expand(3, 5, 4), y)


SINKS = {
    "transpose": lambda m, x, y: x.transpose(0, 1) * y.transpose(0, 1),
    "permute": lambda m, x, y: x.permute(2, 1, 0) * y.permute(2, 1, 0),
    "split features": lambda m, x, y: x.reshape(3, 5, 2, 2) * y.reshape(3, 5, 2, 2),
    "split repeated": lambda m, x, y: x.unsqueeze(1).reshape(3, 1, 5, 4) + y.unsqueeze(1),
    "insert ones": lambda m, x, y: x.reshape(3, 1, 5, 1, 4) + y.reshape(3, 1, 5, 1, 4),
    "pointwise": lambda m, x, y: 2 - torch.nn.functional.gelu(x * 2 / 3 + 1) + y,
    "linear": lambda m, x, y: m.features(x) + m.features(y),
    "slice kept": lambda m, x, y: x[:, :, 1:3] + y[:, :, 1:3],
    "slice repeated": lambda m, x, y: x[:, 1:4] + y[:, 1:4],
    "select kept": lambda m, x, y: x[1] + y[1],
    "cast": lambda m, x, y: (x > 0).to(torch.float32) + x.double().float() + y,
    "other side": lambda m, x, y: y - x.relu(),
    "expand again": lambda m, x, y: x.unsqueeze(0).expand(2, 3, 5, 4).tanh() * y.unsqueeze(0).expand(2, 3, 5, 4),
}

STAYS = {
    "merged with another": lambda m, x, y: x.reshape(15, 4) + y.reshape(15, 4),
    "repeated are the features": lambda m, x, y: m.rows(x.transpose(1, 2)) + y[:, :4, :2],
    "reduction": lambda m, x, y: x.sum(1, keepdim=True) + y,
    "nobody else has the shape": lambda m, x, y: x + y[:, :1],
    "itself": lambda m, x, y: x + x,
}


def run(capture_module, body):
    program, _ = capture_module(lambda: Case(body), x=torch.randn(3, 1, 4), y=torch.randn(3, 5, 4))
    before, graph = program.copy(), program.entries["full"]
    first = next(node for node in graph.calls if node.target is aten.expand.default)
    passed = sink_expand(graph, first)
    graph.remove_dead_code()
    verify(program)
    verify_shapes(program)
    assert program_difference(before, program).relative_error <= 1e-6
    return graph, passed


@pytest.mark.parametrize("name", [name for name in SINKS if name not in ("cast", "expand again")])
def test_sinks_into_the_broadcast(capture_module, name):
    graph, passed = run(capture_module, SINKS[name])
    assert passed >= 1
    assert all(node.target is not aten.expand.default for node in graph.calls)


def test_two_in_a_row_become_one_and_vanish(capture_module):
    graph, passed = run(capture_module, SINKS["expand again"])
    assert passed == 4
    of_y = [node for node in graph.calls if node.target is aten.expand.default]
    assert [node.args[0].name for node in of_y] == ["unsqueeze_1"]


def test_stays_above_what_it_does_not_know(capture_module):
    graph, _ = run(capture_module, SINKS["cast"])
    # `>` is not among the operators that commute, the casts are.
    kept = [node for node in graph.calls if node.target is aten.expand.default]
    assert {operator_name(user) for node in kept for user in node.users} == {"gt.Scalar"}


@pytest.mark.parametrize("name", list(STAYS))
def test_stays(capture_module, name):
    graph, _ = run(capture_module, STAYS[name])
    assert any(node.target is aten.expand.default for node in graph.calls)


def test_works_on_one_row(capture_module):
    graph, _ = run(capture_module, SINKS["linear"])
    assert [shape_of(node) for node in graph.calls if operator_name(node) == "linear"] == [(3, 1, 6), (3, 5, 6)]
