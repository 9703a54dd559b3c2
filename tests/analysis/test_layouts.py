"""Where axes come from, against strides that torch's own views have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optpass.analysis.layouts import contiguous, layouts, mixes_outer_axis, regrouped
from optpass.ir.text import operator_name


@pytest.mark.parametrize(
    ("shape", "after"),
    [((6, 5, 4), (2, 3, 5, 4)), ((2, 3, 5), (6, 5)), ((2, 3, 5), (30,)), ((4, 6), (2, 12)), ((5, 1), (1, 5, 1))],
)
def test_a_reshape_of_what_is_contiguous_is_contiguous(shape, after):
    assert regrouped(contiguous(shape), after) == contiguous(after)


def test_a_reshape_of_what_was_permuted_keeps_factors():
    frames, tokens, channels = 3, 5, 4
    value = torch.empty(frames, tokens, channels)
    axes = [contiguous(value.shape)[dim] for dim in (1, 0, 2)]
    assert [axis[0][1] for axis in axes] == list(value.permute(1, 0, 2).stride())
    assert regrouped(axes, (15, 4)) == (((5, 4), (3, 20)), ((4, 1),))
    assert regrouped(axes, (3, 5, 4)) is None


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.features = body, nn.Linear(4, 6)

    def forward(self, x):
        return self.body(self, x)


@pytest.mark.parametrize("temporal", [False, True])
def test_the_outer_axis_is_told_from_the_inner_one(temporal, capture_module):
    """[batch·frames, tokens, channels] as it is, or with the tokens folded into the batch."""

    def body(m, x):
        z = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1) if temporal else x
        return m.features(z)

    program, _ = capture_module(lambda: Body(body), x=torch.randn(6, 5, 4))
    graph = program.entries["full"]
    query = next(node for node in graph.calls if operator_name(node) == "linear")
    assert mixes_outer_axis(layouts(graph)[query], 1) is temporal


def test_cut_axes_come_from_nowhere(capture_module):
    program, _ = capture_module(lambda: Body(lambda m, x: torch.cat([x[:, 1:], x[:, :2]], 1)), x=torch.randn(3, 5, 4))
    graph = program.entries["full"]
    layout = layouts(graph)[graph.calls[-1]]
    assert layout.axes == (((3, 20),), ((6, 0),), ((4, 1),))
