from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.evaluate.difference import outputs_difference, program_runner
from optpass.ir.loop import single_step
from optpass.ir.text import graph_text
from optpass.passes.multiscale_time import MultiscaleTime
from optpass.passes.resize_inputs import ResizeInputs
from optpass.passes.simplify import Simplify
from optpass.passes.single_token_attention import SingleTokenAttention
from optpass.pipeline.manager import run_pass, run_passes
from optpass.pipeline.recipe import Step, make_recipe
from optpass.rewrite.common_subexpressions import merge_common_subexpressions
from optpass.runtime.looped import program_module

CONFIGS = Path(__file__).parents[1] / "configs"
RTOL = 1e-5


def step(**options):
    return Step("multiscale-time", MultiscaleTime(**options))


class Mixing(nn.Module):
    """A convolution over frames between two over pixels; a bias for each frame's position."""

    def __init__(self):
        super().__init__()
        self.enter, self.deep, self.leave = nn.Conv2d(3, 4, 1), nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)), Out()

    def forward(self, sample):
        batch, frames = sample.shape[:2]
        x = self.enter(sample.flatten(0, 1)).unflatten(0, (batch, frames))
        deep = self.deep(x.transpose(1, 2)).transpose(1, 2) + torch.arange(frames)[:, None, None, None] / 10
        return self.leave(x + deep)


class Joined(Mixing):
    """An image before the frames of a clip."""

    def forward(self, sample, image):
        return super().forward(torch.cat([image, sample], 1))


class Out(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2])


GOLDEN = """\
graph(sample: f32[2, 4, 3, 5, 6]):
  %flatten = reshape(%sample, [8, 3, 5, 6]) : f32[8, 3, 5, 6]  ; (root)
  %conv2d = conv2d(%flatten, @enter.weight, @enter.bias) : f32[8, 4, 5, 6]  ; enter
  %reshape_default = reshape(%conv2d, [2, 2, 2, 4, 5, 6]) : f32[2, 2, 2, 4, 5, 6]  ; (root)
  %mean_dim = mean.dim(%reshape_default, [2]) : f32[2, 2, 4, 5, 6]  ; (root)
  %reshape_default_1 = reshape(%mean_dim, [4, 4, 5, 6]) : f32[4, 4, 5, 6]  ; (root)
  %unflatten = reshape(%reshape_default_1, [2, 2, 4, 5, 6]) : f32[2, 2, 4, 5, 6]  ; (root)
  %transpose = transpose.int(%unflatten, 1, 2) : f32[2, 4, 2, 5, 6]  ; (root)
  %conv3d = conv3d(%transpose, @deep.weight, @deep.bias, [1, 1, 1], [1, 0, 0]) : f32[2, 4, 2, 5, 6]  ; deep
  %transpose_1 = transpose.int(%conv3d, 1, 2) : f32[2, 2, 4, 5, 6]  ; (root)
  %arange = arange(2, device=cpu, pin_memory=False) : i64[2]  ; (root)
  %unsqueeze = unsqueeze(%arange, 1) : i64[2, 1]  ; (root)
  %unsqueeze_1 = unsqueeze(%unsqueeze, 2) : i64[2, 1, 1]  ; (root)
  %unsqueeze_2 = unsqueeze(%unsqueeze_1, 3) : i64[2, 1, 1, 1]  ; (root)
  %div = div.Tensor(%unsqueeze_2, 10) : f32[2, 1, 1, 1]  ; (root)
  %add = add.Tensor(%transpose_1, %div) : f32[2, 2, 4, 5, 6]  ; (root)
  %add_1 = add.Tensor(%unflatten, %add) : f32[2, 2, 4, 5, 6]  ; (root)
  %reshape_default_2 = reshape(%add_1, [2, 2, 1, 4, 5, 6]) : f32[2, 2, 1, 4, 5, 6]  ; leave
  %expand_default = expand(%reshape_default_2, [2, 2, 2, 4, 5, 6]) : f32[2, 2, 2, 4, 5, 6]  ; leave
  %reshape_default_3 = reshape(%expand_default, [2, 4, 4, 5, 6]) : f32[2, 4, 4, 5, 6]  ; leave
  %flatten_1 = reshape(%reshape_default_3, [8, 4, 5, 6]) : f32[8, 4, 5, 6]  ; leave
  %conv2d_1 = conv2d(%flatten_1, @leave.conv.weight, @leave.conv.bias) : f32[8, 2, 5, 6]  ; leave.conv
  %unflatten_1 = reshape(%conv2d_1, [2, 4, 2, 5, 6]) : f32[2, 4, 2, 5, 6]  ; leave
  return output=%unflatten_1"""


