"""Adapters that peft made for a small model, and what peft merges them to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_layers import Layers, example, randomise_adapter
from torch import Tensor

from optpass.ir.program import Program
from optpass.passes.merge_lora import MergeLora
from optpass.pipeline.manager import PassRecord, run_pass
from optpass.pipeline.recipe import Step
from optpass.testing import capture_module


@dataclass
class Trained:
    """A Program, an adapter of it on the disk, and the weights that peft merged."""

    program: Program
    folder: Path
    expected: dict[str, Tensor]


@pytest.fixture
def peft_adapter(tmp_path: Path) -> Callable[..., Trained]:
    """Adapt :class:`Layers` by a peft configuration, save the adapter and let peft merge it."""

    count = itertools.count()

    def make(config: Any, dtype: torch.dtype = torch.float32) -> Trained:
        from peft import get_peft_model

        folder = tmp_path / f"adapter{next(count)}"
        program, real = capture_module(lambda: Layers().to(dtype), x=example(dtype))
        program = program.with_weights({name: _copied(value) for name, value in program.weights.items()})
        model = get_peft_model(real, config)
        randomise_adapter(model)
        model.save_pretrained(folder)
        return Trained(program, folder, dict(model.merge_and_unload().state_dict()))

    return make


def _copied(value: Any) -> Any:
    return type(value)(value.evaluate().clone())


@pytest.fixture
def layers() -> Program:
    """:class:`Layers`, captured."""
    program, _ = capture_module(Layers, x=example())
    return program


@pytest.fixture
def merge() -> Callable[..., tuple[Program, PassRecord]]:
    """Run merge-lora with an adapter and other options."""

    def run(program: Program, adapter: Any, **options: Any) -> tuple[Program, PassRecord]:
        record = MergeLora.from_options({"adapter": adapter, **options}, owner="pass merge-lora")
        return run_pass(program, Step("merge-lora", record))

    return run


@pytest.fixture
def worst_difference() -> Callable[..., float]:
    """The largest difference of a Program's weights from expected ones, by the largest value of each."""

    def measure(program: Program, expected: dict[str, Tensor]) -> float:
        floats = {name: value for name, value in program.weights.items() if value.dtype.is_floating_point}
        found = {name: value.evaluate().double() for name, value in floats.items()}
        return max(
            float((found[name] - expected[name].double()).abs().max() / expected[name].double().abs().max())
            for name in found
        )

    return measure
