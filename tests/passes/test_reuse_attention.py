from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from denoisers import denoiser, sampled
from torch import nn
from torch.nn import functional

from optpass.analysis.cost import measure
from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.evaluate.difference import outputs_difference, program_runner
from optpass.ir.graph import shape_of
from optpass.ir.program import Origin, Program
from optpass.ir.text import graph_text
from optpass.ir.weights import Absent, Constant, WeightStore
from optpass.passes.cache_blocks import CacheBlocks
from optpass.passes.reuse_attention import ReuseAttention
from optpass.pipeline.manager import run_pass, run_passes
from optpass.pipeline.recipe import Step, find_recipe, load_recipe
from optpass.rewrite.probes import choice_of, probes

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
WIDTH, HEADS = 8, 2


def reused(program, **options):
    return run_pass(program, Step("reuse-attention", ReuseAttention(**options)))


class Attention(nn.Module):
    def __init__(self, causal=False, gated=False):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal, self.gated = causal, gated

    def attend(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

    def forward(self, x):
        heads = [each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1)]
        result = self.attend(*heads).transpose(1, 2).flatten(2)
        return self.proj(result * x if self.gated else result)


class Biased(Attention):
    """A learned bias for every pair of the tokens of a 3 × 2 grid."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, 6, 6))

    def attend(self, q, k, v):
        return (q @ k.mT + self.bias).softmax(-1) @ v


class Masked(Attention):
    def attend(self, q, k, v):
        near = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu()
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=near)


class Windowed(Attention):
    """Over pairs of rows of a 4 × 2 grid."""

    def forward(self, x):
        return super().forward(x.unflatten(1, (2, 4)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1, 2)


class Layer(nn.Module):
    def __init__(self, attention=Attention):
        super().__init__()
        self.norm1, self.attn, self.scale = nn.LayerNorm(WIDTH), attention(), nn.Parameter(torch.ones(WIDTH))
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.scale * self.attn(self.norm1(x))
        return x + torch.tanh(self.mlp(self.norm2(x)))


class Vit(nn.Module):
    """Patches of 2 × 2 pixels behind ``tokens`` class tokens and before ``behind`` others."""

    def __init__(self, depth, tokens=1, behind=0, attention=Attention):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.tokens = nn.ParameterList([nn.Parameter(torch.zeros(1, 1, WIDTH)) for _ in range(tokens)])
        self.behind = nn.Parameter(torch.zeros(1, behind, WIDTH)) if behind else None
        self.layers = nn.ModuleList([Layer(attention) for _ in range(depth)])

    def embed(self, image):
        rows = self.patches(image).flatten(2).mT
        parts = [*(token.expand(rows.shape[0], -1, -1) for token in self.tokens), rows]
        parts += [] if self.behind is None else [self.behind.expand(rows.shape[0], -1, -1)]
        return torch.cat(parts, 1) if len(parts) > 1 else rows

    def forward(self, image):
        x = self.embed(image)
        for layer in self.layers:
            x = layer(x)
        return x


class Phi(nn.Module):
    """SkipAt's function by itself, of [batch, height · width, channels]."""

    def __init__(self, height, width, channels):
        super().__init__()
        self.size = (height, width)
        self.fc1, self.fc2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.dwconv = nn.Conv2d(2 * channels, 2 * channels, 5, padding=2, groups=2 * channels)
        self.eca = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, rows):
        image = functional.gelu(self.fc1(rows)).mT.unflatten(2, self.size)
        rows = self.fc2(functional.gelu(self.dwconv(image)).flatten(2).mT)
        return rows * torch.sigmoid(self.eca(rows.mean(1).unsqueeze(1)))


def skipping(vit, image, phis, first, count):
    """``vit`` with what ``phis`` (by layer) make of rows first … first + count of the attention before."""
    x, z = vit.embed(image), None
    for number, layer in enumerate(vit.layers):
        if number in phis:
            z = torch.cat([z[:, :first], phis[number](z[:, first : first + count]), z[:, first + count :]], 1)
        else:
            z = layer.attn(layer.norm1(x))
        x = x + layer.scale * z
        x = x + torch.tanh(layer.mlp(layer.norm2(x)))
    return x