def test_golden(capture_module):
    program, module = capture_module(Mixing, sample=torch.zeros(2, 4, 3, 5, 6))
    options = {"after": "enter", "before": "leave", "down": "average"}
    after, record = run_pass(program, step(**options))
    assert record.sites == ("enter", "(root)")
    assert graph_text(after.entries["full"]) == GOLDEN
    sample = torch.randn(2, 4, 3, 5, 6)
    with torch.no_grad():
        x = module.enter(sample.flatten(0, 1)).unflatten(0, (2, 4)).unflatten(1, (2, 2)).mean(2)
        deep = module.deep(x.transpose(1, 2)).transpose(1, 2) + torch.arange(2)[:, None, None, None] / 10
        expected = {"output": module.leave((x + deep).repeat_interleave(2, 1))}
    assert outputs_difference(expected, program_runner(after, "full")({"sample": sample})).relative_error <= RTOL


def halved_svd(unet, example, *, axis="frames", down="average"):
    """The oracle: the forward of diffusers' UNetSpatioTemporalConditionModel with the pass's resampling written in."""
    sample = example["sample"]
    batch, frames = sample.shape[:2]

    def less(value, *, feature):
        if axis == "pixels":
            if value.ndim < 4:
                return value
            return nn.functional.avg_pool2d(value, 2) if down == "average" else value[..., ::2, ::2]
        apart = value.unflatten(0, (batch, frames))
        mean = feature and down == "average"
        return (apart.unflatten(1, (-1, 2)).mean(2) if mean else apart[:, ::2]).flatten(0, 1)

    def more(value):
        if axis == "pixels":
            return nn.functional.interpolate(value, scale_factor=2.0, mode="nearest")
        return value.unflatten(0, (batch, -1)).repeat_interleave(2, 1)[:, :frames].flatten(0, 1)

    emb = unet.time_embedding(unet.time_proj(example["timestep"].expand(batch)))
    emb = emb + unet.add_embedding(unet.add_time_proj(example["added_time_ids"].flatten()).reshape(batch, -1))
    emb = emb.repeat_interleave(frames, 0)
    context = example["encoder_hidden_states"].repeat_interleave(frames, 0)
    x, indicator = unet.conv_in(sample.flatten(0, 1)), torch.zeros(batch, frames)
    all_frames = (emb, context, indicator)
    count = -(-frames // 2) if axis == "frames" else frames
    fewer = (less(emb, feature=False), less(context, feature=False), torch.zeros(batch, count))

    def run(block, x, values, skips=None):
        temb, context, indicator = values
        given = {"temb": temb, "image_only_indicator": indicator}
        if getattr(block, "has_cross_attention", False):
            given["encoder_hidden_states"] = context
        return block(hidden_states=x, **given, **({} if skips is None else {"res_hidden_states_tuple": skips}))

    skips = [x]
    x, found = run(unet.down_blocks[0], x, all_frames)
    outer, x = [*skips, *found[:-1]], less(x, feature=True)
    inner = [x]
    x, found = run(unet.down_blocks[1], x, fewer)
    inner += found
    x = run(unet.mid_block, x, fewer)
    x = more(run(unet.up_blocks[0], x, fewer, tuple(inner)))
    x = run(unet.up_blocks[1], x, all_frames, tuple(outer))
    x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
    return {"sample": x.unflatten(0, (batch, frames))}


def example_of(frames):
    return {
        "sample": torch.randn(1, frames, 8, 8, 8),
        "timestep": torch.tensor(421.0),
        "encoder_hidden_states": torch.randn(1, 1, 32),
        "added_time_ids": torch.randn(1, 3),
    }


@pytest.mark.parametrize(
    ("frames", "options"),
    [
        (4, {"down": "average"}),
        (3, {"down": "first"}),
        (3, {"down": "average", "axis": "pixels"}),
    ],
)
def test_a_small_svd_computes_what_the_written_forward_does(frames, options, tiny_svd):
    program, module, _ = tiny_svd
    torch.manual_seed(frames)
    example = example_of(frames)
    resized = Step("resize-inputs", ResizeInputs(inputs={"sample": (1, frames, 8, 8, 8)}))
    after, records = run_passes(program, [resized, step(**options)])
    assert records[-1].modified
    with torch.no_grad():
        expected = halved_svd(module, example, **options)
    assert outputs_difference(expected, program_runner(after, "full")(example)).relative_error <= RTOL
    assert records[-1].after.totals.macs < records[-1].before.totals.macs


def test_positions_of_frames_are_counted_anew_where_levels_share_them(tiny_svd):
    program, module, _ = tiny_svd
    example = example_of(3)
    shared, _ = run_pass(program, Step("single-token-attention", SingleTokenAttention()))
    assert merge_common_subexpressions(shared.entries["full"], shared.weights)
    after, _ = run_pass(shared, step(down="first"))
    with torch.no_grad():
        expected = halved_svd(module, example, down="first")
    assert outputs_difference(expected, program_runner(after, "full")(example)).relative_error <= RTOL


def refusal(program, **options):
    with pytest.raises(UserError) as error:
        run_pass(program, step(**options))
    return str(error.value)


def test_refusals(tiny_svd, capture_module):
    program, _, _ = tiny_svd
    assert "down_blocks.0" in refusal(program, after="down_block.0")
    assert "nothing is computed after up_blocks.1" in refusal(program, after="up_blocks.1", before="down_blocks.1")
    assert "3 elements have no pairs to average: use down: first" in refusal(program)
    for frames in (3, 4):
        resized = Step("resize-inputs", ResizeInputs(inputs={"sample": (1, frames, 8, 8, 8)}))
        after, _ = run_passes(program, [resized, step(down="first")])
        again, record = run_pass(after, step(down="first"))
        assert not record.modified
        assert [item.reason for item in record.declined] == ["what enters is sampled already"]
    averaged, _ = run_pass(again, step(axis="pixels"))
    assert not run_pass(averaged, step(axis="pixels"))[1].modified
    folded, _ = run_pass(program, Step("simplify", Simplify()))
    assert "the weight down_blocks.0.resnets.0.time_mixer" in refusal(folded, down="first")
    joined, _ = capture_module(Joined, sample=torch.zeros(2, 3, 3, 5, 6), image=torch.zeros(2, 1, 3, 5, 6))
    assert "the axis is put together of" in refusal(joined, after="enter", before="leave")
    layers = lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))  # noqa: E731
    image, _ = capture_module(layers, input=torch.zeros(1, 3, 4, 4))
    assert "nothing that enters has an axis of frames" in refusal(image, after="0", before="2")
    assert run_pass(image, step(after="0", before="2", axis="pixels"))[1].modified


