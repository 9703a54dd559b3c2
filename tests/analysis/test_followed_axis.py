"""An axis is followed where its elements are computed apart: changing one element changes that element alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.analysis.followed_axis import axis_in_result

TOKENS = 5
FOLLOWED = {
    "pointwise": (lambda m, x: functional.gelu(x) * 2, 1),
    "two of them": (lambda m, x: x.sin() + x, 1),
    "broadcast": (lambda m, x: x * torch.ones(4) + torch.ones(3, 1, 1), 1),
    "layer norm": (lambda m, x: functional.layer_norm(x, (4,)), 1),
    "linear": (lambda m, x: m.linear(x), 1),
    "transposed": (lambda m, x: x.transpose(0, 1), 0),
    "permuted": (lambda m, x: x.permute(2, 0, 1), 2),
    "heads": (lambda m, x: x.reshape(3, TOKENS, 2, 2).transpose(1, 2), 2),
    "unsqueezed in front": (lambda m, x: x.unsqueeze(0), 2),
    "unsqueezed behind": (lambda m, x: x.unsqueeze(-1), 1),
    "another selected": (lambda m, x: x.transpose(0, 1)[:, 1], 0),
    "a part of the features": (lambda m, x: x.chunk(2, -1)[1], 1),
    "fused heads": (lambda m, x: x.reshape(3, TOKENS, 2, 2).permute(2, 0, 1, 3).unbind(0)[1], 1),
}
LOST = {
    "mean": lambda m, x: x.mean(1, keepdim=True).expand(3, TOKENS, 4),
    "softmax": lambda m, x: x.softmax(1),
    "norm over both": lambda m, x: functional.layer_norm(x, (TOKENS, 4)),
    "merged": lambda m, x: x.reshape(3 * TOKENS, 4),
    "rows of the other's own": lambda m, x: x + m.positions,
    "turned against itself": lambda m, x: x[:, :, :1] + x[:, :, :1].transpose(1, 2),
    "linear over it": lambda m, x: m.over(x.transpose(1, 2)),
    "cut": lambda m, x: x[:, 1:],
    "rolled": lambda m, x: x.roll(1, 1),
}


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.linear, self.over = body, nn.Linear(4, 6), nn.Linear(TOKENS, 2)
        self.positions = nn.Parameter(torch.zeros(TOKENS, 4))

    def forward(self, x):
        return self.body(self, x)


def followed(capture_module, body):
    program, module = capture_module(lambda: Body(body), x=torch.zeros(3, TOKENS, 4))
    graph = program.entries["full"]
    axes = {graph.placeholders[0]: 1}
    for node in graph.calls:
        if any(operand in axes for operand in node.all_input_nodes):
            place = axis_in_result(node, axes)
            if place is None:
                return None, module
            axes[node] = place
    [result] = graph.output_node.args[0]
    return axes[result], module


@pytest.mark.parametrize("case", FOLLOWED)
def test_followed(capture_module, case):
    body, expected = FOLLOWED[case]
    axis, module = followed(capture_module, body)
    assert axis == expected
    x = torch.randn(3, TOKENS, 4)
    changed = x.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        same = (module(x) == module(changed)).movedim(axis, 0).flatten(1)
    assert same[[0, 1, 3, 4]].all()
    assert not same[2].all()


@pytest.mark.parametrize("case", LOST)
def test_lost(capture_module, case):
    assert followed(capture_module, LOST[case])[0] is None
