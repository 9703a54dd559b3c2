"""What crosses a module's boundary, and what depends on what."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optpass.analysis.boundaries import ancestors, depending_on, module_paths, values_entering, values_leaving
from optpass.ir.graph import path_of
from optpass.testing import capture_module


class Halves(nn.Module):
    """Gives both halves of a linear layer's result, one of them twice."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.proj(x).chunk(2, -1)
        return left, right * 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList([Halves(), Halves()])

    def forward(self, sample: Tensor, scale: Tensor) -> Tensor:
        outer = self.first(sample)
        left, right = self.blocks[0](outer * scale)
        again, _ = self.blocks[1](left)
        return again + right + scale.reshape(outer.shape[0], 1)


def captured():
    program, _ = capture_module(Net, sample=torch.zeros(2, 4), scale=torch.zeros(2, 1))
    return program.entries["full"]


def told(nodes):
    return [(path_of(node), node.name) for node in nodes]


def test_module_paths_have_the_modules_around():
    assert module_paths(captured()) == {"first", "blocks", "blocks.0", "blocks.0.proj", "blocks.1", "blocks.1.proj"}


def test_what_leaves_and_enters():
    graph = captured()
    # A part of several results belongs where these were made.
    assert told(values_leaving(graph, "blocks.0")) == [("blocks.0", "getitem"), ("blocks.0", "mul_1")]
    assert told(values_leaving(graph, "blocks.0.proj")) == [("blocks.0.proj", "linear_1")]
    assert told(values_leaving(graph, "blocks")) == [("blocks.0", "mul_1"), ("blocks.1", "getitem_2")]
    assert told(values_entering(graph, "blocks.0")) == [("(root)", "mul")]
    assert told(values_entering(graph, "blocks.1")) == [("blocks.0", "getitem")]
    assert values_entering(graph, "first") == []
    assert values_leaving(graph, "block") == []


def test_dependence_is_on_values_and_stops():
    graph = captured()
    nodes = {node.name: node for node in graph.fx.nodes}
    on_sample = depending_on(graph, ["sample"])
    assert {"sample", "linear", "mul", "add"} <= {node.name for node in on_sample}
    assert nodes["reshape"] not in on_sample
    assert nodes["reshape"] in depending_on(graph, ["scale"])
    cut = depending_on(graph, ["sample"], stop={nodes["mul"]})
    assert {node.name for node in cut} == {"sample", "linear"}


def test_ancestors_end_where_they_are_told_to():
    graph = captured()
    nodes = {node.name: node for node in graph.fx.nodes}
    above = ancestors([nodes["getitem_2"]], stop={nodes["getitem"]})
    assert nodes["getitem"] in above
    assert nodes["linear_2"] in above
    assert nodes["linear_1"] not in above
