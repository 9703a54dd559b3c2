"""What a pass does to the target's engine: the Programs before and after it, lowered and timed in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from optpass.errors import MissingValuesError, UserError
from optpass.evaluate.difference import program_calls
from optpass.evaluate.latency import Comparison, compare_latency
from optpass.evaluate.scope import Scope
from optpass.evaluate.walks import period, timed_calls
from optpass.ir.loop import Cycle, Loop
from optpass.ir.program import Program
from optpass.pipeline.lowered import lowered_runners
from optpass.pipeline.target import Runner
from optpass.runtime.loop import call_runners

Calls = Sequence[Mapping[str, Tensor]]
PLACE = "call "
"""Before the name of a call and of its input, in the tensors of a Program that is called in several ways."""


def engine_latency(scope: Scope, *, runs: int, seed: int) -> Comparison:
    """The engine of ``scope.before`` beside that of ``scope.program``, both lowered into a temporary folder.

    A call of a loop is one in the mean of a period; a Program that is called in several ways is called once in each.

    Raises:
        MissingValuesError: the Programs were captured structure-only.
        UserError: the target cannot take one of them.
    """
    before, after, target = scope.before, scope.program, scope.target
    assert before is not None
    assert target is not None
    if not after.has_values:
        raise MissingValuesError("a latency gate needs weight values; the checkpoint was captured structure-only")
    sides: list[tuple[str, Runner]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for label, program in (("before", before), ("after", after)):
            scope.progress(f"lower the engine {label} the pass", 0.0)
            folder = Path(temporary, label)
            folder.mkdir()
            try:
                runners = lowered_runners(target, program, folder, allow_nonfinite=scope.allow_nonfinite)
            except UserError as error:
                raise UserError(f"latency gate, {label} the pass: {error}") from error
            sides.append((label, _together(call_runners(program, runners))))
            scope.progress(f"lower the engine {label} the pass", 1.0)
        loop = shared_loop(before.loop, after.loop)
        first, second = sides
        return compare_latency(
            first,
            second,
            _calls(before, loop, seed),
            after_calls=_calls(after, loop, seed),
            runs=runs,
            progress=lambda fraction: scope.progress("latency gate", fraction),
        )


def shared_loop(*loops: Loop | None) -> Loop | None:
    """Of several loops that are to make the same walk, the one to make it by.

    A schedule of so many steps takes fewer, and no more.
    """
    remembering = [loop for loop in loops if loop is not None and not loop.stateless]
    counted = [loop for loop in remembering if not isinstance(loop.schedule, Cycle) and loop.schedule.of is not None]
    return min(counted, key=period) if counted else next(reversed(remembering), None)


def _together(runners: Mapping[str, Runner]) -> Runner:
    """One runner that calls each of ``runners`` with its part of the tensors."""

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, runner in runners.items():
            prefix = f"{PLACE}{name}."
            runner({key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)})
        return {}

    return run


def _calls(program: Program, loop: Loop | None, seed: int) -> Calls:
    """Tensors for :func:`_together`; a loop has one call, which is walked."""
    each = {name: timed_calls(call, program.ranges, seed, loop=loop) for name, call in program_calls(program).items()}
    steps = max(map(len, each.values()))
    return [
        {f"{PLACE}{name}.{key}": value for name, calls in each.items() for key, value in calls[step].items()}
        for step in range(steps)
    ]
