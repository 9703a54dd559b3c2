from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.evaluate.difference import outputs_difference, program_difference, program_runner
from optpass.ir.text import graph_text
from optpass.passes.pool_memory import PoolMemory
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.pipeline.target import Lowering
from optpass.targets.onnxruntime import OnnxRuntime

WIDTH, HEADS = 8, 2
HEIGHT, COLUMNS = 4, 6
GRID = [HEIGHT, COLUMNS]


def pooled(program, match=("*",), **options):
    options = {"match": list(match), **options}
    return run_pass(program, Step("pool-memory", PoolMemory.from_options(options, owner="test")))


class Memory(nn.Module):
    """Cross-attention of ``x`` [batch, queries, WIDTH] to ``memory`` [batch, keys, WIDTH], by one way to write it."""

    def __init__(self, way="fused"):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.way = way

    def heads(self, x, memory):
        values = self.q(x), self.k(memory), self.v(memory)
        return [value.unflatten(-1, (HEADS, -1)).transpose(1, 2) for value in values]

    def attend(self, q, k, v):
        if self.way == "fused":
            return functional.scaled_dot_product_attention(q, k, v)
        if self.way == "positional":
            return functional.scaled_dot_product_attention(q, k, v, None, 0.0, False)
        if self.way == "matmul":
            return (q @ k.mT / 2.0).softmax(-1) @ v
        if self.way == "turned":
            return (k @ q.mT * 0.5).softmax(-2).mT @ v
        if self.way == "einsum":
            return torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q * 0.5, k).softmax(-1), v)
        if self.way == "flat":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) * 0.5
            return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, (-1, HEADS))
        if self.way == "causal":
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        if self.way == "masked":
            near = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu()
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        if self.way == "gated":
            return ((q @ k.mT) * self.v(torch.ones(k.shape[-2], WIDTH))[:, 0]).softmax(-1) @ v
        if self.way == "shown":
            weights = (q @ k.mT).softmax(-1)
            return weights @ v + weights.amax()
        scores = (q @ k.mT * 0.5).reshape(-1, q.shape[-2], k.shape[-2]).softmax(-1)
        return scores.reshape(-1, HEADS, q.shape[-2], k.shape[-2]) @ v

    def forward(self, x, memory):
        return x + self.out(self.attend(*self.heads(x, memory)).transpose(1, 2).flatten(2))


def inputs(frames=2, others=3):
    return {"x": torch.randn(2, 5, WIDTH), "memory": torch.randn(2, frames * HEIGHT * COLUMNS + others, WIDTH)}


def windows(value, others, window=2, grid=(HEIGHT, COLUMNS)):
    """[batch, heads, keys, channels] in means of its windows, by pooling images; ``others`` behind stay."""
    batch, heads, count, channels = value.shape
    frames, rest = value[:, :, : count - others], value[:, :, count - others :]
    image = frames.reshape(batch, heads, -1, *grid, channels).permute(0, 1, 2, 5, 3, 4)
    means = functional.avg_pool2d(image.flatten(0, 2), window).flatten(2).mT
    return torch.cat([means.reshape(batch, heads, -1, channels), rest], 2)


def landmarks(q, k, v, others, window=2, **options):
    """Attention to means, whose logits have the logarithm of their number added."""
    k, v = windows(k, others, window, **options), windows(v, others, window, **options)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    logits[..., : k.shape[-2] - others] += 2 * math.log(window)
    return logits.softmax(-1) @ v


def expected(net, x, memory, others, window=2):
    q, k, v = net.heads(x, memory)
    return x + net.out(landmarks(q, k, v, others, window).transpose(1, 2).flatten(2))


def differs(program, arguments, expected):
    found = program_runner(program, "full")(arguments)
    return outputs_difference(found, {next(iter(found)): expected.detach()}).relative_error


