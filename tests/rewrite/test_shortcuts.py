"""Streams past their branches: the value is what zero branches leave, and nothing is repeated in vain."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from optpass.analysis.residuals import residuals
from optpass.evaluate.difference import program_runner
from optpass.ir.text import operator_name
from optpass.rewrite.shortcuts import NotCarriedError, shortcut, unmoved
from optpass.rewrite.splitting import subgraph


def branch(m, x):
    return functional.linear(m.features(x), m.features.weight.t())


def folded(x):
    return x.unflatten(0, (3, 1)).transpose(1, 2).flatten(0, 1)


def unfolded(x):
    return x.unflatten(0, (3, 5)).transpose(1, 2).flatten(0, 1)


STREAMS = {
    "plain": (lambda m, x: (z := x + branch(m, x)) + branch(m, z), lambda x: x, []),
    "there and back": (lambda m, x: unfolded((z := folded(x + branch(m, x))) + branch(m, z)), lambda x: x, []),
    "only there": (lambda m, x: (z := folded(x + branch(m, x))) + branch(m, z), folded, ["reshape"] * 2),
    "scaled": (lambda m, x: (z := (x + branch(m, x)) * 0.5) + branch(m, z), lambda x: x * 0.5, ["mul.Tensor"]),
    "joined": (
        lambda m, x: (z := torch.cat([x + branch(m, x), x], 1)) + branch(m, z),
        lambda x: torch.cat([x, x], 1),
        ["cat"],
    ),
    "cut and joined": (
        lambda m, x: (z := torch.cat([(y := x + branch(m, x))[:, :2], y[:, 2:]], 1)) + branch(m, z),
        lambda x: x,
        [],
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_what_zero_branches_leave(name, capture_body):
    body, expected, repeated = STREAMS[name]
    program = capture_body(lambda m, x, y: body(m, x).sin(), (3, 5, 4))
    graph = program.entries["full"]
    found = {residual.add: residual for residual in residuals(graph).found}
    before = set(graph.calls)
    end = graph.calls[-1].args[0]
    with graph.before(graph.calls[-1]):
        value = shortcut(graph, end, {graph.placeholders[0]}, found)
    made = [operator_name(node) for node in graph.calls if node not in before]
    assert [each for each in made if each not in ("permute", "transpose.int")] == repeated
    part = replace(program, entries={"full": subgraph(graph, inputs={}, outputs={"value": value}, keep=("x", "y"))})
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(program_runner(part, "full")({"x": x, "y": x})["value"], expected(x), rtol=0, atol=0)


def test_what_computes_on_the_stream_is_named(capture_body):
    program = capture_body(lambda m, x, y: functional.layer_norm(x + branch(m, x), (4,)).sin(), (3, 5, 4))
    graph = program.entries["full"]
    found = {residual.add: residual for residual in residuals(graph).found}
    with pytest.raises(NotCarriedError, match="the stream passes %layer_norm "):
        shortcut(graph, graph.calls[-1].args[0], {graph.placeholders[0]}, found)


UNMOVED = {
    "there and back": (lambda x: unfolded(folded(x)), "x"),
    "only there": (folded, None),
    "back from further on": (lambda x: unfolded(folded(x)).flatten(1).unflatten(1, (5, 4)), "x"),
    "another order": (lambda x: x.transpose(0, 1).reshape(3, 5, 4), None),
}


@pytest.mark.parametrize("name", UNMOVED)
def test_what_is_moved_back(name, capture_body):
    body, source = UNMOVED[name]
    program = capture_body(lambda m, x, y: body(x).sin(), (3, 5, 4))
    graph = program.entries["full"]
    last = graph.calls[-1].args[0]
    assert unmoved(graph, last) is (graph.placeholders[0] if source else last)
