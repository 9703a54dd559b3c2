"""Small denoisers of diffusers' own classes, captured without weights, with as many layers as a test asks for."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from cases_diffusers import CASES

from optpass.capture.sources import capture
from optpass.capture.spans import Span
from optpass.ir.graph import Graph

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
