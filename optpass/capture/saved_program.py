"""Source: a Program that optpass saved (the ``program`` target, reproducers)."""

from __future__ import annotations

from pathlib import Path

from optpass.capture.request import Request
from optpass.errors import UserError
from optpass.ir.program import Program

DESCRIPTION = "a Program saved by optpass (a folder with program.json)"
INDEX = "program.json"


def recognises(request: Request) -> bool:
    """A folder with ``program.json``, or a bundle whose ``program`` folder has one."""
    return _folder(request.path) is not None


def capture(request: Request) -> Program:
    """Load it as it was saved.

    Raises:
        UserError: other sizes are asked for (a graph's sizes are fixed), or the folder is damaged.
    """
    from optpass.interchange.storage import load_program

    folder = _folder(request.path)
    assert folder is not None
    program = load_program(folder)
    specs = {spec.name: spec for graph in program.entries.values() for spec in graph.inputs}
    for name, sizes in request.sizes.items():
        if name not in specs or tuple(sizes) != specs[name].shape:
            have = ", ".join(map(str, specs.values()))
            raise UserError(f"{request.path} was saved with fixed sizes ({have}); it cannot take {name}={list(sizes)}")
    return program


def _folder(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "program") if (folder / INDEX).is_file()), None)
