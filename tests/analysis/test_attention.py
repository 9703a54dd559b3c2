"""Attentions of real models against what their configurations say, and the spellings of one attention."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from denoisers import denoiser
from torch import nn

from optpass.analysis.attention import Attention, attentions
from optpass.analysis.attention_cores import attention_cores
from optpass.capture.sources import capture
from optpass.ir.program import Origin, Program
from optpass.ir.weights import WeightStore

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


def of_denoiser(name: str) -> list[Attention]:
    program = Program({"full": denoiser(name)}, WeightStore(), Origin("test"))
    return list(attentions(program).found)


def tokens(attention: Attention) -> list[dict[str, int]]:
    return [dict(part.axes) for part in attention.queries.parts]


def test_digits_vit_is_what_its_configuration_says() -> None:
    program = capture(CHECKPOINTS / "digits-vit", structure_only=True)
    found = attentions(program)
    assert [each.layer for each in found.found] == list(range(12))
    [row] = found.rows
    assert row == list(found.found)
    for number, each in enumerate(row):
        assert (each.kind, each.heads, each.key_heads, each.width) == ("self", 3, 3, 32)
        assert (each.queries.over, dict(each.queries.grid)) == ("space", {"height": 8, "width": 8})
        assert (each.queries.class_tokens, each.queries.size) == (1, 65)
        path = f"vit.layers.{number}.attention"
        layers = [each.projections.query, each.projections.key, each.projections.value, each.projections.output]
        assert [layer.meta["path"] for [layer] in layers] == [f"{path}.{name}_proj" for name in "qkvo"]
        assert each.path == path
        assert each.residual is not None
        assert each.residual.path == f"vit.layers.{number}"


def test_moving_digits_attends_over_pixels_frames_and_one_token() -> None:
    found = attentions(capture(CHECKPOINTS / "moving-digits", structure_only=True)).found
    transformers = ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.0", "up_blocks.1")
    assert Counter((each.kind, each.queries.over) for each in found) == {
        (kind, over): len(transformers) + 1 for kind in ("self", "cross") for over in ("space", "time")
    }
    wide = {"down_blocks.1", "up_blocks.1"}
    for each in found:
        side, heads = (8, 4) if each.path[: each.path.index(".attentions")] in wide else (4, 6)
        pixels = {"height": side, "width": side}
        assert (each.heads, each.width) == (heads, 16)
        spatial = each.queries.over == "space"
        assert dict(each.queries.grid) == (pixels if spatial else {"frames": 8})
        assert dict(each.queries.folded) == ({"frames": 8} if spatial else pixels)
        assert not each.queries.is_windowed
        assert each.keys.size == (each.queries.size if each.kind == "self" else 1)


def test_distilled_deit_has_two_class_tokens(capture_module) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 8, "image_size": 24, "patch_size": 8}
    config = transformers.DeiTConfig(num_hidden_layers=3, **sizes)
    build = partial(transformers.DeiTForImageClassificationWithTeacher, config)
    program, _ = capture_module(build, pixel_values=torch.zeros(2, 3, 24, 24))
    found = attentions(program).found
    assert [(each.layer, each.heads, each.queries.class_tokens) for each in found] == [(n, 3, 2) for n in range(3)]
    assert tokens(found[0]) == [{}, {}, {"height": 3, "width": 3}]


def test_timm_vit_has_one_projection_for_queries_keys_and_values(capture_module) -> None:
    from optpass.capture.timm_import import timm_importable

    with timm_importable():
        timm = pytest.importorskip("timm")
    build = partial(
        timm.create_model, "vit_tiny_patch16_224", depth=2, embed_dim=24, img_size=(32, 48), num_classes=3, reg_tokens=4
    )
    program, _ = capture_module(build, x=torch.zeros(1, 3, 32, 48))
    found = attentions(program).found
    assert [each.path for each in found] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(each.projections.is_fused and each.heads == 3 and each.width == 8 for each in found)
    assert [each.projections.query[0].meta["path"] for each in found] == [f"blocks.{n}.attn.qkv" for n in range(2)]
    # A class token and four registers.
    assert all(each.queries.class_tokens == 5 for each in found)
    assert dict(found[0].queries.grid) == {"height": 2, "width": 3}


# Kind, what queries are over, their grid, tokens of keys: of the first attentions of each model, by hand.
DENOISERS = {
    "SD 1.5 UNet": (8, 4, [("self", "space", (8, 12), 96), ("cross", "space", (8, 12), 77)]),
    "SVD UNet": (
        16,
        2,
        [
            ("self", "space", (8, 12), 96),
            ("cross", "space", (8, 12), 1),
            ("self", "time", (4,), 4),
            ("cross", "time", (4,), 1),
        ],
    ),
    "DiT-XL/2": (3, 2, [("self", "space", (4, 4), 16)]),
    "Wan 2.1 text-to-video 1.3B": (
        6,
        2,
        [("self", "space-time", (3, 4, 6), 72), ("cross", "space-time", (3, 4, 6), 5)],
    ),
    "SD 3 medium": (3, 2, [("self", "space", (4, 6), 29)]),
    "Flux.1": (6, 2, [("self", "sequence", (), 29)]),
}


SLOW = {"SVD UNet", "Flux.1"}
"""moving-digits is of the one's class, and another test reads the other."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in DENOISERS])
def test_denoisers(name: str) -> None:
    count, heads, first = DENOISERS[name]
    found = of_denoiser(name)
    assert len(found) == count
    assert found[0].heads == heads
    read = [(each.kind, each.queries.over, tuple(each.queries.grid.values()), each.keys.size) for each in found]
    assert read[: len(first)] == first


