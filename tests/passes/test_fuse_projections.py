from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.sources import capture
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.program import Program
from optpass.ir.text import graph_text, operator_name, program_text
from optpass.passes.fuse_projections import FuseProjections
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

RTOL = FuseProjections.contract.rtol
CONFIGS = Path(__file__).parents[1] / "configs"


def fuse(program: Program, **options):
    return run_pass(program, Step("fuse-projections", FuseProjections(**options)))


class Attention(nn.Module):
    """Query without a bias, key and value with; ``context`` is what key and value read."""

    def __init__(self, features=8):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, features, bias=False), nn.Linear(8, features), nn.Linear(8, 6)

    def forward(self, x, context):
        return functional.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.gate, self.up = nn.Linear(6, 12, bias=False), nn.Linear(6, 12, bias=False)

    def forward(self, x):
        y = self.attn(x, x)
        return functional.silu(self.gate(y)) * self.up(y)


def test_golden(capture_module):
    program, module = capture_module(Block, x=torch.randn(2, 5, 8))
    after, record = fuse(program)
    text = program_text(after)
    assert graph_text(after.entries["full"]) == (
        "graph(x: f32[2, 5, 8]):\n"
        "  %linear_default = linear(%x, @attn.q_k_v.weight, @attn.q_k_v.bias) : f32[2, 5, 22]  ; attn\n"
        "  %split_with_sizes_default = split_with_sizes(%linear_default, [8, 8, 6], -1) : "
        "(f32[2, 5, 8], f32[2, 5, 8], f32[2, 5, 6])  ; attn\n"
        "  %getitem = getitem(%split_with_sizes_default, 0) : f32[2, 5, 8]  ; attn.q\n"
        "  %getitem_1 = getitem(%split_with_sizes_default, 1) : f32[2, 5, 8]  ; attn.k\n"
        "  %getitem_2 = getitem(%split_with_sizes_default, 2) : f32[2, 5, 6]  ; attn.v\n"
        "  %scaled_dot_product_attention = scaled_dot_product_attention(%getitem, %getitem_1, %getitem_2) : "
        "f32[2, 5, 6]  ; attn\n"
        "  %linear_default_1 = linear(%scaled_dot_product_attention, @gate_up.weight) : f32[2, 5, 24]  ; (root)\n"
        "  %split_with_sizes_default_1 = split_with_sizes(%linear_default_1, [12, 12], -1) : "
        "(f32[2, 5, 12], f32[2, 5, 12])  ; (root)\n"
        "  %getitem_3 = getitem(%split_with_sizes_default_1, 0) : f32[2, 5, 12]  ; gate\n"
        "  %getitem_4 = getitem(%split_with_sizes_default_1, 1) : f32[2, 5, 12]  ; up\n"
        "  %silu = silu(%getitem_3) : f32[2, 5, 12]  ; (root)\n"
        "  %mul = mul.Tensor(%silu, %getitem_4) : f32[2, 5, 12]  ; (root)\n"
        "  return output=%mul"
    )
    assert "full([8], 0.0, f32)" in text
    assert record.sites == ("attn.q+k+v", "gate+up")
    assert not record.declined
    assert record.after.totals.macs == record.before.totals.macs
    assert record.after.totals.parameters == record.before.totals.parameters + 8  # the zeros of q's bias
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = {"output": module(x)}
    assert outputs_difference(expected, program_runner(after, "full")({"x": x})).relative_error <= RTOL
    assert not fuse(after)[1].modified


def test_what_does_not_read_the_same_value_is_no_sibling(capture_module):
    program, _ = capture_module(Attention, x=torch.randn(2, 5, 8), context=torch.randn(2, 7, 8))
    after, record = fuse(program)
    assert record.sites == ("k+v",)
    assert program_difference(program, after).relative_error <= RTOL


class Convolutions(nn.Module):
    def __init__(self, **second):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 3, **{"kernel_size": 1, **second})

    def forward(self, x):
        return self.a(x).mean() * self.b(x)


def test_pointwise_convolutions(capture_module):
    program, _ = capture_module(lambda: Convolutions(bias=False), x=torch.randn(2, 4, 5, 7))
    after, record = fuse(program)
    assert record.sites == ("a+b",)
    assert Counter(map(operator_name, after.entries["full"].calls))["conv2d"] == 1
    assert program_difference(program, after).relative_error <= RTOL


@pytest.mark.parametrize("second", [{"stride": 2}, {"padding": 1}])
def test_convolutions_of_other_settings_are_declined(capture_module, second):
    program, _ = capture_module(lambda: Convolutions(**second), x=torch.randn(2, 4, 5, 7))
    _, record = fuse(program)
    assert not record.modified
    assert [(item.path, item.reason) for item in record.declined] == [
        ("a", "it differs in dtype or settings from b"),
        ("b", "it differs in dtype or settings from a"),
    ]


def test_larger_kernels_and_groups_are_no_projections(capture_module):
    for second in ({"kernel_size": 3, "padding": 1}, {"groups": 1, "kernel_size": (1, 3)}):
        program, _ = capture_module(lambda options=second: Convolutions(**options), x=torch.randn(2, 4, 5, 7))
        _, record = fuse(program)
        assert not record.modified
        assert not record.declined


