"""Small modules, one for each interesting rule of axes, with the axes that are free in them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from optpass.ir.program import Program
from optpass.testing import capture_module


class Net(nn.Module):
    """``body(module, x)`` with ``layers``, each as what makes it."""

    def __init__(self, body, **layers):
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer())

    def forward(self, x):
        return self.body(self, x)


TOKENS, IMAGE = (2, 5, 6), (2, 3, 8, 6)
"""[batch, tokens, features], and [batch, channels, height, width]."""


def table(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


def maker(layer):
    return lambda *sizes, **options: lambda: layer(*sizes, **options)


def places(*indices):
    return lambda: nn.Parameter(torch.tensor(indices), requires_grad=False)


linear, conv, up, prelu = maker(nn.Linear), maker(nn.Conv2d), maker(nn.ConvTranspose2d), maker(nn.PReLU)
batch_norm, layer_norm, group_norm = maker(nn.BatchNorm2d), maker(nn.LayerNorm), maker(nn.GroupNorm)
rms_norm, bilinear, embedding = maker(nn.RMSNorm), maker(nn.Bilinear), maker(nn.Embedding)


def encoder_layer():
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def multihead():
    return nn.MultiheadAttention(8, 2, batch_first=True)


def attention(q, k, v, heads, kv_heads=None, **options):
    """Heads split from the features, attention, heads joined."""

    def split(x, count):
        return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)

    kv = kv_heads or heads
    result = functional.scaled_dot_product_attention(split(q, heads), split(k, kv), split(v, kv), **options)
    return result.transpose(1, 2).flatten(2)


def geglu(m, x):
    value, gate = m.enter(x).chunk(2, dim=-1)
    return m.leave(value * functional.gelu(gate))


def fused_qkv(m, x):
    q, k, v = m.qkv(x).reshape(2, 5, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return m.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12))


def concatenated_qkv(m, x):
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return m.out(attention(q, k, v, 4))


def expanded_heads(m, x):
    q, k, v = m.q(x), m.k(x), m.v(x)

    def wide(y):
        return y.reshape(2, 5, 2, 3).transpose(1, 2)[:, :, None].expand(2, 2, 3, 5, 3).reshape(2, 6, 5, 3)

    q = q.reshape(2, 5, 6, 3).transpose(1, 2)
    return m.out(functional.scaled_dot_product_attention(q, wide(k), wide(v)).transpose(1, 2).reshape(2, 5, 18))


def shared_heads(m, x):
    return m.out(attention(m.q(x), m.k(x), m.v(x), 6, 2, enable_gqa=True))


def written_attention(m, x):
    def split(y):
        return y.reshape(2, 5, 3, 4).transpose(1, 2)

    q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
    weights = (q @ k.transpose(-1, -2) * 0.5).softmax(-1)
    return m.out((weights @ v).transpose(1, 2).reshape(2, 5, 12))


def rotary_halves(m, x):
    def turned(y):
        y = y.reshape(2, 5, 3, 4)
        first, second = y.chunk(2, dim=-1)
        angle = torch.arange(5)[:, None, None] * torch.arange(1, 5)
        return (y * angle.cos() + torch.cat([-second, first], -1) * angle.sin()).reshape(2, 5, 12)

    return m.out(attention(turned(m.q(x)), turned(m.k(x)), m.v(x), 3))


def rotary_pairs(m, x):
    def turned(y):
        pairs = y.reshape(2, 5, 3, 2, 2)
        real, imaginary = pairs[..., 0], pairs[..., 1]
        angle = torch.arange(5)[:, None, None] * torch.arange(1, 3)
        rotated = [real * angle.cos() - imaginary * angle.sin(), real * angle.sin() + imaginary * angle.cos()]
        return torch.stack(rotated, -1).reshape(2, 5, 12)

    return m.out(attention(turned(m.q(x)), turned(m.k(x)), m.v(x), 3))


def interleaved_slices(m, x):
    y = m.enter(x).reshape(2, 5, 3, 4)
    return m.leave(torch.stack([-y[..., 1::2], y[..., 0::2]], -1).flatten(-2).flatten(-2))


def residual(m, x):
    y = m.enter(x)
    y = y + m.one(m.norm(y))
    return m.leave(y + m.two(y.relu()))


def skip(m, x):
    y = m.enter(x)
    return m.leave(m.norm(torch.cat([m.side(y), y], 1)).relu())


def low_rank(m, x):
    return m.out(m.base(x) + 0.5 * m.up(m.down(x)))


def masked(m, x):
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    return m.out(attention(m.q(x), m.k(x), m.v(x), 3, attn_mask=mask))


def windows(m, x):
    y = m.enter(x).permute(0, 2, 3, 1).reshape(2, 2, 4, 2, 3, 4).permute(0, 1, 3, 2, 4, 5).reshape(8, 12, 4)
    return m.leave(y.softmax(1) * y)


def replaced(m, x):
    y = m.enter(x).clone()
    y[:, 0] = 0.5
    y[:, :, 1:3] = y[:, :, 3:5]
    return m.leave(y)


def gathered(m, x):
    y = m.enter(x)
    return m.leave(y.gather(1, torch.zeros(2, 3, 8, dtype=torch.long)))


def thirds_of_two_halves(m, x):
    first, second, third = torch.cat([m.enter(x)] * 2, -1).chunk(3, -1)
    return m.one(first) + m.two(second) + m.three(third)


def learnt_queries(m, x):
    queries = m.queries.expand(2, 4, 8)
    return m.out(functional.scaled_dot_product_attention(queries, m.k(x), m.v(x), is_causal=True).flatten(1))


QKV = {"q": (6, 12), "k": (6, 12), "v": (6, 12), "out": (12, 6)}


def projections(**sizes):
    return {name: linear(*pair, bias=name != "k") for name, pair in sizes.items()}


CASES = {
    # what is computed, its layers, the shape of x, and the free axes in the order in which weights are read
    "geglu": (geglu, {"enter": linear(6, 16), "leave": linear(8, 6)}, TOKENS, ["8 enter [ffn]"]),
    "glu": (
        lambda m, x: m.leave(functional.glu(m.enter(x))),
        {"enter": linear(6, 16), "leave": linear(8, 6)},
        TOKENS,
        ["8 enter [ffn]"],
    ),
    "qkv, fused": (
        fused_qkv,
        {"qkv": linear(6, 36), "out": linear(12, 6)},
        TOKENS,
        ["4 qkv [heads]", "3 qkv [head-dim]"],
    ),
    "qkv, joined": (
        concatenated_qkv,
        {"qkv": linear(6, 36), "out": linear(12, 6)},
        TOKENS,
        ["4 qkv [heads]", "3 qkv [head-dim]", "3 qkv [head-dim]"],
    ),
    "q, k, v": (
        lambda m, x: m.out(attention(m.q(x), m.k(x), m.v(x), 4)),
        projections(**QKV),
        TOKENS,
        ["4 q [heads]", "3 q [head-dim]", "3 v [head-dim]"],
    ),
    "attention in two products": (
        written_attention,
        projections(**QKV),
        TOKENS,
        ["3 q [heads]", "4 q [head-dim]", "4 v [head-dim]"],
    ),
    "shared heads, expanded": (
        expanded_heads,
        projections(q=(6, 18), k=(6, 6), v=(6, 6), out=(18, 6)),
        TOKENS,
        ["2 q [heads]", "3 q [heads]", "3 q [head-dim]", "3 v [head-dim]"],
    ),
    "shared heads, enable_gqa": (
        shared_heads,
        projections(q=(6, 18), k=(6, 6), v=(6, 6), out=(18, 6)),
        TOKENS,
        ["2 q [heads]", "3 q [heads]", "3 q [head-dim]", "3 v [head-dim]"],
    ),
    "rotary, halves": (rotary_halves, projections(**QKV), TOKENS, ["3 q [heads]", "4 v [head-dim]"]),
    "rotary, pairs": (rotary_pairs, projections(**QKV), TOKENS, ["3 q [heads]", "4 v [head-dim]"]),
    "every other element": (
        interleaved_slices,
        {"enter": linear(6, 12), "leave": linear(12, 6)},
        TOKENS,
        ["3 enter [ffn]", "2 enter [ffn]"],
    ),
    "mask": (masked, projections(**QKV), TOKENS, ["3 q [heads]", "4 q [head-dim]", "4 v [head-dim]"]),
    "residual stream": (
        residual,
        {"enter": linear(6, 8), "one": linear(8, 8), "two": linear(8, 8), "norm": layer_norm(8), "leave": linear(8, 6)},
        TOKENS,
        ["8 enter [stream]"],
    ),
    "low rank": (
        low_rank,
        {
            "base": linear(6, 8, bias=False),
            "down": linear(6, 4, bias=False),
            "up": linear(4, 8, bias=False),
            "out": linear(8, 6),
        },
        TOKENS,
        ["8 base [stream]", "4 down [ffn]"],
    ),
    "table of positions": (
        lambda m, x: m.leave(m.enter(x) + m.table),
        {"enter": linear(6, 8), "leave": linear(8, 6), "table": table(5, 8)},
        TOKENS,
        ["8 enter [ffn]"],
    ),
    "tied weights": (
        lambda m, x: functional.linear(functional.linear(x, m.table).relu(), m.table.T),
        {"table": table(8, 6)},
        TOKENS,
        ["8 table [ffn]"],
    ),
    "einsum": (
        lambda m, x: torch.einsum("bnr,ro,o->bno", m.enter(x), m.core, m.scale) @ m.out,
        {"enter": linear(6, 4), "core": table(4, 8), "scale": table(8), "out": table(8, 6)},
        TOKENS,
        ["4 enter [ffn]", "8 core [other]"],
    ),
    "tensordot": (
        lambda m, x: m.leave(torch.tensordot(m.enter(x), m.core, dims=([2], [0]))),
        {"enter": linear(6, 4), "core": table(4, 8), "leave": linear(8, 6)},
        TOKENS,
        ["4 enter [ffn]", "8 core [ffn]"],
    ),
    "bilinear": (
        lambda m, x: m.leave(m.both(m.enter(x), m.other(x))),
        {"enter": linear(6, 4), "other": linear(6, 3), "both": bilinear(4, 3, 8), "leave": linear(8, 6)},
        TOKENS,
        ["4 enter [conv]", "3 other [conv]", "8 both [conv]"],
    ),
    "batch matmul": (
        lambda m, x: torch.baddbmm(m.bias, m.enter(x), m.core),
        {"enter": linear(6, 4), "core": table(2, 4, 6), "bias": table(2, 5, 6)},
        TOKENS,
        ["4 enter [ffn]"],
    ),
    "looked up": (gathered, {"enter": linear(6, 8), "leave": linear(8, 6)}, TOKENS, ["8 enter [ffn]"]),
    "replaced": (replaced, {"enter": linear(6, 8), "leave": linear(8, 6)}, TOKENS, []),
    "put in order": (
        lambda m, x: m.leave(m.enter(x).index_select(-1, m.order)),
        {"enter": linear(6, 8), "leave": linear(5, 6), "order": places(3, 1, 0, 7, 4)},
        TOKENS,
        ["5 order [ffn]"],
    ),
    "one channel, joined with nothing": (
        lambda m, x: m.leave(m.enter(x) * torch.cat([m.one(x)], 1)) + torch.cat([m.one(x)], 1).squeeze(1)[:, None],
        {"enter": conv(3, 8, 1), "one": conv(3, 1, 1), "leave": conv(8, 4, 1)},
        IMAGE,
        ["8 enter [conv]"],
    ),
    "joined with itself, cut elsewhere": (
        thirds_of_two_halves,
        {"enter": linear(6, 6), "one": linear(4, 6), "two": linear(4, 6), "three": linear(4, 6)},
        TOKENS,
        ["2 enter [ffn]", "2 enter [ffn]", "2 enter [ffn]"],
    ),
    "joined with itself, added to others": (
        lambda m, x: m.leave(torch.cat([m.enter(x)] * 2, -1) + torch.cat([m.b(x), m.c(x), m.d(x)], -1)),
        {"enter": linear(6, 4), "b": linear(6, 2), "c": linear(6, 5), "d": linear(6, 1), "leave": linear(8, 6)},
        TOKENS,
        ["2 enter [stream]"],
    ),
    "einsum without a result": (
        lambda m, x: m.leave(torch.einsum("...ij,jk", m.enter(x), m.core)),
        {"enter": linear(6, 8), "core": table(8, 10), "leave": linear(10, 6)},
        TOKENS,
        ["8 enter [ffn]", "10 core [ffn]"],
    ),
    "learnt queries, causal": (
        learnt_queries,
        {"queries": table(4, 8), "k": linear(6, 8), "v": linear(6, 3), "out": linear(12, 6)},
        TOKENS,
        ["8 k [head-dim]", "3 v [head-dim]"],
    ),
    "picked": (
        lambda m, x: m.leave(m.enter(x).narrow(-1, 2, 3)),
        {"enter": linear(6, 8), "leave": linear(3, 6)},
        TOKENS,
        ["2 enter [ffn]", "3 enter [ffn]", "3 enter [ffn]"],
    ),
    "repeated": (
        lambda m, x: m.leave(m.enter(x).repeat(1, 1, 2)),
        {"enter": linear(6, 4), "leave": linear(8, 6)},
        TOKENS,
        ["4 enter [ffn]", "2 leave [ffn]"],
    ),
    "interleaved": (
        lambda m, x: m.leave(m.enter(x).repeat_interleave(2, -1)),
        {"enter": linear(6, 4), "leave": linear(8, 6)},
        TOKENS,
        ["4 enter [ffn]", "2 leave [ffn]"],
    ),
    "prelu": (
        lambda m, x: m.leave(m.act(m.enter(x))),
        {"enter": conv(3, 8, 3), "act": prelu(8), "leave": conv(8, 4, 1)},
        IMAGE,
        ["8 enter [conv]"],
    ),
    "batch norm": (
        lambda m, x: m.leave(m.norm(m.enter(x)).relu()),
        {"enter": conv(3, 8, 3), "norm": batch_norm(8), "leave": conv(8, 4, 1)},
        IMAGE,
        ["8 enter [conv]"],
    ),
    "layer norm of channels": (
        lambda m, x: m.leave(m.norm(m.enter(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
        {"enter": conv(3, 8, 3), "norm": layer_norm(8), "leave": conv(8, 4, 1)},
        IMAGE,
        ["8 enter [conv]"],
    ),
    "rms norm": (
        lambda m, x: m.leave(m.norm(m.enter(x))),
        {"enter": linear(6, 8), "norm": rms_norm(8), "leave": linear(8, 6)},
        TOKENS,
        ["8 enter [ffn]"],
    ),
    "depthwise": (
        lambda m, x: m.leave(m.depth(m.enter(x)).relu()),
        {"enter": conv(3, 8, 1), "depth": conv(8, 8, 3, groups=8), "leave": conv(8, 4, 1)},
        IMAGE,
        ["8 enter [conv]"],
    ),
    "depthwise, multiplied": (
        lambda m, x: m.leave(m.depth(m.enter(x)).relu()),
        {"enter": conv(3, 4, 1), "depth": conv(4, 8, 3, groups=4), "leave": conv(8, 4, 1)},
        IMAGE,
        ["4 enter [conv]", "2 depth [conv]"],
    ),
    "grouped": (
        lambda m, x: m.leave(m.groups(m.enter(x)).relu()),
        {"enter": conv(3, 8, 1), "groups": conv(8, 12, 3, groups=4), "leave": conv(12, 4, 1)},
        IMAGE,
        ["4 enter [conv]", "2 enter [conv]", "3 groups [conv]"],
    ),
    "group norm over a skip": (
        skip,
        {"enter": conv(3, 8, 1), "side": conv(8, 4, 3, padding=1), "norm": group_norm(2, 12), "leave": conv(12, 4, 1)},
        IMAGE,
        ["8 enter [conv]", "4 side [conv]"],
    ),
    "transposed": (
        lambda m, x: m.leave(m.up(m.enter(x)).relu()),
        {"enter": conv(3, 8, 1), "up": up(8, 6, 2, stride=2), "leave": conv(6, 4, 1)},
        IMAGE,
        ["8 enter [conv]", "6 up [conv]"],
    ),
    "transposed, grouped": (
        lambda m, x: m.leave(m.up(m.enter(x)).relu()),
        {"enter": conv(3, 8, 1), "up": up(8, 12, 2, groups=4), "leave": conv(12, 4, 1)},
        IMAGE,
        ["4 enter [conv]", "2 enter [conv]", "3 up [conv]"],
    ),
    "pixel shuffle": (
        lambda m, x: m.leave(functional.pixel_shuffle(m.enter(x), 2)),
        {"enter": conv(3, 8, 1), "leave": conv(2, 4, 1)},
        IMAGE,
        ["2 enter [conv]"],
    ),
    "pixel unshuffle": (
        lambda m, x: m.leave(functional.pixel_unshuffle(m.enter(x), 2)),
        {"enter": conv(3, 2, 1), "leave": conv(8, 4, 1)},
        IMAGE,
        ["2 enter [conv]"],
    ),
    "channel shuffle": (
        lambda m, x: m.leave(functional.channel_shuffle(m.enter(x), 2)),
        {"enter": conv(3, 8, 1), "leave": conv(8, 4, 1)},
        IMAGE,
        ["4 enter [conv]"],
    ),
    "patches": (
        lambda m, x: m.leave(functional.unfold(m.enter(x), 2).mT),
        {"enter": conv(3, 5, 1), "leave": linear(20, 4)},
        IMAGE,
        ["5 enter [conv]"],
    ),
    "patches and back": (
        lambda m, x: m.leave(functional.fold(functional.unfold(m.enter(x), 2, stride=2), (8, 6), 2, stride=2)),
        {"enter": conv(3, 5, 1), "leave": conv(5, 4, 1)},
        IMAGE,
        ["5 enter [conv]"],
    ),
    "windows": (windows, {"enter": conv(3, 4, 1), "leave": linear(4, 6)}, IMAGE, ["4 enter [conv]"]),
    "pooled and flattened": (
        lambda m, x: m.leave(functional.adaptive_avg_pool2d(m.enter(x), (2, 3)).flatten(1)),
        {"enter": conv(3, 5, 1), "leave": linear(30, 4)},
        IMAGE,
        ["5 enter [conv]"],
    ),
    "mean of pixels": (
        lambda m, x: m.leave(m.enter(x).mean((2, 3))),
        {"enter": conv(3, 5, 1), "leave": linear(5, 4)},
        IMAGE,
        ["5 enter [conv]"],
    ),
    "excited": (
        lambda m, x: m.leave(m.enter(x) * m.up(m.down(m.enter(x).mean((2, 3), keepdim=True)).relu()).sigmoid()),
        {"enter": conv(3, 8, 1), "down": conv(8, 4, 1), "up": conv(4, 8, 1), "leave": conv(8, 4, 1)},
        IMAGE,
        ["8 enter [conv]", "4 down [conv]"],
    ),
    "joined along the batch": (
        lambda m, x: m.leave(torch.cat([m.enter(x), m.other(x)], 0)),
        {"enter": linear(6, 8), "other": linear(6, 8), "leave": linear(8, 6)},
        TOKENS,
        ["8 enter [ffn]"],
    ),
    "joined sideways": (
        lambda m, x: m.leave(torch.hstack([m.enter(x), m.other(x)])),
        {"enter": conv(3, 4, 1), "other": conv(3, 2, 1), "leave": conv(6, 4, 1)},
        IMAGE,
        ["4 enter [conv]", "2 other [conv]"],
    ),
    "moved": (
        lambda m, x: m.leave(m.enter(x).movedim(1, -1)).swapaxes(1, 3),
        {"enter": conv(3, 8, 1), "leave": linear(8, 4)},
        IMAGE,
        ["8 enter [conv]"],
    ),
    "taken apart and stacked": (
        lambda m, x: m.leave(torch.stack(list(m.enter(x).reshape(2, 5, 2, 4).unbind(2)), 2).flatten(2)),
        {"enter": linear(6, 8), "leave": linear(8, 6)},
        TOKENS,
        ["4 enter [ffn]"],
    ),
    "interpolated at places": (
        lambda m, x: m.leave(functional.grid_sample(m.enter(x), x[:, :2].permute(0, 2, 3, 1))),
        {"enter": conv(3, 8, 1), "leave": conv(8, 4, 1)},
        IMAGE,
        ["8 enter [conv]"],
    ),
    "weight norm": (
        lambda m, x: m.leave(m.enter(x)),
        {"enter": lambda: weight_norm(nn.Linear(6, 8)), "leave": linear(8, 6)},
        TOKENS,
        ["8 enter [ffn]"],
    ),
    "cosine": (
        lambda m, x: functional.cosine_similarity(m.one(x), m.two(x), dim=-1),
        {"one": linear(6, 8), "two": linear(6, 8)},
        TOKENS,
        ["8 one [ffn]"],
    ),
    "a layer of an encoder": (
        lambda m, x: m.leave(m.layer(m.enter(x))),
        {"enter": linear(6, 8), "layer": encoder_layer, "leave": linear(8, 6)},
        TOKENS,
        ["8 enter [stream]", "2 layer.self_attn [heads]", "4 layer.self_attn [head-dim]", "16 layer.linear1 [ffn]"],
    ),
    "heads folded into the batch": (
        lambda m, x: m.leave(m.attention(m.enter(x), m.enter(x), m.enter(x))[0]),
        {"enter": linear(6, 8), "attention": multihead, "leave": linear(8, 6)},
        TOKENS,
        [
            *("8 enter [ffn]", "2 attention [heads]", "4 attention [head-dim]", "4 attention [head-dim]"),
            "8 attention.out_proj [ffn]",
        ],
    ),
    "interleaved, all in a row": (
        lambda m, x: m.leave(m.enter(x[0, 0]).repeat_interleave(2)),
        {"enter": linear(6, 4), "leave": linear(8, 6)},
        TOKENS,
        ["4 enter [ffn]", "2 leave [ffn]"],
    ),
    "embedded": (
        lambda m, x: m.leave(m.table((x > 0).long())[:, :, 0]),
        {"table": embedding(2, 8), "leave": linear(8, 6)},
        TOKENS,
        ["8 table [ffn]"],
    ),
}


def small_net(name: str) -> Program:
    """The module called ``name``, captured with random weights."""
    body, layers, shape, _ = CASES[name]
    return net(body, shape, **layers)


def net(body, shape, **layers) -> Program:
    """``body(module, x)`` with ``layers`` on an ``x`` of ``shape``, captured with random weights."""
    program, _ = capture_module(lambda: Net(body, **layers), x=torch.randn(shape))
    return program
