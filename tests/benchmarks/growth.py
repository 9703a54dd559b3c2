"""How the time of every registered pass grows with the number of nodes, the manager's bookkeeping included."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpass.ir.loop import single_step
from optpass.ir.program import Program
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import make_recipe
from optpass.pipeline.registry import pass_class, pass_names
from optpass.pipeline.target import Lowering
from optpass.testing import capture_module

DEPTHS = (4, 8, 16, 32, 64)
REPEATS = 3
OPTIONS: Mapping[str, Mapping[str, Any]] = {"cast": {"dtype": "float16"}, "cache-features": {"cut": "blocks"}}
"""Of passes that have required options."""

WIDTH, HEADS, TOKENS = 32, 2, 12


@dataclass(frozen=True)
class Curve:
    """CPU seconds by node count, and the exponent of their least-squares line in log-log."""

    name: str
    nodes: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Of the power law through the points."""
        x, y = [math.log(n) for n in self.nodes], [math.log(s) for s in self.seconds]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
        return covariance / sum((a - mean_x) ** 2 for a in x)


class Transformer(nn.Module):
    """A denoiser of ``depth`` DiT blocks: self-attention, cross-attention to one token, and a gated feed-forward."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        from diffusers.models.attention import BasicTransformerBlock

        self.blocks = nn.ModuleList(
            BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=WIDTH) for _ in range(depth)
        )

        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        outer = self.enter(sample) + timestep
        inner = outer
        for block in self.blocks:
            inner = block(inner, encoder_hidden_states=encoder_hidden_states)
        return self.leave(inner + outer)


def program_of_depth(depth: int) -> Program:
    """The captured model; its weights are small and real."""
    inputs = {
        "sample": torch.zeros(2, TOKENS, WIDTH),
        "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.zeros(2, 1, WIDTH),
    }
    program, _ = capture_module(lambda: Transformer(depth), **inputs)
    return replace(program, loop=single_step("full", program.entries["full"].signature))


def curves(depths: Sequence[int] = DEPTHS) -> list[Curve]:
    """Every registered pass that only edits and whose options are known, and the lowering to ONNX Runtime's files."""
    programs = [program_of_depth(depth) for depth in depths]
    found = [_curve(name, programs, _pass(name), REPEATS) for name in pass_names() if _is_told(name)]
    return [*found, _curve("lowering to onnxruntime", programs, _lower, 1)]


def _is_told(name: str) -> bool:
    fields = pass_class(name).model_fields
    required = {option for option, info in fields.items() if info.is_required()}
    return not pass_class(name).executes and required <= set(OPTIONS.get(name, {}))


def _pass(name: str) -> Callable[[Program], None]:
    [step] = make_recipe({"passes": [{name: dict(OPTIONS.get(name, {}))}], "target": "program"}).steps

    def run(program: Program) -> None:
        run_pass(program, step)

    return run


def _lower(program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_recipe({"target": "onnxruntime"}).target.lower(program, Lowering(Path(folder)))


def _curve(name: str, programs: Sequence[Program], run: Callable[[Program], None], repeats: int) -> Curve:
    # The first call pays for imports and caches.
    run(programs[0])
    nodes = tuple(len(program.entries["full"].calls) for program in programs)
    return Curve(name, nodes, tuple(min(_seconds(run, program) for _ in range(repeats)) for program in programs))


def _seconds(run: Callable[[Program], None], program: Program) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        run(program)
        return time.process_time() - start
    finally:
        gc.enable()
