"""Where convolutions hand over to attention, by structure."""

from __future__ import annotations

import pytest
import torch
from quantized_nets import Attention, Hybrid, Residual
from torch import nn

from optpass.ir.graph import path_of
from optpass.quantization.bridges import ATTENTION, COMPUTING, bridges
from optpass.quantization.scopes import facts
from optpass.testing import capture_module

PUBLISHED = [17, 18, 36, 37, 67, 68]
"""Q-HyViT's bridge blocks of MobileViT-S, by index among the modules that its code quantises."""


def graph_of(build, **inputs):
    return capture_module(build, **inputs)[0].entries["full"]


def paths(nodes):
    return [path_of(node) for node in nodes]


def test_a_stage_hands_over_to_attention():
    graph = graph_of(Hybrid, x=torch.zeros(2, 3, 8, 8))
    assert paths(bridges(graph).operators) == ["bridge", "qkv"]
    assert not bridges(graph).declined
    assert paths(node for node, found in facts(graph).items() if "bridge" in found) == ["bridge", "qkv"]


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (Residual, {"x": torch.zeros(2, 3, 16, 16)}),
        (Attention, {"x": torch.zeros(2, 6, 16), "timestep": torch.zeros(2)}),
    ],
)
def test_one_kind_alone_has_none(net, inputs):
    found = bridges(graph_of(net, **inputs))
    assert not found.operators
    assert not found.declined


class Embedded(nn.Module):
    """Convolutions with a bias from a timestep between them, attention by 1×1 convolutions, then convolutions again."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.time = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(1, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.q, self.k, self.v, self.out = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.three = nn.Conv2d(8, 8, 3)

    def forward(self, x, timestep):
        x = self.one(x)
        x = self.two(torch.relu(x + self.time(timestep[:, None])[:, :, None, None]))
        y = self.norm(x)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.three(x + self.out(y))


def test_projections_may_be_convolutions():
    graph = graph_of(Embedded, x=torch.zeros(2, 3, 8, 8), timestep=torch.zeros(2))
    assert paths(bridges(graph).operators) == ["two", "q", "k", "v"]


class Patches(nn.Module):
    """A patch embedding, an attention, a depthwise convolution among the tokens, another attention."""

    def __init__(self):
        super().__init__()
        self.patch, self.depthwise = nn.Conv2d(3, 8, 4, stride=4), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.first, self.mix, self.second = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 24)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = nn.functional.scaled_dot_product_attention(*self.first(x).chunk(3, -1))
        x = self.depthwise(self.mix(x).transpose(1, 2)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(*self.second(x).chunk(3, -1))


def test_what_looks_like_a_bridge_has_its_reason():
    found = bridges(graph_of(Patches, x=torch.zeros(2, 3, 16, 16)))
    assert not found.operators
    assert {path_of(node): why for node, why in found.declined} == {
        "patch": "a patch embedding, with no convolution before it, is no bridge block",
        "depthwise": "a convolution among tokens is no bridge block",
    }


@pytest.mark.slow
def test_mobilevit_has_the_published_ones():
    from transformers import MobileViTConfig, MobileViTForImageClassification

    graph = graph_of(
        lambda: MobileViTForImageClassification(MobileViTConfig()), pixel_values=torch.zeros(1, 3, 256, 256)
    )
    index, numbers = -1, {}
    for node in (node for node in graph.calls if node.target in COMPUTING):
        # The published code has q, k and v in one module, and two modules for attention's products.
        joined = path_of(node).endswith((".key", ".value"))
        index += 0 if joined else 1
        numbers[node] = index
        index += node.target in ATTENTION and "scaled_dot_product" in str(node.target)
    assert list(dict.fromkeys(numbers[node] for node in bridges(graph).operators)) == PUBLISHED
