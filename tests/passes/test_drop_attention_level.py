from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from denoisers import sampled
from torch import nn

from optpass.capture.sources import capture
from optpass.evaluate.difference import outputs_difference, program_runner
from optpass.ir.text import graph_text
from optpass.passes.cache_features import CacheFeatures
from optpass.passes.drop_attention_level import DropAttentionLevel
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

CONFIG = Path(__file__).parents[1] / "configs" / "sd15-unet" / "config.json"
RTOL = 1e-5


def dropped(program, **options):
    return run_pass(program, Step("drop-attention-level", DropAttentionLevel(**options)))


class Attention(nn.Module):
    """x + project(attention(x)), a transformer of one layer over a map's pixels."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        y = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(*(part.unsqueeze(1) for part in y)).squeeze(1)
        return x + self.out(y).transpose(1, 2).reshape(x.shape)


class Net(nn.Module):
    """Two levels with attention and a residual convolution each, the lower within a branch of the higher."""

    def __init__(self):
        super().__init__()
        self.wide, self.conv = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.high, self.low = Attention(), Attention()
        self.down, self.up = nn.Conv2d(4, 4, 2, stride=2), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.high(x)
        x = x + self.wide(x)
        y = self.low(self.down(x))
        y = y + self.conv(y)
        return x + self.up(nn.functional.interpolate(y, scale_factor=2.0))


def test_golden(capture_module):
    program, _ = capture_module(Net, x=torch.randn(2, 4, 6, 8))
    after, record = dropped(program)
    lines = graph_text(after.entries["full"]).splitlines()
    assert lines[1:4] == [
        "  %conv2d = conv2d(%x, @wide.weight, @wide.bias) : f32[2, 4, 6, 8]  ; wide",
        "  %add_1 = add.Tensor(%x, %conv2d) : f32[2, 4, 6, 8]  ; (root)",
        "  %conv2d_1 = conv2d(%add_1, @down.weight, @down.bias, [2, 2]) : f32[2, 4, 3, 4]  ; down",
    ]
    assert lines[4].endswith(": f32[2, 4, 12]  ; low")
    assert record.sites == ("high",)
    assert not any("high" in name for name in after.weights)
    _, second = dropped(after)
    assert not second.modified
    assert [item.reason for item in second.declined] == ["nothing attends at level 0 (96 positions)"]


def test_levels_by_number(capture_module):
    program, module = capture_module(Net, x=torch.randn(2, 4, 6, 8))
    after, record = dropped(program, levels=[0, 1, 5])
    assert record.sites == ("high", "low")
    assert [item.reason for item in record.declined] == ["there is no level 5: the levels are 0 to 1"]
    module.high = module.low = nn.Identity()
    x = torch.randn(2, 4, 6, 8)
    with torch.no_grad():
        expected = {"output": module(x)}
    assert outputs_difference(expected, program_runner(after, "full")({"x": x})).relative_error <= RTOL


def test_a_level_of_attention_alone_stays(tmp_path):
    program, _ = sampled("DiT-XL/2", tmp_path)
    _, record = dropped(program)
    assert not record.modified
    assert [item.reason for item in record.declined] == [
        "every residual branch at level 0 (48 positions) attends: none would be left"
    ]


def test_a_small_unet_without_its_transformers(tmp_path, assert_same_function):
    program, module = sampled("SD 1.5 UNet", tmp_path)
    after, record = dropped(program)
    outer = [module.down_blocks[0], module.up_blocks[-1]]
    paths = [f"down_blocks.0.attentions.{i}" for i in range(len(outer[0].attentions))]
    paths += [f"up_blocks.{len(module.up_blocks) - 1}.attentions.{i}" for i in range(len(outer[1].attentions))]
    assert record.sites == tuple(paths)
    for path in paths:
        module.get_submodule(path).forward = lambda x, *args, **kwargs: (x,)
    assert_same_function(after, module)


def test_every_entry_of_a_loop(tmp_path):
    program, _ = sampled("SD 1.5 UNet", tmp_path)
    cached, _ = run_pass(program, Step("cache-features", CacheFeatures(cut="up_blocks.0", every=2)))
    after, record = dropped(cached)
    plain, first = dropped(program)
    assert {site.removeprefix("reuse:") for site in record.sites} == set(first.sites)
    assert any(site.startswith("reuse:") for site in record.sites)
    assert set(after.weights) == set(plain.weights)


@pytest.mark.parametrize(
    ("channels", "size", "before", "after"),
    [
        # InstructPix2Pix at 480×480: MoViE, table 1, counts its UNet at about 600 GFLOP, and 12 % less.
        (8, 60, 600.4, 526.3),
        # Clockwork Diffusion: SD 1.5 at 677.8 GFLOP, the Efficient UNet at 1187 / 2.
        (4, 64, 677.2, 593.0),
    ],
)
def test_as_published(tmp_path, channels, size, before, after):
    """FLOPs without QKᵀ and AV, as both papers count."""
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(CONFIG.read_text()), "in_channels": channels}))
    program = capture(tmp_path, inputs={"sample": (1, channels, size, size)})
    _, record = dropped(program)
    assert len(record.sites) == 5
    assert record.before.totals.flops(attention=False) / 1e9 == pytest.approx(before, rel=2e-4)
    assert record.after.totals.flops(attention=False) / 1e9 == pytest.approx(after, rel=2e-4)
    assert record.before.totals.parameters / 1e6 == pytest.approx(859.53, rel=1e-4)
    assert record.after.totals.parameters / 1e6 == pytest.approx(846.80, rel=1e-4)
