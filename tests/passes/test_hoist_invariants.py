from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import program_difference, tensor_difference
from optpass.ir.loop import State, every, past, present, single_step
from optpass.ir.text import program_text
from optpass.passes.cache_blocks import CacheBlocks
from optpass.passes.cache_features import CacheFeatures
from optpass.passes.hoist_invariants import HoistInvariants
from optpass.passes.simplify import Simplify
from optpass.passes.single_token_attention import SingleTokenAttention
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.rewrite.splitting import subgraph, unread_inputs
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
    "planner": [*(f"generator.{block}.to_{kind}" for block in (0, 1) for kind in "kv"), "cos"],
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


GOLDEN = """\
full(sample: f32[3, 4, 8], past.attn2.to_k: f32[3, 2, 5, 4], past.attn2.to_v: f32[3, 2, 5, 4], past.silu: f32[1, 8]):
  %add = add.Tensor(%sample, %past_silu) : f32[3, 4, 8]  ; (root)
  %linear_1 = linear(%add, @attn2.to_q.weight, @attn2.to_q.bias) : f32[3, 4, 8]  ; attn2.to_q
  %unflatten = reshape(%linear_1, [3, 4, 2, 4]) : f32[3, 4, 2, 4]  ; attn2
  %transpose = transpose.int(%unflatten, 1, 2) : f32[3, 2, 4, 4]  ; attn2
  %scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %past_attn2_to_k, %past_attn2_to_v)\
 : f32[3, 2, 4, 4]  ; attn2
  %transpose_3 = transpose.int(%scaled_dot_product_attention, 1, 2) : f32[3, 4, 2, 4]  ; attn2
  %flatten = reshape(%transpose_3, [3, 4, 8]) : f32[3, 4, 8]  ; attn2
  %linear_4 = linear(%flatten, @attn2.to_out.weight, @attn2.to_out.bias) : f32[3, 4, 8]  ; attn2.to_out
  %add_1 = add.Tensor(%add, %linear_4) : f32[3, 4, 8]  ; attn2
  return output=%add_1

prepare(context: f32[3, 5, 6]):
  %linear_2 = linear(%context, @attn2.to_k.weight, @attn2.to_k.bias) : f32[3, 5, 8]  ; attn2.to_k
  %unflatten_1 = reshape(%linear_2, [3, 5, 2, 4]) : f32[3, 5, 2, 4]  ; attn2
  %transpose_1 = transpose.int(%unflatten_1, 1, 2) : f32[3, 2, 5, 4]  ; attn2
  %linear_3 = linear(%context, @attn2.to_v.weight, @attn2.to_v.bias) : f32[3, 5, 8]  ; attn2.to_v
  %unflatten_2 = reshape(%linear_3, [3, 5, 2, 4]) : f32[3, 5, 2, 4]  ; attn2
  %transpose_2 = transpose.int(%unflatten_2, 1, 2) : f32[3, 2, 5, 4]  ; attn2
  return present.attn2.to_k=%transpose_1, present.attn2.to_v=%transpose_2

embed(timestep: f32[]):
  %unsqueeze = unsqueeze(%timestep, 0) : f32[1]  ; (root)
  %linear = linear(%unsqueeze, @time.weight, @time.bias) : f32[8]  ; time
  %silu = silu(%linear) : f32[8]  ; (root)
  %unsqueeze_1 = unsqueeze(%silu, 0) : f32[1, 8]  ; (root)
  return present.silu=%unsqueeze_1

loop every=1:
  full: full
  once: prepare
  table: embed
  state attn2.to_k: f32[3, 2, 5, 4] (written)
  state attn2.to_v: f32[3, 2, 5, 4] (written)
  state silu: f32[1, 8] (written)
"""


def test_golden(captured):
    program, _ = captured("cross-attention")
    after, record = run_pass(program, STEP)
    assert program_text(after, weights=False) == GOLDEN
    assert (after.loop.once, after.loop.tables) == (("prepare",), ("embed",))
    assert record.sites == ("attn2.to_k", "attn2.to_v", "(root)")
    assert not record.declined


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
    _, second = run_pass(after, STEP)
    assert not second.modified
    assert not second.sites


def weights_of(program, entry):
    return set(program.entries[entry].weight_names)


def denoised(module, contexts, times, seed=0):
    """A generation step by step, each step's calls with every one of ``contexts`` in turn."""
    generator = torch.Generator().manual_seed(seed)
    sample, answers = torch.randn(3, 4, 8, generator=generator), []
    for time in times:
        for context in contexts:
            answers.append(module(sample, torch.tensor(time), context))
        sample = sample + 0.1 * torch.randn(3, 4, 8, generator=generator)
    return torch.stack(answers)


TIMES = (9.0, 6.0, 3.0, 0.0)


