from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from optpass.analysis.cost import measure
from optpass.analysis.operators import aten
from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.evaluate.difference import outputs_difference, program_runner
from optpass.ir.graph import shape_of
from optpass.ir.text import graph_text
from optpass.ir.weights import Constant
from optpass.passes.select_tokens import SelectTokens
from optpass.pipeline.manager import run_pass, run_passes
from optpass.pipeline.recipe import Step, find_recipe, load_recipe, make_recipe
from optpass.pipeline.registry import target_class
from optpass.pipeline.target import Lowering

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
WIDTH, HEADS, HEIGHT, COLUMNS = 8, 2, 6, 4
PATCHES = HEIGHT * COLUMNS
IMAGE = (2, 3, 2 * HEIGHT, 2 * COLUMNS)
MERGE_AND_SLOW = ["merge", *(pytest.param(name, marks=pytest.mark.slow) for name in ("drop", "bypass"))]


def selected(program, **options):
    return run_pass(program, Step("select-tokens", SelectTokens(**options)))


def in_one_operator(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v)


def in_products(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


def in_folded_heads(q, k, v):
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.mT) * q.shape[-1] ** -0.5, -1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


def in_einsums(q, k, v):
    weights = (torch.einsum("bhnc,bhmc->bhnm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhnm,bhmc->bhnc", weights, v)


class Attention(nn.Module):
    def __init__(self, attend=in_one_operator):
        super().__init__()
        self.qkv, self.proj, self.attend = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), attend

    def heads(self, x):
        return [each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1)]

    def forward(self, x):
        return self.proj(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def behind(self, x):
        return x + torch.tanh(self.mlp(self.norm2(x)))

    def forward(self, x):
        return self.behind(x + self.attn(self.norm1(x)))


class Vit(nn.Module):
    """Patches of 2 × 2 pixels behind ``tokens`` class tokens; ``head`` says what is read of the tokens."""

    def __init__(self, depth, tokens=1, attention=Attention, head="class"):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.tokens = nn.Parameter(torch.zeros(1, tokens, WIDTH)) if tokens else None
        self.layers = nn.ModuleList([Layer(attention) for _ in range(depth)])
        self.norm, self.head, self.count = nn.LayerNorm(WIDTH), head, tokens

    def embed(self, image):
        rows = self.patches(image).flatten(2).mT
        return rows if self.tokens is None else torch.cat([self.tokens.expand(rows.shape[0], -1, -1), rows], 1)

    def read(self, x, sizes=None):
        x = self.norm(x)
        if self.head == "class":
            return x[:, 0]
        if self.head == "mean":
            rest = x[:, self.count :]
            return rest.mean(1) if sizes is None else (rest * sizes[:, self.count :]).sum(1) / PATCHES
        return x

    def forward(self, image):
        x = self.embed(image)
        for layer in self.layers:
            x = layer(x)
        return self.read(x)


# The published methods once more, by hand.


def matching(metric, r, protected):
    """The authors' bipartite soft matching, for 0 or 1 class token, or one and a distillation token."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    if protected > 0:
        scores[:, 0] = -math.inf
    if protected > 1:
        scores[:, :, 0] = -math.inf
    best, nearest = scores.max(-1)
    order = best.argsort(-1, descending=True).unsqueeze(-1)
    staying, going = order[:, r:], order[:, :r]
    into = nearest.unsqueeze(-1).gather(1, going)
    if protected > 0:
        staying = staying.sort(1)[0]

    def merge(x):
        even, odd = x[:, ::2], x[:, 1::2]
        columns = x.shape[-1]
        kept = even.gather(1, staying.expand(-1, -1, columns))
        odd = odd.scatter_add(1, into.expand(-1, -1, columns), even.gather(1, going.expand(-1, -1, columns)))
        if protected > 1:
            return torch.cat([kept[:, :1], odd[:, :1], kept[:, 1:], odd[:, 1:]], 1)
        return torch.cat([kept, odd], 1)

    return merge


def attended(layer, x, sizes=None):
    """The result of an attention, its map and its keys."""
    q, k, v = layer.attn.heads(layer.norm1(x))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if sizes is not None:
        scores = scores + sizes.log()[:, None, None, :, 0]
    weights = scores.softmax(-1)
    return layer.attn.proj((weights @ v).transpose(1, 2).flatten(2)), weights, k


def merging(vit, image, gone, protected):
    """``vit`` with ``gone[layer]`` tokens merged in each layer, and the sizes of those that are left."""
    x, sizes = vit.embed(image), None
    for number, layer in enumerate(vit.layers):
        z, _, k = attended(layer, x, sizes)
        x = x + z
        if r := min(gone.get(number, 0), (x.shape[1] - protected) // 2):
            merge = matching(k.mean(1), r, protected)
            sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
            x, sizes = merge(x * sizes), merge(sizes)
            x = x / sizes
        x = layer.behind(x)
    return vit.read(x, sizes), sizes


def dropping(vit, image, rates, first, frame=None, weight=1.0):
    """``vit`` that keeps ⌈rate · N⌉ of N tokens in the layers of ``rates``: class tokens, a frame, the highest."""
    x = vit.embed(image)
    fixed = [*range(first), *(range(*frame) if frame else ())]
    for number, layer in enumerate(vit.layers):
        z, weights, _ = attended(layer, x)
        x = x + z
        if number in rates:
            weights = weights.clone()
            weights[:, :, fixed[first:]] *= weight
            scores = weights.mean((1, 2))
            free = [place for place in range(x.shape[1]) if place not in fixed]
            best = scores[:, free].topk(math.ceil(rates[number] * x.shape[1]) - len(fixed), 1)[1]
            index = torch.tensor(free)[best]
            rest = x.gather(1, index.unsqueeze(-1).expand(-1, -1, WIDTH))
            x = torch.cat([x[:, fixed], rest], 1)
            fixed = [*range(len(fixed))]
        x = layer.behind(x)
    return vit.read(x)


def bypassing(vit, image, layers, kept, first, predict):
    """``vit`` where ``kept`` tokens take part in ``layers``; ``predict(layer, map)`` gives scores and factors."""
    x, weights = vit.embed(image), None
    for number, layer in enumerate(vit.layers):
        if number in layers:
            scores, gate = predict(number, weights)
            scores = scores.clone()
            scores[:, :first] = math.inf
            index = scores.topk(kept, 1)[1].unsqueeze(-1)
            those = x.gather(1, index.expand(-1, -1, WIDTH))
            z = layer.behind(those + attended(layer, those)[0])
            z = those + gate.gather(1, index) * (z - those)
            x = x.scatter(1, index.expand(-1, -1, WIDTH), z)
        else:
            z, weights, _ = attended(layer, x)
            x = layer.behind(x + z)
    return vit.read(x)


def compare(program, image, expected):
    [found] = program_runner(program, "full")({"image": image}).values()
    assert outputs_difference({"y": found}, {"y": expected.detach()}).relative_error <= 1e-5


# Merging.

SCHEDULES = {
    "everywhere": ({"r": 3}, {0: 3, 1: 3, 2: 3}),
    "one by one": ({"r": (0, 4, 2)}, {1: 4, 2: 2}),
    "in chosen layers": ({"r": (5, 1), "layers": (0, 2)}, {0: 5, 2: 1}),
    "falling": ({"r": 4, "inflect": -1}, {0: 8, 1: 4, 2: 0}),
    "as many as there can be": ({"r": 100}, {0: 100, 1: 100, 2: 100}),
    "a share": ({"ratio": 0.25, "layers": (0, 1)}, {0: 6, 1: 4}),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_merging_is_that_of_the_authors(schedule, capture_module):
    options, gone = SCHEDULES[schedule]
    image = torch.randn(IMAGE)
    program, vit = capture_module(partial(Vit, 3), image=image)
    after, record = selected(program, **options)
    layers = [number for number in gone if gone[number]]
    assert list(record.sites) == [f"layers.{number}.attn" for number in layers]
    expected, sizes = merging(vit, image, gone, 1)
    compare(after, image, expected)
    assert (sizes.sum(1) == PATCHES + 1).all()


@pytest.mark.parametrize("attend", [in_products, in_folded_heads, pytest.param(in_einsums, marks=pytest.mark.slow)])
def test_attention_in_other_words(attend, capture_module):
    image = torch.randn(IMAGE)
    program, vit = capture_module(partial(Vit, 3, attention=partial(Attention, attend)), image=image)
    after, record = selected(program, r=4)
    assert len(record.sites) == 3
    compare(after, image, merging(vit, image, {0: 4, 1: 4, 2: 4}, 1)[0])


@pytest.mark.parametrize("tokens", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_mean_counts_what_tokens_stand_for(tokens, capture_module):
    image = torch.randn(IMAGE)
    program, vit = capture_module(partial(Vit, 3, tokens, head="mean"), image=image)
    after, _ = selected(program, r=4)
    compare(after, image, merging(vit, image, {0: 4, 1: 4, 2: 4}, tokens)[0])


def test_five_registers_keep_their_places(capture_module):
    """Two more than the authors' code knows: the result is one of 5 protected and 11 merged tokens."""
    image = torch.randn(IMAGE)
    program, _ = capture_module(partial(Vit, 2, 5), image=image)
    after, record = selected(program, r=6, layers=(0,))
    assert len(record.sites) == 1
    stream = sizes_in(after, image)
    assert stream.shape == (2, PATCHES + 5 - 6, 1)
    assert (stream[:, :5] == 1).all()


def sizes_in(program, image):
    """How many tokens each of the last ones stands for, read out of the graph."""
    graph = program.entries["full"]
    logarithm = [node for node in graph.calls if node.target is aten.log.default][-1]
    copy = graph.copy()
    [node] = [node for node in copy.calls if node.name == logarithm.name]
    copy.output_node.args = ((node.args[0],),)
    copy.remove_dead_code()
    return copy.module(program.weights)(image)[0]


def test_sizes_sum_up_to_all_tokens(capture_module):
    program, _ = capture_module(partial(Vit, 5), image=torch.zeros(IMAGE))
    after, _ = selected(program, r=5)
    sizes = sizes_in(after, torch.randn(IMAGE))
    assert sizes.shape == (2, 6, 1)
    assert (sizes.sum(1) == PATCHES + 1).all()
    assert sizes.max() > 2


def test_tokens_that_are_there_twice_are_merged_without_a_loss(capture_module):
    """Neighbours in a row of patches are alike; half of all tokens go and the class token sees no difference."""
    program, vit = capture_module(partial(Vit, 4, 1), image=torch.zeros(IMAGE))
    half = torch.randn(2, 3, 2 * HEIGHT, COLUMNS)
    image = half.unflatten(-1, (-1, 2)).repeat_interleave(2, 3).flatten(3)
    after, _ = selected(program, r=PATCHES // 2, layers=(0,))
    compare(after, image, vit(image))


GOLDEN = """\
  %add = add.Tensor(%cat, %linear_1) : f32[2, 25, 8]  ; layers.0
  %mean_dim = mean.dim(%transpose_1, [1]) : f32[2, 25, 4]  ; layers.0
  %linalg_vector_norm_default = linalg_vector_norm(%mean_dim, 2, [-1], True) : f32[2, 25, 1]  ; layers.0
  %clamp_default = clamp(%linalg_vector_norm_default, 1e-12) : f32[2, 25, 1]  ; layers.0
  %div_tensor = div.Tensor(%mean_dim, %clamp_default) : f32[2, 25, 4]  ; layers.0
  %slice_tensor = slice.Tensor(%div_tensor, 1, 2, 9223372036854775807, 2) : f32[2, 12, 4]  ; layers.0
  %slice_tensor_1 = slice.Tensor(%div_tensor, 1, 1, 9223372036854775807, 2) : f32[2, 12, 4]  ; layers.0
  %transpose_int = transpose.int(%slice_tensor_1, 1, 2) : f32[2, 4, 12]  ; layers.0
  %matmul_default = matmul(%slice_tensor, %transpose_int) : f32[2, 12, 12]  ; layers.0
  %max_dim = max.dim(%matmul_default, -1) : (f32[2, 12], i64[2, 12])  ; layers.0
  %getitem_6 = getitem(%max_dim, 0) : f32[2, 12]  ; layers.0
  %getitem_7 = getitem(%max_dim, 1) : i64[2, 12]  ; layers.0
  %topk_default = topk(%getitem_6, 12) : (f32[2, 12], i64[2, 12])  ; layers.0
  %getitem_8 = getitem(%topk_default, 1) : i64[2, 12]  ; layers.0
  %slice_tensor_2 = slice.Tensor(%getitem_8, 1, 0, 3) : i64[2, 3]  ; layers.0
  %gather_default = gather(%getitem_7, 1, %slice_tensor_2) : i64[2, 3]  ; layers.0
  %slice_tensor_3 = slice.Tensor(%getitem_8, 1, 3, 9223372036854775807) : i64[2, 9]  ; layers.0
  %sort_default = sort(%slice_tensor_3) : (i64[2, 9], i64[2, 9])  ; layers.0
  %getitem_9 = getitem(%sort_default, 0) : i64[2, 9]  ; layers.0
  %cat_default = cat([%getitem_9, %slice_tensor_2], 1) : i64[2, 12]  ; layers.0
  %mul_tensor = mul.Tensor(%cat_default, 2) : i64[2, 12]  ; layers.0
  %add_tensor = add.Tensor(%mul_tensor, 2) : i64[2, 12]  ; layers.0
  %reshape_default = reshape(%add, [50, 8]) : f32[50, 8]  ; layers.0
  %arange_default = arange(2) : i64[2]  ; layers.0
  %mul_tensor_1 = mul.Tensor(%arange_default, 25) : i64[2]  ; layers.0
  %unsqueeze_default = unsqueeze(%mul_tensor_1, 1) : i64[2, 1]  ; layers.0
  %add_tensor_1 = add.Tensor(%add_tensor, %unsqueeze_default) : i64[2, 12]  ; layers.0
  %reshape_default_1 = reshape(%add_tensor_1, [24]) : i64[24]  ; layers.0
  %index_select_default = index_select(%reshape_default, 0, %reshape_default_1) : f32[24, 8]  ; layers.0
  %reshape_default_2 = reshape(%index_select_default, [2, 12, 8]) : f32[2, 12, 8]  ; layers.0
  %slice_tensor_4 = slice.Tensor(%add, 1, 0, 1) : f32[2, 1, 8]  ; layers.0
  %slice_tensor_5 = slice.Tensor(%reshape_default_2, 1, 0, 9) : f32[2, 9, 8]  ; layers.0
  %slice_tensor_6 = slice.Tensor(%reshape_default_2, 1, 9, 9223372036854775807) : f32[2, 3, 8]  ; layers.0
  %arange_default_1 = arange(12) : i64[12]  ; layers.0
  %unsqueeze_default_1 = unsqueeze(%arange_default_1, 1) : i64[12, 1]  ; layers.0
  %unsqueeze_default_2 = unsqueeze(%gather_default, 1) : i64[2, 1, 3]  ; layers.0
  %eq_tensor = eq.Tensor(%unsqueeze_default_2, %unsqueeze_default_1) : bool[2, 12, 3]  ; layers.0
  %to_dtype = to.dtype(%eq_tensor, f32) : f32[2, 12, 3]  ; layers.0
  %slice_tensor_7 = slice.Tensor(%add, 1, 1, 9223372036854775807, 2) : f32[2, 12, 8]  ; layers.0
  %full_default = full([2, 10, 1], 1.0, dtype=f32) : f32[2, 10, 1]  ; layers.0
  %sum_dim_int_list = sum.dim_IntList(%to_dtype, [-1], True) : f32[2, 12, 1]  ; layers.0
  %add_tensor_2 = add.Tensor(%sum_dim_int_list, 1.0) : f32[2, 12, 1]  ; layers.0
  %matmul_default_1 = matmul(%to_dtype, %slice_tensor_6) : f32[2, 12, 8]  ; layers.0
  %add_tensor_3 = add.Tensor(%slice_tensor_7, %matmul_default_1) : f32[2, 12, 8]  ; layers.0
  %div_tensor_1 = div.Tensor(%add_tensor_3, %add_tensor_2) : f32[2, 12, 8]  ; layers.0
  %cat_default_1 = cat([%slice_tensor_4, %slice_tensor_5, %div_tensor_1], 1) : f32[2, 22, 8]  ; layers.0
  %cat_default_2 = cat([%full_default, %add_tensor_2], 1) : f32[2, 22, 1]  ; layers.0
  %log_default = log(%cat_default_2) : f32[2, 22, 1]  ; layers.0
  %reshape_default_3 = reshape(%log_default, [2, 1, 1, 22]) : f32[2, 1, 1, 22]  ; layers.0
"""


def test_golden(capture_module):
    program, _ = capture_module(partial(Vit, 2), image=torch.zeros(IMAGE))
    after, record = selected(program, r=3, layers=(0,))
    lines = graph_text(after.entries["full"]).splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "%add = " in line)
    end = next(number for number, line in enumerate(lines) if "norm2" in line)
    assert "".join(lines[start:end]) == GOLDEN
    assert list(record.sites) == ["layers.0.attn"]
    assert not record.declined
    assert str(record.record.promise) == "approximate"


# Dropping.


@pytest.mark.parametrize(
    ("tokens", "attend"),
    [
        (0, in_one_operator),
        (1, in_products),
        pytest.param(2, in_one_operator, marks=pytest.mark.slow),
        pytest.param(1, in_one_operator, marks=pytest.mark.slow),
    ],
)
def test_dropping_keeps_what_receives_most(tokens, attend, capture_module):
    image = torch.randn(IMAGE)
    head = "class" if tokens else "mean"
    program, vit = capture_module(partial(Vit, 4, tokens, partial(Attention, attend), head), image=image)
    after, record = selected(program, method="drop", rate=0.6)
    assert list(record.sites) == [f"layers.{number}.attn" for number in (1, 2, 3)]
    compare(after, image, dropping(vit, image, dict.fromkeys((1, 2, 3), 0.6), tokens))


class Video(Vit):
    """Five frames, one behind the other."""

    def embed(self, image):
        rows = self.patches(image.transpose(1, 2).flatten(0, 1)).flatten(2).mT.unflatten(0, (-1, 5)).flatten(1, 2)
        return rows if self.tokens is None else torch.cat([self.tokens.expand(rows.shape[0], -1, -1), rows], 1)


@pytest.mark.parametrize(("tokens", "weight"), [(0, 1.0), (1, 4.0)])
def test_a_frame_can_be_protected(tokens, weight, capture_module):
    video = torch.randn(2, 3, 5, 6, 4)
    head = "class" if tokens else "mean"
    program, vit = capture_module(partial(Video, 4, tokens, head=head), image=video)
    options = {"method": "drop", "rate": 0.7, "protect": "frame", "weight": weight, "layers": (0, 2)}
    after, record = selected(program, **options)
    assert len(record.sites) == 2
    frame = (tokens + 2 * 6, tokens + 3 * 6)
    compare(after, video, dropping(vit, video, {0: 0.7, 2: 0.7}, tokens, frame, weight))
    assert selected(program, **options | {"rate": 0.2})[1].declined[0].reason == (
        f"{math.ceil(0.2 * (30 + tokens))} of {30 + tokens} tokens would stay, and {6 + tokens} always do"
    )


# Bypassing.


@pytest.mark.parametrize(
    ("tokens", "attend"),
    [(2, in_one_operator), pytest.param(0, in_products, marks=pytest.mark.slow)],
)
def test_bypassing_by_what_was_received(tokens, attend, capture_module):
    image = torch.randn(IMAGE)
    program, vit = capture_module(partial(Vit, 4, tokens, partial(Attention, attend), "all"), image=image)
    after, record = selected(program, method="bypass", rate=0.4, surrogate="column-mean")
    assert list(record.sites) == ["layers.1.attn", "layers.3.attn"]
    assert str(record.record.promise) == "approximate"
    kept = math.ceil(0.4 * (PATCHES + tokens))
    mean = lambda _, weights: (weights.mean((1, 2)), torch.ones_like(weights[:, 0, :, :1]))  # noqa: E731
    compare(after, image, bypassing(vit, image, (1, 3), kept, tokens, mean))


class Selector(nn.Module):
    """What the pass puts before a layer, by itself."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HEADS, 4 * HEADS), nn.Linear(4 * HEADS, 1)

    def forward(self, weights):
        received = weights.mean(2).mT * weights.shape[-1]
        change = self.fc2(functional.gelu(self.fc1(received)))
        return (received.mean(-1, keepdim=True) + change).squeeze(-1), 2 * torch.sigmoid(change)


def test_the_selector_is_that_of_an_independent_module(capture_module):
    image = torch.randn(IMAGE)
    program, vit = capture_module(partial(Vit, 5, head="all"), image=image)
    after, record = selected(program, method="bypass", rate=0.4)
    assert list(record.sites) == ["layers.1.attn", "layers.3.attn"]
    assert str(record.record.promise) == "retrain"
    assert after.untrained == set(after.weights) - set(program.weights)
    # Before training it predicts what was received, and changes nothing of what is added.
    surrogate, _ = selected(program, method="bypass", rate=0.4, surrogate="column-mean")
    [expected] = program_runner(surrogate, "full")({"image": image}).values()
    compare(after, image, expected)
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.randn(after.weights[name].shape, generator=generator) for name in sorted(after.untrained)}
    selectors = {number: Selector() for number in (1, 3)}
    for number, each in selectors.items():
        prefix = f"layers.{number}.attn.selector."
        each.load_state_dict({n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)})
    after = after.with_weights({name: Constant(value) for name, value in values.items()})
    compare(after, image, bypassing(vit, image, (1, 3), 10, 1, lambda number, weights: selectors[number](weights)))


def test_who_passes_by_is_unchanged(capture_module):
    """Bit by bit: 15 of 25 tokens are behind layer 1 what they were before it."""
    image = torch.randn(IMAGE)
    program, vit = capture_module(partial(Vit, 2, head="all"), image=image)
    vit.norm = nn.Identity()
    after, _ = selected(program, method="bypass", rate=0.4)
    graph = after.entries["full"].copy()
    [node] = [node for node in graph.calls if node.target is aten.index_put.default]
    graph.output_node.args = ((node.args[0], node),)
    graph.remove_dead_code()
    before, behind = graph.module(after.weights)(image)
    same = (before == behind).all(-1).reshape(2, -1)
    assert same.sum(1).tolist() == [15, 15]
    assert not same[:, 0].any()


# What is exact, what is refused.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"r": 0}, "nothing is to be merged of its 25 tokens"),
        ({"method": "drop", "rate": 1}, "all of its 25 tokens stay"),
        ({"method": "bypass", "rate": 1}, "all of its 25 tokens take part"),
    ],
)
def test_all_tokens_leave_the_graph_alone(options, reason, capture_module):
    program, _ = capture_module(partial(Vit, 4), image=torch.zeros(IMAGE))
    after, record = selected(program, **options)
    assert not record.modified
    assert graph_text(after.entries["full"]) == graph_text(program.entries["full"])
    assert {item.reason for item in record.declined} == {reason}


@pytest.mark.parametrize(
    "options", [{}, {"method": "bypass"}, pytest.param({"method": "drop"}, marks=pytest.mark.slow)]
)
def test_a_second_run_finds_nothing(options, capture_module):
    program, _ = capture_module(partial(Vit, 4), image=torch.zeros(IMAGE))
    after, record = selected(program, **options)
    assert record.modified
    for again in (options, {"r": 2}):
        _, record = selected(after, **again)
        assert not record.modified
        assert [item.reason for item in record.declined] == ["tokens are selected already"]


class Tapped(Vit):
    """Also returns the rows behind layer 1."""

    def forward(self, image):
        rows = self.layers[1](self.layers[0](self.embed(image)))
        return self.read(self.layers[3](self.layers[2](rows))), rows


class Placed(Vit):
    """Adds positions in front of every layer."""

    def __init__(self, depth):
        super().__init__(depth)
        self.places = nn.Parameter(torch.zeros(PATCHES + 1, WIDTH))

    def forward(self, image):
        x = self.embed(image)
        for layer in self.layers:
            x = layer(x + self.places)
        return self.read(x)


class Gridded(Vit):
    def read(self, x, sizes=None):
        return self.norm(x)[:, 1:].mT.unflatten(2, (HEIGHT, COLUMNS)).mean((2, 3))


class Second(Vit):
    """Reads the first patch."""

    def read(self, x, sizes=None):
        return self.norm(x)[:, 1]


def test_layers_behind_the_last_reader_of_all_tokens(capture_module):
    image = torch.randn(IMAGE)
    program, _ = capture_module(partial(Tapped, 4), image=image)
    after, record = selected(program, r=3)
    assert list(record.sites) == ["layers.2.attn", "layers.3.attn"]
    assert [item.path for item in record.declined] == ["layers.0.attn", "layers.1.attn"]
    assert record.declined[0].reason == "%output behind it is a result with a row for every token"
    results = program_runner(after, "full")({"image": image})
    assert [tuple(value.shape) for value in results.values()] == [(2, WIDTH), (2, PATCHES + 1, WIDTH)]


class Towers(nn.Module):
    """Two transformers with other numbers of tokens, of which the second reads half of the image."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Vit(2), Vit(3)

    def forward(self, image):
        return self.one(image) + self.other(image[:, :, :HEIGHT])


@pytest.mark.parametrize("options", [{"r": 3}, pytest.param({"method": "drop"}, marks=pytest.mark.slow)])
def test_streams_beside_one_another(options, capture_module):
    image = torch.randn(IMAGE)
    program, towers = capture_module(Towers, image=image)
    after, _ = selected(program, **options)
    if options == {"r": 3}:
        one, _ = merging(towers.one, image, {0: 3, 1: 3}, 1)
        other, _ = merging(towers.other, image[:, :, :HEIGHT], {0: 3, 1: 3, 2: 3}, 1)
    else:
        one = dropping(towers.one, image, {0: 0.7, 1: 0.7}, 1)
        other = dropping(towers.other, image[:, :, :HEIGHT], {0: 0.7, 1: 0.7, 2: 0.7}, 1)
    compare(after, image, one + other)


class Pooled(Vit):
    """Its head asks the patches, and not the class token, with a query of its own."""

    def __init__(self, depth):
        super().__init__(depth)
        self.query, self.asking = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def read(self, x, sizes=None):
        rest = self.norm(x)[:, self.count :]
        scores = self.asking(self.query) @ rest.mT
        if sizes is not None:
            scores = scores + sizes[:, self.count :].mT.log()
        return (scores.softmax(-1) @ rest).squeeze(1)


def test_attention_in_the_head_counts_sizes_too(capture_module):
    image = torch.randn(IMAGE)
    program, vit = capture_module(partial(Pooled, 2), image=image)
    after, record = selected(program, r=4, layers=(0, 1))
    assert list(record.sites) == ["layers.0.attn", "layers.1.attn"]
    compare(after, image, merging(vit, image, {0: 4, 1: 4}, 1)[0])


BEHIND = {
    "rows": (partial(Vit, 2, head="all"), "%output behind it is a result with a row for every token"),
    "grid": (partial(Gridded, 2), "arranges tokens in another shape, which takes all of them"),
    "a patch": (partial(Second, 2), "takes tokens by their place"),
    "positions": (partial(Placed, 2), "reads a table with a row for every token"),
}


@pytest.mark.parametrize("case", BEHIND)
@pytest.mark.parametrize(
    "options",
    [{"r": 2, "layers": (0,)}, pytest.param({"method": "drop", "layers": (0,)}, marks=pytest.mark.slow)],
)
def test_what_needs_all_tokens(case, options, capture_module):
    build, reason = BEHIND[case]
    program, _ = capture_module(build, image=torch.zeros(IMAGE))
    _, record = selected(program, **options)
    assert not record.modified
    [item] = record.declined
    assert item.path == "layers.0.attn"
    assert reason in item.reason


class Causal(Attention):
    def __init__(self):
        super().__init__(partial(functional.scaled_dot_product_attention, is_causal=True))


class Biased(Attention):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(HEADS, PATCHES + 1, PATCHES + 1))
        self.attend = lambda q, k, v: (q @ k.mT + self.bias).softmax(-1) @ v