@pytest.mark.parametrize("order", [("cache-features", "multiscale-time"), ("multiscale-time", "cache-features")])
def test_steps_that_reuse_are_halved_where_they_compute(order, tiny_svd):
    program, module, _ = tiny_svd
    example = example_of(3)
    program = replace(program, loop=single_step("full", program.entries["full"].signature))
    options = {"cache-features": {"cut": "up_blocks.0"}, "multiscale-time": {"down": "first"}}
    after, records = run_passes(program, make_recipe({"passes": [{name: options[name]} for name in order]}).steps)
    declined = [(item.entry, item.reason) for record in records for item in record.declined]
    empty = ("reuse", "nothing is computed after down_blocks.0 and before up_blocks.1")
    assert declined == ([empty] if order[0] == "cache-features" else [])
    with torch.no_grad():
        expected = halved_svd(module, example, down="first")
        found = {"sample": program_module(after)(**example).sample}
    assert outputs_difference(expected, found).relative_error <= RTOL


def test_an_open_batch_stays_open(capture_shared):
    from optpass.capture.spans import Span

    program = capture_shared(Mixing, {"sample": ("batch", 4, 3, 5, 6)}, {"batch": Span(1, 4)})
    after, record = run_pass(program, step(after="enter", before="leave"))
    assert record.modified
    for batch in (1, 3):
        found = program_runner(after, "full")({"sample": torch.randn(batch, 4, 3, 5, 6)})
        assert found["output"].shape == (batch, 4, 2, 5, 6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "published"),
    [
        ({}, 5.388),
        ({"after": "conv_in", "before": "conv_norm_out"}, 4.038),
        ({"after": "down_blocks.1", "before": "up_blocks.2"}, 6.653),
        ({"after": "down_blocks.2", "before": "up_blocks.1"}, 7.868),
        ({"after": "conv_in", "before": "conv_norm_out", "axis": "pixels"}, 1.943),
        ({"axis": "pixels"}, 4.038),
    ],
)
def test_svd_as_counted(options, published, svd_one_token):
    _, record = run_pass(svd_one_token, step(**options))
    assert record.after.totals.flops() / 1e12 == pytest.approx(published, rel=1e-3)


@pytest.mark.slow
def test_both_axes_as_counted(svd_one_token):
    _, records = run_passes(svd_one_token, [step(), step(axis="pixels")])
    assert records[-1].after.totals.flops() / 1e12 == pytest.approx(3.370, rel=1e-3)


@pytest.fixture(scope="module")
def svd_one_token():
    program = capture(CONFIGS / "svd-unet", inputs={"sample": (1, 14, 8, 32, 64)})
    return run_pass(program, Step("single-token-attention", SingleTokenAttention()))[0]