class Tied(nn.Module):
    def __init__(self, same):
        super().__init__()
        self.a, self.b, self.same = nn.Linear(8, 8), nn.Linear(8, 8), same
        if same:
            self.b.weight = self.a.weight

    def forward(self, x):
        y = self.a(x) * self.b(x)
        return y if self.same else y + self.a(y)


def test_shared_weights_are_declined(capture_module):
    program, _ = capture_module(lambda: Tied(same=False), x=torch.randn(2, 8))
    _, record = fuse(program)
    assert not record.modified
    assert "a.weight is read elsewhere too" in record.declined[0].reason


def test_one_weight_twice_is_a_common_subexpression(capture_module):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x).sin() * self.a(x)

    program, _ = capture_module(Twice, x=torch.randn(2, 8))
    _, record = fuse(program)
    assert not record.modified
    assert "simplify merges them" in record.declined[0].reason


def test_entries_share_the_fused_weight_or_keep_the_parts(capture_module):
    program, _ = capture_module(Block, x=torch.randn(2, 5, 8))
    graph = program.entries["full"]
    twice = Program({"full": graph, "reuse": graph.copy()}, program.weights, program.origin)
    after, record = fuse(twice)
    assert record.sites == ("attn.q+k+v", "gate+up", "reuse:attn.q+k+v", "reuse:gate+up")
    assert sum(name.endswith("weight") for name in after.weights) == 2
    assert program_difference(twice, after).relative_error <= RTOL
    other, _ = capture_module(Attention, x=torch.randn(2, 5, 8), context=torch.randn(2, 7, 8))
    renamed = {f"attn.{name}": weight for name, weight in other.weights.items()}
    entry = other.entries["full"]
    for node in entry.fx.nodes:
        if node.op == "get_attr":
            node.target = f"attn.{node.target}"
    mixed = Program({"full": graph.copy(), "cross": entry}, program.weights.updated(renamed), program.origin)
    after, record = fuse(mixed)
    assert record.sites == ("gate+up",)
    assert {item.entry for item in record.declined} == {"full", "cross"}


def test_options(capture_module):
    program, _ = capture_module(Block, x=torch.randn(2, 5, 8))
    assert fuse(program, match=("attn",))[1].sites == ("attn.q+k+v",)
    assert fuse(program, min=3)[1].sites == ("attn.q+k+v",)
    _, record = fuse(program, max=2)
    assert record.sites == ("gate+up",)
    assert record.declined[0].reason == "3 siblings, and the option asks for max: 2"
    refusal = FuseProjections(match=("mlp",)).requires(program)
    assert refusal == ["match: 'mlp' matches no module that has projections"]


OPEN = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = (layer(x).reshape(b, n, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
"""


def test_open_sizes(capture_open):
    program = capture_open(OPEN, "{'x': torch.zeros(2, 6, 8)}", {"x": ["1..4", "3..9", 8]})
    after, record = fuse(program)
    assert record.sites == ("q+k+v",)
    assert program_difference(program, after).relative_error <= RTOL


@pytest.fixture(scope="module")
def sd15():
    return capture(CONFIGS / "sd15-unet")


def test_sd15_self_and_cross_attention(sd15):
    after, record = fuse(sd15)
    kinds = Counter(site.rpartition(".")[2] for site in record.sites)
    assert kinds == {"to_q+to_k+to_v": 16, "to_k+to_v": 16}
    before, found = (Counter(map(operator_name, p.entries["full"].calls)) for p in (sd15, after))
    assert (before["linear"], found["linear"]) == (184, 184 - 16 * 2 - 16)
    assert record.after.totals.macs == record.before.totals.macs
    assert record.after.totals.parameters == record.before.totals.parameters


def test_sd15_across_reads_the_text_once(sd15):
    after, record = fuse(sd15, across=True, min=4)
    [site] = record.sites
    assert site.count("+") == 31
    assert all(part.endswith(("to_k", "to_v")) for part in site.split("+"))
    [name] = [name for name in after.weights if name not in sd15.weights]
    assert name.endswith("to_k_and_31_more.weight")
    rows = 2 * (320 * 5 + 640 * 5 + 1280 * 6)
    assert after.weights[name].shape == (rows, 768)


def published_vit(folder: Path) -> Path:
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_vit_base(tmp_path):
    program = capture(published_vit(tmp_path))
    _, record = fuse(program)
    assert record.sites == tuple(f"vit.layers.{i}.attention.q_proj+k_proj+v_proj" for i in range(12))


def test_trained_checkpoint(moving_digits):
    program = capture(moving_digits)
    after, record = fuse(program)
    assert record.sites
    assert program_difference(program, after, trials=1).relative_error <= RTOL


def test_convolutions_without_a_batch_stay(capture_module):
    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)

        def forward(self, x):
            return self.a(x) * self.b(x)

    program, _ = capture_module(Unbatched, x=torch.zeros(4, 9, 7))
    _, record = fuse(program)
    assert not record.modified
