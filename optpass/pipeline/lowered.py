"""Engines of a Program, lowered for a look at them and loaded at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from optpass.errors import UserError
from optpass.ir.program import Program
from optpass.pipeline.progress import Progress
from optpass.pipeline.target import LoweredEntry, Lowering, Runner, Target


def lowered_runners(
    target: Target,
    program: Program,
    folder: Path,
    *,
    allow_nonfinite: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> dict[str, Runner]:
    """Lower ``program`` into ``folder``, an empty one, and load what came out, by entry.

    Raises:
        UserError: the target cannot take the Program, or its engine does not load.
    """
    if refused := target.refuses(program):
        first = refused[0]
        raise UserError(f"the target cannot take {first.path}: {first.operator}: {first.reason}")
    engines = target.lower(program, Lowering(folder, allow_nonfinite=allow_nonfinite, progress=progress))
    return runners_of(target, engines, folder)


def runners_of(target: Target, engines: Mapping[str, LoweredEntry], folder: Path) -> dict[str, Runner]:
    """What :meth:`Target.lower` wrote into ``folder``, loaded, by entry."""
    return {name: _runner(target, engine, folder) for name, engine in engines.items()}


def _runner(target: Target, engine: LoweredEntry, folder: Path) -> Runner:
    entry = {
        "engine": engine.main,
        "inputs": [spec.as_json() for spec in engine.inputs],
        "outputs": [spec.as_json() for spec in engine.outputs],
        "details": engine.facts(),
    }
    return type(target).load(folder, entry, target.as_options())
