"""Guidance and sampling steps distilled: what is learnt from, what comes out, interrupted and whole, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.ir.loop import Sampling
from optpass.ir.program import Program
from optpass.passes.cache_features import CacheFeatures
from optpass.passes.distill_guidance import DistillGuidance
from optpass.passes.distill_steps import DistillSteps
from optpass.pipeline.manager import PassRecord, run_passes
from optpass.pipeline.passes import Pass
from optpass.pipeline.recipe import Step
from optpass.runtime.folder import build_pipeline
from optpass.runtime.looped import program_module
from optpass.runtime.sampling import Asked, drive
from optpass.training.asking import Asking
from optpass.training.clean import CALLS, Generated
from optpass.training.denoising import Denoising
from optpass.training.diffusion import Diffusion
from optpass.training.guided import GuidedTrajectories
from optpass.training.networks import Network, Values
from optpass.training.trainer import Trainer
from optpass.training.watched import WatchedPipeline

SHORT: dict[str, Any] = {"prompt": "a cat", "steps": 2, "updates": 2, "warmup": 0, "learning_rate": 1e-2}


@pytest.fixture(name="folder", scope="module")
def _folder(pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion whose sampler starts from noise alone, whatever the number of steps."""
    folder = tmp_path_factory.mktemp("trailing") / "model"
    shutil.copytree(pipeline_folder("stable-diffusion-tiny"), folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "timestep_spacing": "trailing"}))
    return folder


@pytest.fixture(name="program", scope="module")
def _program(folder: Path) -> Program:
    return capture(folder, inputs={"sample": [1, 4, 12, 12], "encoder_hidden_states": [1, 16, 16]})


def run(program: Program, *passes: tuple[str, Pass]) -> tuple[Program, PassRecord]:
    made, records = run_passes(program, [Step(name, item) for name, item in passes])
    return made, records[-1]


