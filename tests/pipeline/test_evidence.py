"""What evidence is collected with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops import cached, denoiser

from optpass.ir.loop import Adaptive, Listed, Sampling
from optpass.ir.program import Origin, Program
from optpass.pipeline import evidence
from optpass.pipeline.request import Request
from optpass.runtime.sampling import Asked, Samples, asked_beside


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
    assert [asked.steps for asked in asked_beside(denoiser()[0].loop, program.loop, 20)] == [steps, steps]


@pytest.mark.parametrize(("guidance", "untouched"), [(2, True), (1, True), (1, False)])
def test_an_original_with_guidance_is_sampled_as_the_folder_has_it(
    guidance: int, untouched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine has the batch of a model without."""
    original = replace(denoiser()[0], origin=Origin("test", Path("folder"), "unet", pipeline=True))
    assert original.loop is not None
    student = replace(original, loop=replace(original.loop, sampling=Sampling(4, guidance)))
    made: list[tuple[Asked, list[str]]] = []

    def generate(_: Path, replaced: dict[str, Any], *, asked: Asked, **rest: Any) -> Samples:
        made.append((asked, list(replaced)))
        return Samples(torch.rand(1, 2, 1, 4, 4), torch.tensor([1]))

    monkeypatch.setattr(evidence, "generate", generate)
    monkeypatch.setattr(evidence, "can_sample", lambda folder: True)
    monkeypatch.setattr(evidence, "engine_module", lambda program, runners: runners)
    subject: Any = SimpleNamespace(original=original, program=student, untouched=untouched)
    record, _ = evidence._samples(Request("x", Path("out")), [subject], [({}, {})], lambda stage, fraction: None)
    if not untouched:
        assert record is None
        assert not made
        return
    assert made == [
        (Asked(steps=20, guidance=3.0), ["unet"] if guidance == 2 else []),
        (Asked(steps=4, guidance=3.0 if guidance == 2 else 1.0), ["unet"]),
    ]