def with_random_phis(program, layers, size):
    """The Program with random values of what is untrained, and an independent Φ with the same for each layer."""
    generator = torch.Generator().manual_seed(5)
    shapes = {name: program.weights[name].shape for name in sorted(program.untrained)}
    values = {name: torch.randn(shape, generator=generator) / 3 for name, shape in shapes.items()}
    phis = {number: Phi(*size, WIDTH) for number in layers}
    for number, phi in phis.items():
        prefix = f"layers.{number}.attn.reuse."
        phi.load_state_dict({name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)})
    return program.with_weights({name: Constant(value) for name, value in values.items()}), phis


GOLDEN = """\
  %slice_tensor = slice.Tensor(%linear_1, 1, 0, 1) : f32[2, 1, 8]  ; layers.1.attn.proj
  %slice_tensor_1 = slice.Tensor(%linear_1, 1, 1, 7) : f32[2, 6, 8]  ; layers.1.attn.proj
  %linear_default = linear(%slice_tensor_1, @Φ.fc1.weight, @Φ.fc1.bias) : f32[2, 6, 16]  ; Φ.fc1
  %gelu_default = gelu(%linear_default) : f32[2, 6, 16]  ; Φ.act1
  %reshape_default = reshape(%gelu_default, [2, 3, 2, 16]) : f32[2, 3, 2, 16]  ; Φ.dwconv
  %permute_default = permute(%reshape_default, [0, 3, 1, 2]) : f32[2, 16, 3, 2]  ; Φ.dwconv
  %conv2d_default = conv2d(%permute_default, @Φ.dwconv.weight, @Φ.dwconv.bias, [1, 1], [2, 2], [1, 1], 16) : f32[2, 16, 3, 2]  ; Φ.dwconv
  %gelu_default_1 = gelu(%conv2d_default) : f32[2, 16, 3, 2]  ; Φ.act2
  %permute_default_1 = permute(%gelu_default_1, [0, 2, 3, 1]) : f32[2, 3, 2, 16]  ; Φ.dwconv
  %reshape_default_1 = reshape(%permute_default_1, [2, 6, 16]) : f32[2, 6, 16]  ; Φ.dwconv
  %linear_default_1 = linear(%reshape_default_1, @Φ.fc2.weight, @Φ.fc2.bias) : f32[2, 6, 8]  ; Φ.fc2
  %mean_dim = mean.dim(%linear_default_1, [1], True) : f32[2, 1, 8]  ; Φ.eca
  %conv1d_default = conv1d(%mean_dim, @Φ.eca.weight, None, [1], [1]) : f32[2, 1, 8]  ; Φ.eca
  %sigmoid_default = sigmoid(%conv1d_default) : f32[2, 1, 8]  ; Φ.eca
  %mul_tensor = mul.Tensor(%linear_default_1, %sigmoid_default) : f32[2, 6, 8]  ; Φ.eca
  %cat_default = cat([%slice_tensor, %mul_tensor], 1) : f32[2, 7, 8]  ; layers.1.attn.proj
  %mul_1 = mul.Tensor(@layers.1.scale, %cat_default) : f32[2, 7, 8]  ; layers.1
"""  # noqa: E501


def test_golden(capture_module):
    program, _ = capture_module(partial(Vit, 3), image=torch.zeros(2, 3, 6, 4))
    after, record = reused(program, layers=[1])
    lines = graph_text(after.entries["full"]).replace("layers.1.attn.reuse", "Φ").splitlines(keepends=True)
    made = [line for line in lines if "Φ" in line or "slice_tensor" in line or "cat_default" in line]
    assert "".join(made) == GOLDEN
    assert list(record.sites) == ["layers.1.attn"]
    assert not record.declined
    assert str(record.record.promise) == "retrain"


CASES = {
    "the middle of 8": (8, {}, [2, 3, 4, 5]),
    "chosen layers": (6, {"layers": [1, 3, 4]}, [1, 3, 4]),
    "by module": (5, {"match": ["layers.[34]"]}, [3, 4]),
    "by module and number": (5, {"match": ["layers.[34]"], "layers": [1, 4]}, [4]),
}


