"""A half-precision Program executed in float32, against the eager module in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.evaluate.difference import program_runner
from optpass.evaluate.widened import widened
from optpass.ir.program import Origin
from optpass.ir.weights import Constant
from optpass.testing import capture_module


class Net(nn.Module):
    """A float32 time embedding inside a half-precision model, as diffusers has it, and a float32 softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.fc = nn.Linear(4, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        emb = torch.sin(timestep.float()[:, None] * torch.arange(4)).to(x.dtype)
        x = self.fc(x) + self.time(emb) + torch.ones((), dtype=x.dtype)
        return torch.softmax(x, -1, dtype=torch.float32).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_compute_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    real = Net().to(dtype).eval()
    fake, mode = build_fake(Net, dtype)
    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    example = {"x": torch.zeros(3, 8, dtype=dtype), "timestep": torch.zeros(3)}
    program = export_program(fake, mode, example, weights, Origin("test"))
    inputs = {"x": torch.randn(3, 8), "timestep": torch.tensor([1.0, 500.0, 999.0])}
    found = program_runner(widened(program), "full")(inputs)["output"]
    with torch.no_grad():
        expected = real.float()(**inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert program.entries["full"].outputs[0].dtype == dtype


def test_a_float32_program_stays_itself() -> None:
    program, _ = capture_module(lambda: nn.Linear(2, 2), input=torch.zeros(1, 2))
    assert widened(program) is program
