"""The ethos-u target: integers alone, nothing silent about an NPU that gets none, and Arm's own model of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_nets import Handing
from small_net import Small, signal_to_noise
from torch import Tensor, nn

from optpass.errors import UserError
from optpass.evaluate.calibration_set import random_set
from optpass.ir.program import Program
from optpass.ir.weights import Constant
from optpass.pipeline.lowered import runners_of
from optpass.pipeline.target import Lowering
from optpass.quantization.program import Quantization
from optpass.quantization.ranges import Method
from optpass.targets.ethos_u import EthosU
from optpass.testing import capture_module

installed = pytest.mark.skipif(
    bool(EthosU.environment.lacks()), reason=f"{EthosU.environment.lacks()}: optpass targets install ethos-u"
)
INTEGERS = torch.ops.quantized_decomposed


def through_integers(x: Tensor, scale: float, zero: int = 0) -> Tensor:
    x = INTEGERS.quantize_per_tensor(x, scale, zero, -128, 127, torch.int8)
    return INTEGERS.dequantize_per_tensor(x, scale, zero, -128, 127, torch.int8)


class Whole(nn.Module):
    """A convolution and an addition, every value of which is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (16, 3, 3, 3), dtype=torch.int8))
        self.register_buffer("bias", torch.randint(-3000, 3000, (16,), dtype=torch.int32))
        self.register_buffer("steps", torch.ones(16))
        self.register_buffer("bias_steps", torch.ones(16))

    def forward(self, image: Tensor) -> Tensor:
        x = through_integers(image, 0.03)
        w = INTEGERS.dequantize_per_channel(self.weight, self.steps, None, 0, -127, 127, torch.int8)
        b = INTEGERS.dequantize_per_channel(self.bias, self.bias_steps, None, 0, -(2**31), 2**31 - 1, torch.int32)
        x = through_integers(torch.relu(nn.functional.conv2d(x, w, b, padding=1)), 0.05, -128)
        return through_integers(x + x, 0.1, -128)


class Islands(nn.Module):
    """Quantised and made real again; nothing is computed in integers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.erfinv(through_integers(x, 0.03).clamp(-0.9, 0.9))


@pytest.fixture(scope="module")
def whole() -> Program:
    program = capture_module(Whole, image=torch.zeros(1, 3, 16, 16))[0]
    steps = torch.linspace(0.005, 0.015, 16)
    return program.with_weights({"steps": Constant(steps), "bias_steps": Constant(steps * 0.03)})


@installed
@pytest.mark.parametrize("device", ["ethos-u85-256", pytest.param("ethos-u55-128", marks=pytest.mark.slow)])
def test_all_of_it_runs_on_the_npu_and_arms_model_computes_it(whole: Program, tmp_path: Path, device: str) -> None:
    target = EthosU(device=device)
    entry = target.lower(whole, Lowering(tmp_path))["full"]
    assert entry.coverage is not None
    assert entry.coverage.native == entry.coverage.operators > 0
    assert signal_to_noise(whole, runners_of(target, {"full": entry}, tmp_path)["full"]) > 35


@installed
def test_what_is_handed_on_is_what_it_was(tmp_path: Path) -> None:
    """A ReLU behind a sum, pooled, enlarged and joined: integers whose scale no kernel asks for."""
    program = capture_module(Handing, image=torch.zeros(2, 3, 8, 8))[0]
    placed = Quantization.placed(program, EthosU.quantization, Quantization.scheme, lambda graph: lambda node: "")
    calls = random_set(program, count=4, seed=0)
    quantized = placed.calibrated(program, calls, Method("minmax")).applied(program)
    target = EthosU()
    entry = target.lower(quantized, Lowering(tmp_path))["full"]
    assert signal_to_noise(quantized, runners_of(target, {"full": entry}, tmp_path)["full"]) > 35


@installed
def test_a_program_of_which_nothing_runs_on_the_npu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTPASS_HOME", str(tmp_path / "home"))
    program = capture_module(Islands, x=torch.zeros(1, 16))[0]
    with pytest.raises(UserError, match=r"nothing of 'full' runs on the ethos-u85-256: .*erfinv|target 'ethos-u'"):
        EthosU().lower(program, Lowering(tmp_path))


def test_a_floating_program_is_refused_before_any_work() -> None:
    program = capture_module(Small, image=torch.zeros(1, 3, 16, 16))[0]
    (refused,) = EthosU().refuses(program)
    assert "put the pass 'quantize' into the recipe" in refused.reason
    assert EthosU().runs() == "emulated"