@pytest.mark.parametrize(("tokens", "behind"), [(0, 0), (1, 0), (2, 3)])
@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_an_independent_module(case, tokens, behind, capture_module):
    depth, options, layers = CASES[case]
    image = torch.randn(2, 3, 6, 4)
    program, vit = capture_module(partial(Vit, depth, tokens, behind), image=image)
    after, record = reused(program, **options)
    assert list(record.sites) == [f"layers.{number}.attn" for number in layers]
    assert after.untrained == set(after.weights) - set(program.weights)
    assert len(after.untrained) == 7 * len(layers)
    for number in layers:
        assert not {
            name for name in after.weights if name.startswith((f"layers.{number}.attn.qkv", f"layers.{number}.norm1"))
        }
    after, phis = with_random_phis(after, layers, (3, 2))
    _compare(after, image, skipping(vit, image, phis, tokens, 6))


def test_identity_takes_what_attention_gave_before(capture_module):
    image = torch.randn(2, 3, 6, 4)
    program, vit = capture_module(partial(Vit, 8, 2), image=image)
    after, record = reused(program, phi="identity")
    assert (len(record.sites), after.untrained, str(record.record.promise)) == (4, frozenset(), "approximate")
    _compare(after, image, skipping(vit, image, dict.fromkeys(range(2, 6), nn.Identity()), 0, 8))
    assert record.after.totals.macs < record.before.totals.macs


def _compare(program, image, expected):
    found = program_runner(program, "full")({"image": image})
    [name] = found
    assert outputs_difference(found, {name: expected.detach()}).relative_error <= 1e-5


class Inline(Vit):
    """Whose attentions are all the root module's own."""

    def forward(self, image):
        x = self.embed(image)
        for layer in self.layers:
            normed = functional.layer_norm(x, (WIDTH,), layer.norm1.weight, layer.norm1.bias)
            qkv = functional.linear(normed, layer.attn.qkv.weight, layer.attn.qkv.bias)
            heads = [each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in qkv.chunk(3, -1)]
            z = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            x = x + layer.scale * functional.linear(z, layer.attn.proj.weight, layer.attn.proj.bias)
            x = x + torch.tanh(functional.linear(functional.layer_norm(x, (WIDTH,)), layer.mlp.weight))
        return x


def test_layers_of_one_module_have_parameters_of_their_own(capture_module):
    program, _ = capture_module(partial(Inline, 5), image=torch.zeros(2, 3, 6, 4))
    after, record = reused(program, layers=[1, 3])
    assert list(record.sites) == ["(root)", "(root)"]
    assert {name.partition(".")[0] for name in after.untrained} == {"reuse", "reuse_1"}
    assert len(after.untrained) == 14


def test_modules_return_what_they_returned(capture_module):
    """So that a training can compare them: the last value that leaves a module has the shape that it had."""
    program, _ = capture_module(partial(Vit, 8, 2, 3), image=torch.zeros(2, 3, 6, 4))
    after, _ = reused(program)
    for pattern in ("layers.?", "layers.?.attn"):
        before, now = (probes(each.entries["full"], choice_of(pattern)) for each in (program, after))
        assert {path: shape_of(probe.node) for path, probe in now.items()} == {
            path: shape_of(probe.node) for path, probe in before.items()
        }


def test_a_learned_bias_hides_nothing(capture_module):
    program, _ = capture_module(partial(Vit, 3, 0, attention=Biased), image=torch.zeros(2, 3, 6, 4))
    _, record = reused(program, layers=[1])
    assert list(record.sites) == ["layers.1.attn"]


def test_frames_are_convolved_one_by_one(capture_module):
    class Video(Vit):
        def embed(self, image):
            return super().embed(image.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, 4)).flatten(1, 2)

    image = torch.randn(2, 3, 4, 6, 4)
    program, vit = capture_module(partial(Video, 4, 0), image=image)
    after, record = reused(program, layers=[1, 2])
    assert list(record.sites) == ["layers.1.attn", "layers.2.attn"]
    after, phis = with_random_phis(after, (1, 2), (3, 2))
    frames = {number: OverFrames(phi) for number, phi in phis.items()}
    _compare(after, image, skipping(vit, image, frames, 0, 24))


