"""Source: a Program that optpass saved (the ``program`` target, reproducers)."""

from __future__ import annotations

from pathlib import Path

from optpass.capture.request import Request
from optpass.capture.spans import Size, Span, as_written
from optpass.errors import UserError, nearest
from optpass.ir.program import Program

DESCRIPTION = "a Program saved by optpass (a folder with program.json)"
INDEX = "program.json"


def recognises(request: Request) -> bool:
    """A folder with ``program.json``, or a bundle whose ``program`` folder has one."""
    return _folder(request.path) is not None


def capture(request: Request) -> Program:
    """Load it as it was saved.

    Raises:
        UserError: other sizes are asked for (a graph's sizes and ranges are fixed), or the folder is damaged.
    """
    from optpass.interchange.storage import load_program

    folder = _folder(request.path)
    assert folder is not None
    program = load_program(folder)
    refuse_other_sizes(program, request)
    return program


def refuse_other_sizes(program: Program, request: Request) -> None:
    """
    Raises:
        UserError: ``request`` asks for sizes or ranges that are not those of ``program``.
    """
    graphs = program.entries.values()
    saved = {spec.name: (spec, graph.dimensions) for graph in graphs for spec in graph.inputs}
    for name, sizes in request.sizes.items():
        if name not in saved:
            raise UserError(f"{request.path} has no input {name!r}{nearest(name, saved)}")
        spec, dimensions = saved[name]
        spans = {item.name: Span(item.minimum, item.maximum, item.step) for item in dimensions}
        have = [size if isinstance(size, int) else spans[size] for size in spec.shape]
        if len(have) != len(sizes) or not all(map(_same, have, sizes)):
            raise UserError(
                f"{request.path} holds a graph of fixed sizes and ranges ({spec}); it cannot take "
                f"{name}={as_written(sizes)}"
            )


def _same(have: Size, asked: Size) -> bool:
    """Whether a size is the saved one; a range that names no step takes the saved step."""
    if isinstance(have, int) or isinstance(asked, int):
        return have == asked
    return (have.minimum, have.maximum) == (asked.minimum, asked.maximum) and asked.step in (0, have.step)


def _folder(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "program") if (folder / INDEX).is_file()), None)
