from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from denoisers import denoiser, sampled
from torch import nn
from torch.nn import functional

from optpass.analysis.mac_rules import macs_of
from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import program_difference, program_runner
from optpass.ir.graph import path_of
from optpass.ir.program import Origin, Program
from optpass.ir.text import graph_text
from optpass.ir.weights import Absent, Constant, WeightStore
from optpass.passes.cache_blocks import CacheBlocks
from optpass.passes.slice_ffn import SliceFfn
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

WIDTH = 6


def sliced(program, **options):
    return run_pass(program, Step("slice-ffn", SliceFfn.from_options(options, owner="test")))


class Plain(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return self.down(self.hidden(x))

    def hidden(self, x):
        return functional.gelu(self.up(x))


class Gated(Plain):
    """SwiGLU: value and gate in two matrices."""

    def __init__(self, hidden=16):
        super().__init__(hidden)
        self.gate = nn.Linear(WIDTH, hidden, bias=False)

    def hidden(self, x):
        return functional.silu(self.gate(x)) * self.up(x)


class Packed(Plain):
    """GEGLU: value and gate in one matrix."""

    def __init__(self, hidden=16):
        super().__init__(hidden)
        self.up = nn.Linear(WIDTH, 2 * hidden)

    def hidden(self, x):
        value, gate = self.up(x).chunk(2, -1)
        return value * functional.gelu(gate)


class Mixed(Plain):
    """A depthwise convolution over the tokens, as in SegFormer and PVTv2."""

    def __init__(self, hidden=16):
        super().__init__(hidden)
        self.depthwise = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)

    def hidden(self, x):
        return functional.gelu(self.depthwise(self.up(x).mT).mT)


class Net(nn.Module):
    """Blocks of one attention-free mixer and a feed-forward, behind an embedding of time that is no feed-forward."""

    def __init__(self, ffn=Plain, depth=2):
        super().__init__()
        self.time1, self.time2 = nn.Linear(3, 12), nn.Linear(12, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(depth)])
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.ffns = nn.ModuleList([ffn() for _ in range(depth)])

    def forward(self, x, time):
        x = x + self.time2(functional.silu(self.time1(time)))
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + self.scale * ffn(norm(x))
        return x


INPUTS = {"x": torch.randn(2, 5, WIDTH), "time": torch.randn(2, 1, 3)}

GOLDEN = """\
graph(x: f32[2, 4, 6]):
  %layer_norm = layer_norm(%x, [6], @norm.weight, @norm.bias, 1e-05, False) : f32[2, 4, 6]  ; norm
  %linear = linear(%layer_norm, @ffn.up.weight, @ffn.up.bias) : f32[2, 4, 8]  ; ffn.up
  %chunk = split_with_sizes(%linear, [4, 4], 2) : (f32[2, 4, 4], f32[2, 4, 4])  ; ffn
  %getitem = getitem(%chunk, 0) : f32[2, 4, 4]  ; ffn
  %getitem_1 = getitem(%chunk, 1) : f32[2, 4, 4]  ; ffn
  %gelu = gelu(%getitem_1) : f32[2, 4, 4]  ; ffn
  %mul = mul.Tensor(%getitem, %gelu) : f32[2, 4, 4]  ; ffn
  %linear_1 = linear(%mul, @ffn.down.weight, @ffn.down.bias) : f32[2, 4, 6]  ; ffn.down
  %add = add.Tensor(%x, %linear_1) : f32[2, 4, 6]  ; (root)
  return output=%add"""


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(WIDTH), Packed()

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def test_golden(capture_module):
    program, _ = capture_module(One, x=torch.zeros(2, 4, WIDTH))
    after, record = sliced(program, fraction=0.25)
    assert graph_text(after.entries["full"]) == GOLDEN
    assert (
        str(after.weights["ffn.up.weight"])
        == f"select({program.weights['ffn.up.weight']}, dim=0, [0, 1, 2, 3, 16, 17, 18, 19])"
    )
    assert str(after.weights["ffn.down.weight"]) == f"select({program.weights['ffn.down.weight']}, dim=1, 0:4)"
    assert list(record.sites) == ["ffn.up"]
    assert not record.declined
    assert record.facts["pruning"] == [{"group": "ffn.up [ffn]", "before": 16, "after": 4}]


