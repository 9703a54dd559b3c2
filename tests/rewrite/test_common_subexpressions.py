"""What is the same, and what only looks like it."""

from __future__ import annotations

import pytest
import torch

from optpass.ir.algebra import Full
from optpass.ir.weights import Constant, Scale
from optpass.rewrite.common_subexpressions import merge_common_subexpressions

SAME = {
    "operator and arguments": (lambda m, x, y: x.sin() * x.sin(), 1),
    "a whole branch": (lambda m, x, y: m.features(x).relu() + m.features(x).relu(), 2),
    "defaults": (lambda m, x, y: torch.cat([x, y]) + torch.cat([x, y], 0), 1),
    "either order": (lambda m, x, y: (x + y).sin() + (y + x).cos(), 1),
    "parts of a split": (lambda m, x, y: x.chunk(2, -1)[0] * x.chunk(2, -1)[0], 2),
}

OTHER = {
    "a literal's type": lambda m, x, y: [(x > 0).long() * 2, (x > 0).to(torch.int64) * 2.0],
    "the sign of zero": lambda m, x, y: [x.clamp(min=0.0), x.clamp(min=-0.0)],
    "the order of a difference": lambda m, x, y: (x - y) * (y - x),
    "a weighted sum": lambda m, x, y: [torch.add(x, y, alpha=2), torch.add(y, x, alpha=2)],
    "random": lambda m, x, y: torch.rand_like(x) + torch.rand_like(x),
    "uninitialised": lambda m, x, y: [torch.empty_like(x), torch.empty_like(x)],
}


@pytest.mark.parametrize("case", SAME)
def test_merged(capture_body, same_bits, case):
    body, count = SAME[case]
    program = capture_body(body)
    before, graph = program.copy(), program.entries["full"]
    nodes = len(graph.calls)
    merged = merge_common_subexpressions(graph, program.weights)
    assert len(merged) == count == nodes - len(graph.calls)
    same_bits(before, program)


@pytest.mark.parametrize("case", OTHER)
def test_left_alone(capture_body, case):
    body = OTHER[case]
    program = capture_body(body)
    graph = program.entries["full"]
    calls = [node for node in graph.calls if node.op == "call_function"]
    merge_common_subexpressions(graph, program.weights)
    kept = [node.name for node in graph.calls]
    # The operands that lead there may be one; what the case is about stays two.
    assert sum(node.target is calls[-1].target for node in graph.calls) == sum(
        n.target is calls[-1].target for n in calls
    )
    assert len(kept) >= 2


def test_weights_by_name_and_by_equal_expression(capture_body):
    program = capture_body(lambda m, x, y: (x + m.table[0]).sin() * (x + m.table[0]).sin())
    table = program.weights["table"]

    def merged(first, second):
        changed = program.copy().with_weights({"a": first, "b": second})
        graph = changed.entries["full"]
        reads = [node for node in graph.fx.nodes if node.op == "get_attr"]
        with graph.before(reads[0]):
            nodes = [graph.weight(name, first, like=graph.calls[0]) for name in "ab"]
        with graph.before(graph.output_node):
            pair = [graph.call(torch.ops.aten.sum.default, node, like=graph.calls[0]) for node in nodes]
            graph.call(torch.ops.aten.add.Tensor, *pair, like=graph.calls[0])
        merge_common_subexpressions(graph, changed.weights)
        return "b" not in graph.weight_names

    assert merged(Scale(table, 2.0), Scale(table, 2.0))
    assert not merged(Scale(table, 2.0), Scale(table, 3.0))
    assert merged(Full((2,), 0.0, torch.float32), Full((2,), 0.0, torch.float32))
    values = torch.arange(3.0)
    assert merged(Constant(values, computed=True), Constant(values.clone(), computed=True))
    # Parameters that are equal today (two zero biases) may differ after the next training step.
    assert not merged(Constant(values), Constant(values.clone()))


def test_reads_of_one_weight_are_no_change(capture_body):
    program = capture_body(lambda m, x, y: m.features(x) + m.features(y))
    graph = program.entries["full"]
    with graph.before(graph.calls[-1]):
        again = graph.weight("features.bias", program.weights["features.bias"], like=graph.calls[-1])
    second = [node for node in graph.calls if node.target is torch.ops.aten.linear.default][1]
    second.args = (*second.args[:2], again)
    second.prepend(again)
    assert merge_common_subexpressions(graph, program.weights) == []
    assert [str(n.target) for n in graph.fx.nodes if n.op == "get_attr"].count("features.bias") == 1
