"""The coreml target: what a package holds, what is taken apart for it, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("coremltools", reason="pip install 'optpass[coreml]'")

from optpass.errors import UserError
from optpass.pipeline.target import Lowering
from optpass.targets.coreml import CoreMl
from optpass.testing import capture_module


def operators(package: Path) -> list[str]:
    """The types of a package's operators, without constants."""
    import coremltools

    program = coremltools.models.MLModel(str(package), skip_model_load=True).get_spec().mlProgram
    (function,) = program.functions.values()
    (block,) = function.block_specializations.values()
    return [operation.type for operation in block.operations if operation.type != "const"]


def test_a_package_has_the_modules_operators(captured: Any, tmp_path: Path) -> None:
    program, _, _ = captured("resnet")
    entry = CoreMl().lower(program, Lowering(tmp_path))["full"]
    assert [path.name for path in tmp_path.iterdir()] == ["full.mlpackage"]
    found = operators(tmp_path / entry.main)
    assert found.count("conv") == 3
    assert found.count("linear") == 1
    assert entry.details["features"]["inputs"] == ["image"]
    assert len(entry.details["features"]["outputs"]) == 2
    assert CoreMl().runs() == ("native" if sys.platform == "darwin" else "elsewhere")


def test_precision_is_that_of_the_stored_weights(tmp_path: Path) -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.Linear(256, 128)), input=torch.zeros(2, 256))
    sizes = []
    for precision in ("f16", "f32"):
        folder = tmp_path / precision
        folder.mkdir()
        entry = CoreMl.of("coreml", {"precision": precision}).lower(program, Lowering(folder))["full"]
        sizes.append(sum(file.stat().st_size for file in folder.rglob("weight.bin")))
        assert entry.details["bytes"] > sizes[-1]
    assert sizes[0] < 0.6 * sizes[1]
    assert sizes[1] >= 256 * 128 * 4


class Video(nn.Module):
    """A scalar input, and a group norm over frames: what video UNets have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.silu(self.norm(sample))) * timestep


def test_values_of_five_dimensions_are_normalised_in_fewer(tmp_path: Path) -> None:
    program, _ = capture_module(Video, sample=torch.zeros(1, 4, 3, 6, 5), timestep=torch.tensor(1.0))
    entry = CoreMl().lower(program, Lowering(tmp_path))["full"]
    assert "conv" in operators(tmp_path / entry.main)
    assert [spec.name for spec in entry.inputs] == ["sample", "timestep"]


class Mode(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mode(x).values


def test_an_operator_that_core_ml_lacks_is_refused_with_its_place() -> None:
    program, _ = capture_module(lambda: nn.Sequential(nn.ReLU(), Mode()), input=torch.zeros(3, 3))
    (found,) = CoreMl().supports(program)
    assert (found.path, found.operator) == ("1", "mode")


def test_bools_are_refused_at_the_interface() -> None:
    program, _ = capture_module(nn.Identity, input=torch.zeros(2, dtype=torch.bool))
    assert {item.path for item in CoreMl().supports(program)} == {"(interface)"}


@pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is here")
def test_elsewhere_a_package_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="runs on macOS"):
        CoreMl.load(tmp_path, {"engine": "full.mlpackage"}, {})