def test_joint_attention_enters_both_streams() -> None:
    double, *_, single = of_denoiser("Flux.1")
    assert tokens(double) == [{"tokens": 5}, {"tokens": 24}]
    assert double.is_joint
    assert len(double.residuals) == 2
    assert double.residual is None
    paths = [
        [layer.meta["path"].rpartition("attn.")[2] for layer in layers] for layers in vars(double.projections).values()
    ]
    assert paths == [["add_q_proj", "to_q"], ["add_k_proj", "to_k"], ["add_v_proj", "to_v"], ["to_out.0", "to_add_out"]]
    assert not single.is_joint
    assert (single.layer, double.layer) == (5, 0)


def test_rows_are_attentions_at_one_place_of_the_blocks() -> None:
    program = Program({"full": denoiser("Latte-1")}, WeightStore(), Origin("test"))
    rows = attentions(program).rows
    assert [[each.path for each in row] for row in rows] == [
        [f"{blocks}.{number}.{name}" for number in range(3)]
        for blocks, name in (
            ("transformer_blocks", "attn1"),
            ("transformer_blocks", "attn2"),
            ("temporal_transformer_blocks", "attn1"),
        )
    ]


class Spelt(nn.Module):
    """Two heads of four channels, by a function of q, k, v [batch, heads, tokens, channels]."""

    def __init__(self, attend, source=lambda x: x):
        super().__init__()
        self.attend, self.source = attend, source
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, mask):
        queries, keys, values = self.q(x), self.k(self.source(x)), self.v(self.source(x))
        heads = [each.unflatten(-1, (2, 4)).transpose(1, 2) for each in (queries, keys, values)]
        return x + self.o(self.attend(*heads, mask).transpose(1, 2).flatten(2))


def plain(q, k, v, mask):
    return (q @ k.mT / 2 + mask).softmax(-1) @ v


def scaled_before(q, k, v, mask):
    return ((q * 0.5) @ k.mT + mask).softmax(-1) @ v


def mask_first(q, k, v, mask):
    return ((q @ k.mT + mask) * 0.5).softmax(-1).to(torch.float32) @ v


def chosen(q, k, v, mask):
    return torch.where(mask > 0, q @ k.mT, -1e9).softmax(-1) @ v


def batched(q, k, v, mask):
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    return torch.bmm(torch.baddbmm(mask, q, k.mT, alpha=0.5).softmax(-1), v).unflatten(0, (-1, 2))


