"""Stacks of blocks of real denoisers against what their classes say, and the ways to cut a row that repeats."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from denoisers import denoiser
from torch import nn

from optpass.analysis.blocks import stacks
from optpass.capture.spans import Span
from optpass.ir.graph import shape_of

# The runs of the costliest stack with three layers of each kind: (blocks, path of the first).
RUNS = {
    "DiT-XL/2": [(3, "transformer_blocks.0")],
    "PixArt-α": [(3, "transformer_blocks.0")],
    "LTX-Video": [(3, "transformer_blocks.0")],
    "Wan 2.1 text-to-video 1.3B": [(3, "blocks.0")],
    "Latte-1": [(3, "transformer_blocks.0+temporal_transformer_blocks.0")],
    "Flux.1": [(3, "transformer_blocks.0"), (3, "single_transformer_blocks.0")],
    # The last block of these leaves the text as it is.
    "SD 3 medium": [(2, "transformer_blocks.0"), (1, "transformer_blocks.2")],
    "CogVideoX 2B": [(2, "transformer_blocks.0"), (1, "transformer_blocks.2")],
    "HunyuanVideo": [
        (1, "context_embedder.token_refiner.refiner_blocks.0"),
        (3, "transformer_blocks.0"),
        (3, "single_transformer_blocks.0"),
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name):
    stack = stacks(denoiser(name))[0]
    assert [(len(run), stack.blocks[run.start].path) for run in stack.runs] == RUNS[name]


def test_two_streams_enter_and_leave():
    blocks = stacks(denoiser("Flux.1"))[0].blocks
    image, text = (2, 24, 32), (2, 5, 32)
    for block, after in pairwise(blocks[:3]):
        assert list(map(shape_of, block.entering)) == [image, text]
        assert block.leaving == after.entering
    # The single blocks see both in one.
    assert [list(map(shape_of, block.entering)) for block in blocks[3:]] == [[(2, 29, 32)]] * 3


def test_nested_stacks_stand_for_themselves():
    """SDXL's transformers are residual as a whole and hold two equal blocks each."""
    found = {stack.blocks[0].path: stack for stack in stacks(denoiser("SDXL UNet"))}
    path = "down_blocks.0.attentions.0"
    assert [len(run) for run in found[f"{path}.transformer_blocks.0"].runs] == [2]
    assert [block.path for block in found["down_blocks.0.resnets.0"].blocks] == ["down_blocks.0.resnets.0", path]


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        x = x + self.mix(x.relu())
        return x + self.down(self.up(x).relu())


class Row(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, widths))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


# Widths of the feed-forward branches → (blocks, path of the first) of every run.
ROWS = {
    (4, 4, 4): [(3, "layers.0")],
    (4, 4, 6): [(2, "layers.0"), (1, "layers.2")],
    # From the left alone, the row feed-forward, mix, feed-forward, mix would begin inside of the first layer.
    (4, 6, 6, 6): [(1, "layers.0"), (3, "layers.1")],
    (4, 6): [(1, "layers.0"), (1, "layers.1")],
    (4, 6, 4, 6): [(2, "layers.0+layers.1")],
}


@pytest.mark.parametrize("widths", ROWS)
def test_cuts(widths, capture_module):
    program, _ = capture_module(lambda: Row(*widths), x=torch.randn(3, 5, 8))
    [stack] = stacks(program.entries["full"])
    assert [(len(run), stack.blocks[run.start].path) for run in stack.runs] == ROWS[widths]
    ends = [value for block in stack.blocks for value in (*block.entering, *block.leaving)]
    assert ends[1:-1:2] == ends[2::2]


class Whole(nn.Module):
    """What AuraFlow's blocks do: a stream goes around attention and feed-forward at once, x + f(x + attention)."""

    def __init__(self):
        super().__init__()
        self.mix, self.feed = nn.Linear(8, 8), nn.Linear(8, 8)

    def around(self, attention, *streams):
        whole = torch.cat([self.mix(x) for x in streams], 1)
        mixed = attention(whole, whole, whole).split([x.shape[1] for x in streams], 1)
        return [x + self.feed((x + part).relu()) for x, part in zip(streams, mixed, strict=True)]


class TwoThenOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.joint, self.single = (nn.ModuleList(Whole() for _ in range(2)) for _ in range(2))

    def forward(self, image, text):
        attention = nn.functional.scaled_dot_product_attention
        for block in self.joint:
            image, text = block.around(attention, image, text)
        both = torch.cat([text, image], 1)
        for block in self.single:
            [both] = block.around(attention, both)
        return both


def test_streams_that_share_what_lies_within_their_branches(capture_module):
    program, _ = capture_module(TwoThenOne, image=torch.randn(2, 5, 8), text=torch.randn(2, 3, 8))
    blocks = stacks(program.entries["full"])[0].blocks
    assert [len(block.entering) for block in blocks] == [2, 2, 1, 1]
    assert [len(block.residuals) for block in blocks] == [2, 2, 1, 1]


def test_no_blocks_no_stacks(capture_module):
    program, _ = capture_module(lambda: nn.Linear(8, 8), input=torch.randn(3, 8))
    assert stacks(program.entries["full"]) == []


def test_open_sizes():
    """A batch that stays open is compared by its symbol."""
    [stack, *_] = stacks(denoiser("Latte-1", batch=Span(2, 4)))
    assert [len(run) for run in stack.runs] == [3]
