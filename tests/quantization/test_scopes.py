"""What operators are, by the graph, and which are named by path."""

from __future__ import annotations

import torch
from torch import nn

from optpass.quantization.scopes import facts, left_alone, unmatched
from optpass.testing import capture_module


def by_name(program):
    return {node.name: sorted(found) for node, found in facts(program.entries["full"]).items()}


def test_facts_of_an_attention(attention):
    assert by_name(attention) == {
        "linear": ["first"],
        "linear_1": ["embedding", "first"],
        "linear_2": ["attention"],
        "linear_3": ["attention"],
        "linear_4": ["attention"],
        "linear_5": ["attention"],
        "linear_6": ["last"],
        "matmul": ["products"],
        "matmul_1": ["products"],
    }


def test_facts_of_convolutions(residual):
    assert {name: found for name, found in by_name(residual).items() if found} == {
        "conv2d": ["first"],
        "linear": ["last"],
    }


class Fused(nn.Module):
    """The fused attention between reshapes; a second input of one dimension goes through an MLP into it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.embed, self.deep = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x, timestep):
        angles = timestep[:, None] * torch.arange(4)
        x = x + self.deep(torch.relu(self.embed(torch.sin(angles))))[:, None]
        q, k, v = self.qkv(x).reshape(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(2, 6, 8))


def test_views_are_looked_through():
    program, _ = capture_module(Fused, x=torch.zeros(2, 6, 8), timestep=torch.zeros(2))
    found = {str(node.args[1]): sorted(f) for node, f in facts(program.entries["full"]).items()}
    assert found["out_weight"] == ["attention", "last"]
    assert "attention" in found["qkv_weight"]
    # Angles are computed from the timestep alone; the tokens that they join are not.
    assert found["embed_weight"] == found["deep_weight"] == ["embedding"]


def test_reasons_by_path():
    assert left_alone("down.0.conv", (), ()) == ""
    assert left_alone("down.0.conv", ("up.*",), ()) == "not in match"
    assert left_alone("down.0.conv", ("down",), ("down.0",)) == "kept, as asked"
    assert left_alone("down.0.conv", (), ("*.conv",)) == "kept, as asked"


def test_patterns_that_match_nothing_are_told_with_the_paths(residual):
    found = unmatched(residual.entries.values(), ("stem", "steem", "o*"))
    assert list(found) == ["steem"]
    assert found["steem"] == ["stem", "one", "two", "last", "head"]
