"""Operators switched one by one, against graphs that have these quantisers alone."""

from __future__ import annotations

import pytest
import torch

from optpass.evaluate.calibration_set import random_set
from optpass.evaluate.difference import program_runner
from optpass.ir.graph import path_of
from optpass.quantization import switched
from optpass.quantization.form import CHANNELS, CPU, INTEGER, PORTABLE, WeightScheme
from optpass.quantization.program import Quantization
from optpass.quantization.ranges import Method
from optpass.quantization.switched import SwitchedGraph


def everything(graph):
    return lambda node: ""


def quantisation(program, form, scheme=CHANNELS, smooth=False):
    placed = Quantization.placed(program, form, scheme, everything)
    if form is None:
        return placed
    return placed.calibrated(program, random_set(program, count=3, seed=0), Method("minmax", smooth=smooth))


def switching(program, quantization):
    applied = quantization.applied(program)
    weights = {name: expression.evaluate() for name, expression in applied.weights.items()}
    return SwitchedGraph(program.entries["full"], applied.entries["full"], weights)


@pytest.mark.parametrize("kept", [0, switched.KEPT])
@pytest.mark.parametrize(
    ("net", "form", "smooth"),
    [("residual", CPU, False), ("residual", INTEGER, False), ("attention", PORTABLE, True), ("attention", None, False)],
)
def test_equals_the_graph_with_these_quantisers_alone(request, monkeypatch, net, form, smooth, kept):
    monkeypatch.setattr(switched, "KEPT", kept)
    program = request.getfixturevalue(net)
    found = quantisation(
        program, form, WeightScheme(4, symmetric=False, group_size=4) if form is None else CHANNELS, smooth
    )
    graph = switching(program, found)
    (inputs,) = random_set(program, count=1, seed=7).entries["full"]
    every = {node.name for node in graph.operators}
    expected, real = graph.run(inputs, ())
    assert torch.equal(expected["output"], program_runner(program, "full")(inputs)["output"])
    whole, integer = graph.run(inputs, every)
    assert torch.equal(whole["output"], program_runner(found.applied(program), "full")(inputs)["output"])
    paths = list(dict.fromkeys(map(path_of, graph.operators)))
    assert len(paths) >= 5
    for path in paths:
        nodes = [node for node in graph.operators if path_of(node) == path]
        own = {node.name for node in nodes}
        alone = found.restricted(lambda node, path=path: path_of(node) == path).applied(program)
        without = found.restricted(lambda node, path=path: path_of(node) != path).applied(program)
        for result, oracle in (
            (graph.rerun(real, own, nodes), alone),
            (graph.rerun(integer, every - own, nodes), without),
        ):
            assert torch.equal(result["output"], program_runner(oracle, "full")(inputs)["output"])
            assert not torch.equal(result["output"], expected["output"])
