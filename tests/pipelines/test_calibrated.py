"""Schedules calibrated on a pipeline's own samples, against what hooks measure in the eager pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from optpass.analysis.generation import calls_of, generation_cost
from optpass.analysis.schedules import computed_steps
from optpass.capture.sources import capture
from optpass.errors import UserError
from optpass.evaluate.calibration import Calibration, Request
from optpass.ir.loop import Adaptive, Listed
from optpass.ir.program import Program
from optpass.ir.text import program_text
from optpass.ir.weights import Absent, WeightStore
from optpass.passes import calibrate_cache
from optpass.passes.cache_adaptive import CacheAdaptive
from optpass.passes.cache_blocks import CacheBlocks
from optpass.passes.calibrate_cache import CalibrateCache
from optpass.passes.hoist_invariants import HoistInvariants
from optpass.pipeline.manager import PassRecord, run_pass
from optpass.pipeline.recipe import Step
from optpass.runtime.sampling import Asked

STEPS = 6
ASKED: dict[str, Any] = {"samples": 2, "steps": STEPS, "labels": (1, 2)}


@pytest.fixture(scope="module")
def folder(pipeline_folder: Callable[[str], Path]) -> Path:
    return pipeline_folder("dit")


@pytest.fixture(scope="module")
def captured(folder: Path) -> Program:
    return capture(folder)


def cached(program: Program, **options: Any) -> Program:
    after, record = run_pass(program, Step("cache-blocks", CacheBlocks(head=1, **options)))
    assert record.modified
    return after


def calibrated(program: Program, **options: Any) -> tuple[Program, PassRecord]:
    return run_pass(program, Step("calibrate-cache", CalibrateCache(**{**ASKED, **options})))


def calibration(program: Program) -> Calibration:
    return Calibration(program, Request(Asked(labels=(1, 2), steps=STEPS), 2, 0))


def measured_by_hooks(folder: Path) -> torch.Tensor:
    """The mean change of what the blocks after the first add, between all pairs of steps, of the eager pipeline."""
    from diffusers import DiTPipeline

    pipe = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    entered: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    blocks = pipe.transformer.transformer_blocks
    blocks[1].register_forward_pre_hook(lambda module, args, kwargs: entered.append(args[0]), with_kwargs=True)
    blocks[-1].register_forward_hook(lambda module, args, output: added.append(output - entered[-1]))
    found = []
    for seed, label in enumerate(ASKED["labels"]):
        added.clear()
        generator = torch.Generator().manual_seed(seed)
        pipe(class_labels=[label], num_inference_steps=STEPS, generator=generator, output_type="np")
        values = torch.stack(added).flatten(1)
        found.append(torch.stack([(values - row).abs().sum(1) / values.abs().sum(1) for row in values]))
    return torch.stack(found).mean(0)


def test_a_listed_schedule_is_what_hooks_would_choose(folder: Path, captured: Program) -> None:
    program = cached(captured)
    after, record = calibrated(program, speedup=1.2)
    expected = measured_by_hooks(folder)
    told = record.facts["calibration"]
    torch.testing.assert_close(torch.tensor(told["states"]), expected.diagonal(1), rtol=1e-3, atol=1e-5)
    loop = after.loop
    assert loop is not None
    assert isinstance(loop.schedule, Listed)
    assert loop.schedule == Listed(computed_steps(expected, len(loop.schedule.computed)), STEPS)
    # The fewest steps reuse that save a fifth.
    whole = generation_cost(captured, STEPS).macs
    assert whole / generation_cost(after, STEPS).macs >= 1.2
    assert calls_of(loop, STEPS)["reuse"] == STEPS - len(loop.schedule.computed)
    assert told["speedup"] >= 1.2
    assert told["computed"] == [float(step in loop.schedule.computed) for step in range(STEPS)]
    assert all(len(values) == STEPS - 1 for values in told["blocks"].values())
    assert {"transformer_blocks.0", "transformer_blocks.1"} <= set(told["blocks"])


def test_what_was_chosen_replays_without_samples(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program = cached(captured)
    after, record = calibrated(program, speedup=1.2)
    monkeypatch.setattr(calibrate_cache, "Calibration", None)
    options = yaml.safe_load(yaml.safe_dump(record.record.as_options()))
    again, replayed = run_pass(program, Step("calibrate-cache", CalibrateCache.from_options(options, owner="test")))
    assert program_text(again) == program_text(after)
    # Nor are weights.
    bare = replace(program, weights=WeightStore({n: Absent(n, e.shape, e.dtype) for n, e in program.weights.items()}))
    structure, _ = run_pass(bare, Step("calibrate-cache", CalibrateCache.from_options(options, owner="test")))
    assert structure.loop == after.loop
    assert replayed.facts == {}
    _, second = run_pass(after, Step("calibrate-cache", CalibrateCache.from_options(options, owner="test")))
    assert not second.modified


def test_fidelity_bounds_a_listed_schedule(captured: Program) -> None:
    """The least fidelity that is asked for is kept, and with one step more reused it would not be."""
    program = cached(captured)
    trials = calibration(program)
    computed = {reused: computed_steps(trials.computed.changes, STEPS - reused) for reused in (1, 2)}
    fidelity = {reused: trials.trial(Listed(steps, STEPS)).psnr for reused, steps in computed.items()}
    assert fidelity[2] < fidelity[1]
    bound = (fidelity[1] + fidelity[2]) / 2
    after, record = calibrated(program, psnr=bound)
    assert after.loop is not None
    assert after.loop.schedule == Listed(computed[1], STEPS)
    assert record.facts["calibration"]["psnr"] == pytest.approx(fidelity[1])


def test_a_threshold_is_scaled(captured: Program) -> None:
    program = cached(captured, method="threshold", threshold=0.05)
    after, record = calibrated(program, speedup=1.15)
    assert after.loop is not None
    schedule = after.loop.schedule
    assert isinstance(schedule, Adaptive)
    assert schedule.policy == "threshold"
    factor = schedule.options["threshold"] / 0.05
    assert 8 * torch.tensor(factor).log2().item() == pytest.approx(round(8 * torch.tensor(factor).log2().item()))
    told = record.facts["calibration"]
    assert told["speedup"] >= 1.15
    assert sum(told["computed"]) < STEPS
    assert told["computed"][0] == 1.0


def test_a_codebook_is_scaled(captured: Program) -> None:
    options: dict[str, Any] = {"codebook": {0.05: 4, 0.1: 2, 1.0: 1}}
    program, _ = run_pass(captured, Step("cache-adaptive", CacheAdaptive(**options)))
    after, record = calibrated(program, speedup=1.1, steps=10)
    assert after.loop is not None
    assert isinstance(after.loop.schedule, Adaptive)
    book = {float(key): rate for key, rate in after.loop.schedule.options["codebook"].items()}
    assert list(book.values()) == [4, 2, 1]
    first, second, third = book
    assert (second / first, third / first) == (pytest.approx(2), pytest.approx(20))
    told = record.facts["calibration"]
    assert told["speedup"] >= 1.1
    # The first two and the last two are always computed.
    assert [told["computed"][step] for step in (0, 1, 8, 9)] == [1.0] * 4
    assert sum(told["computed"]) < 10


def test_calibrates_what_was_hoisted(captured: Program) -> None:
    """States that stay the same are none of those that a step reuses: the same steps are chosen."""
    plain, _ = calibrated(cached(captured), speedup=1.2)
    hoisted, _ = run_pass(cached(captured), Step("hoist-invariants", HoistInvariants()))
    after, _ = calibrated(hoisted, speedup=1.2)
    assert plain.loop is not None
    assert after.loop is not None
    assert after.loop.schedule == plain.loop.schedule


def test_budgets_out_of_reach(captured: Program) -> None:
    with pytest.raises(UserError, match="a speed-up of 50 is out of reach: reusing most, this loop has"):
        calibrated(cached(captured), speedup=50)
    with pytest.raises(UserError, match="200 dB are out of reach"):
        calibrated(cached(captured), psnr=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one budget"),
        ({"speedup": 2, "psnr": 30}, "give one budget"),
        ({"speedup": 1}, "speedup"),
        ({"schedule": {"steps": "all"}}, "no schedule as a manifest has it"),
    ],
)
def test_options_that_say_nothing_to_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrateCache.from_options(options, owner="pass calibrate-cache")


def test_what_cannot_be_calibrated(captured: Program) -> None:
    with pytest.raises(UserError, match="run a caching pass before it"):
        calibrated(captured, speedup=2)
    program = cached(captured)
    assert program.loop is not None
    third = replace(program.loop, variants={**program.loop.variants, "third": ("reuse",)})
    [reason] = CalibrateCache(speedup=2).requires(replace(program, loop=third))
    assert reason == "steps are made in 3 ways, and a budget chooses between two"


def test_the_lock_has_the_schedule(folder: Path, tmp_path: Path, optpass: Callable[..., Any]) -> None:
    recipe = {
        "passes": [{"cache-blocks": {"head": 1}}, {"calibrate-cache": {**ASKED, "labels": [1, 2], "speedup": 1.2}}],
        "target": "program",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("--no-baseline", "--samples", "0", "--verify", "never")
    optpass("apply", tmp_path / "recipe.yaml", folder, "-o", tmp_path / "out", *arguments)
    lock = yaml.safe_load((tmp_path / "out" / "recipe.lock.yaml").read_text())
    [_, chosen] = lock["passes"]
    assert chosen["calibrate-cache"]["schedule"]["of"] == STEPS
    page = (tmp_path / "out" / "report.html").read_text()
    assert "transformer_blocks.1" in page
