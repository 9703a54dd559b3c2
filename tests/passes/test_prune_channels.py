from __future__ import annotations

import math
from dataclasses import replace

import loops
import pytest
import torch
from torch import nn
from torch.nn import functional

from optpass.analysis.cost import measure
from optpass.errors import MissingValuesError, UserError
from optpass.evaluate.difference import program_difference, program_runner
from optpass.ir.loop import Cycle
from optpass.ir.text import program_text
from optpass.ir.weights import Absent, Constant, WeightStore
from optpass.passes.prune_channels import PruneChannels
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step


def prune(program, **options):
    return run_pass(program, Step("prune-channels", PruneChannels.from_options(options, owner="test")))


def weights(program):
    return {name: expression.evaluate() for name, expression in program.used_weights().items()}


class TwoConvs(nn.Module):
    """conv → BatchNorm → relu → conv: one group of 8 channels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.second(functional.relu(self.norm(self.first(x))))


class Attention(nn.Module):
    """Two residual blocks of a transformer: attention of 4 heads of width 8, GEGLU of width 64."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(6, 32), nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down, self.head = nn.Linear(32, 128), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        batch, tokens, _ = x.shape
        query, key, value = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, 32))
        value, gate = self.up(self.norm2(x)).chunk(2, -1)
        return self.head(x + self.down(value * functional.gelu(gate)))