class Windowed(Attention):
    """Over two halves of the grid."""

    def forward(self, x):
        return super().forward(x.unflatten(1, (2, -1)).flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1, 2)


UNFIT = {
    "causal": (partial(Vit, 2, attention=Causal), "it is causal, and the order of tokens counts"),
    "biased": (partial(Vit, 2, attention=Biased), "it has a mask or a bias for pairs of tokens"),
    "windowed": (partial(Vit, 2, 0, Windowed, "mean"), "it is among the tokens of a window"),
}


@pytest.mark.parametrize("case", UNFIT)
@pytest.mark.parametrize("method", MERGE_AND_SLOW)
def test_unfit_attention(case, method, capture_module):
    build, reason = UNFIT[case]
    program, _ = capture_module(build, image=torch.zeros(IMAGE))
    _, record = selected(program, method=method, layers=(1,))
    assert not record.modified
    [item] = record.declined
    assert item.path == "layers.1.attn"
    assert item.reason.startswith(reason)


def test_bypass_needs_a_map_of_all_tokens(capture_module):
    program, _ = capture_module(partial(Vit, 4), image=torch.zeros(IMAGE))
    _, record = selected(program, method="bypass", layers=(0, 1, 2))
    assert list(record.sites) == ["layers.1.attn"]
    assert [(item.path, item.reason) for item in record.declined] == [
        ("layers.0.attn", "there is no such attention in the layer before, from which to predict"),
        ("layers.2.attn", "in the layer before only some tokens take part"),
    ]


