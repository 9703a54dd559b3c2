from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.sources import capture
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.graph import path_of
from optpass.ir.text import graph_text, operator_name
from optpass.passes.single_token_attention import SingleTokenAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step

STEP = Step("single-token-attention", SingleTokenAttention())
RTOL = SingleTokenAttention.contract.rtol
CONFIGS = Path(__file__).parents[1] / "configs"


class Blocked(nn.Module):
    """An attention inside a block, so that its path is not the root."""

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"attn2": CrossAttention()})

    def forward(self, x, context, mask=None):
        return self.block["attn2"](x, context, mask)


class CrossAttention(nn.Module):
    """x + out(attention(norm(x), context)), as diffusers' blocks have it."""

    def __init__(self, written=None, **options):
        super().__init__()
        self.norm, self.q = nn.LayerNorm(8), nn.Linear(8, 8, bias=False)
        self.k, self.v, self.out = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False), nn.Linear(8, 8)
        self.written, self.options = written, options

    def forward(self, x, context, mask=None):
        heads = lambda y: y.unflatten(-1, (2, 4)).transpose(1, 2)  # noqa: E731
        q, k, v = heads(self.q(self.norm(x))), heads(self.k(context)), heads(self.v(context))
        if self.written:
            y = self.written(q, k, v, mask)
        else:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return x + self.out(y.transpose(1, 2).flatten(2))


def inputs(tokens=1):
    return {"x": torch.randn(3, 5, 8), "context": torch.randn(3, tokens, 6)}


def test_golden(capture_module):
    program, _ = capture_module(CrossAttention, **inputs())
    after, record = run_pass(program, STEP)
    assert graph_text(after.entries["full"]) == (
        "graph(x: f32[3, 5, 8], context: f32[3, 1, 6]):\n"
        "  %linear_2 = linear(%context, @v.weight) : f32[3, 1, 8]  ; v\n"
        "  %unflatten_2 = reshape(%linear_2, [3, 1, 2, 4]) : f32[3, 1, 2, 4]  ; (root)\n"
        "  %transpose_2 = transpose.int(%unflatten_2, 1, 2) : f32[3, 2, 1, 4]  ; (root)\n"
        "  %transpose_int = transpose.int(%transpose_2, 1, 2) : f32[3, 1, 2, 4]  ; (root)\n"
        "  %reshape_default = reshape(%transpose_int, [3, 1, 8]) : f32[3, 1, 8]  ; (root)\n"
        "  %linear_default = linear(%reshape_default, @out.weight, @out.bias) : f32[3, 1, 8]  ; out\n"
        "  %add_tensor = add.Tensor(%x, %linear_default) : f32[3, 5, 8]  ; (root)\n"
        "  return output=%add_tensor"
    )
    assert set(after.weights) == {"v.weight", "out.weight", "out.bias"}
    assert record.sites == ("(root)",)
    assert not record.declined
    assert program_difference(program, after).relative_error <= RTOL


def bmm(q, k, v, mask):
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    scores = torch.baddbmm(torch.empty(6, 5, 1), q, k.transpose(1, 2), beta=0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (3, 2))


def matmul(q, k, v, mask):
    return ((q / 2) @ k.mT).softmax(-1) @ v


def wide_softmax(q, k, v, mask):
    return (q @ k.mT).double().softmax(-1).float() @ v


def of_queries(q, k, v, mask):
    return torch.softmax(q @ k.mT, -2) @ v


def masked(q, k, v, mask):
    return ((q @ k.mT) + mask).softmax(-1) @ v


@pytest.mark.parametrize("written", [bmm, matmul, wide_softmax])
def test_written_out(capture_module, written):
    program, _ = capture_module(lambda: CrossAttention(written), **inputs())
    after, record = run_pass(program, STEP)
    assert len(record.sites) == 1
    assert {operator_name(node) for node in after.entries["full"].calls}.isdisjoint({"softmax.int", "bmm", "matmul"})
    assert set(after.weights) == {"v.weight", "out.weight", "out.bias"}
    assert program_difference(program, after).relative_error <= RTOL


def declined(capture_module, build, **arguments):
    program, _ = capture_module(build, **arguments)
    after, record = run_pass(program, STEP)
    assert not record.modified
    assert graph_text(after.entries["full"]) == graph_text(program.entries["full"])
    return [(item.path, item.reason) for item in record.declined]


def test_declines_with_the_reason_and_the_path(capture_module):
    mask = torch.zeros(3, 1, 5, 1)
    found = declined(capture_module, Blocked, **inputs(), mask=mask)
    assert found == [("block.attn2", "the attention has a mask, which may hide the only key")]
    [(_, reason)] = declined(capture_module, lambda: CrossAttention(is_causal=True), **inputs())
    assert "causal" in reason
    [(_, reason)] = declined(capture_module, lambda: CrossAttention(dropout_p=0.5), **inputs())
    assert "drops out" in reason
    [(_, reason)] = declined(capture_module, lambda: CrossAttention(masked), **inputs(), mask=mask)
    assert "a mask?" in reason
    assert "%add" in reason


def test_other_attention_is_no_site(capture_module):
    assert declined(capture_module, CrossAttention, **inputs(tokens=2)) == []
    assert declined(capture_module, lambda: CrossAttention(matmul), **inputs(tokens=2)) == []
    assert declined(capture_module, lambda: CrossAttention(of_queries), **inputs()) == []


def test_a_small_svd_computes_the_same(tiny_svd):
    program, module, example = tiny_svd
    after, record = run_pass(program, STEP)
    places = ["down_blocks.0.attentions.0", "mid_block.attentions.0", *(f"up_blocks.1.attentions.{i}" for i in (0, 1))]
    assert list(record.sites) == [
        f"{place}.{kind}_blocks.0.attn2" for place in places for kind in ("transformer", "temporal_transformer")
    ]
    dead = ("attn2.to_q.", "attn2.to_k.", "blocks.0.norm2.")
    assert any(part in name for name in program.weights for part in dead)
    assert not any(part in name for name in after.weights for part in dead)
    # The context's rows over all pixels are gone too: every to_v and to_out of a temporal attention sees one row.
    calls = after.entries["full"].calls
    rows = {
        node.meta["val"].shape[:-1] for node in calls if "temporal" in path_of(node) and ".attn2.to_" in path_of(node)
    }
    assert rows == {(1, 1)}
    # The oracle is the module itself, not our own capture of it.
    with torch.no_grad():
        expected = {"sample": module(**example).sample}
    assert outputs_difference(expected, program_runner(after, "full")(example)).relative_error <= RTOL
    _, second = run_pass(after, STEP)
    assert not second.modified
    assert not second.sites


def test_svd_as_published():
    """MobileVD's own count, at 14 frames of 512×256."""
    program = capture(CONFIGS / "svd-unet", inputs={"sample": (1, 14, 8, 32, 64)})
    _, record = run_pass(program, STEP)
    before, after = record.before.totals, record.after.totals
    assert len(record.sites) == 32
    assert before.parameters / 1e6 == pytest.approx(1524.62, rel=0.005)
    assert after.parameters / 1e6 == pytest.approx(1474.28, rel=0.0005)
    assert before.flops() / 1e12 == pytest.approx(8.459, rel=0.005)
    assert after.flops() / 1e12 == pytest.approx(8.076, rel=0.0005)


def test_trained_checkpoint(moving_digits):
    program = capture(moving_digits)
    after, record = run_pass(program, STEP)
    assert record.sites
    assert record.after.totals.parameters < record.before.totals.parameters
    assert program_difference(program, after).relative_error <= RTOL
