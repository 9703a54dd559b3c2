"""Fixtures that every test folder shares: small real modules captured with their weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Nothing here may reach a hub; a test that tries must fail at once and not wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.capture.inputs import Input, Inputs
from optpass.capture.spans import Span
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant
from optpass.testing import capture_module, randomised

CHECKPOINT = Path(__file__).parent / "checkpoints" / "moving-digits"


@pytest.fixture(name="capture_module")
def _capture_module() -> Callable[..., tuple[Program, nn.Module]]:
    return capture_module


@pytest.fixture
def capture_shared() -> Callable[..., Program]:
    """Captures a module on floats whose sizes are open where they are named, shared where two have one name."""

    def capture(
        build: Callable[[], nn.Module], shapes: Mapping[str, tuple[int | str, ...]], spans: Mapping[str, Span]
    ) -> Program:
        inputs = Inputs({name: Input(shape) for name, shape in shapes.items()})
        example = inputs.arguments({name: (span,) for name, span in spans.items()}, {}, torch.float32)
        weights = {name: Constant(value) for name, value in randomised(build().eval()).state_dict().items()}
        fake, mode = build_fake(build)
        return export_program(fake, mode, example, weights, Origin("test"))

    return capture


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


@pytest.fixture(scope="session")
def assert_same_function() -> Callable[..., None]:
    """Check that a Program computes what the eager module computes, on random inputs in their ranges."""

    def check(program: Program, module: nn.Module, *, atol: float = 1e-5) -> None:
        graph = program.entries["full"]
        tensors = random_inputs(graph.inputs_at(), program.ranges, seed=1)
        arguments = graph.signature.arguments.unflatten(tensors)
        with torch.no_grad():
            expected = leaves(module.eval()(**arguments))
            found = graph.module(program.weights)(*(tensors[spec.name] for spec in graph.inputs))
        assert len(found) == len(expected)
        for got, want in zip(found, expected, strict=True):
            assert float(want.abs().max()) > 1e-3
            torch.testing.assert_close(got, want, atol=atol * float(want.abs().max()), rtol=0)

    return check


def leaves(value: Any) -> list[Tensor]:
    found, _ = torch.utils._pytree.tree_flatten(value)
    return [item for item in found if isinstance(item, Tensor)]
