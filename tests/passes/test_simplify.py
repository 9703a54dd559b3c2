from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optpass.capture.sources import capture
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.text import graph_text, operator_name
from optpass.passes.simplify import Simplify
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

STEP = Step("simplify", Simplify())
CONFIGS = Path(__file__).parents[1] / "configs"


class TimeEmbedding(nn.Module):
    """Frequencies by arithmetic on literals, halves swapped, an idle scale and a residual divided by one, twice."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, t):
        angles = t[:, None] * torch.exp(-0.5 * torch.arange(4))[None] * 1
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        waves = torch.cat([waves[:, 4:], waves[:, :4]], -1)
        return nn.functional.silu(self.linear(waves)) + nn.functional.silu(self.linear(waves)) / 1.0


def test_golden(capture_module):
    program, _ = capture_module(TimeEmbedding, t=torch.randn(3))
    after, record = run_pass(program, STEP)
    assert graph_text(after.entries["full"]) == (
        "graph(t: f32[3]):\n"
        "  %unsqueeze = unsqueeze(%t, 1) : f32[3, 1]  ; (root)\n"
        "  %mul_1 = mul.Tensor(%unsqueeze, @unsqueeze_1) : f32[3, 4]  ; (root)\n"
        "  %sin = sin(%mul_1) : f32[3, 4]  ; (root)\n"
        "  %cos = cos(%mul_1) : f32[3, 4]  ; (root)\n"
        "  %cat_1 = cat([%cos, %sin], -1) : f32[3, 8]  ; (root)\n"
        "  %linear = linear(%cat_1, @linear.weight, @linear.bias) : f32[3, 4]  ; linear\n"
        "  %silu = silu(%linear) : f32[3, 4]  ; (root)\n"
        "  %add = add.Tensor(%silu, %silu) : f32[3, 4]  ; (root)\n"
        "  return output=%add"
    )
    assert record.after.totals.parameters == record.before.totals.parameters == 36
    assert program_difference(program, after).max_abs == 0.0
    again, second = run_pass(after, STEP)
    assert not second.modified
    assert graph_text(again.entries["full"]) == graph_text(after.entries["full"])


def test_sd15_as_published():
    """Per ResNet block one silu of the time embedding, two unsqueezes, a division by 1; per attention another one."""
    program = capture(CONFIGS / "sd15-unet")
    after, record = run_pass(program, STEP)
    before, found = (Counter(map(operator_name, p.entries["full"].calls)) for p in (program, after))
    assert before["div.Tensor"] - found["div.Tensor"] == 22 + 32 + 1
    assert before["silu"] - found["silu"] == 21
    assert (before["unsqueeze"], found["unsqueeze"], found["reshape"] - before["reshape"]) == (47, 0, 23)
    assert found["exp"] == found["arange.start"] == found["slice.Tensor"] == 0
    assert (sum(before.values()), sum(found.values())) == (1128, 1020)
    assert record.after.totals.macs == record.before.totals.macs
    assert record.after.totals.parameters == record.before.totals.parameters
    assert not run_pass(after, STEP)[1].modified


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16)
    config.patch_size = 4
    return ViTModel(config, add_pooling_layer=False)


def test_a_vit_loses_its_idle_masks(capture_module):
    program, module = capture_module(vit, pixel_values=torch.randn(2, 3, 16, 16))
    after, _ = run_pass(program, STEP)
    calls = after.entries["full"].calls
    masks = [node for node in calls if operator_name(node) == "scaled_dot_product_attention" and len(node.args) > 3]
    assert masks == []
    assert not {"arange", "ge.Scalar"} & set(map(operator_name, calls))
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected: Any = {"last_hidden_state": module(**example).last_hidden_state}
    assert outputs_difference(expected, program_runner(after, "full")(example)).relative_error <= 1e-6


SPLIT = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        b, n, d = x.shape
        y = self.linear(x).reshape(b, n, 2, 4).transpose(1, 2).reshape(b, -1, n, 4).transpose(1, 2)
        y = torch.cat(y.chunk(2, -1), -1) * 1 + 0
        return y.reshape(b, n, d) + x.expand(b, n, d).unsqueeze(1).unsqueeze(1)[:, 0, 0] / 1.0
"""


@pytest.mark.parametrize("sizes", [["1..4", "3..9", 8], [2, "3..9", 8]])
def test_open_sizes(capture_open, sizes):
    program = capture_open(SPLIT, "{'x': torch.zeros(2, 6, 8)}", {"x": sizes})
    after, record = run_pass(program, STEP)
    found = Counter(map(operator_name, after.entries["full"].calls))
    assert (found["linear"], found["reshape"] <= 2, found["transpose.int"], found["cat"], found["mul.Tensor"]) == (
        *(1, True, 0, 0, 0),
    )
    assert record.sites
    assert program_difference(program, after).max_abs == 0.0
    assert not run_pass(after, STEP)[1].modified


def test_trained_checkpoint(moving_digits):
    program = capture(moving_digits)
    after, record = run_pass(program, STEP)
    assert record.sites
    assert len(after.entries["full"].calls) < 0.8 * len(program.entries["full"].calls)
    assert program_difference(program, after, trials=1).relative_error <= Simplify.contract.rtol
