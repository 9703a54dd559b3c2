"""Noise of single modules, and budgets, against what the definition gives."""

from __future__ import annotations

import math

import pytest
import torch

from optpass.errors import UserError
from optpass.evaluate.calibration_set import random_set
from optpass.evaluate.difference import IDENTICAL_DB, program_runner, tensor_difference
from optpass.ir.graph import PATH, path_of
from optpass.quantization.budget import Budget, fewest_real, most_real
from optpass.quantization.form import CHANNELS, CPU
from optpass.quantization.program import Quantization
from optpass.quantization.ranges import Method
from optpass.quantization.sensitivity import ModuleNoise, Noise, Sensitivity, measure_sensitivity, outputs_noise


@pytest.fixture(scope="module")
def measured(residual):
    """The quantisation, the calls, and what they gave."""
    quantization = Quantization.placed(residual, CPU, CHANNELS, lambda graph: lambda node: "")
    quantization = quantization.calibrated(residual, random_set(residual, count=4, seed=0), Method("minmax"))
    calls = random_set(residual, count=2, seed=9).entries
    return quantization, calls, measure_sensitivity(residual, quantization, calls)


def test_noise_is_that_of_the_definition(residual, measured):
    quantization, calls, found = measured
    assert [module.path for module in found.modules] == ["stem", "one", "two", "(root)", "last", "head"]
    module = next(module for module in found.modules if module.path == "one")
    for noise, program in (
        (module.alone, quantization.restricted(lambda node: path_of(node) == "one").applied(residual)),
        (module.without, quantization.restricted(lambda node: path_of(node) != "one").applied(residual)),
        (found.together, quantization.applied(residual)),
    ):
        real, integer = program_runner(residual, "full"), program_runner(program, "full")
        powers = [
            10 ** (-tensor_difference(real(call)["output"], integer(call)["output"]).snr / 10) for call in calls["full"]
        ]
        assert noise.power == pytest.approx(sum(powers) / 2, rel=1e-6)
        assert noise.snr == pytest.approx(-10 * math.log10(sum(powers) / 2))


def test_operations_are_macs_or_elements(measured):
    operations = {module.path: module.operations for module in measured[2].modules}
    assert operations["one"] == 2 * 16 * 16 * 16 * 16 * 9
    assert operations["(root)"] == 2 * 16 * 16 * 16


def test_depth_joins_modules(residual, measured):
    quantization, calls, _ = measured
    renamed = residual.copy()
    for node in renamed.entries["full"].calls:
        if path_of(node) in ("one", "two"):
            node.meta = {**node.meta, PATH: f"body.{path_of(node)}"}
    joined = measure_sensitivity(renamed, quantization, calls, depth=1)
    assert [module.path for module in joined.modules] == ["stem", "body", "(root)", "last", "head"]


def test_ranked_by_noise_for_operations():
    def module(path, power, operations):
        return ModuleNoise(path, operations, Noise(power), Noise(0.0))

    found = Sensitivity((module("a", 1.0, 100), module("b", 0.5, 10), module("c", 0.0, 0)), Noise(2.0))
    assert [module.path for module in found.ranked()] == ["b", "a", "c"]


def test_equal_outputs_have_no_noise():
    outputs = [{"a": torch.ones(3), "index": torch.tensor([1])}, {"a": torch.zeros(3)}]
    assert outputs_noise(outputs, outputs).snr == IDENTICAL_DB
    changed = [{"a": torch.ones(3) * 1.1, "index": torch.tensor([2])}, {"a": torch.zeros(3)}]
    assert outputs_noise(outputs, changed).power == pytest.approx(0.01 / 2)
    assert outputs_noise(outputs, [outputs[0], {"a": torch.ones(3)}]).power == math.inf


class Figures(Budget):
    """A budget whose figure at so many real modules is given."""

    title, unit = "snr", "dB"

    def __init__(self, bound, figures, falling=False):
        object.__setattr__(self, "bound", bound)
        self.__dict__.update(figures=figures, falling=falling)

    def figure(self, program):
        return self.figures[program]

    def holds(self, figure):
        return figure <= self.bound if self.falling else super().holds(figure)


def same(count):
    return count


@pytest.mark.parametrize("bound", range(10, 18))
def test_the_fewest_that_hold(bound):
    figures = list(range(10, 20))
    count, tried = fewest_real(Figures(bound, figures), same, 10)
    assert figures[count] == bound
    assert tried[count] == bound
    assert len(tried) <= 6


@pytest.mark.parametrize("bound", [0.5, 0.75, 0.98, 3.0])
def test_the_most_that_hold(bound):
    figures = [0.5 + 0.05 * index for index in range(10)]
    count, _ = most_real(Figures(bound, figures, falling=True), same, 10)
    assert count == max(index for index, figure in enumerate(figures) if figure <= bound)


def test_budgets_out_of_reach_tell_the_best_figure():
    with pytest.raises(UserError, match="snr 30 dB is out of reach: with all modules real but one it is 19 dB"):
        fewest_real(Figures(30, list(range(10, 20))), same, 10)
    with pytest.raises(UserError, match="with every module in integers it is 0"):
        most_real(Figures(0.4, [0.5, 0.6], falling=True), same, 2)