class Grouped(nn.Module):
    """conv → group norm of 4 groups → conv, 16 channels between."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        return self.second(functional.silu(self.norm(self.first(x))))


@pytest.fixture
def two_convs(capture_module):
    return capture_module(TwoConvs, x=torch.randn(1, 3, 6, 5))[0]


@pytest.fixture
def attention(capture_module):
    return capture_module(Attention, x=torch.randn(2, 7, 6))[0]


@pytest.fixture
def grouped(capture_module):
    return capture_module(Grouped, x=torch.randn(1, 3, 6, 5))[0]


def test_golden(two_convs):
    after, record = prune(two_convs, ratio=0.5)
    assert record.sites == ("first [conv]",)
    affine = "@norm.weight, @norm.bias, @norm.running_mean, @norm.running_var"
    assert program_text(after).split("\n\n")[0] == (
        "full(x: f32[1, 3, 6, 5]):\n"
        "  %conv2d = conv2d(%x, @first.weight, @first.bias, [1, 1], [1, 1]) : f32[1, 4, 6, 5]  ; first\n"
        f"  %batch_norm = batch_norm(%conv2d, {affine}, False, 0.1, 1e-05, False) : f32[1, 4, 6, 5]  ; norm\n"
        "  %relu = relu(%batch_norm) : f32[1, 4, 6, 5]  ; (root)\n"
        "  %conv2d_1 = conv2d(%relu, @second.weight, @second.bias) : f32[1, 4, 6, 5]  ; second\n"
        "  return output=%conv2d_1"
    )


def test_the_channels_of_least_norm_go(two_convs):
    before = weights(two_convs)
    energy = before["first.weight"].square().sum((1, 2, 3)) + before["second.weight"].square().sum((0, 2, 3))
    kept = energy.argsort(descending=True)[:5].sort().values
    after, _ = prune(two_convs, ratio=0.4)
    found = weights(after)
    for name, dim in {"first.weight": 0, "first.bias": 0, "norm.running_var": 0, "second.weight": 1}.items():
        assert torch.equal(found[name], before[name].index_select(dim, kept)), name


@pytest.mark.parametrize("criterion", ["l1", "l2", "norm-scale", "taylor"])
def test_a_channel_that_does_nothing_goes_first(two_convs, criterion):
    given = {name: value.clone() for name, value in weights(two_convs).items()}
    for name in ("first.weight", "norm.weight", "norm.bias"):
        given[name][6] = 0
    given["second.weight"][:, 6] = 0
    program = two_convs.with_weights({name: Constant(value) for name, value in given.items()})
    after, record = prune(program, ratio=0.13, criterion=criterion)
    assert record.facts["pruning"] == [{"group": "first [conv]", "before": 8, "after": 7}]
    assert program_difference(program, after).relative_error < 1e-6


def test_random_is_seeded(two_convs):
    texts = [program_text(prune(two_convs, ratio=0.5, criterion="random", seed=seed)[0]) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_every_group_loses_its_share_and_no_more(attention):
    after, record = prune(attention, ratio=0.3, kinds=["ffn", "head-dim", "stream"])
    sizes = [(item["group"], item["before"], item["after"]) for item in record.facts["pruning"]]
    assert sorted(sizes) == [
        ("embed [stream]", 32, 23),
        ("qkv [head-dim]", 8, 6),
        ("up [ffn]", 64, 45),
    ]
    assert program_runner(after, "full")({"x": torch.randn(2, 7, 6)})["output"].shape == (2, 7, 5)


def test_attention_keeps_its_scale(attention):
    after, _ = prune(attention, ratio=0.5, kinds=["head-dim"])
    [node] = [n for n in after.entries["full"].calls if "scaled_dot_product" in str(n.target)]
    assert node.kwargs["scale"] == 1 / math.sqrt(8)
    assert {tuple(weights(after)[name].shape) for name in ("qkv.weight", "out.weight")} == {(48, 32), (32, 16)}


def test_heads_go_whole(attention):
    after, record = prune(attention, ratio=0.5, kinds=["heads"])
    assert record.sites == ("qkv [heads]",)
    assert weights(after)["qkv.weight"].shape == (3 * 2 * 8, 32)


@pytest.mark.parametrize(("multiple_of", "stays"), [(1, 45), (8, 48), (32, 64), (48, 48)])
def test_multiples_never_prune_beyond_the_ratio(attention, multiple_of, stays):
    after, _ = prune(attention, ratio=0.3, kinds=["ffn"], multiple_of=multiple_of)
    assert weights(after)["down.weight"].shape[1] == stays


def test_a_group_norm_keeps_its_groups(grouped):
    before = weights(grouped)
    after, _ = prune(grouped, ratio=0.5)
    found = weights(after)["first.weight"]
    places = [next(i for i, row in enumerate(before["first.weight"]) if torch.equal(row, kept)) for kept in found]
    assert [sum(place // 4 == part for place in places) for part in range(4)] == [2, 2, 2, 2]


def test_too_little_for_a_group_norm_is_declined(grouped):
    _, record = prune(grouped, ratio=0.2)
    assert not record.modified
    assert [(d.path, d.reason) for d in record.declined if d.path == "first" and "norm" in d.reason] == [
        ("first", "too little is asked for to take one of 16: a group norm asks for multiples of 4")
    ]


class ThreeConvs(nn.Module):
    """conv → BatchNorm → conv → BatchNorm → conv: groups of 8 and 16 channels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm1, self.second = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)
        self.norm2, self.third = nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.third(functional.relu(self.norm2(self.second(functional.relu(self.norm1(self.first(x)))))))


def test_equal_scores_go_evenly_and_never_more_than_asked(capture_module):
    """Norms that nobody trained: all scales are 1."""
    program, _ = capture_module(ThreeConvs, x=torch.zeros(1, 3, 4, 6))
    ones = {name: Constant(torch.ones(program.weights[name].shape)) for name in ("norm1.weight", "norm2.weight")}
    _, record = prune(program.with_weights(ones), ratio=0.25, ranking="global", criterion="norm-scale")
    assert [(item["before"], item["after"]) for item in record.facts["pruning"]] == [(8, 6), (16, 12)]


@pytest.mark.parametrize("ranking", ["group", "global"])
@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_budgets_are_met_and_not_wasted(attention, budget, ranking):
    after, _ = prune(attention, ranking=ranking, **{budget: 0.6})
    before, left = measure(attention).totals, measure(after).totals
    share = getattr(left, budget) / getattr(before, budget)
    assert 0.5 < share <= 0.6


