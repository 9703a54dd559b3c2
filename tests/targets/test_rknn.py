"""The rknn target, in the toolkit's own environment: the simulator's numbers, and errors that it does not return."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from small_net import Small, signal_to_noise
from torch import Tensor, nn

from optpass.ir.program import Program
from optpass.passes.quantize import Quantize
from optpass.pipeline.lowered import lowered_runners, runners_of
from optpass.pipeline.passes import Context
from optpass.pipeline.target import Lowering
from optpass.targets.rknn import Rknn, _common, _place
from optpass.testing import capture_module

installed = pytest.mark.skipif(
    bool(Rknn.environment.lacks()), reason=f"{Rknn.environment.lacks()}: optpass targets install rknn"
)


@pytest.fixture(scope="module")
def small() -> Program:
    return capture_module(Small, image=torch.zeros(1, 3, 16, 16))[0]


class Timesteps(nn.Module):
    """Sine and cosine swapped, as diffusers has them: a rewrite of the toolkit's crashes on it."""

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.expand(2)[:, None] * torch.arange(1.0, 9.0)[None]
        embedding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return torch.cat([embedding[:, 8:], embedding[:, :8]], dim=-1)


@installed
def test_the_simulator_computes_in_float16(small: Program, tmp_path: Path) -> None:
    target = Rknn()
    entry = target.lower(small, Lowering(tmp_path))["full"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full.onnx", "full.onnx.data", "full.rknn"]
    assert entry.coverage is not None
    assert 0 < entry.coverage.native <= entry.coverage.operators
    assert {each.operator for each in entry.coverage.elsewhere} <= {"Reshape"}
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved)
    alive, rebuilt = (runners_of(target, {"full": entry}, folder)["full"] for folder in (tmp_path, moved))
    assert 60 < signal_to_noise(small, alive) < 90
    assert signal_to_noise(small, rebuilt) == signal_to_noise(small, alive)


@installed
def test_quantised_operators_run_in_int8(small: Program, tmp_path: Path) -> None:
    target = Rknn()
    quantised = Quantize(calls=4).run(small.copy(), Context(target=target)).pruned()
    entry = target.lower(quantised, Lowering(tmp_path))["full"]
    assert entry.details["int8_operators"] >= 2
    assert signal_to_noise(quantised, runners_of(target, {"full": entry}, tmp_path)["full"]) > 35


@installed
def test_embeddings_of_a_timestep_that_is_a_number(tmp_path: Path) -> None:
    program = capture_module(Timesteps, timestep=torch.tensor(1.0))[0]
    assert signal_to_noise(program, lowered_runners(Rknn(), program, tmp_path)["full"]) > 50


def test_places_that_the_toolkit_names_become_module_paths(tmp_path: Path, small: Program) -> None:
    from optpass.interchange.onnx_folder import write_onnx_folder

    source = write_onnx_folder(small, tmp_path).paths["full"]
    assert _place("conv/conv2d", source) == "conv"
    assert _place("norm/group_norm.Instan", source) == "norm"
    assert _place("linear_mm_tp_rs", source) in ("fc", "(root)")
    assert _place("some/thing", source) == "some"
    assert _common(["a.b.c", "a.b.d"]) == "a.b"
    assert _common(["a", "b"]) == "(root)"
