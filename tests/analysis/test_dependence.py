from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from optpass.analysis.computations import Numbering
from optpass.analysis.dependence import dependence
from optpass.capture.export import build_fake, export_program
from optpass.capture.spans import Span
from optpass.ir.program import Origin


class Conditioned(nn.Module):
    """Cross-attention to a context, its queries modulated by a timestep."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.time = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, t, context):
        rows = context.repeat(x.shape[0], 1, 1)
        q = self.q(x) * functional.silu(self.time(t))
        return functional.scaled_dot_product_attention(q, self.k(rows), self.v(rows)) + torch.rand(1)


def inputs(batch=3):
    return {"x": torch.randn(batch, 5, 8), "t": torch.randn(1, 8), "context": torch.randn(1, 4, 8)}


def depending(graph, found):
    """Names of the nodes by the inputs that they depend on."""
    rows = {}
    for node in graph.calls:
        names = [name for index, name in enumerate(found.inputs) if found.of[node] >> index & 1]
        rows.setdefault(",".join(names) + ("?" if found.of[node] >> len(found.inputs) else ""), []).append(node.name)
    return rows


def test_every_value_knows_its_inputs(capture_module):
    program, _ = capture_module(Conditioned, **inputs())
    graph = program.entries["full"]
    found = dependence(graph)
    assert found.inputs == ("x", "t", "context")
    assert depending(graph, found) == {
        "context": ["repeat", "linear_2", "linear_3"],
        "x": ["linear"],
        "t": ["linear_1", "silu"],
        "x,t": ["mul"],
        "x,t,context": ["scaled_dot_product_attention"],
        "?": ["rand"],
        "x,t,context?": ["add"],
    }
    mask = found.mask({"t", "context", "unheard of"})
    assert [node.name for node in graph.calls if found.within(node, mask)] == [
        *("repeat", "linear_1", "silu", "linear_2", "linear_3")
    ]


def test_what_the_memory_held_is_no_chance(capture_module):
    class Written(nn.Module):
        def forward(self, x, y):
            return torch.baddbmm(torch.empty(3, 5, 5), y, y.mT, beta=0) + x

    program, _ = capture_module(Written, x=torch.randn(3, 5, 5), y=torch.randn(3, 5, 4))
    graph = program.entries["full"]
    found = depending(graph, dependence(graph))
    assert found.keys() == {"", "y", "x,y"}
    assert "baddbmm" in found["y"]


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Linear(8, 8)

    def forward(self, x, t, context):
        rows = self.time(t.expand(x.shape[0], 8))
        return x * rows[:, None] + context.sum(1, keepdim=True).expand(x.shape[0], x.shape[1], 8)


def test_a_size_is_read_where_it_is_preferred(capture_shared):
    shapes = {"x": ("batch", "tokens", 8), "t": (1, 8), "context": ("batch", 4, 8)}
    graph = capture_shared(Repeated, shapes, {"batch": Span(1, 4), "tokens": Span(2, 9)}).entries["full"]
    sample_first = dependence(graph)
    time = next(node for node in graph.calls if node.target is torch.ops.aten.linear.default)
    assert not sample_first.within(time, sample_first.mask({"t", "context"}))
    preferred = dependence(graph, ("context", "t"))
    assert preferred.within(time, preferred.mask({"t", "context"}))
    assert ("context", 0) in preferred.sizes.values()
    # The number of tokens is the sample's alone; the contents of what is repeated to it are not.
    wide = [node for node in graph.calls if node.target is torch.ops.aten.expand.default][-1]
    mask = preferred.mask({"t", "context"})
    assert not preferred.within(wide, mask)
    assert preferred.contents[wide] & ~mask == 0


def test_equal_computations_have_equal_numbers_in_all_graphs(capture_module):
    program, _ = capture_module(Conditioned, **inputs())
    graph = program.entries["full"]
    other = graph.copy()
    linears = [node for node in other.calls if node.target is torch.ops.aten.linear.default]
    linears[0].args = (*linears[0].args[:1], linears[1].args[1], linears[0].args[2])
    numbering = Numbering(program.weights)
    first, second = numbering.of(graph), numbering.of(other)
    same = {a.name for a, b in zip(graph.fx.nodes, other.fx.nodes, strict=True) if first[a] == second[b]}
    assert {"x", "t", "context", "q_weight", "repeat", "linear_1", "silu", "linear_2", "linear_3"} <= same
    assert same.isdisjoint({"linear", "mul", "scaled_dot_product_attention", "rand", "add"})


def test_linear_in_the_nodes():
    """A deep chain of many inputs, where a set a node would be quadratic."""

    class Chain(nn.Module):
        def forward(self, inputs):
            total = inputs[0]
            for value in inputs:
                total = total + value.sin()
            return total

    fake, mode = build_fake(Chain)
    program = export_program(fake, mode, {"inputs": [torch.randn(2) for _ in range(200)]}, {}, Origin("test"))
    graph = program.entries["full"]
    found = dependence(graph)
    last = graph.output_node.args[0][0]
    assert found.of[last] == (1 << 200) - 1