def masked(net, kept):
    """``net`` with the hidden units of each feed-forward at zero that are not among its ``kept``."""

    def forward(x, time):
        x = x + net.time2(functional.silu(net.time1(time)))
        for norm, ffn, units in zip(net.norms, net.ffns, kept, strict=True):
            hidden = ffn.hidden(norm(x))
            mask = torch.zeros(hidden.shape[-1])
            mask[list(units)] = 1
            x = x + net.scale * ffn.down(hidden * mask)
        return x

    return forward


def differs(program, expected):
    found, expected = program_runner(program, "full")(INPUTS)["output"], expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("ffn", [Plain, Gated, Packed, Mixed])
@pytest.mark.parametrize(("fraction", "counts"), [(0.5, (8, 8)), (0.125, (2, 2)), ([0.25, 0.8], (4, 12))])
def test_a_slice_is_the_whole_masked(ffn, fraction, counts, capture_module):
    program, net = capture_module(partial(Net, ffn), **INPUTS)
    after, record = sliced(program, fraction=fraction)
    assert len(record.sites) == 2
    assert differs(after, masked(net, map(range, counts))(**INPUTS)) <= 1e-6
    assert differs(after, net(**INPUTS)) > 1e-3


@pytest.mark.parametrize("ffn", [Plain, Gated, Packed])
def test_importance_keeps_the_largest(ffn, capture_module):
    program, net = capture_module(partial(Net, ffn), **INPUTS)
    largest = []
    for each in net.ffns:
        rows = [each.up.weight, *([each.gate.weight] if ffn is Gated else [])]
        energy = sum(row.reshape(-1, 16, WIDTH).square().sum((0, 2)) for row in rows)
        energy = energy + each.down.weight.square().sum(0)
        largest.append(energy.argsort(descending=True).tolist())
    after, _ = sliced(program, fraction=0.5, order="importance")
    assert differs(after, masked(net, [order[:8] for order in largest])(**INPUTS)) <= 1e-6
    sorted_, record = sliced(program, fraction=1.0, order="importance")
    assert record.modified
    assert program_difference(program, sorted_).relative_error <= 1e-6
    assert torch.equal(sorted_.weights["ffns.0.down.weight"].evaluate(), net.ffns[0].down.weight[:, largest[0]])
    assert not sliced(sorted_, fraction=1.0, order="importance")[1].modified
    one, _ = sliced(sorted_, fraction=0.5)
    assert program_difference(one, after).relative_error == 0


