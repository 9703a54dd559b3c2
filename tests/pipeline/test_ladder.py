"""The ladder: a rung a pass, evaluations and the other components in it."""

from __future__ import annotations

import torch
from loops import denoiser

from optpass import console
from optpass.analysis.cost import measure
from optpass.passes.steps import Steps
from optpass.pipeline.ladder import Climb, ladder
from optpass.pipeline.manager import run_passes
from optpass.pipeline.recipe import Step
from optpass.testing import capture_module

RECORDED = Step("steps", Steps(steps=10, guidance=3, trained=True))
STUDENT = Step("steps", Steps(steps=2))


def climb(*steps):
    program, _ = denoiser(1)
    return Climb("unet", program, run_passes(program, steps)[1])


def test_what_is_recorded_first_holds_for_the_original(tiny_classifier):

    other, _ = capture_module(tiny_classifier, input=torch.zeros(1, 6))
    beside = measure(other).totals.macs
    rungs = [rung.as_json() for rung in ladder(climb(RECORDED, STUDENT), [Climb("vae", other, ())])]
    assert [rung["name"] for rung in rungs] == ["captured", "steps", "steps"]
    assert [rung["evaluations"] for rung in rungs] == [30, 30, 2]
    each = rungs[0]["macs"]
    assert [rung["total"] for rung in rungs] == [30 * each + beside, 30 * each + beside, 2 * each + beside]


def test_what_training_gives_does_not_hold_for_the_original():
    rungs = [rung.as_json() for rung in ladder(climb(STUDENT))]
    assert [(rung["evaluations"], rung["total"]) for rung in rungs] == [(None, None), (2, 2 * rungs[0]["macs"])]


def test_without_a_number_of_steps_there_is_no_ladder(tiny_classifier):

    assert ladder(climb()) == []
    other, _ = capture_module(tiny_classifier, input=torch.zeros(1, 6))
    assert ladder(Climb("", other, ())) == []


def test_passes_of_other_components_come_first():
    program, _ = denoiser(1)
    rungs = ladder(climb(RECORDED), [Climb("vae", program, run_passes(program, [STUDENT])[1])])
    assert [rung.name for rung in rungs] == ["captured", "vae: steps", "steps"]


def test_the_table_shows_what_is_known():
    rungs = [rung.as_json() for rung in ladder(climb(STUDENT, Step("steps", Steps(steps=1))))]
    table = console.ladder_table(rungs)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["evaluations"] == ["?", "2", "1"]
    assert cells["fewer"] == ["", "1×", "2×"]
