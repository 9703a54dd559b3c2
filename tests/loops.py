"""A small denoiser whose loop is cut by hand, for tests of everything that knows loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from optpass.ir.interface import Interface
from optpass.ir.loop import Loop, Schedule, State, every, past, present, single_step
from optpass.ir.program import InputRange, Program
from optpass.rewrite.splitting import subgraph
from optpass.testing import capture_module

RANGES = {"timestep": InputRange(0, 1000, "uniform")}


class Denoiser(nn.Module):
    """Outer layers around an inner one that is worth skipping; context comes in at the inner one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.mix = nn.Linear(3, 4)

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        outer = self.enter(sample) + timestep / 1000
        deep = torch.tanh(self.inner(outer) + self.mix(context))
        return self.leave(deep + outer)


def denoiser(batch: int = 2) -> tuple[Program, nn.Module]:
    """The Program of a :class:`Denoiser` as captured, and the module."""
    program, module = capture_module(
        Denoiser, sample=torch.zeros(batch, 4), timestep=torch.tensor(1.0), context=torch.zeros(batch, 3)
    )
    loop = single_step("full", program.entries["full"].signature)
    assert loop is not None
    return replace(program, loop=loop, ranges=RANGES), module


def cached(schedule: Schedule | None = None, batch: int = 2) -> tuple[Program, nn.Module]:
    """The same, split at ``tanh``: ``full`` and ``reuse``, every second step by default."""
    program, module = denoiser(batch)
    full, loop = program.entries["full"], program.loop
    assert loop is not None
    deep = next(node for node in full.calls if "tanh" in str(node.target))
    (result,) = full.output_node.args[0]  # type: ignore[misc, union-attr]
    computed = subgraph(full, inputs={}, outputs={"output": result, present("deep"): deep})  # type: ignore[dict-item]
    reuse = subgraph(full, inputs={past("deep"): deep}, outputs={"output": result})  # type: ignore[dict-item]
    made = Loop(
        loop.signature,
        loop.sample,
        loop.timestep,
        {"full": ("full",), "reuse": ("reuse",)},
        schedule or every(2, ("full", "reuse")),
        {"deep": State.of("deep", Interface.of(computed).outputs[1])},
    )
    return replace(program, entries={"full": computed, "reuse": reuse}, loop=made), module


def generation(
    call: Callable[..., Tensor],
    seed: int,
    steps: int,
    context: Tensor,
    *,
    first: float = 999.0,
    stop: int | None = None,
) -> list[Tensor]:
    """What ``call`` answers at each of ``steps`` steps of a sampler that takes a little of the answer off.

    It is broken off after ``stop`` of them.
    """
    sample = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    answers = []
    for index in range(steps)[:stop]:
        answer = call(sample, torch.tensor(first - index * first / steps), context)
        answers.append(answer)
        sample = sample - 0.05 * answer
    return answers


class Eager:
    """The oracle: the module with a forward hook's kind of cache, told its step."""

    def __init__(self, module: nn.Module, computes: Callable[[int], bool]) -> None:
        self.module, self.computes = module, computes
        self.step, self.deep = 0, torch.empty(0)

    def __call__(self, sample: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        net = self.module
        with torch.no_grad():
            outer = net.enter(sample) + timestep / 1000
            if self.computes(self.step):
                self.deep = torch.tanh(net.inner(outer) + net.mix(context))
            self.step += 1
            answer: Tensor = net.leave(self.deep + outer)
        return answer
