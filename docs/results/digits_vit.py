"""digits-vit for the tables: its Program, what it reads right, what its attention layers cost, its engine's time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engines import engine

from optpass.analysis.mac_rules import macs_of
from optpass.capture.sources import capture
from optpass.evaluate.difference import program_runner
from optpass.evaluate.given_data import named_object
from optpass.evaluate.latency import Comparison, compare_latency
from optpass.evaluate.trials import random_inputs
from optpass.ir.graph import path_of
from optpass.ir.program import Program
from optpass.pipeline.manager import PassRecord, run_passes
from optpass.pipeline.recipe import make_recipe

FOLDER = Path(__file__).parents[2] / "tests" / "checkpoints" / "digits-vit"
# Every checkpoint has a train.py: by its path, and not by its name.
digits, render = (named_object(f"{FOLDER / 'train.py'}:{name}", "train") for name in ("digits", "render"))


def digits_vit(batch: int) -> Program:
    """The checkpoint in float32, without the masks that hide nothing."""
    program = capture(FOLDER, inputs={"pixel_values": (batch, 1, 32, 32)}, dtype=torch.float32)
    return with_passes(program, ["simplify"])[0]


def with_passes(program: Program, passes: Sequence[Any]) -> tuple[Program, list[PassRecord]]:
    """``program`` after ``passes``, written as in a recipe."""
    return run_passes(program, make_recipe({"passes": list(passes), "unhealed": True}).steps)


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one image, in millions: of everything, and of the layers without their MLPs."""

    whole: float
    attention: float


def costs(program: Program, batch: int) -> Costs:
    """Of a Program that was captured with ``batch`` images; what is chosen by attention counts as attention."""
    nodes = program.entries["full"].calls
    inside = [node for node in nodes if ".layers." in path_of(node) and ".mlp" not in path_of(node)]
    whole, attention = (sum(map(macs_of, some)) / batch / 1e6 for some in (nodes, inside))
    return Costs(whole, attention)


def read_right(program: Program, batch: int) -> float:
    """Per cent of the 360 held-out scans, given to a Program that was captured with ``batch`` images."""
    scans, labels = digits("held-out")
    images = render(scans)
    # The last call is filled up; what it says of the filling does not count.
    images = torch.cat([images, images[: -len(images) % batch]])
    run = program_runner(program, "full")
    answers = torch.cat([run({"pixel_values": some})["logits"].argmax(-1) for some in images.split(batch)])
    return 100 * (answers[: len(labels)] == labels).float().mean().item()


class Timed:
    """ONNX Runtime's engine of ``program``, one thread, to be called in turn with those of others."""

    def __init__(self, program: Program) -> None:
        self.inputs = random_inputs(program.entries["full"].inputs_at(), {}, seed=0)
        self.engine = engine(program)

    def beside(self, program: Program, runs: int) -> Comparison:
        """The time of the engine of ``program`` beside this one's, ``runs`` pairs."""
        pair = ("before", self.engine), ("after", engine(program))
        return compare_latency(*pair, [self.inputs], runs=runs)