def test_a_budget_that_cannot_be_met_says_what_can(attention):
    with pytest.raises(
        UserError, match=r"0.05 of the MACs cannot be met: with at most 0.5 of each group gone, 0\.\d+ stay"
    ):
        prune(attention, macs=0.05, limit=0.5, kinds=["ffn"])


def test_groups_compete(attention):
    """A feed-forward that matters a thousandfold less loses what the others keep: scores are relative to their mean."""
    _, record = prune(attention, ratio=0.25, ranking="global", kinds=["ffn", "stream"])
    gone = {item["group"]: item["before"] - item["after"] for item in record.facts["pruning"]}
    assert sum(gone.values()) == int(0.25 * (64 + 32))


def test_it_can_be_pruned_again(attention):
    once, _ = prune(attention, ratio=0.25)
    twice, record = prune(once, ratio=0.25)
    assert record.modified
    assert measure(twice).totals.macs < measure(once).totals.macs < measure(attention).totals.macs


def test_without_values_the_structure_is_pruned(attention):
    bare = WeightStore({n: Absent(n, e.shape, e.dtype) for n, e in attention.weights.items()})
    after, record = prune(replace(attention, weights=bare), ratio=0.3)
    assert measure(after).totals == measure(prune(attention, ratio=0.3)[0]).totals
    assert "structure-only" in record.facts["scores"]
    with pytest.raises(MissingValuesError):
        prune(replace(attention, weights=bare), ratio=0.3, criterion="taylor")


def test_scope(attention):
    _, record = prune(attention, ratio=0.5, match=["up"])
    assert record.sites == ("up [ffn]",)
    _, record = prune(attention, ratio=0.5, exclude=["up", "embed"])
    assert record.sites == ("qkv [head-dim]",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": ["qvk"]}, "no module with weights matches 'qvk'; the nearest are qkv"),
        ({"match": ["head"]}, r"nothing that matches may be cut: head: is a dimension of the output"),
        ({"match": ["up"], "kinds": ["conv"]}, "of the kinds asked for; there are: ffn"),
    ],
)
def test_scopes_with_nothing_in_them(attention, options, message):
    with pytest.raises(UserError, match=message):
        prune(attention, ratio=0.5, **options)


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": -0.1}, {}, {"ratio": 0.5, "macs": 0.5}, {"macs": 0}])
def test_amounts_that_leave_nothing_or_say_nothing(options):
    with pytest.raises(UserError, match=r"ratio|macs"):
        PruneChannels.from_options(options, owner="prune-channels")


def test_it_says_why_the_rest_stays(attention):
    _, record = prune(attention, ratio=0.5)
    assert ("head", "an axis of 5 is a dimension of the output output") in {(d.path, d.reason) for d in record.declined}


def test_states_of_a_loop_follow_whether_it_is_split_before_or_after():
    """The loop is cut by hand where tanh gives the pruned channels: pruning the whole gives the same generations."""
    uncached, _ = loops.denoiser()
    program, _ = loops.cached()
    options = {"ratio": 0.5, "kinds": ["stream"], "match": ["inner"]}
    after, record = prune(program, **options)
    assert record.sites == ("enter [stream]",)
    assert after.loop.states["deep"].shape == (2, 2)
    computed = replace(after, loop=replace(after.loop, schedule=Cycle(("full",))))
    whole = prune(uncached, **options)[0]
    assert program_difference(whole, computed).relative_error == 0
    assert program_difference(whole, after).relative_error > 1e-3


class Squeezed(nn.Module):
    """A pooled map without its dimensions of size 1, whichever these are."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.second(functional.adaptive_avg_pool2d(functional.relu(self.first(x)), 1).squeeze())


def test_a_single_channel_left_is_no_dimension_to_squeeze(capture_module):
    program, _ = capture_module(Squeezed, x=torch.randn(2, 3, 6, 5))
    after, _ = prune(program, ratio=0.8)
    assert weights(after)["first.weight"].shape[0] == 1
    assert program_runner(after, "full")({"x": torch.randn(2, 3, 6, 5)})["output"].shape == (2, 5)
