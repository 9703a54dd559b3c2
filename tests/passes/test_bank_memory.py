from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.text import graph_text
from optpass.passes.bank_memory import BankMemory
from optpass.passes.simplify import Simplify
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.target import Lowering
from optpass.rewrite.memory_bank import BankWriter
from optpass.rewrite.splitting import subgraph
from optpass.targets.onnxruntime import OnnxRuntime

WIDTH, HEADS, QUERIES = 8, 2, 3
FRAMES, TOKENS, CHANNELS = 7, 5, 6


def banked(program, match=("*",), **options):
    options = {"match": list(match), **options}
    return run_pass(program, Step("bank-memory", BankMemory.from_options(options, owner="test")))


class Attention(nn.Module):
    def __init__(self, way="fused"):
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(CHANNELS, WIDTH), nn.Linear(CHANNELS, WIDTH)
        self.norm, self.way = nn.LayerNorm(WIDTH // HEADS), way

    def forward(self, x, memory):
        q, k, v = self.q(x), self.k(memory), self.v(memory.tanh() if self.way == "apart" else memory)
        if self.way == "rotary":
            k = k * torch.arange(k.shape[1])[:, None].cos()
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (q, k, v))
        if self.way == "normed":
            k = self.norm(k)
        if self.way == "written":
            result = (q @ k.mT / 2.0).softmax(-1) @ v
        elif self.way == "masked":
            near = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu()
            result = functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        else:
            result = functional.scaled_dot_product_attention(q, k, v)
        shown = k.amax() if self.way == "shown" else 0
        return self.out(result.transpose(1, 2).flatten(2)) + shown


class Reader(nn.Module):
    """Learned queries that read the features [batch, frames, tokens, channels] of a video in two layers."""

    def __init__(self, way="fused", depth=2):
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, QUERIES, WIDTH))
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(depth)])
        self.layers = nn.ModuleList([Attention(way) for _ in range(depth)])

    def read(self, memory):
        x = self.queries.expand(memory.shape[0], -1, -1)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), memory)
        return x

    def forward(self, features):
        return self.read(features.flatten(1, 2))


def features(frames=FRAMES, tokens=TOKENS, batch=2):
    """Neighbours that are alike, more or less, as those of a video."""
    steps = torch.randn(batch, frames, tokens, CHANNELS) * torch.rand(batch, frames, tokens, 1)
    return steps.cumsum(1)


def bank_of(video, length):
    """The bank after a stream of ``video`` [batch, frames, tokens, channels], vector by vector, and its sizes."""
    batch, _, tokens, _ = video.shape
    frames, sizes = [], []
    for row in range(batch):
        for token in range(tokens):
            bank, counts = [], []
            for vector in video[row, :, token].detach().double():
                bank.append(vector)
                counts.append(1)
                if len(bank) > length:
                    alike = [float(functional.cosine_similarity(a, b, 0)) for a, b in pairwise(bank)]
                    at = alike.index(max(alike))
                    both = counts[at] + counts[at + 1]
                    mean = (bank[at] * counts[at] + bank[at + 1] * counts[at + 1]) / both
                    bank[at : at + 2], counts[at : at + 2] = [mean], [both]
            frames.append(torch.stack(bank))
            sizes.append(torch.tensor(counts))
    unflat = (batch, tokens)
    return (
        torch.stack(frames).unflatten(0, unflat).transpose(1, 2).float(),
        torch.stack(sizes).unflatten(0, unflat).transpose(1, 2),
    )


def differs(program, arguments, expected):
    found = program_runner(program, "full")(arguments)
    return outputs_difference(found, {next(iter(found)): expected.detach()}).relative_error


