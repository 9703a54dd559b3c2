"""The executorch target, in its own environment: delegates, kernels that are left, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_net import Small, signal_to_noise
from torch import nn

from optpass.environments.worker import WorkerError
from optpass.errors import MissingValuesError, UserError
from optpass.ir.program import Program
from optpass.passes.quantize import Quantize
from optpass.pipeline.lowered import lowered_runners, runners_of
from optpass.pipeline.passes import Context
from optpass.pipeline.target import Lowering
from optpass.targets.executorch import ExecuTorch
from optpass.testing import capture_module

installed = pytest.mark.skipif(
    bool(ExecuTorch.environment.lacks()), reason=f"{ExecuTorch.environment.lacks()}: optpass targets install executorch"
)


@pytest.fixture(scope="module")
def small() -> Program:
    return capture_module(Small, image=torch.zeros(1, 3, 16, 16))[0]


@installed
def test_xnnpack_computes_the_same_and_says_what_it_leaves(small: Program, tmp_path: Path) -> None:
    target = ExecuTorch()
    entry = target.lower(small, Lowering(tmp_path))["full"]
    assert [path.name for path in tmp_path.iterdir()] == ["full.pte"]
    assert entry.coverage is not None
    assert entry.coverage.native == entry.coverage.operators - 2
    assert {(each.path, each.operator) for each in entry.coverage.elsewhere} == {
        ("norm", "native_group_norm.default"),
        ("(root)", "mean.dim"),
    }
    assert signal_to_noise(small, runners_of(target, {"full": entry}, tmp_path)["full"]) > 100


@installed
def test_integer_kernels_of_a_quantised_program(small: Program, tmp_path: Path) -> None:
    target = ExecuTorch()
    quantised = Quantize(calls=4).run(small.copy(), Context(target=target)).pruned()
    assert signal_to_noise(quantised, lowered_runners(target, quantised, tmp_path)["full"]) > 35


@installed
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["portable", "vulkan", "coreml"])
def test_other_delegates_compile(small: Program, tmp_path: Path, backend: str) -> None:
    entry = ExecuTorch(backend=backend).lower(small, Lowering(tmp_path))["full"]
    assert entry.details["bytes"] == (tmp_path / "full.pte").stat().st_size
    assert (entry.coverage is None) is (backend == "portable")


@installed
def test_an_engine_that_is_damaged_is_one_error(
    small: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTPASS_HOME", str(tmp_path / "home"))
    (tmp_path / "full.pte").write_bytes(b"nothing")
    record = {"engine": "full.pte", "inputs": [], "outputs": [], "details": {}}
    with pytest.raises(WorkerError, match="target 'executorch'"):
        ExecuTorch.load(tmp_path, record, {})


def test_what_it_cannot_take_is_told_before(small: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ExecuTorch().refuses(small) == []
    assert ExecuTorch(backend="vulkan").runs() == "elsewhere"
    wide = capture_module(nn.Identity, input=torch.zeros(2, dtype=torch.float64))[0]
    assert next(item.reason for item in ExecuTorch().refuses(wide)) == "executorch has no f64"
    monkeypatch.setenv("OPTPASS_HOME", str(tmp_path))
    monkeypatch.delenv(ExecuTorch.environment.variable, raising=False)
    with pytest.raises(UserError, match="optpass targets install executorch"):
        ExecuTorch.check_installed("executorch")


def test_without_values_nothing_is_started(small: Program, tmp_path: Path) -> None:
    from dataclasses import replace

    from optpass.ir.weights import Absent, WeightStore

    absent = {name: Absent(name, item.shape, item.dtype) for name, item in small.weights.items()}
    with pytest.raises(MissingValuesError, match="executorch needs weight values"):
        ExecuTorch().lower(replace(small, weights=WeightStore(absent)), Lowering(tmp_path))