class OverFrames(nn.Module):
    """Φ whose convolution sees the pixels of each of four frames, and whose ECA all of them."""

    def __init__(self, phi):
        super().__init__()
        self.phi = phi

    def forward(self, rows):
        frames = functional.gelu(self.phi.fc1(rows)).unflatten(1, (4, 6)).flatten(0, 1).mT.unflatten(2, self.phi.size)
        mixed = functional.gelu(self.phi.dwconv(frames)).flatten(2).mT.unflatten(0, (-1, 4)).flatten(1, 2)
        rows = self.phi.fc2(mixed)
        return rows * torch.sigmoid(self.phi.eca(rows.mean(1).unsqueeze(1)))


def test_the_start_is_near_the_identity(capture_module):
    """The attention before, or what has forgotten it: nearer than a random start by far."""
    image = torch.randn(2, 3, 6, 4)
    program, _ = capture_module(partial(Vit, 8), image=image)
    outputs = {
        name: program_runner(reused(program, **options)[0], "full")({"image": image})
        for name, options in (
            ("exact", {"phi": "identity"}),
            ("near", {}),
            ("random", {"start": "random"}),
            ("again", {"start": "random"}),
            ("other", {"start": "random", "seed": 1}),
        )
    }
    near, random, again, other = (
        outputs_difference(outputs[name], outputs["exact"]).relative_error
        for name in ("near", "random", "again", "other")
    )
    assert near < random / 4
    assert random == again != other


def test_a_second_run_finds_nothing(capture_module):
    program, _ = capture_module(partial(Vit, 8), image=torch.zeros(2, 3, 6, 4))
    for options in ({}, {"phi": "identity"}, {"layers": [3]}, {"match": ["layers.[45].attn"]}):
        after, _ = reused(program, **options)
        _, record = reused(after, **options)
        assert not record.modified
        assert record.declined