def test_generations_are_kept_apart(captured):
    program, module = captured("cross-attention")
    looping = program_module(run_pass(program, STEP)[0])
    one, other = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    with torch.no_grad():
        # Guidance in two calls a step, then another context half-way, then the same generation again.
        for contexts, times in (((one, other), TIMES), ((one,), TIMES[:2]), ((other,), TIMES[2:]), ((one,), TIMES)):
            assert torch.equal(denoised(looping, contexts, times), denoised(module, contexts, times))
    counts = looping.statistics
    assert counts["full"] == 2 * 4 + 2 + 2 + 4
    assert counts["embed"] == len(TIMES)
    assert counts["prepare"] <= 5


def split(program, feature):
    """``program`` with an entry that begins at the value ``feature``, every other step."""
    graph = program.entries["full"]
    node = next(node for node in graph.calls if node.name == feature)
    outputs = {"output": graph.output_node.args[0][0]}
    full = subgraph(graph, inputs={}, outputs={**outputs, present("feature"): node})
    reuse = subgraph(graph, inputs={past("feature"): node}, outputs=outputs, keep=unread_inputs(graph))
    loop = replace(
        program.loop,
        variants={"full": ("full",), "reuse": ("reuse",)},
        schedule=every(2, ("full", "reuse")),
        states={"feature": State.of("feature", full.outputs[1])},
    )
    return replace(program, entries={"full": full, "reuse": reuse}, loop=loop)


def test_entries_share_what_they_all_compute(captured):
    program, _ = captured("adaln")
    adds = [node.name for node in program.entries["full"].calls if node.name.startswith("add")]
    cached = split(program, adds[-4])
    after, record = run_pass(cached, STEP)
    assert list(after.loop.states) == ["feature", *STATES["adaln"]]
    assert len(record.sites) == 3
    assert after.interfaces["full"].reads == ["blocks.0.modulation", "blocks.1.modulation"]
    assert after.interfaces["reuse"].reads == ["feature", "blocks.1.modulation"]
    assert program_difference(cached, after).relative_error == 0.0


CACHES = {
    "interval": ("adaln", Step("cache-blocks", CacheBlocks(blocks="1-1"))),
    "threshold": ("adaln", Step("cache-blocks", CacheBlocks(blocks="1-1", method="threshold", threshold=0.2))),
    "taylor": ("adaln", Step("cache-blocks", CacheBlocks(blocks="1-1", method="taylor", every=3))),
    "features": ("windows", Step("cache-features", CacheFeatures(cut="local", every=2))),
}


@pytest.mark.parametrize("name", CACHES)
def test_composes_with_caching_in_both_orders(captured, name):
    model, cache = CACHES[name]
    program, _ = captured(model)
    cached, _ = run_pass(program, cache)
    for order in ((cache, STEP), (STEP, cache)):
        after = program
        for step in order:
            after, record = run_pass(after, step)
            assert record.modified
        assert set(STATES[model]) <= set(after.loop.states)
        hoisted = {weight for entry in ("prepare", *after.loop.tables) for weight in weights_of(after, entry)}
        for entry in {entry for chain in after.loop.variants.values() for entry in chain}:
            assert hoisted.isdisjoint(weights_of(after, entry))
        assert program_difference(cached, after).relative_error == 0.0
        _, again = run_pass(after, STEP)
        assert not again.modified


def test_timesteps_can_stay_in_the_step(captured):
    program, _ = captured("adaln")
    after, record = run_pass(program, Step("hoist-invariants", HoistInvariants(timesteps="keep")))
    assert (after.loop.once, after.loop.tables) == (("prepare",), ())
    assert record.sites == ("classes",)
    assert [(item.path, item.reason) for item in record.declined] == [
        (f"blocks.{block}.modulation", "it stays the same for a timestep, and 'timesteps: keep'") for block in (0, 1)
    ]
    assert program_difference(program, after).relative_error == 0.0
    # A later run takes the rest, and reads what is kept already.
    later, record = run_pass(after, STEP)
    assert (later.loop.once, later.loop.tables) == (("prepare",), ("embed",))
    assert later.interfaces["embed"].reads == ["classes"]
    assert program_difference(program, later).relative_error == 0.0


def test_what_is_large_is_not_kept_for_every_timestep(captured):
    program, _ = captured("adaln")
    after, record = run_pass(program, Step("hoist-invariants", HoistInvariants(largest=3 * 8 * 4)))
    assert list(after.loop.states) == ["classes", "silu"]
    assert {item.reason for item in record.declined} == {"288 bytes for every timestep, more than 96"}
    assert {item.path for item in record.declined} == {"blocks.0.modulation", "blocks.1.modulation"}
    assert program_difference(program, after).relative_error == 0.0


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_k = nn.Linear(8, 8)

    def forward(self, sample, timestep, context):
        return sample * self.to_k(context + torch.rand_like(context)) * timestep


class Unconditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, sample, timestep, mask):
        return self.a(sample) * timestep + (1 - mask) * -1e4