GOLDEN = """\
  %reshape_default = reshape(%flatten, [1, 3, 2, 6]) : f32[1, 3, 2, 6]  ; layers.0.k
  %permute_default = permute(%reshape_default, [0, 2, 1, 3]) : f32[1, 2, 3, 6]  ; layers.0.k
  %arange_default = arange(3) : i64[3]  ; layers.0.k
  %reshape_default_1 = reshape(%arange_default, [3, 1]) : i64[3, 1]  ; layers.0.k
  %eq_tensor = eq.Tensor(%reshape_default_1, %arange_default) : bool[3, 3]  ; layers.0.k
  %to_dtype = to.dtype(%eq_tensor, f32) : f32[3, 3]  ; layers.0.k
  %expand_default = expand(%to_dtype, [1, 2, 3, 3]) : f32[1, 2, 3, 3]  ; layers.0.k
  %transpose_int = transpose.int(%permute_default, 2, 3) : f32[1, 2, 6, 3]  ; layers.0.k
  %matmul_default = matmul(%permute_default, %transpose_int) : f32[1, 2, 3, 3]  ; layers.0.k
  %cat_default = cat([%expand_default, %matmul_default], 3) : f32[1, 2, 3, 6]  ; layers.0.k
  %slice_tensor = slice.Tensor(%cat_default, 2, 0, 2) : f32[1, 2, 2, 6]  ; layers.0.k
  %slice_tensor_1 = slice.Tensor(%reshape_default_1, 0, 0, 2) : i64[2, 1]  ; layers.0.k
  %slice_tensor_2 = slice.Tensor(%cat_default, 2, 2, 3) : f32[1, 2, 1, 6]  ; layers.0.k
  %cat_default_1 = cat([%slice_tensor, %slice_tensor_2], 2) : f32[1, 2, 3, 6]  ; layers.0.k
  %slice_tensor_3 = slice.Tensor(%cat_default_1, 2, 0, 2) : f32[1, 2, 2, 6]  ; layers.0.k
  %slice_tensor_4 = slice.Tensor(%cat_default_1, 2, 1, 3) : f32[1, 2, 2, 6]  ; layers.0.k
  %slice_tensor_5 = slice.Tensor(%cat_default_1, 3, 0, 3) : f32[1, 2, 3, 3]  ; layers.0.k
  %slice_tensor_6 = slice.Tensor(%cat_default_1, 3, 3, 6) : f32[1, 2, 3, 3]  ; layers.0.k
  %mul_tensor = mul.Tensor(%slice_tensor_5, %slice_tensor_6) : f32[1, 2, 3, 3]  ; layers.0.k
  %sum_dim_int_list = sum.dim_IntList(%mul_tensor, [-1], True) : f32[1, 2, 3, 1]  ; layers.0.k
  %clamp_default = clamp(%sum_dim_int_list, 1e-16) : f32[1, 2, 3, 1]  ; layers.0.k
  %sqrt_default = sqrt(%clamp_default) : f32[1, 2, 3, 1]  ; layers.0.k
  %slice_tensor_8 = slice.Tensor(%slice_tensor_5, 2, 1, 3) : f32[1, 2, 2, 3]  ; layers.0.k
  %slice_tensor_9 = slice.Tensor(%slice_tensor_6, 2, 0, 2) : f32[1, 2, 2, 3]  ; layers.0.k
  %mul_tensor_1 = mul.Tensor(%slice_tensor_8, %slice_tensor_9) : f32[1, 2, 2, 3]  ; layers.0.k
  %sum_dim_int_list_1 = sum.dim_IntList(%mul_tensor_1, [-1], True) : f32[1, 2, 2, 1]  ; layers.0.k
  %slice_tensor_11 = slice.Tensor(%sqrt_default, 2, 0, 2) : f32[1, 2, 2, 1]  ; layers.0.k
  %slice_tensor_12 = slice.Tensor(%sqrt_default, 2, 1, 3) : f32[1, 2, 2, 1]  ; layers.0.k
  %mul_tensor_2 = mul.Tensor(%slice_tensor_11, %slice_tensor_12) : f32[1, 2, 2, 1]  ; layers.0.k
  %div_tensor = div.Tensor(%sum_dim_int_list_1, %mul_tensor_2) : f32[1, 2, 2, 1]  ; layers.0.k
  %argmax_default = argmax(%div_tensor, 2, True) : i64[1, 2, 1, 1]  ; layers.0.k
  %le_tensor = le.Tensor(%slice_tensor_1, %argmax_default) : bool[1, 2, 2, 1]  ; layers.0.k
  %ge_tensor = ge.Tensor(%slice_tensor_1, %argmax_default) : bool[1, 2, 2, 1]  ; layers.0.k
  %to_dtype_1 = to.dtype(%le_tensor, f32) : f32[1, 2, 2, 1]  ; layers.0.k
  %mul_tensor_3 = mul.Tensor(%slice_tensor_3, %to_dtype_1) : f32[1, 2, 2, 6]  ; layers.0.k
  %to_dtype_2 = to.dtype(%ge_tensor, f32) : f32[1, 2, 2, 1]  ; layers.0.k
  %mul_tensor_4 = mul.Tensor(%slice_tensor_4, %to_dtype_2) : f32[1, 2, 2, 6]  ; layers.0.k
  %add_tensor = add.Tensor(%mul_tensor_3, %mul_tensor_4) : f32[1, 2, 2, 6]  ; layers.0.k
  %slice_tensor_13 = slice.Tensor(%add_tensor, 3, 0, 3) : f32[1, 2, 2, 3]  ; layers.0.k
  %sum_dim_int_list_2 = sum.dim_IntList(%slice_tensor_13, [-1], True) : f32[1, 2, 2, 1]  ; layers.0.k
  %div_tensor_1 = div.Tensor(%slice_tensor_13, %sum_dim_int_list_2) : f32[1, 2, 2, 3]  ; layers.0.k
  %matmul_default_1 = matmul(%div_tensor_1, %permute_default) : f32[1, 2, 2, 6]  ; layers.0.k
  %permute_default_1 = permute(%matmul_default_1, [0, 2, 1, 3]) : f32[1, 2, 2, 6]  ; layers.0.k
  %reshape_default_2 = reshape(%permute_default_1, [1, 4, 6]) : f32[1, 4, 6]  ; layers.0.k
  %linear_1 = linear(%reshape_default_2, @layers.0.k.weight, @layers.0.k.bias) : f32[1, 4, 8]  ; layers.0.k
  %linear_2 = linear(%reshape_default_2, @layers.0.v.weight, @layers.0.v.bias) : f32[1, 4, 8]  ; layers.0.v
"""


