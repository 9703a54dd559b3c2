"""Where integers go, by form: nodes by name, against what the kernels take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.ir.graph import path_of
from optpass.ir.program import Program
from optpass.quantization.form import CPU, INTEGER, PORTABLE, QuantizationForm, WeightScheme
from optpass.quantization.placement import place, place_weights
from optpass.testing import capture_module


def nothing(node):
    return ""


def edges(program, form, reason=nothing):
    graph = program.entries["full"] if isinstance(program, Program) else program
    return [(value.name, reader.name) for value, reader in place(graph, form, reason).edges]


def test_portable_has_the_inputs_of_convolutions_and_linears(residual, attention):
    assert edges(residual, PORTABLE) == [
        ("x", "conv2d"),
        ("relu", "conv2d_1"),
        ("relu_1", "conv2d_2"),
        ("relu_2", "conv2d_3"),
        ("mean", "linear"),
    ]
    weights = place(residual.entries["full"], PORTABLE, nothing).weights
    assert [weight.read.target for weight in weights] == [
        f"{name}.weight" for name in ("stem", "one", "two", "last", "head")
    ]
    assert {reader for _, reader in edges(attention, PORTABLE)} == {
        f"linear{i}" for i in ("", *(f"_{n}" for n in range(1, 7)))
    }


def test_cpu_adds_in_integers_where_a_convolution_reads_the_sum(residual, attention):
    added = set(edges(residual, CPU)) - set(edges(residual, PORTABLE))
    assert added == {("relu", "add"), ("conv2d_2", "add")}
    # Sums of attention's tokens have two shapes.
    assert edges(attention, CPU) == edges(attention, PORTABLE)


def test_a_sum_that_a_real_operator_reads_stays_real(residual):
    def kept(node):
        return "kept" if path_of(node) == "last" else ""

    assert ("relu", "add") not in edges(residual, CPU, kept)


def test_products_of_activations(attention):
    form = QuantizationForm(products=True)
    added = set(edges(attention, form)) - set(edges(attention, PORTABLE))
    assert added == {("linear_2", "matmul"), ("transpose", "matmul"), ("softmax", "matmul_1"), ("linear_4", "matmul_1")}


def test_everything_is_every_real_value_once(residual, attention):
    for program in (residual, attention):
        graph = program.entries["full"]
        found = edges(program, INTEGER)
        assert len(set(found)) == len(found)
        readers = {reader for _, reader in found}
        # A ReLU that alone reads a convolution is one with it.
        fused = {"relu", "relu_1", "relu_3"} if program is residual else set()
        assert readers == {node.name for node in graph.calls} - fused | {"output"}


def test_edges_stand_in_the_order_of_execution(residual):
    order = [node.name for node in residual.entries["full"].fx.nodes]
    places = [order.index(reader) for _, reader in edges(residual, INTEGER)]
    assert places == sorted(places)


def test_a_restriction_and_a_copy_name_the_same_nodes(residual):
    graph = residual.entries["full"]
    placement = place(graph, CPU, nothing)
    alone = placement.restricted(lambda node: path_of(node) == "one")
    assert [(value.name, reader.name) for value, reader in alone.edges] == [("relu", "conv2d_1")]
    assert [weight.read.target for weight in alone.weights] == ["one.weight"]
    copy = graph.copy()
    moved = alone.on(copy)
    assert moved.edges[0][1] in copy.calls
    assert [node.name for node in placement.operators][:2] == ["conv2d", "conv2d_1"]


class Odd(nn.Module):
    """What has weights and cannot all be quantised."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 8, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.tied = nn.Linear(6, 6)

    def forward(self, x):
        y = self.depthwise(self.grouped(self.up(x)))
        return self.tied(self.tied(y)) @ torch.nn.functional.linear(y, self.tied.weight + 1)


@pytest.fixture(scope="module")
def odd():
    return capture_module(Odd, x=torch.zeros(1, 4, 2, 2))[0].entries["full"]


def test_axes_of_weights_and_what_has_none(odd):
    placement = place(odd, PORTABLE, nothing)
    assert [(weight.read.target, weight.axis) for weight in placement.weights] == [
        ("up.weight", 1),
        ("depthwise.weight", 0),
        ("tied.weight", 0),
        ("tied.weight", 0),
    ]
    assert [(node.name, reason.split(" lie")[0]) for node, reason in placement.declined] == [
        ("conv_transpose2d_1", "the output channels of a grouped transposed convolution")
    ]


@pytest.mark.parametrize(("size", "declined"), [(0, 0), (8, 0), (16, 0), (5, 6), (32, 6)])
def test_weights_alone_are_those_of_linears_in_whole_groups(attention, size, declined):
    placement = place_weights(attention.entries["full"], WeightScheme(4, group_size=size), nothing)
    uneven = [reason for _, reason in placement.declined if f"no multiple of the group's {size}" in reason]
    # The embedding of a timestep has one column.
    assert len(uneven) == declined + (size > 0)
    assert len(placement.weights) == 7 - len(uneven)
    assert placement.edges == []


def test_weights_alone_leave_convolutions(residual):
    placement = place_weights(residual.entries["full"], WeightScheme(8), nothing)
    assert [weight.read.target for weight in placement.weights] == ["head.weight"]
    assert {reason for _, reason in placement.declined} == {
        "no kernel convolves with integer weights and real activations"
    }
