"""Costs against published counts, torch's own counter, and counts done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from optpass.analysis.cost import measure
from optpass.analysis.mac_rules import RULES, mac_rule
from optpass.capture.sources import capture
from optpass.ir.program import Program

CONFIGS = Path(__file__).parents[1] / "configs"
TOLERANCE = 0.005


def close(value: float, published: float) -> bool:
    return abs(value / published - 1) <= TOLERANCE


def test_sd15_unet_as_published():
    totals = measure(capture(CONFIGS / "sd15-unet", inputs={"sample": (1, 4, 64, 64)})).totals
    assert close(totals.parameters, 859.52e6)
    assert close(totals.macs - totals.macs_attention, 338.6e9)
    assert close(totals.macs, 401.7e9)


@pytest.mark.parametrize(("height", "width", "tflop"), [(32, 64, 8.459), (72, 128, 44.80)])
def test_svd_unet_as_published(height, width, tflop):
    totals = measure(capture(CONFIGS / "svd-unet", inputs={"sample": (1, 14, 8, height, width)})).totals
    assert close(totals.parameters, 1524.62e6)
    assert close(totals.flops() / 1e12, tflop)
    assert totals.weight_bytes == pytest.approx(4 * totals.parameters, rel=1e-4)


class Zoo(nn.Module):
    """One of each operator that has a rule, with grouped and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2, stride=2)
        self.up = nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1, groups=2)
        self.line = nn.Conv1d(6, 5, 3)
        self.volume = nn.Conv3d(1, 2, (3, 1, 1))
        self.linear = nn.Linear(14, 7)

    def forward(self, x, bias):
        x = self.up(self.conv(x))
        x = self.line(x.flatten(2)[:, :, :16])
        x = self.linear(x)
        y = torch.bmm(x, x.transpose(1, 2))
        y = torch.baddbmm(bias, y, x)
        z = torch.addmm(bias[0], y[0], bias[0].mT @ bias[0])
        volume = self.volume(y[:, None, :, :, None])
        return torch.matmul(y, z.mT).sum() + torch.einsum("bij,bkj->bik", y, x).sum() + volume.sum() + torch.mm(z, z.mT)


def test_macs_agree_with_torch_counter(capture_module):
    inputs = {"x": torch.randn(2, 4, 8, 8), "bias": torch.randn(2, 5, 7)}
    program, _ = capture_module(Zoo, **inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        Zoo()(*(torch.empty_like(value, device="meta") for value in inputs.values()))
    cost = measure(program)
    assert cost.totals.flops() == counter.get_total_flops()
    assert cost.totals.macs_attention == 0
    counted = {name for name, row in cost.entries["full"].by_operator().items() if row["macs"]}
    assert {"conv2d", "conv1d", "conv3d", "conv_transpose2d.input", "linear", "bmm", "baddbmm", "addmm", "matmul",
            "einsum", "mm"} <= counted  # fmt: skip


class Attention(nn.Module):
    """The same attention fused and written out, over keys that come from other places."""

    def __init__(self, written: bool):
        super().__init__()
        self.written = written
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.classify = nn.Linear(8, 3)

    def forward(self, x, context):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.q(x), self.k(context), self.v(context)))
        if self.written:
            scores = (q @ k.transpose(-1, -2)) * 0.5
            y = torch.softmax(scores, -1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v)
        return torch.softmax(self.classify(y.transpose(1, 2).flatten(2)), -1)


@pytest.mark.parametrize("written", [False, True])
def test_attention_is_counted_apart(capture_module, written):
    program, _ = capture_module(lambda: Attention(written), x=torch.randn(3, 5, 8), context=torch.randn(3, 7, 6))
    totals = measure(program).totals
    # 3 clips, 2 heads, 5 queries, 7 keys, 4 features; twice.
    assert totals.macs_attention == 2 * 3 * 2 * 5 * 7 * 4
    assert totals.macs - totals.macs_attention == 3 * (5 * 8 * 8 + 2 * 7 * 6 * 8 + 5 * 8 * 3)
    assert totals.flops(attention=False) == 2 * (totals.macs - totals.macs_attention)


class Chain(nn.Module):
    """x [4, 8] f32 = 128 B → linear to 1024 B → views → relu → sum of halves."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(8, 64)

    def forward(self, x):
        y = self.wide(x)
        a, b = y.reshape(4, 2, 32).transpose(0, 1).chunk(2)
        return (a.relu() + b).squeeze(0)


def test_peak_by_liveness(capture_module):
    program, _ = capture_module(Chain, x=torch.randn(4, 8))
    # At the addition: x 128, y 1024 (b views it), relu 512, result 512.
    assert measure(program).totals.peak_activation_bytes == 128 + 1024 + 512 + 512


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.tied = self.head
        self.register_buffer("table", torch.randn(4), persistent=False)

    def forward(self, x):
        return self.tied(self.head(self.norm(self.conv(x)).mean((2, 3)))) + self.table


def test_parameters_are_counted_as_published_counts_are(capture_module):
    program, module = capture_module(Normalised, x=torch.randn(1, 3, 2, 2))
    totals = measure(program).totals
    assert totals.parameters == sum(parameter.numel() for parameter in module.parameters())
    # Running mean and variance and the table are stored all the same.
    assert totals.weight_bytes == 4 * (totals.parameters + 8 + 4)


def test_entries_share_weights(capture_module):
    program, _ = capture_module(lambda: nn.Linear(4, 4), input=torch.randn(2, 4))
    graph = program.entries["full"]
    cost = measure(Program({"a": graph, "b": graph.copy()}, program.weights, program.origin))
    assert cost.totals.parameters == cost.entries["a"].totals.parameters == 20
    assert cost.totals.weight_bytes == 80
    assert cost.totals.macs == 2 * cost.entries["a"].totals.macs == 64
    assert cost.totals.peak_activation_bytes == cost.entries["b"].totals.peak_activation_bytes == 64


def test_json_and_breakdowns(capture_module):
    program, _ = capture_module(lambda: Attention(False), x=torch.randn(3, 5, 8), context=torch.randn(3, 7, 6))
    cost = measure(program)
    keys = {"parameters", "macs", "macs_attention", "weight_bytes", "peak_activation_bytes"}
    record = json.loads(json.dumps(cost.as_json()))
    assert set(record) == {"entries", "totals"}
    assert set(record["totals"]) == set(record["entries"]["full"]["totals"]) == keys
    modules = cost.entries["full"].by_module(1)
    assert modules["q"] == {"parameters": 72, "macs": 3 * 5 * 8 * 8, "macs_attention": 0}
    assert modules["(root)"]["macs_attention"] == cost.totals.macs_attention
    assert sum(row["macs"] for row in modules.values()) == cost.totals.macs
    operators = cost.entries["full"].by_operator()
    assert operators["linear"]["count"] == 4
    assert sum(row["macs"] for row in operators.values()) == cost.totals.macs


def test_an_author_adds_a_rule(capture_module, monkeypatch):
    program, _ = capture_module(nn.ReLU, input=torch.randn(2, 4))
    monkeypatch.setattr("optpass.analysis.mac_rules.RULES", RULES.copy())
    assert measure(program).totals.macs == 0
    mac_rule(torch.ops.aten.relu.default)(lambda node: node.meta["val"].numel())
    assert measure(program).totals.macs == 8
