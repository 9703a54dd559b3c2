"""Units of real denoisers: what goes together, what it mixes, what it costs."""

from __future__ import annotations

import pytest
import torch
from denoisers import denoiser
from torch import nn

from optpass.analysis.mac_rules import macs_of
from optpass.analysis.units import outermost, units
from optpass.ir.graph import operators
from optpass.rewrite.unit_removal import remove
from optpass.testing import capture_module


def chosen(name, kind):
    return outermost(units(denoiser(name), {}), lambda unit: unit.is_kind(kind))


def test_blocks_are_what_one_module_adds():
    found = units(denoiser("Latte-1"), {})
    kinds = ["transformer_blocks", "temporal_transformer_blocks"]
    assert [unit.path for unit in found] == [f"{kind}.{index}" for index in range(3) for kind in kinds]
    assert [len(unit.branches) for unit in found] == [3, 2] * 3
    assert [set(unit.mixes) for unit in found] == [{"spatial"}, {"temporal"}] * 3


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        x = x + self.b(self.a(x).relu())
        return x + self.d(self.c(x).relu())


def test_branches_of_the_root_are_told_apart():
    program, _ = capture_module(Flat, x=torch.randn(3, 4))
    assert [unit.path for unit in units(program.entries["full"], {})] == ["b", "d"]


@pytest.mark.parametrize(
    ("name", "kind", "paths"),
    [
        ("Latte-1", "temporal", [f"temporal_transformer_blocks.{i}" for i in range(3)]),
        ("DiT-XL/2", "temporal", []),
        ("DiT-XL/2", "feed-forward", [f"transformer_blocks.{i}.ff.net" for i in range(3)]),
        ("DiT-XL/2", "attention", [f"transformer_blocks.{i}.attn1" for i in range(3)]),
        ("SD 1.5 UNet", "convolution", ["down_blocks.0.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"]),
    ],
)
def test_kinds(name, kind, paths):
    assert [unit.path for unit in chosen(name, kind)] == paths


def test_svd_has_a_temporal_unit_in_every_residual_block_and_transformer():
    found = chosen("SVD UNet", "temporal")
    assert len(found) == 12
    assert all(unit.branches[0].blend for unit in found)
    # Spatial units are those beside them, and no transformer that holds a temporal one.
    spatial = chosen("SVD UNet", "spatial")
    assert not {unit.path for unit in spatial} & {unit.path for unit in found}
    assert not any("temporal" in unit.path for unit in spatial)


@pytest.mark.parametrize("name", ["SVD UNet", "SD 1.5 UNet", "DiT-XL/2", "Flux.1"])
def test_macs_are_those_that_go(name):
    graph = denoiser(name).copy()
    for unit in units(graph, {}):
        trial = graph.copy()
        twin = next(each for each in units(trial, {}) if each.path == unit.path)
        remove(trial, [twin])
        trial.remove_dead_code()
        gone = sum(map(macs_of, operators(graph))) - sum(map(macs_of, operators(trial)))
        assert unit.macs == gone > 0


def test_positions_are_those_of_the_stream():
    resolutions = {unit.path.rpartition(".")[0]: unit.positions for unit in units(denoiser("SVD UNet"), {})}
    # Two clips of four frames of 8×12.
    assert resolutions["down_blocks.0.resnets.0"] == 2 * 4 * 8 * 12
    assert resolutions["mid_block.resnets.1"] == 2 * 4 * 4 * 6


class Convolution(nn.Module):
    def __init__(self, kernel, padding):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, kernel, padding=padding)

    def forward(self, x):
        return x + self.conv(x)


class FoldedPixels(nn.Module):
    """ModelScope's way: a convolution over frames, pixels in the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x):
        y = x.permute(0, 3, 4, 1, 2).reshape(-1, 4, x.shape[2])
        y = self.conv(y).reshape(x.shape[0], x.shape[3], x.shape[4], 4, x.shape[2])
        return x + y.permute(0, 3, 4, 1, 2)


@pytest.mark.parametrize(
    ("build", "mixes"),
    [
        (lambda: Convolution((3, 1, 1), (1, 0, 0)), {"temporal"}),
        (lambda: Convolution((1, 3, 3), (0, 1, 1)), {"spatial"}),
        (lambda: Convolution((3, 3, 3), (1, 1, 1)), {"spatial"}),
        (lambda: Convolution((1, 1, 1), (0, 0, 0)), set()),
        (FoldedPixels, {"temporal"}),
    ],
)
def test_what_kernels_mix(build, mixes):
    program, _ = capture_module(build, x=torch.randn(2, 4, 3, 5, 6))
    [unit] = units(program.entries["full"], program.weights)
    assert set(unit.mixes) == mixes


class Gated(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.inner, self.mix = body, nn.Linear(4, 4), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.body(self, x)


def learned(m, x):
    a = torch.sigmoid(m.mix)
    return a * x + (1.0 - a) * m.inner(x)


def switched(m, x):
    a = 1.0 - torch.sigmoid(m.mix)
    return a * x + (1.0 - a) * m.inner(x)


BLENDS = {
    "learned": (learned, True),
    "switched": (switched, True),
    "numbers": (lambda m, x: 0.25 * x + 0.75 * m.inner(x), True),
    "the branch first": (lambda m, x: (1.0 - m.mix) * m.inner(x) + m.mix * x, True),
    "a scaled branch": (lambda m, x: x + m.mix * m.inner(x), False),
    "numbers that do not sum to one": (lambda m, x: 0.25 * x + 0.5 * m.inner(x), False),
    "two minus": (lambda m, x: m.mix * x + (2.0 - m.mix) * m.inner(x), False),
}


@pytest.mark.parametrize("name", BLENDS)
def test_blends(name):
    body, is_blend = BLENDS[name]
    program, _ = capture_module(lambda: Gated(body), x=torch.randn(3, 4))
    graph = program.entries["full"]
    [unit] = units(graph, program.weights)
    [branch] = unit.branches
    assert (branch.blend is not None) == is_blend
    if is_blend:
        assert branch.passed is graph.placeholders[0]