def test_golden(capture_module):
    program, _ = capture_module(partial(Reader, depth=1), features=torch.zeros(1, 3, 2, CHANNELS))
    after, record = banked(program, length=2, frames=3)
    assert GOLDEN in graph_text(after.entries["full"])
    assert list(record.sites) == ["layers.0"]
    assert not record.declined
    assert str(record.record.promise) == "approximate"
    _, record = banked(after, length=1, frames=2)
    assert not record.modified
    assert [item.reason for item in record.declined] == ["its keys are a bank already"]


@pytest.mark.parametrize("way", ["fused", "written", "normed"])
@pytest.mark.parametrize("length", [1, 3, 6])
def test_numbers_are_those_of_a_stream(way, length, capture_module):
    video = features()
    program, net = capture_module(partial(Reader, way), features=video)
    after, record = banked(program, length=length, frames=FRAMES)
    assert list(record.sites) == ["layers.0", "layers.1"]
    bank, _ = bank_of(video, length)
    assert differs(after, {"features": video}, net(bank)) <= 1e-5
    assert program_difference(program, after).relative_error > 1e-4
    # Both layers read one bank.
    assert graph_text(after.entries["full"]).count(" = argmax(") == FRAMES - length
    assert record.after.totals.macs_attention * FRAMES == record.before.totals.macs_attention * length


