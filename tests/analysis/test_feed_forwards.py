from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.analysis.axes import axes_of
from optpass.analysis.feed_forwards import feed_forwards
from optpass.testing import capture_module

WIDTH = 4


class Net(nn.Module):
    """Feed-forwards of one stream, every second one packed with a gate."""

    def __init__(self, depth):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(depth)])
        self.ups = nn.ModuleList([nn.Linear(WIDTH, 12 if number % 2 else 6) for number in range(depth)])
        self.downs = nn.ModuleList([nn.Linear(6, WIDTH) for _ in range(depth)])

    def forward(self, x):
        for number, (norm, up, down) in enumerate(zip(self.norms, self.ups, self.downs, strict=True)):
            hidden = up(norm(x))
            x = x + down(functional.glu(hidden) if number % 2 else functional.gelu(hidden))
        return x


def found(build, **inputs):
    program, _ = capture_module(build, **inputs)
    axes = axes_of(program)
    start = time.perf_counter()
    result = feed_forwards(program, axes)
    return result, time.perf_counter() - start


def test_in_the_order_of_the_graph():
    result, _ = found(lambda: Net(3), x=torch.zeros(2, 3, WIDTH))
    assert [(group.path, group.size) for group in result.found] == [("ups.0", 6), ("ups.1", 6), ("ups.2", 6)]
    assert not result.refused


def test_a_layer_that_runs_twice_is_one():
    class Twice(Net):
        def forward(self, x):
            return super().forward(super().forward(x))

    result, _ = found(lambda: Twice(1), x=torch.zeros(2, 3, WIDTH))
    assert [group.path for group in result.found] == ["ups.0"]


def test_units_that_something_else_reads_are_refused():
    class Read(Net):
        def forward(self, x):
            hidden = torch.relu(self.ups[0](x))
            return x + self.downs[0](hidden), self.downs[1](hidden).softmax(-1)

    result, _ = found(lambda: Read(2), x=torch.zeros(2, 3, WIDTH))
    assert not result.found
    assert [(item.path, reason) for item, reason in result.refused] == [
        ("ups.0", "what it gives is not what a residual addition adds")
    ]


@pytest.mark.slow
def test_time_is_linear():
    _, little = min((found(lambda: Net(20), x=torch.zeros(1, 2, WIDTH)) for _ in range(2)), key=lambda pair: pair[1])
    result, much = found(lambda: Net(80), x=torch.zeros(1, 2, WIDTH))
    assert len(result.found) == 80
    # Four times as many, with room for a busy machine; pairs of layers would be sixteen times.
    assert much < 10 * little