GOLDEN = """\
  %transpose_2 = transpose.int(%unflatten_2, 1, 2) : f32[2, 2, 51, 4]  ; (root)
  %slice_tensor = slice.Tensor(%transpose_1, 2, 0, 48) : f32[2, 2, 48, 4]  ; (root)
  %reshape_default = reshape(%slice_tensor, [16, 2, 3, 2, 4]) : f32[16, 2, 3, 2, 4]  ; (root)
  %mean_dim = mean.dim(%reshape_default, [1, 3]) : f32[16, 3, 4]  ; (root)
  %reshape_default_1 = reshape(%mean_dim, [2, 2, 12, 4]) : f32[2, 2, 12, 4]  ; (root)
  %slice_tensor_1 = slice.Tensor(%transpose_1, 2, 48, 51) : f32[2, 2, 3, 4]  ; (root)
  %cat_default = cat([%reshape_default_1, %slice_tensor_1], 2) : f32[2, 2, 15, 4]  ; (root)
  %slice_tensor_2 = slice.Tensor(%transpose_2, 2, 0, 48) : f32[2, 2, 48, 4]  ; (root)
  %reshape_default_2 = reshape(%slice_tensor_2, [16, 2, 3, 2, 4]) : f32[16, 2, 3, 2, 4]  ; (root)
  %mean_dim_1 = mean.dim(%reshape_default_2, [1, 3]) : f32[16, 3, 4]  ; (root)
  %reshape_default_3 = reshape(%mean_dim_1, [2, 2, 12, 4]) : f32[2, 2, 12, 4]  ; (root)
  %slice_tensor_3 = slice.Tensor(%transpose_2, 2, 48, 51) : f32[2, 2, 3, 4]  ; (root)
  %cat_default_1 = cat([%reshape_default_3, %slice_tensor_3], 2) : f32[2, 2, 15, 4]  ; (root)
  %full_default = full([1, 12], 1.3862943611198906, dtype=f32) : f32[1, 12]  ; (root)
  %full_default_1 = full([1, 3], 0.0, dtype=f32) : f32[1, 3]  ; (root)
  %cat_default_2 = cat([%full_default, %full_default_1], 1) : f32[1, 15]  ; (root)
  %scaled_dot_product_attention = scaled_dot_product_attention(%transpose, %cat_default, %cat_default_1, attn_mask=%cat_default_2) : f32[2, 2, 5, 4]  ; (root)
"""  # noqa: E501


def test_golden(capture_module):
    program, _ = capture_module(Memory, **inputs())
    after, record = pooled(program, grid=GRID, unpooled=3)
    assert GOLDEN in graph_text(after.entries["full"])
    assert list(record.sites) == ["(root)"]
    assert not record.declined
    assert str(record.record.promise) == "approximate"
    _, record = pooled(after, grid=GRID, unpooled=3)
    assert not record.modified
    assert [item.reason for item in record.declined] == ["its keys are means already"]


def test_where_all_keys_are_pooled_the_constant_goes(capture_module):
    arguments = inputs(others=0)
    program, net = capture_module(Memory, **arguments)
    after, record = pooled(program, grid=GRID)
    assert "full(" not in graph_text(after.entries["full"])
    assert record.after.totals.macs_attention * 4 == record.before.totals.macs_attention
    assert differs(after, arguments, expected(net, others=0, **arguments)) <= 1e-5


@pytest.mark.parametrize("way", ["fused", "positional", "matmul", "turned", "einsum", "flat"])
def test_numbers_are_those_of_landmarks(way, capture_module):
    arguments = inputs()
    program, net = capture_module(partial(Memory, way), **arguments)
    after, record = pooled(program, grid=GRID, unpooled=3)
    assert len(record.sites) == 1
    assert differs(after, arguments, expected(net, others=3, **arguments)) <= 1e-5
    assert program_difference(program, after).relative_error > 1e-3


def test_another_window(capture_module):
    arguments = {"x": torch.randn(2, 5, WIDTH), "memory": torch.randn(2, 36 + 3, WIDTH)}
    program, net = capture_module(Memory, **arguments)
    after, _ = pooled(program, grid=[6, 6], unpooled=3, window=3)
    q, k, v = net.heads(**arguments)
    result = landmarks(q, k, v, 3, 3, grid=(6, 6)).transpose(1, 2).flatten(2)
    assert differs(after, arguments, arguments["x"] + net.out(result)) <= 1e-5