def test_invariants(capture_module):
    """Sizes and bank themselves: both are results of a graph in which nothing else is left."""
    video = features(11)
    program, _ = capture_module(Reader, features=video)
    graph = program.entries["full"]
    reader = next(node for node in graph.calls if node.target is torch.ops.aten.reshape.default)
    with graph.before(reader.next):
        bank = BankWriter(graph, 4, reader).filled(reader, 11)
    both = subgraph(graph, inputs={}, outputs={"vectors": bank.vectors, "sizes": bank.sizes})
    frames, sizes = (each.transpose(1, 2) for each in both.module(program.weights)(video))
    sizes = sizes.squeeze(-1)
    expected, counts = bank_of(video, 4)
    assert torch.equal(sizes, counts.to(sizes.dtype))
    torch.testing.assert_close(frames, expected, rtol=1e-5, atol=1e-6)
    assert bool((sizes.sum(1) == 11).all())
    means = (frames * sizes[..., None]).sum(1) / 11
    torch.testing.assert_close(means, video.mean(1), rtol=1e-5, atol=1e-6)


def test_a_static_video_loses_nothing(capture_module):
    video = features(1).repeat(1, FRAMES, 1, 1)
    program, net = capture_module(Reader, features=video)
    after, _ = banked(program, length=2, frames=FRAMES)
    assert differs(after, {"features": video}, net(video)) <= 1e-6


class Video(nn.Module):
    """Patches of the frames of a video behind a class token in each."""

    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, CHANNELS, 2, 2), nn.Parameter(torch.zeros(1, 1, CHANNELS))
        self.reader = Reader()

    def see(self, video):
        rows = self.patches(video.transpose(1, 2).flatten(0, 1)).flatten(2).mT
        rows = torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1)
        return rows.unflatten(0, (-1, video.shape[2]))

    def forward(self, video):
        return self.reader(self.see(video))


def test_frames_are_found(capture_module):
    video = torch.randn(2, 3, 6, 4, 4)
    program, net = capture_module(Video, video=video)
    after, record = banked(program, ["reader.*"], length=4)
    assert list(record.sites) == ["reader.layers.0", "reader.layers.1"]
    bank, _ = bank_of(net.see(video), 4)
    assert differs(after, {"video": video}, net.reader(bank)) <= 1e-5


class InRow(Reader):
    """Frames in one row, which come in so; or pixels of which nothing says what they are."""

    def forward(self, features):
        return self.read(features)


