"""Fixtures that every test folder shares: small real modules captured with their weights."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing here may reach a hub; a test that tries must fail at once and not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant

CHECKPOINT = Path(__file__).parent / "checkpoints" / "moving-digits"


def capture_module(build: Callable[[], nn.Module], **inputs: Tensor) -> tuple[Program, nn.Module]:
    """A module built twice, once real with every parameter random, once fake; captured with the real weights."""
    torch.manual_seed(0)
    real = randomised(build().eval())
    fake, mode = build_fake(build)
    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    return export_program(fake, mode, inputs, weights, Origin("test")), real


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter and buffer away from zero and one, where a wrong pass could hide."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim <= 1:
                tensor.copy_(noise * 0.3 + 0.4)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return module


@pytest.fixture(name="capture_module")
def _capture_module() -> Callable[..., tuple[Program, nn.Module]]:
    return capture_module


@pytest.fixture(name="randomised")
def _randomised() -> Callable[[nn.Module], nn.Module]:
    return randomised


@pytest.fixture(scope="session")
def moving_digits() -> Path:
    """The trained checkpoint."""
    if not (CHECKPOINT / "model_index.json").is_file():
        pytest.skip("tests/checkpoints/moving-digits is not there")
    return CHECKPOINT


@pytest.fixture(scope="session")
def tiny_classifier() -> Any:
    """A two-layer module's factory: linear, GELU, linear."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    return build