class Beside(nn.Module):
    """An attention and a feed-forward side by side, projected together, as in Flux's single blocks."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 16)
        self.out = nn.Linear(WIDTH + 16, WIDTH)

    def forward(self, x, units=range(16)):
        normed = self.norm(x)
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(normed).chunk(3, -1)]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        hidden = functional.gelu(self.up(normed))
        mask = torch.zeros(16)
        mask[list(units)] = 1
        return x + self.out(torch.cat([mixed, hidden * mask], -1))


def test_beside_an_attention(capture_module):
    class Unmasked(Beside):
        def forward(self, x):
            normed = self.norm(x)
            heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(normed).chunk(3, -1)]
            mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            return x + self.out(torch.cat([mixed, functional.gelu(self.up(normed))], -1))

    program, net = capture_module(Unmasked, x=INPUTS["x"])
    after, record = sliced(program, fraction=0.5)
    assert list(record.sites) == ["up"]
    assert differs(after, Beside.forward(net, INPUTS["x"], range(8))) <= 1e-6


def test_what_is_no_feed_forward_stays(capture_module):
    """An embedding of time, an adapter of low rank, a gate of channels, units that are an output."""

    class Others(Net):
        def __init__(self):
            super().__init__(depth=1)
            self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
            self.squeeze, self.excite = nn.Linear(WIDTH, 3), nn.Linear(3, WIDTH)
            self.mix, self.last = nn.Linear(WIDTH, WIDTH), Plain()

        def forward(self, x, time):
            x = super().forward(x, time)
            x = x + self.b(self.a(x))
            gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean(1, True)))))
            x = x + self.mix(x * gate)
            hidden = self.last.hidden(x)
            return x + self.last.down(hidden), hidden

    program, _ = capture_module(Others, **INPUTS)
    _, record = sliced(program, fraction=0.5)
    assert list(record.sites) == ["ffns.0.up"]
    added = "what it gives is not what a residual addition adds"
    assert [(item.path, item.reason) for item in record.declined] == [
        ("time1", added),
        ("squeeze", added),
        ("last.up", "its axis of 16 units is a dimension of the output output.1"),
    ]


def test_match_and_fractions(capture_module):
    program, net = capture_module(Net, **INPUTS)
    after, record = sliced(program, fraction=0.5, match=["ffns.1"])
    assert list(record.sites) == ["ffns.1.up"]
    assert differs(after, masked(net, [range(16), range(8)])(**INPUTS)) <= 1e-6
    _, record = sliced(program, fraction=0.5, match=["ffn.1"])
    assert not record.modified
    assert [item.reason for item in record.declined] == [
        "no feed-forward is in such a module; the nearest are ffns.1.up, ffns.0.up"
    ]
    _, record = sliced(program, fraction=[1, 0.5])
    assert list(record.sites) == ["ffns.1.up"]
    assert ("ffns.0.up", "all of its 16 units stay") in [(item.path, item.reason) for item in record.declined]
    _, record = sliced(program, fraction=1)
    assert not record.modified
    with pytest.raises(UserError, match=r"3 fractions are given, and 2 feed-forwards match: ffns\.0\.up, ffns\.1\.up"):
        sliced(program, fraction=[0.5, 0.5, 0.5])
    for wrong in (0, 1.5, [0.5, -1]):
        with pytest.raises(UserError):
            SliceFfn.from_options({"fraction": wrong}, owner="test")


def test_a_slice_of_a_matformer_needs_no_training():
    assert str(SliceFfn(fraction=0.5).promise) == "retrain"
    assert str(SliceFfn(fraction=0.5, trained=True).promise) == "approximate"


def test_open_sizes(capture_shared):
    spans = {"batch": Span(1, 9), "tokens": Span(2, 16)}
    shapes = {"x": ("batch", "tokens", WIDTH), "time": ("batch", 1, 3)}
    program = capture_shared(partial(Net, Packed), shapes, spans)
    after, record = sliced(program, fraction=0.25)
    assert len(record.sites) == 2
    module = Net(Packed)
    module.load_state_dict({name: each.evaluate() for name, each in program.weights.items()})
    assert differs(after, masked(module, [range(4)] * 2)(**INPUTS)) <= 1e-6


@pytest.mark.slow
def test_entries_share_a_slice(tmp_path):
    program, _ = sampled("DiT-XL/2", tmp_path, layers=4)
    program, _ = run_pass(program, Step("cache-blocks", CacheBlocks(every=2, head=2)))
    after, record = sliced(program, fraction=0.5)
    assert list(record.sites) == [f"transformer_blocks.{number}.ff.net.0.proj" for number in range(4)]
    zeroed = {}
    for number in range(4):
        name = f"transformer_blocks.{number}.ff.net.2.weight"
        value = program.weights[name].evaluate().clone()
        value[:, value.shape[1] // 2 :] = 0
        zeroed[name] = Constant(value)
    assert program_difference(program.with_weights(zeroed), after).relative_error <= 1e-5


@pytest.mark.slow
def test_in_denoisers():
    graph = denoiser("SD 3 medium")
    specs = {str(n.target): n.meta["val"] for n in graph.fx.nodes if n.op == "get_attr"}
    weights = WeightStore({name: Absent(name, tuple(v.shape), v.dtype) for name, v in specs.items()})
    _, record = sliced(Program({"full": graph.copy()}, weights, Origin("test")), fraction=0.5, order="importance")
    both = [f"transformer_blocks.{n}.{ff}.net.0.proj" for n in range(2) for ff in ("ff", "ff_context")]
    assert list(record.sites) == [*both, "transformer_blocks.2.ff.net.0.proj"]
    assert record.facts["scores"] == "none: captured structure-only, units stay in their order"


# Of MatFormer's granularities on ViT-B/16: 10⁹ MACs of a call and million weights of the matrices in the blocks.
VIT_B = {1: (17.45, 84.9), 2: (11.87, 56.6), 4: (9.08, 42.5), 8: (7.69, 35.4)}


@pytest.mark.parametrize("part", [8, *(pytest.param(part, marks=pytest.mark.slow) for part in (1, 2, 4))])
def test_published_counts(part, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}), "utf-8")
    after, record = sliced(capture(tmp_path, structure_only=True), fraction=1 / part)
    assert len(record.sites) == (12 if part > 1 else 0)
    blocks = [node for node in after.entries["full"].calls if path_of(node).startswith("blocks.")]
    matrices = [e for name, e in after.weights.items() if name.startswith("blocks.") and len(e.shape) == 2]
    macs, parameters = VIT_B[part]
    assert sum(map(macs_of, blocks)) / 1e9 == pytest.approx(macs, abs=0.006)
    assert sum(each.numel for each in matrices) / 1e6 == pytest.approx(parameters, abs=0.06)
