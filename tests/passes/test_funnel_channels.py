from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import program_difference
from optpass.ir.text import graph_text
from optpass.ir.weights import Constant
from optpass.passes.cache_features import CacheFeatures
from optpass.passes.funnel_channels import FunnelChannels
from optpass.passes.reparameterize import Reparameterize
from optpass.passes.single_token_attention import SingleTokenAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

CONFIGS = Path(__file__).parents[1] / "configs"
ATTENTION = ("attention-qk", "attention-vo")


def funnelled(program, **options):
    return run_pass(program, Step("funnel-channels", FunnelChannels(**options)))


class Attention(nn.Module):
    """Two heads of eight channels; the last projections may be of low rank, or something may stand between."""

    def __init__(self, bias=True, between=None, written=False, width=16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, width, bias=bias) for _ in range(3))
        self.out = nn.Linear(width, 6)
        self.between, self.written = between, written
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.between:
            q = self.between(self, q)
        if self.written:
            y = (q * 0.3) @ k.mT
            y = y.softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


def tokens():
    return {"x": torch.randn(3, 5, 6)}


def test_golden(capture_module):
    program, _ = capture_module(lambda: Attention(bias=False), **tokens())
    after, record = funnelled(program)
    assert graph_text(after.entries["full"]) == (
        "graph(x: f32[3, 5, 6]):\n"
        "  %linear = linear(%x, @q.weight) : f32[3, 5, 8]  ; q\n"
        "  %unflatten = reshape(%linear, [3, 5, 2, 4]) : f32[3, 5, 2, 4]  ; (root)\n"
        "  %transpose = transpose.int(%unflatten, 1, 2) : f32[3, 2, 5, 4]  ; (root)\n"
        "  %linear_1 = linear(%x, @k.weight) : f32[3, 5, 8]  ; k\n"
        "  %unflatten_1 = reshape(%linear_1, [3, 5, 2, 4]) : f32[3, 5, 2, 4]  ; (root)\n"
        "  %transpose_1 = transpose.int(%unflatten_1, 1, 2) : f32[3, 2, 5, 4]  ; (root)\n"
        "  %linear_2 = linear(%x, @v.weight) : f32[3, 5, 8]  ; v\n"
        "  %unflatten_2 = reshape(%linear_2, [3, 5, 2, 4]) : f32[3, 5, 2, 4]  ; (root)\n"
        "  %transpose_2 = transpose.int(%unflatten_2, 1, 2) : f32[3, 2, 5, 4]  ; (root)\n"
        "  %scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %transpose_1, %transpose_2, "
        "scale=0.35355339059327373) : f32[3, 2, 5, 4]  ; (root)\n"
        "  %transpose_3 = transpose.int(%scaled_dot_product_attention, 1, 2) : f32[3, 5, 2, 4]  ; (root)\n"
        "  %flatten = reshape(%transpose_3, [3, 5, 8]) : f32[3, 5, 8]  ; (root)\n"
        "  %linear_3 = linear(%flatten, @out.weight, @out.bias) : f32[3, 5, 6]  ; out\n"
        "  %add = add.Tensor(%x, %linear_3) : f32[3, 5, 6]  ; (root)\n"
        "  return output=%add"
    )
    assert record.sites == ("q", "v")
    assert not record.declined


def heads(weight):
    return weight.evaluate().double().unflatten(0, (2, -1))


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_weights_are_the_best_of_their_rank(capture_module, ratio, written):
    """Of each head's Wqᵀ·Wk and Wo·Wv, biases as one more column: computed anew from the original weights."""
    program, _ = capture_module(lambda: Attention(written=written), **tokens())
    after, _ = funnelled(program, ratio=ratio)

    def products(of):
        w = {name: of.weights[name] for name in ("q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias")}
        q, k, v = (torch.cat([heads(w[f"{n}.weight"]), heads(w[f"{n}.bias"])[..., None]], -1) for n in "qkv")
        out = of.weights["out.weight"].evaluate().double().unflatten(1, (2, -1)).transpose(0, 1)
        return q.mT @ k, out @ v

    rank = int(8 * ratio)
    for whole, cut in zip(products(program), products(after), strict=True):
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        best = (u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]
        torch.testing.assert_close(cut, best, rtol=0, atol=1e-6 * float(whole.abs().max()))


def test_enough_rank_is_exact(capture_module):
    """Six inputs and a bias: products of rank seven, which a funnel of seven of eight channels holds."""
    program, module = capture_module(Attention, **tokens())
    after, record = funnelled(program, ratio=0.875)
    assert record.after.totals.parameters < record.before.totals.parameters
    assert program_difference(program, after).relative_error <= 1e-5
    x = torch.randn(3, 5, 6)
    with torch.no_grad():
        [found] = after.entries["full"].module(after.weights)(x)
        torch.testing.assert_close(found, module(x), rtol=0, atol=1e-5)


