"""What modules of a student and of its teacher return, side by side: further outputs of their graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from optpass.errors import UserError, nearest_paths
from optpass.ir.graph import operators, path_of, shape_of
from optpass.ir.program import Program
from optpass.rewrite.probes import PROBE, Probe, matching, probes, with_outputs

Found = dict[str, dict[str, Probe]]
"""By entry and module path."""


@dataclass(frozen=True)
class Compared:
    """Two Programs that also return, as ``probe.PATH``, what the modules return that both have.

    ``paths`` are those; ``declined`` says why others that match are not compared.
    """

    student: Program
    teacher: Program
    paths: tuple[str, ...]
    declined: Mapping[str, str]


def with_features(student: Program, teacher: Program, patterns: Sequence[str]) -> Compared:
    """Both Programs with outputs where a module's path matches one of ``patterns``.

    Raises:
        UserError: no module matches in the student, or none of those is comparable.
    """
    own, theirs = _found(student, patterns), _found(teacher, patterns)
    shapes = {path: shape_of(probe.node) for found in theirs.values() for path, probe in found.items()}
    declined: dict[str, str] = {}
    paths: list[str] = []
    for path, probe in ((path, probe) for found in own.values() for path, probe in found.items()):
        if path not in shapes:
            declined[path] = "the teacher has no such module"
        elif shapes[path] != shape_of(probe.node):
            declined[path] = f"it gives {list(shape_of(probe.node))}, and the teacher's {list(shapes[path])}"
        else:
            paths.append(path)
    paths = [path for path in dict.fromkeys(paths) if path not in declined]
    if not paths:
        known = {path_of(node) for graph in student.entries.values() for node in operators(graph)}
        why = next((f"{path}: {reason}" for path, reason in declined.items()), "none matches")
        raise UserError(f"features: no module to compare ({why}){nearest_paths(patterns[0], known - {'(root)'})}")
    return Compared(_probed(student, own, paths), _probed(teacher, theirs, paths), tuple(paths), declined)


def _found(program: Program, patterns: Sequence[str]) -> Found:
    choice = matching(patterns)
    return {name: probes(graph, choice) for name, graph in program.entries.items()}


def _probed(program: Program, found: Found, paths: Sequence[str]) -> Program:
    entries = {}
    for name, graph in program.entries.items():
        looked_at = {path: replace(found[name][path], port=PROBE + path) for path in paths if path in found[name]}
        entries[name] = with_outputs(graph, looked_at)
    return replace(program, entries=entries)
