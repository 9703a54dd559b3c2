"""Small denoisers of diffusers' own classes, with as many layers as a test asks for."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from cases_diffusers import CASES
from torch import nn
from zoo import saved, small_model

from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.ir.graph import Graph
from optpass.ir.loop import single_step
from optpass.ir.program import Program

BY_NAME = {case.name: case for case in CASES}


@cache
def denoiser(name: str, layers: int = 3, batch: Span | None = None) -> Graph:
    """The graph of a model of the zoo with ``layers`` blocks of each kind, its batch open over ``batch`` if given."""
    case = BY_NAME[name]
    counts = {key: layers for key in ("num_layers", "num_single_layers") if key in case.config}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({**case.config, **counts}), "utf-8")
        sizes = {key: [batch or size[0], *size[1:]] for key, size in case.inputs.items()}
        return capture(folder, inputs=sizes, structure_only=True).entries["full"]


def sampled(name: str, folder: Path, layers: int = 3, batch: Span | None = None) -> tuple[Program, nn.Module]:
    """A model of the zoo with random weights as a Program with its loop, and the model; ``folder`` is empty."""
    case = BY_NAME[name]
    counts = {key: layers for key in ("num_layers", "num_single_layers") if key in case.config}
    case = replace(case, config={**case.config, **counts})
    model = small_model(case)
    source, options = saved(case, model, folder / "model")
    sizes = {key: [batch or size[0], *size[1:]] for key, size in case.inputs.items()}
    program = capture(source, inputs=sizes, **options)
    loop = single_step("full", program.entries["full"].signature)
    return replace(program, loop=loop), model
