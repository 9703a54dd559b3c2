"""Healing on a pipeline's own generations, and a bundle of what came out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from optpass.capture.sources import capture
from optpass.ir.program import Program
from optpass.passes.cache_blocks import CacheBlocks
from optpass.passes.cache_features import CacheFeatures
from optpass.passes.distill import Distill
from optpass.pipeline.apply import apply
from optpass.pipeline.manager import PassRecord, run_passes
from optpass.pipeline.recipe import Step, load_recipe, make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.sampling import Asked
from optpass.training.asking import Asking
from optpass.training.courses import Trajectories
from optpass.training.networks import Network, Values


def healed(program: Program, first: Step, **options: object) -> tuple[Program, Program, PassRecord]:
    """The Programs before and after healing, and its record."""
    before, _ = run_passes(program, [first])
    after, records = run_passes(program, [first, Step("distill", Distill.from_options(options, owner="distill"))])
    return before, after, records[-1]


def errors(original: Program, program: Program, folder: Path, *, steps: int, share: float, seed: int) -> torch.Tensor:
    """Σ(a − b)² / Σb² of the answers at every step of a generation, against those of ``original``."""
    values = Values(torch.device("cpu"))
    teacher, student = Network(original, values), Network(program, values)
    asking = Asking(Asked(steps=steps, labels=(4,)), seed=seed)
    courses = Trajectories(folder, teacher, asking, student_states=share, in_order=True)
    lessons, run, found = courses.course(0, student.runner, teacher.runner), student.runner(), []
    for lesson in lessons:
        assert lesson.expected is not None
        (answer,), (expected,) = run(lesson.inputs).values(), lesson.expected.values()
        found.append(float((answer - expected).square().sum() / expected.square().sum()))
    return torch.tensor(found)


def test_trained_on_its_own_generations(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = pipeline_folder("dit")
    program, cache = capture(folder), Step("cache-blocks", CacheBlocks(head=1, every=3))
    options = {"train": "all", "updates": 8, "calls": 6, "steps": 6, "labels": (1, 2), "learning_rate": 2e-3}
    before, after, record = healed(program, cache, warmup=0, work=str(tmp_path), **options)
    assert record.facts["training"]["source"] == "trajectories of the pipeline in 6 steps"
    found = [errors(program, each, folder, steps=6, share=0.0, seed=5) for each in (before, after)]
    # Steps 1, 2, 4 and 5 reuse.
    assert found[0][[1, 2, 4, 5]].mean() > found[1][[1, 2, 4, 5]].mean()


def test_a_bundle_and_its_lock(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = pipeline_folder("dit")
    options = {"train": "all", "updates": 2, "steps": 3, "labels": [1], "work": str(tmp_path / "work")}
    document = {"passes": [{"cache-blocks": {"head": 1, "every": 2}}, {"distill": options}], "target": "program"}
    told: list[str] = []
    made = apply(
        make_recipe(document),
        Request(str(folder), tmp_path / "out", baseline=False, verify="never"),
        progress=lambda stage, fraction: told.append(stage),
    )
    assert any(stage.startswith("train · loss ") and stage.endswith(" left") for stage in told)
    lock = yaml.safe_load((made.folder / "recipe.lock.yaml").read_text("utf-8"))
    outcome = lock["passes"][1]["distill"]["outcome"]
    training = made.report["passes"][1]["training"]
    assert outcome == {"data": training["sha256"], "seed": 0, "updates": 2, "loss": training["last"]}
    assert load_recipe(made.folder / "recipe.lock.yaml").steps[1].record.heals
    assert 'id="training"' in (made.folder / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_clockworks_adaptor_on_moving_digits(moving_digits: Path, tmp_path: Path) -> None:
    program = capture(moving_digits, dtype=torch.float32, inputs={"sample": [2, 8, 4, 16, 16]})
    cache = Step("cache-features", CacheFeatures(cut="up_blocks.1", every=3, adaptor="resnet", width=64))
    options = {"updates": 300, "calls": 2, "steps": 10, "learning_rate": 1e-3}
    before, after, record = healed(program, cache, work=str(tmp_path), **options)
    assert all(name.startswith("adaptor.") for name in record.sites)
    for share in (0.0, 1.0):
        one, other = (errors(program, each, moving_digits, steps=10, share=share, seed=777) for each in (before, after))
        reusing = [1, 2, 4, 5, 7, 8]
        assert (one[reusing] > other[reusing]).all()
        assert (one / other)[[4, 5, 7, 8]].mean() > 3