class Block(nn.Module):
    """A residual block as diffusers has it: convolution, embedding of the time, norm, activation, convolution."""

    def __init__(self, norm=None, embedded=True, activation=functional.silu):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.norm, self.activation = norm() if norm else None, activation
        self.time = nn.Linear(6, 16) if embedded else None

    def forward(self, x, t):
        h = self.enter(x)
        h = h + self.time(t)[:, :, None, None] if self.time else h
        h = self.norm(h) if self.norm else h
        return x * t.mean() + self.leave(self.activation(h))


def images():
    return {"x": torch.randn(2, 4, 5, 5), "t": torch.randn(2, 6)}


def test_convolutions_without_what_is_ignored(capture_module):
    """Without norm and activation the block is affine, of rank at most 16, and a funnel is its truncated SVD."""
    program, _ = capture_module(lambda: Block(activation=lambda h: h * 1.5), **images())
    after, record = funnelled(program, scope=("conv",))
    assert record.sites == ("enter",)

    def product(of):
        w = {name: expression.evaluate().double() for name, expression in of.weights.items()}
        first = torch.cat([w["enter.weight"].flatten(1), w["enter.bias"][:, None], w["time.weight"]], 1)
        first = torch.cat([first, w["time.bias"][:, None]], 1)
        return w["leave.weight"].transpose(1, 3).flatten(0, 2) @ first

    u, s, vh = torch.linalg.svd(product(program), full_matrices=False)
    best = (u[:, :8] * s[:8]) @ vh[:8]
    torch.testing.assert_close(product(after), best, rtol=0, atol=1e-6 * float(s[0]))


def test_norms_between_keep_their_groups(capture_module):
    program, _ = capture_module(lambda: Block(lambda: nn.GroupNorm(4, 16)), **images())
    after, record = funnelled(program, scope=("conv",), ratio=0.3)
    assert record.facts["pruning"] == [{"group": "enter [conv]", "before": 16, "after": 8}]
    assert FunnelChannels(scope=("conv",)).promise.kind == "retrain"
    assert FunnelChannels().promise.kind == "approximate"
    before = program.weights["norm.weight"].evaluate()
    torch.testing.assert_close(after.weights["norm.weight"].evaluate(), before.mean().expand(8))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("written", [True, False])
def test_adaptors_merge_into_the_narrow_weights(capture_module, bias, written):
    program, _ = capture_module(lambda: Attention(bias, written=written), **tokens())
    _compare_forms(program, ATTENTION, {"q", "k", "v", "out"})


@pytest.mark.parametrize("norm", [None, lambda: nn.GroupNorm(4, 16)])
def test_adaptors_of_convolutions_merge(capture_module, norm):
    program, _ = capture_module(lambda: Block(norm), **images())
    _compare_forms(program, ("conv",), {"enter", "time", "leave"})


def _compare_forms(program, scope, layers):
    merged, record = funnelled(program, scope=scope)
    apart, _ = funnelled(program, scope=scope, merged=False)
    assert apart.untrained == set(apart.weights) - set(program.weights)
    assert {name.removesuffix(".funnel") for name in apart.weights if name.endswith(".funnel")} == layers
    for layer in layers:
        assert apart.weights[f"{layer}.weight"] is program.weights[f"{layer}.weight"]
    assert program_difference(merged, apart).relative_error <= 1e-6
    again, remerged = run_pass(apart, Step("reparameterize", Reparameterize()))
    assert not any(name.endswith(".funnel") for name in again.weights)
    assert program_difference(merged, again).relative_error <= 1e-6
    assert remerged.after.totals.macs == record.after.totals.macs < record.before.totals.macs


def test_adaptors_of_the_whole_width_change_nothing(capture_module):
    """The fun-factor 1 of the paper's ablation."""
    program, _ = capture_module(Attention, **tokens())
    after, record = funnelled(program, ratio=1, merged=False)
    assert len(record.sites) == 2
    assert program_difference(program, after).relative_error <= 1e-6


def declined(program, **options):
    after, record = funnelled(program, **options)
    assert graph_text(after.entries["full"]) == graph_text(program.entries["full"])
    assert not record.modified
    return {item.path: item.reason for item in record.declined}


