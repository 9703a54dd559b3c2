from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.analysis.attention import attentions
from optpass.analysis.attention_choice import Choice, dead_without, hiding, keys_of, output_projection

WIDTH = 8


class Attention(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(2, 6, 6)) if bias else None

    def forward(self, x, mask=None, causal=False):
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        mask = self.bias if mask is None else mask
        z = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(z.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Of three layers, the second of which calls one module twice."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(3)])

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = x + layer(x)
            if number == 1:
                x = x + layer(x)
        return x


def captured(capture_module, build=Stack, **inputs):
    program, _ = capture_module(build, **(inputs or {"x": torch.zeros(2, 6, WIDTH)}))
    return program, attentions(program)


def test_keys_number_the_calls_of_a_module(capture_module):
    _, found = captured(capture_module)
    expected = [("layers.0", 0), ("layers.1", 0), ("layers.1", 1), ("layers.2", 0)]
    assert list(keys_of(found).values()) == expected


def test_choice_by_module_and_number(capture_module):
    _, found = captured(capture_module)
    for layers, match, paths in (
        (None, (), ["layers.0", "layers.1", "layers.1", "layers.2"]),
        ((0,), (), ["layers.0"]),
        (None, ("layers.[12]",), ["layers.1", "layers.1", "layers.2"]),
        ((0, 1), ("layers.1",), ["layers.1"]),
    ):
        choice = Choice(found, layers, match)
        assert [each.path for each in choice.chosen] == paths
        assert not list(choice.missed)
    missed = list(Choice(found, (7,), ("layer.0",)).missed)
    assert missed == [
        ("layer.0", "no attention is in such a module; the nearest are layers.0, layers.2, layers.1"),
        ("layer 7", "no stack has an attention in such a layer"),
    ]


@pytest.mark.parametrize(
    ("bias", "call", "expected"),
    [
        (False, {}, ""),
        (True, {}, ""),
        (False, {"causal": True}, "causal"),
        (False, {"mask": torch.ones(6, 6, dtype=torch.bool).triu()}, "mask"),
        (False, {"mask": torch.zeros(6, 6)}, "mask"),
    ],
    ids=["nothing", "a learned bias", "causal", "a mask", "an additive mask"],
)
def test_what_hides_tokens(bias, call, expected, capture_module):
    class Called(Attention):
        def forward(self, x):
            return super().forward(x, **call)

    program, found = captured(capture_module, lambda: Called(bias))
    assert [hiding(each, program.weights) for each in found.found] == [expected]


class Tapped(Attention):
    """That returns what it attends with as well."""

    def forward(self, x):
        qkv = self.qkv(x)
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in qkv.chunk(3, -1))
        z = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(z.transpose(1, 2).flatten(2)), qkv


@pytest.mark.parametrize("build", [Attention, Tapped])
def test_what_goes_with_an_attention(build, capture_module):
    """All between its input and its projection, but nothing that something else reads."""
    program, found = captured(capture_module, build)
    [layer], graph = found.found, program.entries["full"]
    [source], [qkv] = graph.placeholders, set(layer.projections.query)
    gone = dead_without(output_projection(layer), source)
    assert gone == set(graph.calls) - ({qkv} if build is Tapped else set())
