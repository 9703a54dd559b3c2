from __future__ import annotations

import json
from dataclasses import replace

import pytest
from loops import cached, denoiser

from optpass.analysis.cost import measure
from optpass.analysis.generation import sample_cost
from optpass.errors import UserError
from optpass.evaluate.difference import program_difference
from optpass.interchange.storage import load_program, save_program
from optpass.ir.loop import Listed, Loop, Sampling
from optpass.ir.loop_legality import loop_problems
from optpass.ir.text import program_text
from optpass.passes.steps import Steps
from optpass.pipeline.apply import apply
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step, make_recipe
from optpass.pipeline.request import Request
from optpass.runtime.bundle import read_manifest
from optpass.runtime.running import sample
from optpass.runtime.sampling import Asked, asked_beside

ROW = 3 * 4 * 4 + 3 * 4
"""MACs of one row of tests/loops.py's denoiser: three linears of 4 × 4, one of 3 × 4."""
REUSED = 2 * 4 * 4


def run(program, **options):
    return run_pass(program, Step("steps", Steps(**options)))


def test_golden():
    program, _ = denoiser()
    after, record = run(program, steps=5, guidance=2)
    assert program_text(after, weights=False).partition("\n\n")[2] == (
        "loop every=1:\n  sampled in 5 steps of 2 evaluations\n  full: full\n"
    )
    assert record.modified
    assert record.sites == ("(root)",)
    assert program_difference(program, after).relative_error == 0
    again, record = run(after, steps=5, guidance=2)
    assert not record.modified
    assert [item.reason for item in record.declined] == ["a sample takes 10 evaluations already"]
    assert run(again, steps=1)[0].loop.sampling == Sampling(1, 1)


def test_weights_are_to_be_trained_unless_they_are():
    assert str(Steps(steps=4).promise) == "retrain"
    assert Steps(steps=4, trained=True).promise.kind == "exact"
    for options in ({"steps": 0}, {"steps": 4, "guidance": 0}):
        with pytest.raises(UserError):
            make_recipe({"passes": [{"steps": options}]})


def test_refusals():
    program, _ = denoiser()
    with pytest.raises(UserError, match="has no loop"):
        run(replace(program, loop=None), steps=4)
    listed, _ = cached(Listed((0, 2), 6))
    with pytest.raises(UserError, match="lists steps of 6, and these are 4"):
        run(listed, steps=4)
    assert run(listed, steps=6)[1].modified


@pytest.mark.parametrize("batch", [1, 2])
def test_a_sample_costs_its_evaluations_whatever_the_batch(batch):
    program, _ = denoiser(batch)
    cost = sample_cost(program, measure(program))
    assert (cost.macs, cost.total) == (ROW, None)
    after, record = run(program, steps=5, guidance=2)
    assert record.sample.total == 5 * 2 * ROW
    assert record.sample.as_json()["sampling"] == {"steps": 5, "guidance": 2, "evaluations": 10}
    reusing, _ = cached(batch=batch)
    _, record = run(reusing, steps=5, guidance=3)
    assert record.sample.total == 3 * (3 * ROW + 2 * REUSED)
    assert record.sample.macs == (ROW + REUSED) // 2
    assert sample_cost(replace(after, loop=None), measure(after)) is None


def test_it_is_stored(tmp_path):
    program, _ = run(denoiser()[0], steps=5, guidance=2)
    save_program(program, tmp_path)
    assert load_program(tmp_path).loop.sampling == Sampling(5, 2)
    record = program.loop.as_json()
    assert Loop.from_json(json.loads(json.dumps(record))) == program.loop
    damaged = Loop.from_json({**record, "sampling": {"steps": 0, "guidance": 2}})
    assert "which is none" in loop_problems(damaged, program.interfaces)[0]


def test_models_are_sampled_side_by_side_as_they_are_made_for():
    program, _ = denoiser()
    student = run(program, steps=2)[0].loop
    assert asked_beside(program.loop, student, 20) == (Asked(steps=20, guidance=3.0), Asked(steps=2, guidance=1.0))
    assert asked_beside(student, program.loop, 20)[0] == Asked(steps=2, guidance=1.0)
    listed = cached(Listed((0, 2), 6))[0].loop
    assert [asked.steps for asked in asked_beside(program.loop, listed, 20)] == [6, 6]


@pytest.mark.slow
def test_a_bundle_samples_so_and_without_guidance_asks_once(moving_digits, tmp_path):
    document = {"inputs": {"sample": [1, 8, 4, 16, 16]}, "passes": [{"steps": {"steps": 2}}], "target": "program"}
    request = Request(str(moving_digits), tmp_path / "out", samples=1, steps=3, unhealed=True)
    applied = apply(make_recipe(document), request)
    # The original is sampled with guidance, for which its engine has too small a batch.
    samples = applied.report["samples"]
    assert [samples[key] for key in ("steps_before", "guidance_before", "steps", "guidance")] == [3, 3.0, 2, 1.0]
    assert samples["quality_before"]["frame_accuracy"] > 0.5
    assert [rung["evaluations"] for rung in applied.report["ladder"]] == [None, 2]
    assert read_manifest(applied.folder).usual_steps == 2
    # The engine takes one clip: with guidance, the pipeline would give it two.
    facts = sample(applied.folder, None, samples=1, asked=Asked(labels=(3,), steps=None))
    assert (facts["steps"], facts["guidance"]) == (2, 1.0)
    assert facts["quality"]["frame_accuracy"] >= 0
