from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.analysis.dependence import dependence
from optpass.analysis.stored_values import stored_values


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
        self.a, self.b, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(3, 8))

    def forward(self, x, c):
        return self.body(self, x, c)


def split_heads(m, x, c):
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (m.a(x), m.a(c), m.b(c)))
    return functional.scaled_dot_product_attention(q, k, v)


def modulated(m, x, c):
    shift, scale, gate = m.wide(functional.silu(c.mean(1))).chunk(3, -1)
    return x + gate[:, None] * (x * (1 + scale[:, None]) + shift[:, None])


def repeated(m, x, c):
    return x + m.a(c.mean(1, keepdim=True)).expand(3, 5, 8)


def sequence_twice(m, x, c):
    keys = m.a(c)
    return x @ keys.mT + x.mean(1, keepdim=True) @ keys.reshape(3, 4, 8)[:, :, :].mT


def halved(m, x, c):
    return x * m.a(c.mean(1, keepdim=True)).half().float().double()


def tables(m, x, c):
    emb = m.a(c.mean(1))
    return (x * (emb + m.table[0])[:, None] + (emb + m.table[1])[:, None]) * (m.table[2] + emb)[:, None]


def masked(m, x, c):
    bias = (1 - c[:, :1, :5]) * -1e4
    return functional.scaled_dot_product_attention(x, x, x, attn_mask=bias.expand(3, 5, 5))


def looked_at(m, x, c):
    return x + m.table.sin().sum() + c[:, :1]


def returned(m, x, c):
    return x + 1, m.a(c)


def several_results(m, x, c):
    values, places = m.a(c).topk(2, -1)
    return x[..., :2] + values[:, :1], places


CASES = {
    "a head split is kept as attention reads it": (split_heads, ["transpose.int[3, 2, 4, 4]"] * 2),
    "the parts of a product are kept as the product": (modulated, ["linear.default[3, 24]"]),
    "a repeated row is kept once": (repeated, ["linear.default[3, 1, 8]"]),
    "what is read in two layouts is kept once": (sequence_twice, ["linear.default[3, 4, 8]"]),
    "a widened half is kept as a half": (halved, ["to.dtype[3, 1, 8]"]),
    "a sum with tables is kept without them": (tables, ["linear.default[3, 8]"]),
    "a mask that is moved and scaled is not kept": (masked, []),
    "nor are constants and inputs": (looked_at, []),
    "what is returned is read": (returned, ["linear.default[3, 4, 8]"]),
    "of several results each is kept alone": (several_results, ["getitem[3, 4, 2]", "slice.Tensor[3, 1, 2]"]),
}


def kept(capture_module, body):
    program, _ = capture_module(lambda: Body(body), x=torch.randn(3, 5, 8), c=torch.randn(3, 4, 8))
    graph = program.entries["full"]
    found = dependence(graph)
    known = {node for node in graph.fx.nodes if node.op != "output" and found.within(node, found.mask({"c"}))}
    return graph, stored_values(graph, known)


@pytest.mark.parametrize("name", CASES)
def test_the_least_is_kept(capture_module, name):
    body, expected = CASES[name]
    _, found = kept(capture_module, body)
    described = [
        f"{str(node.target).removeprefix('aten.') if 'aten' in str(node.target) else 'getitem'}"
        f"{list(node.meta['val'].shape)}"
        for node in found
    ]
    assert described == expected


def test_of_two_chains_each_gives_its_own_last(capture_module):
    graph, found = kept(capture_module, split_heads)
    attention = next(node for node in graph.calls if "attention" in str(node.target))
    assert found == list(attention.args[1:3])


def test_half_stays_half(capture_module):
    _, [found] = kept(capture_module, halved)
    assert found.meta["val"].dtype is torch.float16