def test_constant_windows_lose_nothing(capture_module):
    """And neither does the constant in the elements of keys, as released for fused attention, do the same."""
    arguments = inputs()
    program, net = capture_module(Memory, **arguments)
    small = torch.randn(2, 2, HEIGHT // 2, COLUMNS // 2, WIDTH)
    frames = small.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(1, 3)
    arguments["memory"] = torch.cat([frames, torch.randn(2, 3, WIDTH)], 1)
    after, _ = pooled(program, grid=GRID, unpooled=3)
    assert differs(after, arguments, net(**arguments)) <= 1e-6
    q, k, v = net.heads(**arguments)
    k, v = windows(k, 3), windows(v, 3)
    k[:, :, :-3] += 2 * math.log(2)
    wrong = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert differs(after, arguments, arguments["x"] + net.out(wrong)) > 1e-3


class Image(nn.Module):
    """A vision transformer's self-attention behind a class token; of videos among the tokens of all frames."""

    def __init__(self, frames=1):
        super().__init__()
        self.patches, self.memory = nn.Conv2d(3, WIDTH, 2, 2), Memory()
        self.token, self.frames = nn.Parameter(torch.zeros(1, 1, WIDTH)), frames

    def embed(self, image):
        if self.frames > 1:
            image = image.transpose(1, 2).flatten(0, 1)
        rows = self.patches(image).flatten(2).mT
        rows = rows.unflatten(0, (-1, self.frames)).flatten(1, 2)
        return torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1)

    def forward(self, image):
        x = self.embed(image)
        return self.memory(x, x)


@pytest.mark.parametrize("shape", [(2, 3, 8, 12), (2, 3, 3, 8, 12)])
def test_the_grid_is_found(shape, capture_module):
    frames = shape[2] if len(shape) == 5 else 1
    image = torch.randn(shape)
    program, net = capture_module(partial(Image, frames), image=image)
    after, record = pooled(program)
    assert list(record.sites) == ["memory"]
    x = net.embed(image)
    q, k, v = net.memory.heads(x, x)
    # The oracle has what is not pooled behind the rest; attention does not see the order of keys.
    k, v = (torch.cat([each[:, :, 1:], each[:, :, :1]], 2) for each in (k, v))
    result = landmarks(q, k, v, 1).transpose(1, 2).flatten(2)
    assert differs(after, {"image": image}, x + net.memory.out(result)) <= 1e-5


