from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.evaluate.difference import program_difference, tensor_difference
from optpass.ir.loop import single_step
from optpass.ir.text import graph_text
from optpass.passes.hoist_invariants import HoistInvariants
from optpass.passes.simplify import Simplify
from optpass.passes.single_token_attention import SingleTokenAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.runtime.looped import program_module

STEP = Step("hoist-invariants", HoistInvariants())
RTOL = HoistInvariants.contract.rtol
CONFIGS = Path(__file__).parents[1] / "configs"


class CrossAttention(nn.Module):
    """x + out(attention(q(x), k(context), v(context)))."""

    def __init__(self, width=8, context=6):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(size, width) for size in (width, context, context))
        self.to_out = nn.Linear(width, width)

    def forward(self, x, context):
        heads = lambda y: y.unflatten(-1, (2, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        return x + self.to_out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Denoiser(nn.Module):
    """A cross-attention to a context, and an embedded timestep."""

    def __init__(self):
        super().__init__()
        self.time, self.attn2 = nn.Linear(1, 8), CrossAttention()

    def forward(self, sample, timestep, context):
        emb = functional.silu(self.time(timestep[None]))
        return self.attn2(sample + emb[None], context)


class AdaLN(nn.Module):
    """Blocks modulated by timestep and class, as a DiT's."""

    def __init__(self, depth=2):
        super().__init__()
        self.time, self.classes = nn.Linear(1, 8), nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"modulation": nn.Linear(8, 24), "mlp": nn.Linear(8, 8)}) for _ in range(depth)
        )

    def forward(self, hidden_states, timestep, class_labels):
        emb = functional.silu(self.time(timestep[None, None]) + self.classes(class_labels))
        for block in self.blocks:
            shift, scale, gate = block["modulation"](emb)[:, None].chunk(3, -1)
            normed = functional.layer_norm(hidden_states, (8,)) * (1 + scale) + shift
            hidden_states = hidden_states + gate * block["mlp"](normed)
        return hidden_states


class Planner(nn.Module):
    """A large network over reference frames, and a small generator that attends to what it says (MarDini)."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 32, dropout=0.0, batch_first=True)
        self.planner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.generator = nn.ModuleList(CrossAttention() for _ in range(2))

    def forward(self, sample, timestep, frames, mask):
        plan = self.planner(frames * mask)
        for block in self.generator:
            sample = block(sample * timestep.cos(), plan)
        return sample


class Added(nn.Module):
    """Embeddings of sizes and of a pooled prompt, added to the timestep's (SDXL)."""

    def __init__(self):
        super().__init__()
        self.time, self.add_embedding, self.proj = nn.Linear(1, 8), nn.Linear(10, 8), nn.Linear(8, 8)

    def forward(self, sample, timestep, added_cond_kwargs):
        ids = added_cond_kwargs["time_ids"].sin().flatten(1)
        added = self.add_embedding(torch.cat([added_cond_kwargs["text_embeds"], ids], -1))
        emb = self.time(timestep[None, None]) + added
        return sample * self.proj(functional.silu(emb))[:, None]


class Windows(nn.Module):
    """Windows of the sample attend to themselves, and to one global context that is the same for all (FreeSwim)."""

    def __init__(self):
        super().__init__()
        self.local, self.whole = CrossAttention(context=8), CrossAttention()

    def forward(self, sample, timestep, context):
        batch = sample.shape[0]
        windows = sample.reshape(batch * 2, -1, 8)
        inside = self.local(windows, windows) * timestep
        across = self.whole(windows, context.repeat_interleave(2, 0))
        return (inside + across).reshape(batch, -1, 8)


SAMPLE, TIME = torch.randn(3, 4, 8), torch.tensor(7.0)
MODELS = {
    "cross-attention": (Denoiser, {"sample": SAMPLE, "timestep": TIME, "context": torch.randn(3, 5, 6)}),
    "adaln": (AdaLN, {"hidden_states": SAMPLE, "timestep": TIME, "class_labels": torch.tensor([1, 2, 3])}),
    "planner": (
        Planner,
        {"sample": SAMPLE, "timestep": TIME, "frames": torch.randn(3, 5, 6), "mask": torch.ones(3, 5, 1)},
    ),
    "added embeddings": (
        Added,
        {
            "sample": SAMPLE,
            "timestep": TIME,
            "added_cond_kwargs": {"text_embeds": torch.randn(3, 4), "time_ids": torch.randn(3, 6)},
        },
    ),
    "windows": (Windows, {"sample": SAMPLE, "timestep": TIME, "context": torch.randn(3, 5, 6)}),
}
STATES = {
    "cross-attention": ["attn2.to_k", "attn2.to_v", "silu"],
    "adaln": ["classes", "blocks.0.modulation", "blocks.1.modulation"],
    "planner": [f"generator.{block}.to_{kind}" for block in (0, 1) for kind in "kv"],
    "added embeddings": ["add_embedding", "proj"],
    "windows": ["whole.to_k", "whole.to_v"],
}


def looped(program):
    return replace(program, loop=single_step("full", program.entries["full"].signature))


@pytest.fixture
def captured(capture_module):
    def build(name):
        program, module = capture_module(MODELS[name][0], **MODELS[name][1])
        return looped(program), module

    return build


def test_golden(captured):
    program, _ = captured("cross-attention")
    after, record = run_pass(program, STEP)
    assert [graph_text(graph, name) for name, graph in after.entries.items()] == [
        "full(sample: f32[3, 4, 8], past.attn2.to_k: f32[3, 2, 5, 4], past.attn2.to_v: f32[3, 2, 5, 4],"
        " past.silu: f32[1, 8]):\n"
        "  %unsqueeze_1 = unsqueeze(%past_silu, 0) : f32[1, 1, 8]  ; (root)\n"
        "  return output=%linear_4",
    ]
    assert record.sites == ("attn2", "attn2", "(root)")


@pytest.mark.parametrize("name", MODELS)
def test_the_same_function_and_the_expected_states(captured, name):
    program, _ = captured(name)
    after, record = run_pass(program, STEP)
    assert list(after.loop.states) == STATES[name]
    assert len(record.sites) == len(STATES[name])
    assert not record.declined
    assert program_difference(program, after).relative_error == 0.0
    hoisted = {weight for entry in (*after.loop.once, *after.loop.tables) for weight in weights_of(after, entry)}
    assert hoisted
    assert hoisted.isdisjoint(weights_of(after, "full"))
    again, second = run_pass(after, STEP)
    assert not second.modified
    assert not second.sites


def weights_of(program, entry):
    return set(program.entries[entry].weight_names)
