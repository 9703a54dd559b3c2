"""Quality of a Program inside its pipeline: generate, then measure with the folder's own evaluator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from optpass.errors import UserError
from optpass.evaluate.difference import IDENTICAL_DB
from optpass.evaluate.quality import Evaluator, psnr
from optpass.evaluate.scope import Scope
from optpass.ir.program import Program
from optpass.runtime.looped import program_module
from optpass.runtime.sampling import Asked, Samples, asked_beside, generate


def quality_of_program(scope: Scope, metric: str, *, samples: int, steps: int, seed: int) -> float:
    """One quality metric of ``scope.program``; PSNR is against ``scope.reference`` at equal seeds, in dB.

    ``steps`` are those of Programs that are not made for some number themselves.

    Raises:
        UserError: the Program was not captured from a pipeline folder that can be sampled and evaluated.
    """
    folder = pipeline_folder(scope.program)
    first, second = asked_beside(scope.reference.loop, scope.program.loop, steps)
    if metric == "psnr":
        before = _samples(scope.reference, folder, samples, first, seed, scope.progress, "reference samples")
        after = _samples(scope.program, folder, samples, second, seed, scope.progress, "samples")
        return min(psnr(before.frames, after.frames), IDENTICAL_DB)
    evaluator = Evaluator.load(folder / "evaluator")
    after = _samples(scope.program, folder, samples, second, seed, scope.progress, "samples")
    return evaluator.measure(after.frames, after.labels).as_dict()[metric]


def pipeline_folder(program: Program) -> Path:
    """The pipeline folder that ``program`` was captured from.

    Raises:
        UserError: it was captured from something else.
    """
    origin = program.origin
    if not origin.pipeline or origin.path is None:
        raise UserError("quality metrics need a checkpoint that is a pipeline folder with an evaluator")
    return origin.path


def _samples(
    program: Program,
    folder: Path,
    samples: int,
    asked: Asked,
    seed: int,
    progress: Callable[[str, float], None],
    stage: str,
) -> Samples:
    return generate(
        folder,
        {program.origin.component: program_module(program)},
        samples=samples,
        asked=asked,
        seed=seed,
        progress=lambda fraction: progress(stage, fraction),
    )
