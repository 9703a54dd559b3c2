"""What a model's output loses without each of several units: measured with their gates, one closed at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from optpass.evaluate.difference import program_runners
from optpass.evaluate.importance import Calls
from optpass.evaluate.observation import computing
from optpass.evaluate.widened import widened
from optpass.ir.program import Program
from optpass.ir.weights import Constant
from optpass.runtime.loop import call_runners

Outputs = Mapping[str, Tensor]


def removal_errors(program: Program, gates: Collection[str], calls: Calls) -> dict[str, float]:
    """The relative error ‖y − y₀‖₂ / ‖y‖₂ of setting each of the ``gates``, scalar weights that are 1, to 0.

    The mean over all ``calls``, all outputs of a call together. A loop is asked for its computed variant, each call
    being a generation's first. Executes every call once, and once more for each gate; weights are read once.

    Raises:
        MissingValuesError: the Program was captured structure-only.
    """
    held = {name: torch.ones(1) for name in gates}
    # The runners' parameters share the memory of these.
    wide = widened(program.with_weights({name: Constant(value) for name, value in held.items()}))
    looped = replace(wide, loop=computing(wide.loop)) if wide.loop else wide
    runners = program_runners(wide)

    def answers() -> list[Outputs]:
        # A new runner for each call: a loop remembers.
        return [call_runners(looped, runners)[name](inputs) for name, trials in calls.items() for inputs in trials]

    expected, errors = answers(), dict[str, float]()
    for name, value in held.items():
        value.zero_()
        distances = list(map(_distance, expected, answers()))
        value.fill_(1.0)
        errors[name] = sum(distances) / len(distances)
    return errors


def _distance(reference: Outputs, other: Outputs) -> float:
    pairs = [(value.double(), other[name].double()) for name, value in reference.items()]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    norm = sum(float(a.square().sum()) for a, _ in pairs)
    if not norm:
        return math.inf if error else 0.0
    return float((error / norm) ** 0.5)
