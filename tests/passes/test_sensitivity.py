"""The pass ``sensitivity``: what stays real under a budget, what a replay gives, what is refused."""

from __future__ import annotations

import pytest
import torch
from quantized_nets import Residual

from optpass.errors import UserError
from optpass.evaluate.calibration_set import random_set
from optpass.evaluate.difference import program_runners
from optpass.ir.text import program_text
from optpass.passes.quantize import Quantize
from optpass.passes.sensitivity import MeasureSensitivity
from optpass.pipeline.manager import run_pass
from optpass.pipeline.recipe import Step
from optpass.quantization import budget
from optpass.quantization.sensitivity import outputs_noise
from optpass.targets.program import ProgramTarget
from optpass.testing import capture_module

CALLS = {"calls": 8, "estimator": "minmax", "bias_correction": "none"}


@pytest.fixture(scope="module")
def residual():
    return capture_module(Residual, x=torch.zeros(2, 3, 16, 16))[0]


def sensitivity(program, target=None, **options):
    return run_pass(program, Step("sensitivity", MeasureSensitivity(**{**CALLS, **options})), target=target)


@pytest.fixture(scope="module")
def measured(residual):
    """Without a budget: everything in integers, every module told."""
    return sensitivity(residual)


def kept_out(program):
    """The calls that were held out of calibration."""
    return random_set(program, count=10, seed=0).split(2)[1].entries["full"]


def noise(before, after):
    first, second = (program_runners(program)["full"] for program in (before, after))
    calls = kept_out(before)
    return outputs_noise([first(call) for call in calls], [second(call) for call in calls])


def test_without_a_budget_all_is_quantised_and_told(residual, measured):
    after, record = measured
    found = record.facts["sensitivity"]
    assert record.modified
    assert record.sites == ("stem", "one", "two", "last", "head")
    assert record.record.real == ()
    assert found["budget"] is None
    assert found["calls"] == {"full": 2}
    assert found["together"]["snr"] == pytest.approx(noise(residual, after).snr)
    alone = [module["alone"]["error"] for module in found["modules"]]
    assert alone == sorted(alone, reverse=True)
    assert {module["path"] for module in found["modules"]} == set(record.sites)


def test_a_bound_on_noise_is_held_by_as_few_real_modules_as_it_takes(residual, measured):
    bound = measured[1].facts["sensitivity"]["together"]["snr"] + 2
    after, record = sensitivity(residual, snr=bound)
    found, real = record.facts["sensitivity"], record.record.real
    assert 0 < len(real) < 5
    assert found["figure"] == pytest.approx(noise(residual, after).snr)
    assert found["figure"] >= bound
    tried = {trial["real"]: trial["figure"] for trial in found["tried"]}
    assert tried[len(real) - 1] < bound
    assert {declined.path for declined in record.declined} == set(real)
    assert {declined.reason for declined in record.declined} == {"its integers cost too much"}
    assert [module["real"] for module in found["modules"]].count(True) == len(real)
    assert all(f"{path}.weight" in after.weights for path in real)


def test_a_replay_gives_the_same_and_measures_nothing(residual, measured, monkeypatch):
    bound = measured[1].facts["sensitivity"]["together"]["snr"] + 2
    after, record = sensitivity(residual, snr=bound, form="cpu")
    monkeypatch.setattr("optpass.passes.sensitivity.measure_sensitivity", None)
    settled = MeasureSensitivity.from_options(record.record.as_options(), owner="test")
    again, replayed = run_pass(residual, Step("sensitivity", settled))
    assert program_text(again) == program_text(after)
    assert "sensitivity" not in replayed.facts


def test_nothing_real_is_what_quantize_gives(residual, measured):
    # The calls that are held out here have to be left out there: ranges of other calls are others.
    after, _ = measured
    same = run_pass(residual, Step("quantize", Quantize(**CALLS)))[0]
    names = [[node.name for node in program.entries["full"].fx.nodes] for program in (after, same)]
    assert names[0] == names[1]


def test_latency_keeps_as_many_real_as_the_engine_allows(residual, monkeypatch):
    # Times of an engine so small are noise: a time for each module in integers stands for them.
    def ratio(self, program):
        return 1 - 0.1 * sum(name.endswith("_int8") for name in program.weights)

    monkeypatch.setattr(budget.LatencyBudget, "figure", ratio)
    _, record = sensitivity(residual, ProgramTarget(), latency=0.75)
    assert len(record.record.real) == 2
    assert record.facts["sensitivity"]["figure"] == pytest.approx(0.7)
    with pytest.raises(UserError, match=r"latency 0.4 × is out of reach: with every module in integers it is 0.5"):
        sensitivity(residual, ProgramTarget(), latency=0.4)


def test_latency_is_measured_on_the_target(residual):
    target = ProgramTarget()
    figure = budget.LatencyBudget(1.0, residual, target, runs=8).figure(residual)
    assert 0.3 < figure < 3


def test_weights_alone_are_measured_too(residual):
    after, record = sensitivity(residual, scheme="w8", group_size=0, estimator="auto")
    assert [module["path"] for module in record.facts["sensitivity"]["modules"]] == ["head"]
    assert record.facts["sensitivity"]["together"]["snr"] > 40
    assert "head.weight_int8" in after.weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr": 200.0}, "snr 200 dB is out of reach: with all modules real but one"),
        ({"psnr": 30.0}, "psnr is of a pipeline's samples, and the checkpoint is a model alone"),
        ({"latency": 0.5}, "needs a target whose engines run on this machine"),
        ({"keep": "nowhere"}, "'nowhere' matches nothing to quantise"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(residual, options, message):
    with pytest.raises(UserError, match=message):
        sensitivity(residual, **options)


def test_two_budgets_are_refused():
    with pytest.raises(ValueError, match="give one budget"):
        MeasureSensitivity(snr=30, latency=0.5)


def test_nothing_in_scope_changes_nothing(residual):
    after, record = sensitivity(residual, keep="*")
    assert not record.modified
    assert program_text(after) == program_text(residual)