def test_what_layers_and_match_do_not_find_is_told(capture_module):
    program, _ = capture_module(partial(Vit, 2), image=torch.zeros(IMAGE))
    for options, reason in (
        ({"layers": (2,)}, "there is no layer 2 in its stack of 2"),
        ({"match": ("layer.1",)}, "no attention of a stack is in such a module"),
        ({"r": (1, 2), "layers": (0,)}, "r has 2 numbers, and 1 layers are chosen"),
    ):
        _, record = selected(program, **options)
        assert [item.reason for item in record.declined] == [reason]
    program, _ = capture_module(Attention, x=torch.zeros(2, 6, WIDTH))
    _, record = selected(program)
    assert [item.reason for item in record.declined] == ["its result enters no residual stream"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "drop", "r": 3}, "go with method: merge"),
        ({"rate": 0.5}, "rate goes with method: drop or bypass"),
        ({"r": 3, "ratio": 0.1}, "give one"),
        ({"inflect": -1}, "inflect tilts one number r"),
        ({"protect": "frame"}, "go with method: drop"),
        ({"method": "drop", "weight": 2}, "add protect: frame"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValidationError, match=message):
        SelectTokens(**options)


@pytest.mark.slow
def test_a_training_reaches_the_selectors(capture_module, tmp_path):
    program, _ = capture_module(partial(Vit, 4), image=torch.zeros(IMAGE))
    options = {"updates": 4, "warmup": 0, "learning_rate": 1e-2, "work": str(tmp_path)}
    recipe = make_recipe({"passes": [{"select-tokens": {"method": "bypass", "rate": 0.4}}, {"distill": options}]})
    after, [bypassed, trained] = run_passes(program, recipe.steps)
    assert len(bypassed.sites) == 2
    assert set(trained.sites) == {
        f"layers.{number}.attn.selector.{leaf}"
        for number in (1, 3)
        for leaf in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }
    assert not after.untrained