def test_a_second_run_leaves_it(capture_module):
    program, _ = capture_module(Attention, **tokens())
    for options in ({}, {"merged": False}):
        after, _ = funnelled(program, **options)
        assert all("a funnel already" in reason for reason in declined(after).values())
    assert declined(program, ratio=1) == dict.fromkeys("qv", "1 of 8 channels, are all of them")


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda module, q: module.norm(q), "layer_norm.default stands between"),
        (lambda module, q: torch.tanh(q), "tanh.default stands between"),
        (lambda module, q: torch.cat([-q[..., 4:], q[..., :4]], -1), "cat.default stands between"),
    ],
)
def test_what_stands_between_query_and_key(capture_module, between, reason):
    program, _ = capture_module(lambda: Attention(between=between), **tokens())
    _, record = funnelled(program)
    assert record.sites == ("v",)
    assert {item.path for item in record.declined} == {"q"}
    assert reason in record.declined[0].reason


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 48), nn.Linear(16, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_one_projection_of_all_three(capture_module):
    program, _ = capture_module(Fused, **tokens())
    # What its heads are wide is one axis for the query, the key and the value.
    [(path, reason)] = declined(program).items()
    assert path == "qkv"
    assert "several projections in one" in reason


def test_an_attention_with_one_key(capture_module):
    program, _ = capture_module(Attention, x=torch.randn(3, 1, 6))
    assert all("single-token-attention" in reason for reason in declined(program).values())


def test_convolutions_that_are_no_pair(capture_module):
    program, _ = capture_module(lambda: Block(lambda: nn.BatchNorm2d(16), embedded=False), **images())
    assert declined(program, scope=("conv",)) == {"enter": "aten.batch_norm.default stands between (norm: %batch_norm)"}
    folded, _ = run_pass(program, Step("reparameterize", Reparameterize()))
    _, record = funnelled(folded, scope=("conv",))
    assert record.sites == ("enter",)


def test_a_single_layer_saves_nothing(capture_module):
    """Rank d/2 of a d × d layer, written as two layers, has as many parameters: no funnel is offered for one."""
    program, _ = capture_module(lambda: nn.Linear(16, 16, bias=False), input=torch.randn(4, 16))
    after, record = funnelled(program)
    assert not record.modified
    assert not record.sites
    assert after.weights["weight"].numel == 2 * 16 * 8


def test_patterns(capture_module):
    program, _ = capture_module(Attention, **tokens())
    _, record = funnelled(program, match=("v",))
    assert record.sites == ("v",)
    with pytest.raises(UserError, match="matches no layer of attention-qk, attention-vo; the nearest are k, q, v"):
        funnelled(program, match=("oat",))
    with pytest.raises(UserError, match="ratio"):
        FunnelChannels.from_options({"ratio": 0}, owner="funnel-channels")


def test_open_sizes(capture_shared):
    program = capture_shared(Attention, {"x": (3, "n", 6)}, {"n": Span(2, 8)})
    after, record = funnelled(program, ratio=0.875)
    assert len(record.sites) == 2
    assert after.entries["full"].dimensions
    assert program_difference(program, after).relative_error <= 1e-5


def test_half_precision_is_rounded_once(capture_module):
    program, _ = capture_module(lambda: Attention().bfloat16(), x=torch.randn(3, 5, 6).bfloat16())
    after, _ = funnelled(program)
    assert {expression.dtype for expression in after.weights.values()} == {torch.bfloat16}
    single, _ = capture_module(Attention, **tokens())
    wide = {name: Constant(expression.evaluate().float()) for name, expression in program.weights.items()}
    single, _ = funnelled(single.with_weights(wide))
    for name in ("q.weight", "k.weight", "v.weight", "out.weight"):
        assert torch.equal(single.weights[name].evaluate().bfloat16(), after.weights[name].evaluate())


@pytest.fixture(scope="module")
def svd():
    program = capture(CONFIGS / "svd-unet", inputs={"sample": (1, 14, 8, 32, 64)})
    after, _ = run_pass(program, Step("single-token-attention", SingleTokenAttention()))
    return after


@pytest.mark.parametrize(
    ("scope", "axis", "sites", "saved"),
    [
        pytest.param(("attention-qk",), "spatial", 16, 0.197, marks=pytest.mark.slow),
        (ATTENTION, "spatial", 32, 0.393),
        pytest.param(("attention-qk",), "both", 32, 0.287, marks=pytest.mark.slow),
        pytest.param(ATTENTION, "both", 64, 0.575, marks=pytest.mark.slow),
        (("conv",), "both", 44, 1.4385),
    ],
)
def test_svd_as_published(svd, scope, axis, sites, saved):
    """MobileVD, tables 2 and 5, at 14 frames of 512×256 after the optimised cross-attention: TFLOP of each scope."""
    _, record = funnelled(svd, scope=scope, axis=axis)
    assert len(record.sites) == sites
    assert (record.before.totals.flops() - record.after.totals.flops()) / 1e12 == pytest.approx(saved, abs=0.0005)


def test_trained_checkpoint(moving_digits):
    program = capture(moving_digits, dtype=torch.float32)
    program, _ = run_pass(program, Step("single-token-attention", SingleTokenAttention()))
    after, record = funnelled(program)
    assert len(record.sites) == 28
    assert not record.declined
    assert program_difference(program, after).snr > 30
    _, temporal = funnelled(program, axis="temporal")
    _, spatial = funnelled(program, axis="spatial")
    assert len(temporal.sites) == len(spatial.sites) == 14
    assert all("temporal_transformer_blocks" in path for path in temporal.sites)


def test_in_a_loop_entries_change_together(moving_digits):
    program = capture(moving_digits, dtype=torch.float32)
    program, _ = run_pass(program, Step("single-token-attention", SingleTokenAttention()))
    split = Step("cache-features", CacheFeatures(cut="up_blocks.1", every=2))
    options = {"match": ("up_blocks.1.*", "mid_block.*")}
    before, record = funnelled(run_pass(program, split)[0], **options)
    after, _ = run_pass(funnelled(program, **options)[0], split)
    assert len(record.sites) == 12
    assert program_difference(before, after).relative_error <= 1e-6
