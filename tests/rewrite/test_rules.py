"""Patterns, checks and replacements over the dialect."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from optpass.errors import OptpassError
from optpass.evaluate.difference import program_difference
from optpass.ir.dialect import verify, verify_shapes
from optpass.ir.graph import shape_of
from optpass.ir.text import graph_text
from optpass.pipeline.passes import Context
from optpass.rewrite.pattern import Pattern
from optpass.rewrite.rules import Rule, apply_rules

aten = torch.ops.aten


class Swish(Rule):
    """x · sigmoid(x) → silu(x), either way round."""

    def pattern(self, x):
        return aten.mul.Tensor(x, aten.sigmoid.default(x))

    def patterns(self):
        return (self.pattern, lambda x: aten.mul.Tensor(aten.sigmoid.default(x), x))

    def check(self, match):
        return "the last dimension is odd" if shape_of(match["x"])[-1] % 2 else None

    def rewrite(self, graph, match):
        return graph.call(aten.silu.default, match["x"], like=match.root)


class Swishes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x)
        y = y * torch.sigmoid(y)
        gate = torch.sigmoid(y)
        y = self.b(gate * y)
        return y * torch.sigmoid(y), gate, y * torch.sigmoid(y + 1)


def test_golden_sites_reasons_and_values(capture_module):
    program, _ = capture_module(Swishes, x=torch.randn(2, 4))
    before = program.copy()
    context = Context()
    assert apply_rules(program, [Swish()], context) == 2
    verify(program)
    verify_shapes(program)
    assert graph_text(program.entries["full"]) == (
        "graph(x: f32[2, 4]):\n"
        "  %linear = linear(%x, @a.weight, @a.bias) : f32[2, 6]  ; a\n"
        "  %silu_default = silu(%linear) : f32[2, 6]  ; (root)\n"
        "  %sigmoid_1 = sigmoid(%silu_default) : f32[2, 6]  ; (root)\n"
        "  %silu_default_1 = silu(%silu_default) : f32[2, 6]  ; (root)\n"
        "  %linear_1 = linear(%silu_default_1, @b.weight, @b.bias) : f32[2, 3]  ; b\n"
        "  %sigmoid_2 = sigmoid(%linear_1) : f32[2, 3]  ; (root)\n"
        "  %mul_2 = mul.Tensor(%linear_1, %sigmoid_2) : f32[2, 3]  ; (root)\n"
        "  %add = add.Tensor(%linear_1, 1) : f32[2, 3]  ; (root)\n"
        "  %sigmoid_3 = sigmoid(%add) : f32[2, 3]  ; (root)\n"
        "  %mul_3 = mul.Tensor(%linear_1, %sigmoid_3) : f32[2, 3]  ; (root)\n"
        "  return output.0=%mul_2, output.1=%sigmoid_1, output.2=%mul_3"
    )
    assert context.sites == ["(root)", "(root)"]
    assert [(declined.node, declined.reason) for declined in context.declined] == [
        ("mul_2", "the last dimension is odd")
    ]
    assert program_difference(before, program).relative_error <= 1e-6


def calls(program):
    return program.entries["full"], program.entries["full"].calls


def test_wildcards_defaults_and_literals(capture_module):
    class Module(nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x).softmax(1).clamp(0.5)

    graph, (attention, softmax, clamp) = calls(capture_module(Module, x=torch.randn(2, 3, 4))[0])
    sdpa = aten.scaled_dot_product_attention.default
    match = Pattern(lambda q, k, v: sdpa(q, k, v)).match(graph, attention)
    assert match is not None
    assert match["q"] is match["k"] is match["v"]
    assert Pattern(lambda q, k, v: sdpa(q, k, v, None, 0.0, False)).match(graph, attention)
    assert Pattern(lambda q, k, v: sdpa(q, k, v, None, 0.1)).match(graph, attention) is None
    assert Pattern(lambda q, k, v: sdpa(q, k, v, is_causal=True)).match(graph, attention) is None
    found = Pattern(lambda x, dim: aten.softmax.int(x, dim)).match(graph, softmax)
    assert found is not None
    assert found["dim"] == 1
    assert Pattern(lambda x: aten.softmax.int(x, 2)).match(graph, softmax) is None
    assert Pattern(lambda x: aten.softmax.int(x, True)).match(graph, softmax) is None
    assert Pattern(lambda x, low: aten.clamp.default(x, low)).match(graph, clamp)["low"] == 0.5
    assert Pattern(lambda x, y: aten.clamp.default(aten.softmax.int(x, y), y)).match(graph, clamp) is None


def test_a_pattern_that_is_no_operator():
    with pytest.raises(TypeError, match="must return an operator's result"):
        Pattern(lambda x: x)


class Halves(Rule):
    """A rule with a mistake: the replacement is smaller."""

    def pattern(self, x):
        return aten.relu.default(x)

    def rewrite(self, graph, match):
        return graph.call(aten.slice.Tensor, match["x"], 0, 0, 1, like=match.root)


class Endless(Rule):
    """relu → relu."""

    def pattern(self, x):
        return aten.relu.default(x)

    def rewrite(self, graph, match):
        return graph.call(aten.relu.default, match["x"], like=match.root)


def test_mistakes_of_a_rule_are_named(capture_module):
    build = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # noqa: E731
    with pytest.raises(OptpassError, match=r"rule Halves replaces %relu \(1\)"):
        apply_rules(capture_module(build, input=torch.randn(2, 4))[0], [Halves()])
    with pytest.raises(OptpassError, match="Endless keep rewriting"):
        apply_rules(capture_module(build, input=torch.randn(2, 4))[0], [Endless()])


def test_linear_in_the_nodes(capture_module):
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.depth = depth

        def forward(self, x):
            for _ in range(self.depth):
                x = x * torch.sigmoid(x)
            return x

    seconds = {}
    for depth in (100, 800):
        program, _ = capture_module(lambda depth=depth: Deep(depth), x=torch.randn(2, 4))
        start = time.process_time()
        assert apply_rules(program, [Swish()]) == depth
        seconds[depth] = time.process_time() - start
        assert len(program.entries["full"].calls) == depth
    assert seconds[800] < 8 * 3 * seconds[100]