# Sizes, dtypes, targets, models.

METHODS = {
    "merge": {"r": 4},
    "drop": {"method": "drop", "rate": 0.6},
    "bypass": {"method": "bypass", "rate": 0.5},
}


@pytest.mark.parametrize("method", MERGE_AND_SLOW)
def test_an_open_batch(method, capture_shared):
    options, shape = METHODS[method], IMAGE[1:]
    depth = 2 if method == "merge" else 4
    program = capture_shared(partial(Vit, depth), {"image": ("batch", *shape)}, {"batch": Span(1, 9)})
    after, record = selected(program, **options)
    assert record.modified
    for batch in (3,) if method == "merge" else (1, 3):
        image = torch.randn(batch, *shape)
        fixed, _ = selected(capture_shared(partial(Vit, depth), {"image": (batch, *shape)}, {}), **options)
        compare(after, image, *program_runner(fixed, "full")({"image": image}).values())


def test_an_open_number_of_tokens(capture_shared):
    spans = {"height": Span(6, 16), "width": Span(4, 16)}
    program = capture_shared(partial(Vit, 3), {"image": (1, 3, "height", "width")}, spans)
    _, record = selected(program, layers=(1,))
    assert [item.reason for item in record.declined] == [
        "the number of its tokens is open: give the inputs that it depends on one size"
    ]


