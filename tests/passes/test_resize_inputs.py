from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.loop import every, past, present, single_step
from optpass.ir.text import graph_text
from optpass.passes.resize_inputs import ResizeInputs
from optpass.pipeline.manager import run_pass, run_passes
from optpass.pipeline.recipe import Step
from optpass.pipeline.verification import Verification
from optpass.rewrite.splitting import subgraph
from optpass.rewrite.stepping import results, stepped

CONFIGS = Path(__file__).parents[1] / "configs"


def step(**inputs):
    return Step("resize-inputs", ResizeInputs(inputs=inputs))


class Patches(nn.Module):
    """Attention over the pixels of frames, folded into the batch; a frame's context is added to them."""

    def __init__(self):
        super().__init__()
        self.conv, self.qkv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, sample, context):
        batch, frames, channels, height, width = sample.shape
        x = self.conv(sample.reshape(batch * frames, channels, height, width)).flatten(2).transpose(1, 2)
        x = x + context.reshape(batch * frames, 1, 8)
        q, k, v = self.qkv(x).reshape(batch * frames, height * width, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(x).reshape(batch, frames, height, width, 5)


def test_golden(capture_module):
    sizes = {"sample": torch.zeros(2, 3, 3, 4, 6), "context": torch.zeros(2, 3, 8)}
    program, module = capture_module(Patches, **sizes)
    after, record = run_pass(program, step(sample=(3, 2, 3, 5, 4)))
    assert record.sites == ("sample", "context")
    wanted, _ = capture_module(Patches, sample=torch.zeros(3, 2, 3, 5, 4), context=torch.zeros(3, 2, 8))
    assert graph_text(after.entries["full"]) == graph_text(wanted.entries["full"])
    example = {"sample": torch.randn(3, 2, 3, 5, 4), "context": torch.randn(3, 2, 8)}
    with torch.no_grad():
        expected = {"output": module(**example)}
    assert outputs_difference(expected, program_runner(after, "full")(example)).relative_error <= 1e-5
    _, record = run_pass(after, step(sample=(3, 2, 3, 5, 4)))
    assert not record.modified
    assert [item.reason for item in record.declined] == ["it is [3, 2, 3, 5, 4] already"]


def test_a_small_svd_computes_what_the_module_does(tiny_svd):
    program, module, example = tiny_svd
    after, record = run_pass(program, step(sample=(1, 5, 8, 4, 12)))
    assert record.sites == ("sample",)
    example = {
        "sample": torch.randn(1, 5, 8, 4, 12),
        "timestep": torch.tensor(7.0),
        "encoder_hidden_states": torch.randn(1, 1, 32),
        "added_time_ids": torch.randn(1, 3),
    }
    with torch.no_grad():
        expected = {"sample": module(**example).sample}
    assert outputs_difference(expected, program_runner(after, "full")(example)).relative_error <= 1e-5


class Padded(nn.Module):
    """Tokens written behind three zeros, as tables of positions of text and image tokens are joined."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x):
        joined = torch.zeros(x.shape[0], 3 + x.shape[1], 8)
        joined[:, 3:] = self.layer(x)
        return joined


def test_what_is_written_into_a_part_grows_with_it(capture_module):
    program, module = capture_module(Padded, x=torch.zeros(2, 5, 6))
    after, _ = run_pass(program, step(x=(2, 9, 6)))
    example = {"x": torch.randn(2, 9, 6)}
    with torch.no_grad():
        expected = {"output": module(**example)}
    assert outputs_difference(expected, program_runner(after, "full")(example)).relative_error <= 1e-6


@pytest.mark.slow
def test_what_a_capture_at_the_new_sizes_gives(moving_digits):
    program = capture(moving_digits)
    after, _ = run_pass(program, step(sample=(1, 5, 4, 8, 24)))
    wanted = capture(moving_digits, inputs={"sample": (1, 5, 4, 8, 24)})
    assert measure(after).totals == measure(wanted).totals
    assert program_difference(wanted, after).relative_error <= 1e-5


@pytest.mark.slow
def test_svd_as_published():
    program = capture(CONFIGS / "svd-unet", inputs={"sample": (1, 14, 8, 72, 128)})
    _, record = run_pass(program, step(sample=(1, 14, 8, 32, 64)))
    assert record.before.totals.flops() / 1e12 == pytest.approx(44.80, rel=1e-3)
    assert record.after.totals.flops() / 1e12 == pytest.approx(8.459, rel=1e-3)
    assert record.after.totals.parameters == record.before.totals.parameters


def test_what_does_not_go_with_the_new_size_is_refused(capture_module):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 6, 4))

        def forward(self, x):
            return x + self.positions

    program, _ = capture_module(Table, x=torch.zeros(2, 6, 4))
    with pytest.raises(UserError, match="the weight positions has 6 along it"):
        run_pass(program, step(x=(2, 7, 4)))
    assert run_pass(program, step(x=(5, 6, 4)))[1].sites == ("x",)
    with pytest.raises(UserError, match="no input 'y'"):
        run_pass(program, step(y=(2, 6, 4)))
    with pytest.raises(UserError, match="another number of dimensions"):
        run_pass(program, step(x=(2, 6)))


def test_open_sizes_are_given_at_each_call(capture_shared):
    from optpass.capture.spans import Span

    program = capture_shared(lambda: nn.Conv2d(3, 4, 3), {"input": ("batch", 3, 9, 8)}, {"batch": Span(1, 4)})
    with pytest.raises(UserError, match="open along"):
        run_pass(program, step(input=(2, 3, 7, 8)))


def test_states_follow(capture_module):
    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.leave = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.leave(torch.tanh(self.body(sample)) + sample * timestep)

    program, _ = capture_module(Denoiser, sample=torch.zeros(2, 6, 4), timestep=torch.tensor(1.0))
    graph = program.entries["full"]
    program = replace(program, loop=single_step("full", graph.signature))
    deep = next(node for node in graph.calls if "tanh" in str(node.target))
    full = subgraph(graph, inputs={}, outputs={**results(graph), present("deep"): deep})
    reuse = subgraph(graph, inputs={past("deep"): deep}, outputs=results(graph))
    entries = {"full": full, "reuse": reuse}
    split = stepped(program, "full", entries, {"full": ("full",), "reuse": ("reuse",)}, every(2, ("full", "reuse")))
    after, _ = run_pass(split, step(sample=(2, 9, 4)))
    assert after.loop.states["deep"].shape == (2, 9, 4)


def test_nothing_is_compared_with_what_had_other_inputs(tiny_classifier, capture_module):
    from optpass.passes.simplify import Simplify

    program, _ = capture_module(tiny_classifier, input=torch.zeros(2, 6))
    events = []
    steps = [step(input=(5, 6)), Step("simplify", Simplify())]
    _, [record, _] = run_passes(program, steps, [Verification(), events.append])
    reason = "not verified: the input input has another size than before"
    assert record.facts == {"difference": None, "verified": reason}
    assert events[-1].original.entries["full"].inputs[0].shape == (5, 6)
