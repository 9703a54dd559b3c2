"""Scales of guidance as inputs: nothing changes at first; then what the hand-written layers compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optpass.evaluate.difference import program_difference, program_runner
from optpass.ir.loop import single_step
from optpass.ir.program import Program
from optpass.ir.text import program_text
from optpass.ir.weights import Constant
from optpass.rewrite.guided import time_layers, with_scales
from optpass.testing import capture_module


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + torch.relu(self.conv(x) + self.time(F.silu(time))[:, :, None, None])


class Denoiser(nn.Module):
    """Two residual blocks; the time goes through two layers of its own before it comes to theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = self.second(F.silu(self.first(timestep.reshape(1, 1) / 1000)))
        for block in self.blocks:
            sample = block(sample, time)
        return sample


@pytest.fixture(name="denoiser")
def _denoiser() -> tuple[Program, nn.Module]:
    program, module = capture_module(Denoiser, sample=torch.zeros(1, 4, 6, 6), timestep=torch.tensor(1.0))
    return replace(program, loop=single_step("full", program.entries["full"].signature)), module


def scaled(program: Program, scales: dict[str, float], width: int = 8) -> Program:
    made = program.copy()
    graph, loop = made.entries["full"], made.loop
    assert loop is not None
    learnt, tables = with_scales(graph, time_layers(graph, loop), scales, width)
    made = made.with_weights(tables).with_untrained(learnt)
    return replace(made, loop=replace(loop, signature=graph.signature))


def test_the_last_layers_of_the_time(denoiser: tuple[Program, nn.Module]) -> None:
    program, _ = denoiser
    assert program.loop is not None
    layers = time_layers(program.entries["full"], program.loop)
    assert [str(node.args[1]) for node in layers] == ["blocks_0_time_weight", "blocks_1_time_weight"]


def test_nothing_changes_before_training(denoiser: tuple[Program, nn.Module]) -> None:
    program, _ = denoiser
    made = scaled(program, {"guidance_scale": 3.0, "image_guidance_scale": 1.5})
    assert program_difference(program, made).max_abs == 0
    assert made.loop is not None
    assert made.loop.signature.defaults == {"guidance_scale": 3.0, "image_guidance_scale": 1.5}
    assert len(made.untrained) == 8
    assert "guidance_scale" in program_text(made)


def test_what_the_layers_compute(denoiser: tuple[Program, nn.Module]) -> None:
    program, module = denoiser
    made = scaled(program, {"guidance_scale": 3.0})
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(made.weights[name].shape, generator=generator) for name in sorted(made.untrained)}
    made = made.with_weights({name: Constant(value) for name, value in weights.items()})
    sample, scale = torch.randn(1, 4, 6, 6, generator=generator), torch.tensor(4.5)
    found = program_runner(made, "full")({"sample": sample, "timestep": torch.tensor(7.0), "guidance_scale": scale})

    def hook(name: str):  # type: ignore[no-untyped-def]
        def added(layer: nn.Module, inputs: object, output: Tensor) -> Tensor:
            angles = scale * torch.exp(torch.arange(4) * -torch.log(torch.tensor(10_000.0)) / 4)
            embedded = torch.cat([angles.cos(), angles.sin()])[None]
            weight, bias = (weights[f"blocks.{name}.time.guidance_scale.{leaf}"] for leaf in ("weight", "bias"))
            return output + F.silu(F.linear(embedded, weight, bias))

        return added

    for index, block in enumerate(module.blocks):  # type: ignore[arg-type]
        block.time.register_forward_hook(hook(str(index)))
    torch.testing.assert_close(found["output"], module(sample, torch.tensor(7.0)), atol=1e-5, rtol=1e-5)


def test_an_input_of_that_name_is_refused(denoiser: tuple[Program, nn.Module]) -> None:
    with pytest.raises(ValueError, match="already"):
        scaled(denoiser[0], {"timestep": 1.0})
