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
from torch import nn

from optpass.ir.program import Program
from optpass.testing import capture_module, randomised

CHECKPOINT = Path(__file__).parent / "checkpoints" / "moving-digits"


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