@pytest.mark.parametrize("method", MERGE_AND_SLOW)
def test_half_precision_stays(method, capture_module):
    program, _ = capture_module(lambda: Vit(4).half(), image=torch.zeros(IMAGE, dtype=torch.float16))
    after, record = selected(program, **METHODS[method])
    assert record.modified
    assert {after.weights[name].dtype for name in after.untrained} <= {torch.float16}
    made = [node for node in after.entries["full"].calls if isinstance(node.meta["val"], torch.Tensor)]
    assert torch.float32 not in {node.meta["val"].dtype for node in made}


@pytest.mark.slow
def test_in_onnx_runtime(capture_module, tmp_path):
    image = torch.randn(IMAGE)
    program, _ = capture_module(partial(Vit, 4), image=image)
    target = target_class("onnxruntime")
    for method, options in METHODS.items():
        after, _ = selected(program, **options)
        folder = tmp_path / method
        folder.mkdir()
        entry = target(threads=1).lower(after, Lowering(folder))["full"]
        record = {"engine": entry.main, "outputs": [s.as_json() for s in entry.outputs], "details": entry.details}
        results = target.load(folder, record, {"threads": 1})({"image": image})
        compare(after, image, *map(torch.as_tensor, results.values()))


def timm_program(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}), "utf-8")
    return capture(tmp_path, structure_only=True)