REFUSED = {
    "causal": (
        partial(Vit, 3, attention=partial(Attention, causal=True)),
        "it is causal, and Φ looks at all neighbours",
    ),
    "masked": (partial(Vit, 3, attention=Masked), "it has a mask (simplify drops one that hides nothing)"),
    "windowed": (
        partial(Vit, 3, 0, attention=Windowed),
        "it is among the tokens of a window, and windows move from layer to layer",
    ),
    "gated": (
        partial(Vit, 3, attention=partial(Attention, gated=True)),
        "its projection reads more than the attention (layers.1.attn: %mul_2)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, capture_module):
    build, reason = REFUSED[case]
    height = 8 if case == "windowed" else 6
    program, _ = capture_module(build, image=torch.zeros(2, 3, height, 4))
    _, record = reused(program, layers=[1])
    assert [(item.path, item.reason) for item in record.declined] == [("layers.1.attn", reason)]


def test_without_a_stream_there_is_no_layer(capture_module):
    program, _ = capture_module(Attention, x=torch.zeros(2, 6, WIDTH))
    _, record = reused(program)
    assert [(item.node, item.reason) for item in record.declined] == [
        ("scaled_dot_product_attention", "its result enters no residual stream")
    ]


def test_new_parameters_have_the_dtype_of_the_model(capture_module):
    image = torch.zeros(2, 3, 6, 4, dtype=torch.float16)
    program, _ = capture_module(lambda: Vit(3).half(), image=image)
    after, record = reused(program, layers=[1])
    assert record.modified
    assert {after.weights[name].dtype for name in after.untrained} == {torch.float16}


def test_what_layers_and_match_do_not_find_is_told(capture_module):
    program, _ = capture_module(partial(Vit, 2), image=torch.zeros(2, 3, 6, 4))
    for options, reason in (
        ({"layers": [2]}, "there is no layer 2 in its stack of 2"),
        ({}, "its stack has 2 such layers, none in the middle"),
        ({"match": ["layer.1"]}, "no attention of a stack is in such a module"),
        ({"match": ["layers.0"]}, "there is no such attention in the layer before"),
    ):
        _, record = reused(program, **options)
        assert [item.reason for item in record.declined] == [reason]


def of_denoiser(name, **options):
    graph = denoiser(name)
    specs = {str(n.target): n.meta["val"] for n in graph.fx.nodes if n.op == "get_attr"}
    weights = WeightStore({name: Absent(name, tuple(v.shape), v.dtype) for name, v in specs.items()})
    return reused(Program({"full": graph.copy()}, weights, Origin("test")), **options)[1]


def test_in_denoisers():
    """DiT's gates stay; the text of a joint attention is no grid; over frames there is none."""
    assert list(of_denoiser("DiT-XL/2", layers=[1, 2]).sites) == [f"transformer_blocks.{n}.attn1" for n in (1, 2)]
    latte = of_denoiser("Latte-1", layers=[1])
    assert list(latte.sites) == ["transformer_blocks.1.attn1"]
    assert [(item.path, item.reason.split(":")[0]) for item in latte.declined] == [
        ("transformer_blocks.1.attn2", "cross-attention"),
        ("temporal_transformer_blocks.1.attn1", "among its tokens are 3 along frames, which are no grid"),
    ]
    assert [item.reason for item in of_denoiser("SD 3 medium", layers=[1]).declined] == [
        "its result enters several streams"
    ]


def test_open_sizes(capture_shared):
    """One graph for every batch and grid gives what the graphs of two sizes give."""
    spans = {"batch": Span(1, 9), "height": Span(4, 16), "width": Span(4, 16)}
    program = capture_shared(partial(Vit, 4), {"image": ("batch", 3, "height", "width")}, spans)
    after, record = reused(program, layers=[1, 2])
    assert list(record.sites) == ["layers.1.attn", "layers.2.attn"]
    run = program_runner(after, "full")
    for shape in ((3, 3, 6, 4), (1, 3, 8, 12)):
        image = torch.randn(shape)
        fixed, _ = reused(capture_shared(partial(Vit, 4), {"image": shape}, {}), layers=[1, 2])
        found, expected = run({"image": image}), program_runner(fixed, "full")({"image": image})
        assert outputs_difference(found, expected).relative_error <= 1e-5


def test_entries_that_share_weights_share_new_ones(tmp_path):
    """The first four blocks run in the step that keeps the others and in the one that reuses them."""
    program, _ = sampled("DiT-XL/2", tmp_path, layers=6)
    program, _ = run_pass(program, Step("cache-blocks", CacheBlocks(every=2, head=4)))
    after, record = reused(program)
    sites = [f"transformer_blocks.{number}.attn1" for number in (1, 2, 3)]
    others = [entry for entry in after.entries if entry != "full"]
    assert list(record.sites) == [*sites, *(f"{entry}:{site}" for entry in others for site in sites)]
    assert len(after.untrained) == 7 * len(sites)
    assert all(after.untrained <= set(graph.weight_names) for graph in after.entries.values())


# Parameters in millions and 10⁹ MACs: of the released code, counted in the paper's terms.
DEIT = {"tiny": (5.77, 1.175), "small": (22.16, 4.439), "base": (86.79, 17.24)}


@pytest.mark.parametrize("size", ["tiny", "base", pytest.param("small", marks=pytest.mark.slow)])
def test_published_counts(size, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": f"deit_{size}_patch16_224"}), "utf-8")
    program = capture(tmp_path, structure_only=True)
    after, record = reused(program)
    assert list(record.sites) == [f"blocks.{number}.attn" for number in range(3, 9)]
    parameters, macs = DEIT[size]
    totals = measure(after).totals
    assert totals.parameters / 1e6 == pytest.approx(parameters, rel=0.005)
    assert totals.macs / 1e9 == pytest.approx(macs, rel=0.005)


def test_the_recipe_on_digits_vit():
    program = capture(CHECKPOINTS / "digits-vit", inputs={"pixel_values": (2, 1, 32, 32)}, dtype=torch.float32)
    _, record = reused(program)
    assert {item.reason for item in record.declined} == {"it has a mask (simplify drops one that hides nothing)"}
    after, [plain, record] = run_passes(program, load_recipe(find_recipe("skipat-vit")).steps)
    assert list(record.sites) == [f"vit.layers.{number}.attention" for number in range(3, 9)]
    assert record.after.totals.macs_attention == record.before.totals.macs_attention // 2
    assert plain.after.totals == record.before.totals
    image = torch.rand(2, 1, 32, 32)
    difference = outputs_difference(
        *(program_runner(each, "full")({"pixel_values": image}) for each in (after, program))
    )
    assert 0 < difference.relative_error < 1
