"""Small bundles on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optpass.ir.program import Origin, Program
from optpass.pipeline.registry import target_class
from optpass.pipeline.target import Lowering
from optpass.runtime.bundle import BundleWriter
from optpass.testing import capture_module


class Net(nn.Module):
    """Two layers and a result in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, scale: bool = True) -> dict[str, torch.Tensor]:
        return {"sample": self.second(torch.relu(self.first(sample))) * timestep.to(sample.dtype)}


@pytest.fixture(scope="session")
def program() -> Program:
    return capture_module(Net, sample=torch.zeros(2, 6), timestep=torch.tensor(1.0))[0]


@pytest.fixture(scope="session")
def write_bundle() -> Callable[..., Path]:
    """Write a Program as a bundle through a target, as ``apply`` does."""

    def write(out: Path, program: Program, *, target: str = "program", force: bool = False, **options: Any) -> Path:
        chosen = target_class(target).of(target, options)
        with BundleWriter(out, force=force) as writer:
            writer.reserve(program)
            engines = chosen.lower(program, Lowering(writer.folder))
            writer.finish(program=program, target=target, options=chosen.as_options(), engines=engines)
        return out

    return write


@pytest.fixture
def bundle(tmp_path: Path, program: Program, write_bundle: Callable[..., Path]) -> Path:
    return write_bundle(tmp_path / "bundle", program)


@pytest.fixture
def pipeline(tmp_path: Path, program: Program) -> tuple[Path, Program]:
    """A pipeline folder as libraries leave it, weights and clutter included, and a Program captured from it."""
    folder = tmp_path / "pipeline"
    files = {
        "model_index.json": '{"_class_name": "X", "unet": ["diffusers", "X"]}',
        "all-in-one.ckpt": "everything once more",
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": "the weights that were optimised",
        "unet/diffusion_pytorch_model.safetensors.index.json": "{}",
        "unet/custom.py": "raise SystemExit",
        "vae/config.json": "{}",
        "vae/diffusion_pytorch_model.safetensors": "the weights of another",
        "scheduler/scheduler_config.json": "{}",
        ".git/config": "hidden",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    origin = Origin("diffusers", folder, "unet", "diffusers", "X", {"in_channels": 6}, pipeline=True)
    return folder, replace(program, origin=origin)
