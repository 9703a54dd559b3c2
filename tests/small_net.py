"""A small network with what compilers trip over, and how near an engine of it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optpass.evaluate.difference import program_runner
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Program


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.conv(image))
        return self.fc((torch.relu(self.norm(x)) + x).mean((2, 3)))


def signal_to_noise(program: Program, runner: Callable[[Any], dict[str, Tensor]]) -> float:
    """In dB, of one engine's output against the Program itself in PyTorch."""
    inputs = random_inputs(program.entries["full"].inputs_at(), {}, seed=3)
    (expected,), (found,) = program_runner(program, "full")(inputs).values(), runner(inputs).values()
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))