def by_letters(q, k, v, mask):
    scores = torch.einsum("bhic,bhjc->bhij", q, k) + mask
    return torch.einsum("bhij,bhjc->bhic", scores.softmax(-1), v)


def keys_first(q, k, v, mask):
    """Scores of [keys, queries], over the first of which the softmax is."""
    return (v.mT @ (k @ q.mT + mask).softmax(-2)).mT


SPELLINGS = [plain, scaled_before, mask_first, chosen, batched, by_letters, keys_first]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling, capture_module) -> None:
    build = partial(Spelt, spelling, source=lambda x: x[:, :3])
    mask = torch.zeros((3, 5) if spelling is keys_first else (5, 3))
    program, _ = capture_module(build, x=torch.zeros(2, 5, 8), mask=mask)
    [found] = attentions(program).found
    graph = program.entries["full"]
    assert (found.heads, found.width, found.queries.size, found.keys.size) == (2, 4, 5, 3)
    projections = vars(found.projections).values()
    assert [layer.meta["path"] for [layer] in projections] == ["q", "k", "v", "o"]
    [mask] = found.core.masks
    above = {mask, *mask.all_input_nodes}
    assert graph.placeholders[1] in above
    assert found.core.softmax in found.core.nodes
    assert found.residual is not None
    for operand, size in ((found.core.query, 5), (found.core.key, 3), (found.core.value, 3), (found.core.result, 5)):
        shape = operand.node.meta["val"].shape
        assert (shape[operand.tokens], shape[operand.channels]) == (size, 4)


def test_heads_that_share_keys(capture_module) -> None:
    class Grouped(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    keys = torch.zeros(2, 2, 5, 4)
    program, _ = capture_module(Grouped, q=torch.zeros(2, 6, 5, 4), k=keys, v=keys.clone())
    [found] = attentions(program).found
    assert (found.heads, found.key_heads, found.core.is_causal, found.layer) == (6, 2, True, None)
    assert vars(found.projections) == {"query": (), "key": (), "value": (), "output": ()}


def test_a_classifier_over_two_activations_is_no_attention(capture_module) -> None:
    class Similar(nn.Module):
        def forward(self, x, y):
            return (x @ y.mT).softmax(-1)

    program, _ = capture_module(Similar, x=torch.zeros(2, 5, 8), y=torch.zeros(2, 3, 8))
    assert attentions(program).found == ()


def test_a_softmax_over_neither_tokens_is_refused(capture_module) -> None:
    class OverHeads(nn.Module):
        def forward(self, q, k, v):
            return (q @ k.mT).softmax(1) @ v

    shape = torch.zeros(2, 3, 5, 4)
    program, _ = capture_module(OverHeads, q=shape, k=shape.clone(), v=shape.clone())
    cores = attention_cores(program.entries["full"])
    assert cores.found == ()
    assert [reason for _, reason in cores.refused] == ["the softmax is over neither of the dimensions of a product"]
    assert attentions(program).refused[0][0] == "full"


def test_open_sizes(capture_shared) -> None:
    from optpass.capture.spans import Span

    program = capture_shared(
        partial(Spelt, plain), {"x": (2, "tokens", 8), "mask": ("tokens", "tokens")}, {"tokens": Span(3, 9)}
    )
    [found] = attentions(program).found
    assert (found.heads, found.width, found.kind) == (2, 4, "self")
    assert found.queries.size == found.keys.size
    assert not isinstance(found.queries.size, int)


def test_time_is_linear() -> None:
    """Three times the blocks, three times the operators that are looked at; counted, for a clock cannot tell."""
    few, many = (_looks(layers) for layers in (3, 9))
    assert 0 < many <= 3.1 * few


def _looks(layers: int) -> int:
    from optpass.analysis import attention, attention_cores

    count = 0

    def counting(node):
        nonlocal count
        count += 1
        return plain_view(node)

    plain_view = attention_cores.is_view
    program = Program({"full": denoiser("DiT-XL/2", layers)}, WeightStore(), Origin("test"))
    attention.is_view = attention_cores.is_view = counting
    try:
        attentions(program)
    finally:
        attention.is_view = attention_cores.is_view = plain_view
    return count
