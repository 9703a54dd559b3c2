"""Calls of a model to measure on: those that its pipeline makes, or random ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from optpass.evaluate.calibration import Request
from optpass.evaluate.difference import program_runners
from optpass.evaluate.generation import pipeline_folder
from optpass.evaluate.trials import random_inputs
from optpass.ir.program import Program
from optpass.pipeline.target import Runner
from optpass.runtime.folder import build_pipeline
from optpass.runtime.looped import engine_module
from optpass.runtime.sampling import drive


def random_calls(program: Program, entry: str, number: int, seed: int) -> list[dict[str, Tensor]]:
    """``number`` random calls of ``entry`` at the captured sizes, within the captured ranges."""
    specs = program.entries[entry].inputs_at()
    return [random_inputs(specs, program.ranges, seed + index) for index in range(number)]


def pipeline_calls(program: Program, entry: str, number: int, request: Request) -> list[dict[str, Tensor]]:
    """``number`` of the calls of ``entry`` that generating the ``request`` makes, evenly taken; fewer where there are.

    Raises:
        UserError: ``program`` was not captured from a pipeline folder, or the pipeline needs what was not given.
    """
    runners, made = program_runners(program), list[dict[str, Tensor]]()
    module = engine_module(program, {**runners, entry: _noting(runners[entry], made)})
    pipeline = build_pipeline(pipeline_folder(program), {program.origin.component: module})
    drive(pipeline, samples=request.samples, asked=request.asked, seed=request.seed)
    taken = min(number, len(made))
    return [made[(2 * index + 1) * len(made) // (2 * taken)] for index in range(taken)]


def _noting(runner: Runner, made: list[dict[str, Tensor]]) -> Runner:
    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made.append({name: value.detach().clone() for name, value in tensors.items()})
        return runner(tensors)

    return run
