"""What evidence is collected with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from loops import cached, denoiser

from optpass.ir.loop import Adaptive, Listed
from optpass.ir.program import Program
from optpass.pipeline.evidence import _sampled_steps
from optpass.pipeline.request import Request


@pytest.mark.parametrize(
    ("program", "steps"),
    [
        (denoiser()[0], 20),
        (cached()[0], 20),
        (cached(Listed((0, 2), of=4))[0], 4),
        (cached(Adaptive("threshold", {"threshold": 0.1}, of=30))[0], 20),
    ],
)
def test_samples_have_the_steps_that_a_list_serves(program: Program, steps: int) -> None:
    """A recipe with a list needs no ``--steps`` to go with it."""
    request = Request("checkpoint", Path("out"), steps=20)
    assert _sampled_steps(request, [SimpleNamespace(program=program)]) == steps  # type: ignore[list-item]
