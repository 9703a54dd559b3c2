"""Random graphs: any choice of indices of any groups at once is zeroing, to rounding of float64.

A model is drawn as a list of steps on feature maps [2, channels, 4, 6], each on one that was made before. A step that
cannot be done with the channels that it meets is left out.
"""

from __future__ import annotations

from math import gcd
from random import Random

import pytest
import torch
from axis_oracle import check_sizes, cut_errors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from optpass.analysis.axes import axes_of
from optpass.analysis.axes.steps import norm_groups, removable
from optpass.testing import capture_module

SHAPE = (2, 3, 4, 6)
SEEDS = st.integers(0, 2**32 - 1)
STEPS = (
    "conv", "conv", "linear", "depthwise", "grouped", "transposed", "group norm", "batch norm", "layer norm",
    "concatenate", "split", "gate", "add", "multiply", "pool", "mean", "attention", "shuffle", "flatten", "repeat",
    "select", "excite", "twice",
)  # fmt: skip


class Drawn(nn.Module):
    """Steps (kind, how many values back, width, a number), and at the end one convolution over all that they made."""

    def __init__(self, steps):
        super().__init__()
        self.plan, self.layers = [], nn.ModuleDict()
        values = [(SHAPE[1], False)]
        values += self._planned("enter", values, "conv", 0, 8, 1)
        for index, step in enumerate(steps):
            values += self._planned(f"step{index}", values, *step)
        left = values[1:]
        self.last = nn.Conv2d(sum(channels for channels, _ in left), 2, 1)

    def _planned(self, name, values, kind, back, width, number):
        """Channels of what the step makes, and whether it is half as high; nothing where it cannot be done."""
        place = max(0, len(values) - 1 - back)
        channels, small = values[place]
        other = next((i for i in range(len(values) - 1, -1, -1) if i != place and values[i] == values[place]), None)
        if (
            (kind in ("add", "multiply", "concatenate") and other is None)
            or (kind in ("split", "gate", "shuffle") and channels % 2)
            or (kind == "pool" and small)
            or (kind == "select" and channels < 3)
        ):
            return []
        divisor = gcd(channels, number)
        if make := _layers(channels, width, divisor).get(kind):
            self.layers[name] = make()
        self.plan.append((kind, name, place, other, divisor))
        return [(_made(channels, width, divisor).get(kind, channels), small or kind == "pool")]

    def forward(self, x):
        values = [x]
        for kind, name, place, other, divisor in self.plan:
            layer = dict(self.layers).get(name)
            second = values[other] if other is not None else None
            values.append(_step(kind, layer, values[place], second, divisor))
        left = [functional.adaptive_avg_pool2d(value, (2, 3)) for value in values[1:]]
        return self.last(torch.cat(left, 1))


def _layers(channels, width, divisor):
    return {
        "conv": lambda: nn.Conv2d(channels, width, 3, padding=1),
        "linear": lambda: nn.Linear(channels, width),
        "depthwise": lambda: nn.Conv2d(channels, channels * divisor, 3, padding=1, groups=channels),
        "grouped": lambda: nn.Conv2d(channels, divisor * width, 1, groups=divisor),
        "transposed": lambda: nn.ConvTranspose2d(channels, width, 3, padding=1),
        "group norm": lambda: nn.GroupNorm(divisor, channels),
        "batch norm": lambda: nn.BatchNorm2d(channels),
        "layer norm": lambda: nn.LayerNorm(channels),
        "attention": lambda: nn.ModuleList([nn.Linear(channels, divisor * width) for _ in "qkv"]),
        "excite": lambda: nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, channels)),
        "twice": lambda: nn.Linear(channels, channels, bias=False),
    }


def _made(channels, width, divisor):
    """How many channels the steps make that make another number of them."""
    return {
        **dict.fromkeys(("conv", "linear", "transposed"), width),
        **dict.fromkeys(("grouped", "attention"), divisor * width),
        **dict.fromkeys(("concatenate", "repeat"), 2 * channels),
        **dict.fromkeys(("split", "gate"), channels // 2),
        "depthwise": channels * divisor,
        "select": channels - 1,
    }


def _step(kind, layer, x, y, divisor):
    def last(function):
        return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def attention():
        tokens = x.flatten(2).mT
        q, k, v = (part(tokens).unflatten(-1, (divisor, -1)).transpose(1, 2) for part in layer)
        joined = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return joined.mT.unflatten(2, x.shape[2:])

    return {
        "linear": lambda: last(layer),
        "layer norm": lambda: last(layer),
        "concatenate": lambda: torch.cat([x, y], 1),
        "split": lambda: (lambda a, b: a - b.sigmoid())(*x.chunk(2, 1)),
        "gate": lambda: functional.glu(x, 1),
        "add": lambda: x + y,
        "multiply": lambda: x * y,
        "pool": lambda: functional.avg_pool2d(x, 2),
        "mean": lambda: x - x.mean((2, 3), keepdim=True),
        "attention": attention,
        "shuffle": lambda: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
        "flatten": lambda: (
            x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).reshape(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
        ),
        "repeat": lambda: x.repeat_interleave(2, 1),
        "select": lambda: x[:, 1:],
        "excite": lambda: x * layer(x.mean((2, 3)))[:, :, None, None],
        "twice": lambda: last(lambda y: functional.linear(layer(y), layer.weight.T)),
    }.get(kind, lambda: layer(x))()


def drawn(random):
    """Ten steps of as many kinds: Hypothesis, left to itself, would rather repeat the first ones."""
    return [
        (kind, random.choice((0, 0, 0, 1, 2, 4)), random.choice((4, 8, 6)), random.choice((2, 4, 3, 1)))
        for kind in random.sample(STEPS, 10)
    ]


def check(seed):
    random = Random(seed)
    steps = drawn(random)
    program, _ = capture_module(lambda: Drawn(steps), x=torch.randn(SHAPE))
    found = axes_of(program)
    check_sizes(program, found)
    norms = norm_groups(found)
    choice = {}
    for index, group in enumerate(found.groups):
        gone = removable(group.size, random.randint(1, group.size), norms.get(group.atom, 1))
        if gone:
            choice[index] = tuple(sorted(random.sample(range(group.size), group.size - gone)))
    some = {index: kept for index, kept in choice.items() if random.random() < 0.5}
    assert max([0.0, *cut_errors(program, [choice, some])]) <= 1e-9


DRAWN = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True, "database": None}


@settings(max_examples=20, **DRAWN)
@given(SEEDS)
def test_any_choice_is_zeroing(seed):
    check(seed)


@pytest.mark.slow
@settings(max_examples=400, **DRAWN)
@given(SEEDS)
def test_any_choice_is_zeroing_in_many_graphs(seed):
    check(seed)