class Itself(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * WIDTH)

    def forward(self, features):
        heads = self.qkv(features.flatten(1, 2)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return functional.scaled_dot_product_attention(*heads)


def test_frames_in_a_row(capture_module):
    video = features()
    program, net = capture_module(InRow, features=video.flatten(1, 2))
    after, record = banked(program, length=3, frames=FRAMES)
    assert len(record.sites) == 2
    assert differs(after, {"features": video.flatten(1, 2)}, net(bank_of(video, 3)[0].flatten(1, 2))) <= 1e-5


REFUSED = {
    "few": (Reader, {"frames": 7, "length": 7}, "its 7 frames fit into a bank of 7"),
    "unknown": (Reader, {"length": 3}, "what of its 35 keys are frames is not known: say frames"),
    "others": (Reader, {"frames": 4, "length": 3}, "its 35 keys are not those of 4 frames"),
    "inner": (Reader, {"frames": 5, "length": 3}, "its keys are 7 × 5, and not 5 frames one after another"),
    "masked": (
        partial(Reader, "masked"),
        {"frames": 7, "length": 3},
        "it has a mask or is causal (simplify drops a mask that hides nothing)",
    ),
    "apart": (
        partial(Reader, "apart"),
        {"frames": 7, "length": 3},
        "its keys and values are not projections of one value",
    ),
    "rotary": (partial(Reader, "rotary"), {"frames": 7, "length": 3}, "%arange stands between its projections"),
    "shown": (partial(Reader, "shown"), {"frames": 7, "length": 3}, "%transpose_1 is read by more than the attention"),
    "itself": (Itself, {"frames": 7, "length": 3}, "it is self-attention: queries would be merged with keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, capture_module):
    build, options, reason = REFUSED[case]
    program, _ = capture_module(build, features=features())
    _, record = banked(program, **options)
    assert not record.modified
    assert record.declined[0].reason.startswith(reason)


def test_options(capture_module):
    program, _ = capture_module(Reader, features=features())
    _, record = banked(program, ["layers.2"], length=3, frames=7)
    assert [(item.path, item.reason) for item in record.declined] == [
        ("layers.2", "no attention is in such a module; the nearest are layers.1, layers.0")
    ]
    after, record = banked(program, ["layers.1"], length=3, frames=7)
    assert list(record.sites) == ["layers.1"]
    assert "linear(%flatten, @layers.0.k.weight" in graph_text(after.entries["full"])
    for wrong in ({"match": ["*"]}, {"match": [], "length": 3}, {"match": ["*"], "length": 0}):
        with pytest.raises(UserError):
            BankMemory.from_options(wrong, owner="test")


def test_half_precision(capture_module):
    video = features().half()
    program, _ = capture_module(lambda: Reader().half(), features=video)
    after, _ = banked(program, length=6, frames=7)
    text = graph_text(after.entries["full"])
    assert "argmax(%div_tensor, 2, True) : i64[2, 5, 1, 1]" in text
    assert "%matmul_default_1 = matmul(%div_tensor_1, %permute_default) : f32[2, 5, 6, 6]" in text
    assert "f16[2, 30, 8]" in text


def test_open_sizes(capture_shared):
    shapes = {"features": ("batch", 6, "tokens", CHANNELS)}
    program = capture_shared(partial(Reader, depth=1), shapes, {"batch": Span(1, 9), "tokens": Span(2, 16)})
    after, record = banked(program, length=4, frames=6)
    assert len(record.sites) == 1
    net = Reader(depth=1)
    net.load_state_dict({name: each.evaluate() for name, each in program.weights.items()}, strict=False)
    for batch, tokens in ((1, 9), (3, 4)):
        video = features(6, tokens, batch)
        assert differs(after, {"features": video}, net(bank_of(video, 4)[0])) <= 1e-5
    program = capture_shared(
        partial(Reader, depth=1), {"features": (2, "frames", TOKENS, CHANNELS)}, {"frames": Span(2, 16)}
    )
    _, record = banked(program, length=4)
    assert not record.modified


def test_onnxruntime(capture_module, tmp_path):
    video = features(4, batch=1)
    program, net = capture_module(partial(Reader, depth=1), features=video)
    after, _ = banked(program, length=2, frames=4)
    target = OnnxRuntime(threads=1)
    entry = target.lower(after, Lowering(tmp_path))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs], "details": entry.details}
    found = target.load(tmp_path, record, {"threads": 1})({"features": video})
    wanted = {next(iter(found)): net(bank_of(video, 2)[0]).detach()}
    assert outputs_difference(found, wanted).relative_error <= 1e-5


def qformer():
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    class Video(nn.Module):
        """BLIP-2's Q-Former over the features of a video, as in MA-LMM."""

        def __init__(self):
            super().__init__()
            config = Blip2QFormerConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                cross_attention_frequency=1,
                encoder_hidden_size=CHANNELS,
            )
            self.qformer = Blip2QFormerModel(config)
            self.queries = nn.Parameter(torch.zeros(1, QUERIES, 16))

        def forward(self, features):
            options = {"encoder_hidden_states": features.flatten(1, 2), "return_dict": False}
            return self.qformer(query_embeds=self.queries.expand(len(features), -1, -1), **options)[0]

    return Video()


@pytest.mark.slow
def test_a_qformer(capture_module):
    video = features(9)
    program, net = capture_module(qformer, features=video)
    program, _ = run_pass(program, Step("simplify", Simplify()))
    after, record = banked(program, ["*.crossattention.*"], length=4, frames=9)
    assert list(record.sites) == [f"qformer.encoder.layer.{number}.crossattention.attention" for number in (0, 1)]
    assert differs(after, {"features": video}, net(bank_of(video, 4)[0])) <= 1e-5
