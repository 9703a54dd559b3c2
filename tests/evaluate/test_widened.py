"""A half-precision Program executed in float32, against the eager module in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.digest import Identity
from optpass.capture.export import build_fake, export_program
from optpass.evaluate.difference import program_runner
from optpass.evaluate.widened import widened
from optpass.interchange.pickled import Mapped
from optpass.ir.program import Origin
from optpass.ir.weights import Cast, Constant, Scale, Sum
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


def test_unrounded_weights_are_computed_in_float32_from_their_leaves_on() -> None:
    program, _ = capture_module(lambda: nn.Linear(2, 2).half(), input=torch.zeros(1, 2, dtype=torch.float16))
    leaf = Constant(torch.tensor([[1.0001, 2.0], [3.0, 4.0]]))
    rounded = Cast(leaf, torch.float16)
    summed = Cast(Sum(Cast(rounded, torch.float32), Scale(leaf, 1e-4)), torch.float16)
    program = program.with_weights({"weight": summed})
    found = widened(program, unrounded=True).weights["weight"].evaluate()
    assert torch.equal(found, leaf.value + leaf.value * 1e-4)
    once = widened(program).weights["weight"].evaluate()
    assert torch.equal(once, (leaf.value.half().float() + leaf.value * 1e-4).half().float())
    assert not torch.equal(once, found)


def test_unrounded_weights_keep_telling_their_digest_what_they_read() -> None:
    program, _ = capture_module(lambda: nn.Linear(2, 2).half(), input=torch.zeros(1, 2, dtype=torch.float16))
    leaf = Mapped(Path("w.pt"), "weight", torch.ones(2, 2, dtype=torch.float16))
    identity = Identity(program.with_weights({"weight": leaf}))
    watched = program.with_weights({"weight": Cast(identity.watched(leaf), torch.float16)})
    value = widened(watched, unrounded=True).weights["weight"].evaluate()
    assert value.dtype == torch.float32
    assert torch.equal(value, torch.ones(2, 2))