REFUSED = {
    "odd": ("fused", {"grid": [3, 4]}, "windows of 2 × 2 do not fill a grid of 3 × 4"),
    "window": ("fused", {"grid": GRID, "window": 4}, "windows of 4 × 4 do not fill a grid of 4 × 6"),
    "unknown": ("fused", {}, "its 51 keys are no grid of rows and columns that is known: say grid: [height, width]"),
    "others": ("fused", {"grid": GRID}, "its 51 keys are not frames of 4 × 6 and 0 others: say unpooled"),
    "causal": ("causal", {"grid": GRID}, "it is causal: a window has keys that a query may see, and others"),
    "masked": (
        "masked",
        {"grid": GRID},
        "it has a mask or a bias for every key (simplify drops a mask that hides nothing)",
    ),
    "gated": ("gated", {"grid": GRID}, "it is written out, and %mul has a value for every key"),
    "shown": ("shown", {"grid": GRID}, "%softmax is read by more than the attention"),
    "counted": ("reshaped", {"grid": GRID}, "it is written out, and %reshape says how many keys there are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, capture_module):
    way, options, reason = REFUSED[case]
    program, _ = capture_module(partial(Memory, way), **inputs())
    _, record = pooled(program, **options)
    assert not record.modified
    assert [item.reason for item in record.declined] == [reason]


def test_options(capture_module):
    program, _ = capture_module(Image, image=torch.zeros(2, 3, 8, 12))
    _, record = pooled(program, match=["memories"])
    assert [(item.path, item.reason) for item in record.declined] == [
        ("memories", "no attention is in such a module; the nearest are memory")
    ]
    for wrong in ({"match": []}, {"match": ["*"], "unpooled": 3}, {"match": ["*"], "window": 1}):
        with pytest.raises(UserError):
            PoolMemory.from_options(wrong, owner="test")


def test_half_precision(capture_module):
    arguments = {name: value.half() for name, value in inputs().items()}
    program, _ = capture_module(lambda: Memory().half(), **arguments)
    after, record = pooled(program, grid=GRID, unpooled=3)
    assert record.modified
    assert "full([1, 12], 1.3862943611198906, dtype=f16)" in graph_text(after.entries["full"])


def test_open_sizes(capture_shared):
    class Frames(Memory):
        def forward(self, x, memory, others):
            return super().forward(x, torch.cat([memory.flatten(1, 2), others], 1))

    shapes = {
        "x": ("batch", 5, WIDTH),
        "memory": ("batch", "frames", HEIGHT * COLUMNS, WIDTH),
        "others": ("batch", 3, WIDTH),
    }
    program = capture_shared(Frames, shapes, {"batch": Span(1, 9), "frames": Span(1, 12)})
    after, record = pooled(program, grid=GRID, unpooled=3)
    assert len(record.sites) == 1
    net = Frames()
    net.load_state_dict({name: each.evaluate() for name, each in program.weights.items()})
    for batch, frames in ((1, 5), (3, 2)):
        sizes = {"x": (batch, 5, WIDTH), "memory": (batch, frames, 24, WIDTH), "others": (batch, 3, WIDTH)}
        arguments = {name: torch.randn(size) for name, size in sizes.items()}
        keys = torch.cat([arguments["memory"].flatten(1, 2), arguments["others"]], 1)
        assert differs(after, arguments, expected(net, arguments["x"], keys, 3)) <= 1e-5


@pytest.mark.slow
def test_onnxruntime(capture_module, tmp_path):
    arguments = inputs()
    program, net = capture_module(Memory, **arguments)
    after, _ = pooled(program, grid=GRID, unpooled=3)
    target = OnnxRuntime(threads=1)
    entry = target.lower(after, Lowering(tmp_path))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs], "details": entry.details}
    found = target.load(tmp_path, record, {"threads": 1})(arguments)
    wanted = {next(iter(found)): expected(net, others=3, **arguments).detach()}
    assert outputs_difference(found, wanted).relative_error <= 1e-5


POINTERS = 3


def sam2(side=4):
    from transformers import Sam2VideoConfig
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoMemoryAttention

    class Tracker(nn.Module):
        """SAM 2's memory attention among two layers, the number of pointers to objects being given."""

        def __init__(self):
            super().__init__()
            sizes = {"hidden_size": 16, "num_layers": 2, "feed_forward_hidden_size": 32, "rope_feat_sizes": [side] * 2}
            config = Sam2VideoConfig(**{f"memory_attention_{name}": size for name, size in sizes.items()})
            config._attn_implementation = "sdpa"
            self.memory = Sam2VideoMemoryAttention(config)

        def forward(self, features, memory, positions):
            return self.memory(features, memory, None, positions, POINTERS)

    return Tracker()


@pytest.mark.slow
def test_sam2s_memory_attention(capture_module, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    keys = 2 * 16 + POINTERS
    shapes = {"features": (16, 1, 16), "memory": (keys, 1, 64), "positions": (keys, 1, 64)}
    arguments = {name: torch.randn(shape) for name, shape in shapes.items()}
    program, tracker = capture_module(sam2, **arguments)
    after, record = pooled(program, match=["*.cross_attn_image"], grid=[4, 4], unpooled=POINTERS)
    assert list(record.sites) == [f"memory.layers.{number}.cross_attn_image" for number in (0, 1)]

    def attend(module, query, key, value, *args, **kwargs):
        if not module.rope_k_repeat:
            return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None
        return landmarks(query, key, value, POINTERS, grid=(4, 4)).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend)
    assert differs(after, arguments, tracker(**arguments)) <= 1e-5
    assert program_difference(program, after).relative_error > 1e-4