def test_nothing_to_hoist_is_said(capture_module):
    noisy, _ = capture_module(Noisy, sample=SAMPLE, timestep=TIME, context=SAMPLE)
    _, record = run_pass(looped(noisy), STEP)
    assert not record.modified
    assert [item.reason for item in record.declined] == ["it is drawn at random, anew at every step"]
    plain, _ = capture_module(Unconditional, sample=SAMPLE, timestep=TIME, mask=torch.ones(3, 4, 8))
    _, record = run_pass(looped(plain), STEP)
    assert not record.modified
    assert [item.reason for item in record.declined] == [
        "no step computes what another one has, beyond what costs nothing"
    ]


def test_a_model_without_steps_is_refused(capture_module):
    program, _ = capture_module(lambda: nn.Linear(4, 4), input=torch.randn(2, 4))
    with pytest.raises(UserError, match="the model has no loop"):
        run_pass(program, STEP)


def test_what_depends_on_no_input_and_costs_products(capture_module):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a = nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 8)

        def forward(self, sample, timestep):
            return sample * timestep + self.a(self.table)

    program, _ = capture_module(Positions, sample=SAMPLE, timestep=TIME)
    program = looped(program)
    after, _ = run_pass(program, STEP)
    assert list(after.loop.states) == ["a"]
    assert after.interfaces["prepare"].inputs == ()
    assert program_difference(program, after).relative_error == 0.0


class Sized(nn.Module):
    """The timestep is repeated to the batch, and where ``wide``, what the context gives to the sample's tokens."""

    def __init__(self, wide=False):
        super().__init__()
        self.time, self.to_k, self.to_q, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), wide

    def forward(self, sample, timestep, context):
        batch, tokens, _ = sample.shape
        emb = self.time(timestep.expand(batch, 8))
        keys = self.to_k(context)
        bias = keys.sum(1, keepdim=True)
        bias = bias.expand(batch, tokens, 8).cos() if self.wide else bias
        return functional.scaled_dot_product_attention(self.to_q(sample) + emb[:, None], keys, keys) + bias


SHAPES = {"sample": ("batch", "tokens", 8), "timestep": (1, 1), "context": ("batch", "length", 8)}
SPANS = {"batch": Span(1, 4), "tokens": Span(2, 9), "length": Span(2, 6)}


def test_open_sizes(capture_shared):
    program = looped(capture_shared(Sized, SHAPES, SPANS))
    after, record = run_pass(program, STEP)
    assert list(after.loop.states) == ["to_k", "sum_1", "time"]
    assert not record.declined
    assert [str(spec) for spec in after.entries["prepare"].inputs] == ["context: f32[batch, length, 8]"]
    # The batch that the embedding is repeated to is the context's too.
    assert [spec.name for spec in after.entries["embed"].inputs] == ["timestep", "context"]
    assert program_difference(program, after).relative_error <= RTOL


def test_a_size_of_the_sample_alone(capture_shared):
    program = looped(capture_shared(lambda: Sized(wide=True), SHAPES, SPANS))
    after, record = run_pass(program, STEP)
    assert list(after.loop.states) == ["to_k", "sum_1", "time"]
    assert [(item.node, item.reason) for item in record.declined] == [
        ("expand_1", "it takes a size from sample, and from no input of a generation")
    ]
    assert program_difference(program, after).relative_error <= RTOL


def test_svd_after_single_token_attention(tiny_svd):
    program, module, example = tiny_svd
    program, _ = run_pass(looped(program), Step("single-token-attention", SingleTokenAttention()))
    program, _ = run_pass(program, Step("simplify", Simplify()))
    after, _ = run_pass(program, STEP)
    rows = {name: state.shape for name, state in after.loop.states.items() if "attn2" in name}
    assert len(rows) == 8
    # What the context's one token gives is kept before it is repeated over the pixels.
    assert max(torch.Size(shape).numel() for shape in rows.values()) <= 3 * 64
    assert program_difference(program, after).relative_error == 0.0
    with torch.no_grad():
        expected = module(**example).sample
    assert tensor_difference(expected, program_module(after)(**example).sample).relative_error <= 1e-5


def test_sd15_as_published():
    """The keys and values of 16 cross-attentions and the embedding of the time leave the step, with their weights."""
    program = looped(capture(CONFIGS / "sd15-unet", inputs={"sample": (1, 4, 64, 64)}))
    _, record = run_pass(program, STEP)
    assert len(record.sites) == 2 * 16 + 22
    entries, before = {name: entry.totals for name, entry in record.after.entries.items()}, record.before.totals
    # 77 tokens of 768 features: 2 products for each of 5 · 320, 5 · 640 and 6 · 1280 features.
    assert entries["prepare"].macs == 2 * 77 * 768 * (5 * 320 + 5 * 640 + 6 * 1280)
    # The embedding's two layers, and a projection in every one of 22 residual blocks.
    assert entries["embed"].macs == 320 * 1280 + 1280 * (1280 + 5 * 320 + 5 * 640 + 12 * 1280)
    assert entries["full"].macs == before.macs - entries["prepare"].macs - entries["embed"].macs
    assert sum(entry.parameters for entry in entries.values()) == before.parameters
