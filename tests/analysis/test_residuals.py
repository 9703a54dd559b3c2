"""Residual additions of real denoisers against counts made by hand, and the look-alikes that are none."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from denoisers import denoiser
from torch import nn
from torch.nn import functional

from optpass.analysis.residuals import residuals
from optpass.ir.text import operator_name

# Kind → how many, by hand: three layers of each kind of block.
COUNTS = {
    "DiT-XL/2": {"self-attention": 3, "feed-forward": 3},
    "PixArt-α": {"self-attention": 3, "cross-attention": 3, "feed-forward": 3},
    "Wan 2.1 text-to-video 1.3B": {"self-attention": 3, "cross-attention": 3, "feed-forward": 3},
    # Spatial blocks attend, cross-attend and feed forward; temporal ones attend and feed forward.
    "Latte-1": {"self-attention": 3, "cross-attention": 3, "temporal-attention": 3, "feed-forward": 6},
    # Image and text stream attend together and feed forward apart; the last block's text goes nowhere.
    "SD 3 medium": {"self-attention": 5, "feed-forward": 5},
    # Three double blocks of the same sort, three single ones in which attention and feed-forward are one branch.
    "Flux.1": {"self-attention": 9, "feed-forward": 6},
    # One transformer down, one in the middle, two up, each also a residual as a whole; the resnets without shortcut.
    "SD 1.5 UNet": {"self-attention": 4, "cross-attention": 4, "feed-forward": 4, "other": 4, "convolution": 3},
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    found = residuals(denoiser(name)).found
    assert Counter(residual.kind for residual in found) == COUNTS[name]


def test_svd_blends_are_residual():
    """x·α + (1-α)·(x + f(x)): the blend is an addition to x, and holds the temporal branch."""
    found = residuals(denoiser("SVD UNet")).found
    blends = [residual for residual in found if residual.path.endswith("time_mixer")]
    # One a resnet (8) and one a transformer (4).
    assert len(blends) == 12
    assert all(residual.inner and residual.kind == "other" for residual in blends)
    kinds = Counter(residual.kind for residual in found)
    assert kinds["temporal-attention"] == kinds["self-attention"] == 4
    assert kinds["cross-attention"] == 8


def test_paths_are_those_of_the_branch():
    paths = [residual.branch_path for residual in residuals(denoiser("Latte-1")).found[:5]]
    spatial = [f"transformer_blocks.0.{name}" for name in ("attn1", "attn2", "ff.net")]
    assert paths == [*spatial, *(f"temporal_transformer_blocks.0.{name}" for name in ("attn1", "ff.net"))]


def test_projected_shortcuts_are_refused_with_the_reason():
    refused = residuals(denoiser("SD 1.5 UNet")).refused
    shortcuts = ["down_blocks.1.resnets.0", *(f"up_blocks.{i}.resnets.{j}" for i in (0, 1) for j in (0, 1))]
    assert [node.meta["path"] for node, _ in refused] == shortcuts
    assert {reason for _, reason in refused} == {"both operands are projected: neither carries the stream itself"}


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.one, self.two = body, nn.Linear(8, 8), nn.Linear(8, 8)
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, x, y):
        return self.body(self, x, y)


def attend(q, k, v):
    return functional.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)


def rotate(m, x, y):
    halves = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return m.one(x * y[:, :1].cos() + halves * y[:, :1].sin())


def over_frames(m, x, y):
    z = x.unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1)
    z = attend(m.one(z), m.two(z), z).unflatten(0, (2, 5)).transpose(1, 2).flatten(0, 1)
    return x + z


RESIDUAL = {
    "plain": (lambda m, x, y: x + m.one(x), ["feed-forward"]),
    "the branch first": (lambda m, x, y: m.one(x) + x, ["feed-forward"]),
    "gated": (lambda m, x, y: x + m.gate * m.one(x), ["feed-forward"]),
    "blended": (lambda m, x, y: x * 0.3 + 0.7 * m.one(x), ["feed-forward"]),
    "post-norm": (lambda m, x, y: functional.layer_norm(x + m.one(x), (8,)), ["feed-forward"]),
    "parallel branches": (lambda m, x, y: x + m.one(x) + m.two(x), ["feed-forward"] * 2),
    "nested": (lambda m, x, y: x + m.two((z := m.one(x)) + attend(z, z, z)), ["self-attention", "other"]),
    "self-attention": (lambda m, x, y: x + attend(m.one(x), m.two(x), x), ["self-attention"]),
    "cross-attention": (lambda m, x, y: x + attend(m.one(x), m.two(y), y), ["cross-attention"]),
    "written out": (lambda m, x, y: x + torch.bmm((m.one(x) @ m.two(x).mT).softmax(-1), x), ["self-attention"]),
    "over frames": (over_frames, ["temporal-attention"]),
}
NONE = {
    "two inputs": lambda m, x, y: m.one(x) + m.two(y),
    "two projections of one": lambda m, x, y: m.one(x) + m.two(x),
    "nothing computed": lambda m, x, y: m.one(x.sin() + x),
    "rotary embedding": rotate,
    "a bias": lambda m, x, y: m.one(x) + m.gate,
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_what_is_residual(name, capture_module):
    body, kinds = RESIDUAL[name]
    program, _ = capture_module(lambda: Body(body), x=torch.randn(6, 5, 8), y=torch.randn(6, 5, 8))
    assert [residual.kind for residual in residuals(program.entries["full"]).found] == kinds


@pytest.mark.parametrize("name", NONE)
def test_what_is_not(name, capture_module):
    program, _ = capture_module(lambda: Body(NONE[name]), x=torch.randn(6, 5, 8), y=torch.randn(6, 5, 8))
    assert residuals(program.entries["full"]).found == ()


def test_branch_is_what_is_added_after_the_gate(capture_module):
    program, _ = capture_module(lambda: Body(RESIDUAL["gated"][0]), x=torch.randn(6, 5, 8), y=torch.randn(6, 5, 8))
    [residual] = residuals(program.entries["full"]).found
    assert operator_name(residual.branch) == "mul.Tensor"
    assert residual.stream is residual.root is residual.carrier is program.entries["full"].placeholders[0]
    assert list(map(operator_name, residual.nodes)) == ["linear", "mul.Tensor"]


def test_time_is_linear():
    """Three times the blocks, three times the steps: counted, because a clock cannot tell on a shared machine."""
    few, many = (_steps(denoiser("DiT-XL/2", layers)) for layers in (3, 9))
    assert 0 < many <= 3.1 * few


def _steps(graph):
    from optpass.analysis import residuals as module

    count = 0
    plain = module._Finder._steps_back

    def counted(self, node):
        nonlocal count
        count += 1
        return plain(self, node)

    module._Finder._steps_back = counted
    try:
        module.residuals(graph)
    finally:
        module._Finder._steps_back = plain
    return count
