"""Costs against published counts, torch's own counter, and counts done by hand."""

from __future__ import annotations

import json
import sys
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


class Recurrent(nn.Module):
    """Recurrent layers of every kind, and a fused encoder layer."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=4, batch_first=True)
        self.gru, self.rnn = nn.GRU(8, 5, batch_first=True), nn.RNN(5, 3, batch_first=True)
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x):
        y = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        return self.cell(y[:, -1])


def test_recurrent_layers_count_their_products(capture_module):
    program, _ = capture_module(Recurrent, x=torch.randn(3, 7, 6))
    # LSTM, two directions: layer 1 from 6, layer 2 from 2·4; hidden 4, projected from 8 to 4.
    lstm = 2 * sum(4 * 8 * (size + 4) + 4 * 8 for size in (6, 8))
    gru, rnn, cell = 3 * 5 * (8 + 5), 3 * (5 + 3), 3 * 4 * (3 + 4)
    cost = measure(program)
    assert cost.totals.macs == 3 * 7 * (lstm + gru + rnn) + 3 * cell
    assert cost.totals.macs_attention == 0
    assert cost.entries["full"].uncounted() == {}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        layer = self.layer
        self.first = (layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)

    def forward(self, x):
        layer, attention = self.layer, self.layer.self_attn
        projections = (attention.in_proj_weight, attention.in_proj_bias)
        out = (attention.out_proj.weight, attention.out_proj.bias)
        norms = (layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias)
        feed = (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
        y = torch._transformer_encoder_layer_fwd(x, 8, 2, *projections, *out, False, False, 1e-5, *norms, *feed)
        return torch._native_multi_head_attention(y, y, y, 8, 2, *projections, *out, need_weights=False)[0]


def test_fused_layers_count_as_what_they_are_made_of(capture_module):
    program, _ = capture_module(Encoder, x=torch.randn(3, 5, 8))
    attention, projections, feed = 2 * 3 * 5 * 5 * 8, 3 * 5 * 4 * 8 * 8, 2 * 3 * 5 * 8 * 16
    cost = measure(program)
    assert {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"} <= set(cost.entries["full"].by_operator())
    assert cost.totals.macs == 2 * (attention + projections) + feed
    assert cost.totals.macs_attention == 2 * attention


class Products(nn.Module):
    """Products by their rarer names."""

    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(3, 5, 4)

    def forward(self, a, b):
        left, right = a[0], b[0]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return (
            self.pair(a, b).sum()
            + torch.tensordot(left, b, dims=([0], [1])).sum()
            + torch.inner(left, left).sum()
            + torch.addbmm(torch.mm(left, left.mT), b, b.mT).sum()
            + torch.addmv(left[:, 0], right, right[0]).sum()
            + torch.linalg.vecdot(a, a[:1]).sum()
            + kernel(a[None], a[None, :, :6], a[None, :, :6])[0].sum()
        )


def test_products_by_their_rarer_names(capture_module):
    program, _ = capture_module(Products, a=torch.randn(2, 7, 3), b=torch.randn(2, 7, 5))
    bilinear, tensordot, inner = 2 * 7 * 4 * 5 * (3 + 1), 3 * 2 * 5 * 7, 7 * 7 * 3
    addbmm, mm, addmv, vecdot, sdpa = 2 * 7 * 7 * 5, 7 * 7 * 3, 7 * 5, 2 * 7 * 3, 2 * 7 * 6 * (3 + 3)
    cost = measure(program)
    assert cost.totals.macs == bilinear + tensordot + inner + addbmm + mm + addmv + vecdot + sdpa
    assert cost.totals.macs_attention == sdpa
    assert cost.entries["full"].uncounted() == {}


class Uncounted(nn.Module):
    """What has no rule: a distance matrix, a Fourier transform, and an operator of somebody else's."""

    def __init__(self):
        super().__init__()
        self.inner = Distances()

    def forward(self, x):
        spectrum = torch.fft.rfft(x).abs()
        return self.inner(x).sum() + torch.ops.optpass_tests.mystery(spectrum).sum() + torch.softmax(x, -1).topk(2)[0]


class Distances(nn.Module):
    def forward(self, x):
        return torch.cdist(x, x * 2)


def test_what_may_multiply_and_has_no_rule_is_named(capture_module):
    library = torch.library.Library("optpass_tests", "FRAGMENT")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", lambda x: x.mT @ x, "CompositeExplicitAutograd")
    library.impl("mystery", lambda x: x.new_empty(x.shape[-1], x.shape[-1]), "Meta")
    program, _ = capture_module(Uncounted, x=torch.randn(4, 6))
    cost = measure(program)
    found = cost.as_json()["entries"]["full"]["uncounted"]
    assert set(found) == {"cdist", "fft_rfft", "optpass_tests.mystery"}
    assert found["cdist"] == {"count": 1, "paths": ["inner"]}
    assert cost.totals.macs == 0


@pytest.mark.parametrize("config", ["sd15-unet", "svd-unet"])
def test_nothing_of_a_known_model_is_uncounted(config):
    program = capture(CONFIGS / config)
    assert measure(program).entries["full"].uncounted() == {}


class Tower(nn.Module):
    """``depth`` attentions, each of which reads one weight through one view more than the last."""

    def __init__(self, depth: int):
        super().__init__()
        self.depth = depth
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        seen = self.table
        for _ in range(self.depth):
            seen = seen.transpose(0, 1)
            x = torch.softmax(x @ seen, -1) @ x
        return x


def function_calls(work) -> int:
    count = 0

    def count_calls(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(count_calls)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_costs_are_linear_in_nodes(capture_module):
    short, long = (capture_module(lambda: Tower(depth), x=torch.randn(4, 4))[0] for depth in (20, 80))  # noqa: B023
    nodes = len(long.entries["full"].calls) / len(short.entries["full"].calls)
    calls = function_calls(lambda: measure(long)) / function_calls(lambda: measure(short))
    assert nodes > 3.5
    assert calls <= 1.05 * nodes


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