@pytest.mark.slow
def test_published_token_counts(tmp_path):
    """DeiT-T with r = 13: 197 − 13·l tokens in layer l; matching costs a hundredth of what is saved."""
    program = timm_program("deit_tiny_patch16_224", tmp_path)
    after, record = selected(program, r=13)
    assert len(record.sites) == 12
    counts = [197 - 13 * layer for layer in range(13)]
    products = [node for node in after.entries["full"].calls if node.target is aten.softmax.int]
    assert [shape_of(node)[-1] for node in products] == counts[:12]
    d, hidden = 192, 768
    attention = sum(4 * n * d * d + 2 * n * n * d for n in counts[:12])
    mlp = sum(2 * n * d * hidden for n in counts[1:])
    matching = sum(((n - 1) // 2) * (n // 2) * 64 + 13 * (n // 2) * d for n in counts[:12])
    stem = 196 * 768 * 192 + 192 * 1000
    assert measure(after).totals.macs == attention + mlp + matching + stem
    assert matching < 0.015 * (measure(program).totals.macs - measure(after).totals.macs)
    assert measure(after).totals.macs_attention == sum(2 * n * n * d for n in counts[:12])


@pytest.mark.slow
def test_evads_token_counts(tmp_path):
    program = timm_program("deit_tiny_patch16_224", tmp_path)
    after, record = selected(program, method="drop")
    assert list(record.sites) == [f"blocks.{number}.attn" for number in (3, 6, 9)]
    counts = [shape_of(node)[-1] for node in after.entries["full"].calls if node.target is aten.softmax.int]
    assert counts == [197] * 4 + [138] * 3 + [97] * 3 + [68] * 2


@pytest.mark.slow
def test_the_recipes_on_digits_vit():
    program = capture(CHECKPOINTS / "digits-vit", inputs={"pixel_values": (2, 1, 32, 32)}, dtype=torch.float32)
    _, record = selected(program)
    assert {item.reason.split(" (")[0] for item in record.declined} == {"it has a mask or a bias for pairs of tokens"}
    after, records = run_passes(program, load_recipe(find_recipe("tome-vit")).steps)
    assert len(records[-1].sites) == 12
    assert records[-1].after.totals.macs < 0.7 * records[0].before.totals.macs
    bypassed, records = run_passes(program, load_recipe(find_recipe("tosa-vit")).steps)
    assert list(records[-1].sites) == [f"vit.layers.{number}.attention" for number in range(1, 12, 2)]
    assert bypassed.untrained
    assert not after.untrained