def test_what_guidance_is_learnt_from(program: Program, folder: Path) -> None:
    network = Network(program, Values(torch.device("cpu")))
    asking = Asking(Asked(prompt="a cat", steps=2), seed=4)
    courses = GuidedTrajectories(folder, network, asking, {"guidance_scale": (2.0, 6.0)}, student_states=0.5)

    def student(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sample": tensors["sample"] * 0.5}

    lessons = courses.course(0, lambda: student, network.runner)  # type: ignore[arg-type, return-value]
    assert len(lessons) == 8
    scales = {float(lesson.inputs["guidance_scale"]) for lesson in lessons}
    assert len(scales) == 4
    assert all(2 <= scale <= 6 for scale in scales)
    # Without the condition: the pipeline's own empty prompt.
    empty = build_pipeline(folder, {}).encode_prompt("", torch.device("cpu"), 1, False)[0]
    for lesson in lessons:
        inputs, scale = dict(lesson.inputs), lesson.inputs["guidance_scale"]
        without = network.runner()({**inputs, "encoder_hidden_states": empty})["sample"]
        conditioned = network.runner()(inputs)["sample"]
        expected = without + scale * (conditioned - without)
        assert lesson.expected is not None
        torch.testing.assert_close(lesson.expected["sample"], expected, atol=1e-4, rtol=1e-4)


def test_guidance_becomes_an_input(program: Program, folder: Path, tmp_path: Path) -> None:
    options = {**SHORT, "scales": {"guidance_scale": (2.0, 6.0)}, "width": 8, "updates": 8, "calls": 2}
    made, record = run(program, ("distill-guidance", DistillGuidance(**options, work=tmp_path)))
    losses = record.facts["training"]["losses"]["loss"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert record.facts["scales"]["defaults"] == {"guidance_scale": 4.0}
    assert made.loop is not None
    assert made.loop.sampling == Sampling(2, 1)
    assert not made.untrained
    module = program_module(made)
    calls: list[float] = []
    runner = module.runner

    def counted(tensors: Any) -> Any:
        calls.append(float(tensors["guidance_scale"]))
        return runner(tensors)

    module.runner = counted
    for guidance, expected in ((None, 4.0), (2.5, 2.5)):
        drive(build_pipeline(folder, {"unet": module}), samples=1, asked=Asked("a cat", steps=2, guidance=guidance))
        assert calls == [expected] * 2
        calls.clear()


@pytest.mark.parametrize("method", ["consistency", "progressive", "matching", "adversarial"])
def test_few_steps_interrupted_and_whole(program: Program, tmp_path: Path, method: str, monkeypatch: Any) -> None:
    options: dict[str, Any] = {**SHORT, "method": method, "into": 2, "samples": 2, "calls": 2, "guidance": 1.0}
    options |= {"updates": 4, "learning_rate": 1e-3, "checkpoint_seconds": 0, "ladder": 8}
    whole, record = run(program, ("distill-steps", DistillSteps(**options, work=tmp_path / "whole")))
    assert whole.loop is not None
    assert whole.loop.sampling == Sampling(2, 1)
    assert record.modified
    assert len(record.facts["training"]["losses"]["loss"]) == 4
    save = Trainer._save

    def broken_off(trainer: Trainer) -> None:
        save(trainer)
        if trainer.progress.updates == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", broken_off)
    halves = Step("distill-steps", DistillSteps(**options, work=tmp_path / "halves"))
    with pytest.raises(KeyboardInterrupt):
        run_passes(program, [halves])
    monkeypatch.setattr(Trainer, "_save", save)
    resumed, _ = run_passes(program, [halves])
    for name in whole.weights:
        assert torch.equal(whole.weights[name].evaluate(), resumed.weights[name].evaluate()), name


def test_a_teacher_with_guidance(program: Program, folder: Path, tmp_path: Path) -> None:
    network = Network(program, Values(torch.device("cpu")))
    pipeline = WatchedPipeline(folder, network)
    assert program.loop is not None
    asking = Asking(Asked("a cat", steps=1, guidance=3.0))
    courses = Generated(pipeline, folder, asking, program.loop, number=1, calls=1)
    (lesson,) = courses.course(0, network.runner, network.runner)
    assert len(lesson.batch[CALLS]) == 2
    made = Denoising(Diffusion.of(pipeline.scheduler, 1), network.call, program.loop, guidance=3.0)
    sample, timestep = torch.randn(1, 4, 12, 12), torch.tensor([300])
    empty = build_pipeline(folder, {}).encode_prompt("", torch.device("cpu"), 1, False)[0]
    inputs = made.inputs(lesson, sample, timestep)
    without = network.runner()({**inputs, "encoder_hidden_states": empty})["sample"]
    expected = without + 3 * (network.runner()(inputs)["sample"] - without)
    torch.testing.assert_close(made.taught(network.runner(), lesson, sample, timestep), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="asked 2 times a step"):
        replace(made, guidance=None).taught(network.runner(), lesson, sample, timestep)
    options = {**SHORT, "method": "matching", "teacher": "original", "guidance": 3.0, "samples": 1, "work": tmp_path}
    _, record = run(program, ("distill-steps", DistillSteps(**options)))
    assert record.modified


REFUSED: dict[str, tuple[Callable[[Program], Program], type[Pass], dict[str, Any], str]] = {
    "no loop": (lambda p: replace(p, loop=None), DistillSteps, {"method": "matching"}, "the model has no loop"),
    "teacher": (lambda p: p, DistillSteps, {"method": "matching", "teacher": "prune"}, "no pass 'prune' ran before"),
    "guided": (
        lambda p: replace(p, loop=replace(p.loop, sampling=Sampling(5, 2))),  # type: ignore[type-var]
        DistillSteps,
        {"method": "matching"},
        "put distill-guidance in front",
    ),
    "no pipeline": (
        lambda p: replace(p, origin=replace(p.origin, pipeline=False)),
        DistillGuidance,
        {},
        "give the folder of the whole pipeline",
    ),
    "features": (lambda p: p, DistillSteps, {"method": "adversarial", "features": ("x",)}, "features: no module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_distilled(program: Program, tmp_path: Path, name: str) -> None:
    change, kind, options, message = REFUSED[name]
    item = kind(**{**SHORT, **options, "work": tmp_path})
    with pytest.raises(UserError, match=message):
        run_passes(change(program), [Step("distilled", item)])


def test_a_cached_model_is_refused(program: Program, tmp_path: Path) -> None:
    cache = Step("cache-features", CacheFeatures(cut="up_blocks.0", every=2))
    for item in (DistillGuidance(work=tmp_path), DistillSteps(method="matching", guidance=1.0, work=tmp_path)):
        with pytest.raises(UserError, match="its steps are split already: put distill-"):
            run_passes(program, [cache, Step("distilled", item)])


def test_two_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    program = capture(folder, inputs={"sample": [2, 4, 12, 12], "encoder_hidden_states": [2, 16, 16]})
    with pytest.raises(UserError, match=r"captured for 2 rows.*--inputs sample=1x"):
        run_passes(program, [Step("distill-guidance", DistillGuidance(work=tmp_path))])


def test_scales_are_ranges() -> None:
    for options, message in (
        ({"scales": {"guidance_scale": (3, 3)}}, "which is no range"),
        ({"defaults": {"guidance_scale": 9}}, "outside of 1 … 7.5, which is trained"),
        ({"defaults": {"scale": 2}}, "scale is none of scales"),
    ):
        with pytest.raises(UserError, match=message):
            DistillGuidance.from_options(options, owner="distill-guidance")
