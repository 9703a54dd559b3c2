"""Units of a whole Program: one module's, wherever an entry has it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from optpass.analysis.readers import Readers
from optpass.analysis.units import Unit, UnitKind, dead_without, outermost, units
from optpass.errors import UserError, nearest_paths
from optpass.ir.graph import Graph, path_of
from optpass.ir.loop import PAST, PRESENT
from optpass.ir.program import Program

Forest = Mapping[str, tuple[Unit, ...]]
"""The outermost units of every entry."""


@dataclass(frozen=True)
class Place:
    """A ``unit`` of an ``entry``."""

    entry: str
    unit: Unit


Places = dict[str, list[Place]]
"""Units by their path: what is removed together, in every entry, and at every call of a module that is called often."""


def forest(program: Program) -> Forest:
    """The units of every entry of ``program``."""
    return {name: units(graph, program.weights) for name, graph in program.entries.items()}


def places(found: Forest, wanted: Callable[[Unit], bool]) -> Places:
    """The largest units that are ``wanted``, in the order of the entries."""
    made: Places = {}
    for entry, roots in found.items():
        for unit in outermost(roots, wanted):
            made.setdefault(unit.path, []).append(Place(entry, unit))
    return made


def named_places(
    found: Forest,
    kind: UnitKind | None,
    *lists: Sequence[str],
    among: Callable[[Unit], bool] = lambda _: True,
) -> Places:
    """The largest units of a ``kind`` (of any, where it is ``None``), ``among`` some, that each list of patterns names.

    An empty list names all.

    Raises:
        UserError: a pattern names none of them; the nearest paths are shown.
    """

    def wanted(unit: Unit) -> bool:
        return is_kind(unit) and all(unit.is_named(each) for each in lists if each)

    def is_kind(unit: Unit) -> bool:
        return (kind is None or unit.is_kind(kind)) and among(unit)

    chosen = places(found, wanted)
    members = [place.unit for group in chosen.values() for place in group]
    for pattern in (pattern for each in lists for pattern in each):
        if not any(unit.is_named([pattern], whole=False) for unit in members):
            paths = dict.fromkeys(unit.path for unit in all_units(found) if is_kind(unit))
            of_kind = f" of kind {kind}" if kind else ""
            raise UserError(f"no residual branch{of_kind} matches {pattern!r}{nearest_paths(pattern, paths)}")
    return chosen


def all_units(found: Forest) -> Iterable[Unit]:
    """The outermost units of all entries and every part of them."""
    pending = [unit for roots in found.values() for unit in roots]
    pending.reverse()
    while pending:
        unit = pending.pop()
        yield unit
        pending.extend(reversed(list(unit.parts())))


@dataclass(frozen=True)
class Refusal:
    """Why a unit cannot be removed, and the ``entry`` in which it cannot."""

    entry: str
    reason: str


def refusal(program: Program, members: Iterable[Place], readers: Readers) -> Refusal | None:
    """The first reason why a unit cannot be removed at all its places; ``None`` where it can."""
    members = list(members)
    for place in members:
        if reason := place.unit.refusal or _kept(program.entries[place.entry], place.unit):
            return Refusal(place.entry, reason)
    gone = {node for place in members for node in dead_without(place.unit)}
    for place in members:
        if state := _computed_elsewhere(program.entries[place.entry], place.unit.path, gone):
            return Refusal(place.entry, f"a part of it is computed in another entry ({state}): prune before that")
    return _needed_elsewhere(members, readers, gone)


def _computed_elsewhere(graph: Graph, path: str, gone: Collection[Node]) -> str:
    """A state that the module at ``path`` reads for something that would stay: its branches are not all to be seen."""
    for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True):
        staying = (path_of(user) for user in node.users if user not in gone) if name.startswith(PAST) else ()
        if any(f"{user}.".startswith(f"{path}.") for user in staying):
            return name
    return ""


def _needed_elsewhere(members: Iterable[Place], readers: Readers, gone: set[Node]) -> Refusal | None:
    """Entries must lose the same: none may go on with weights that are a unit's own in another entry."""
    for place in members:
        own = (operand for node in place.unit.nodes for operand in node.all_input_nodes)
        read = dict.fromkeys(str(operand.target) for operand in own if operand.op == "get_attr")
        for weight in read:
            here = [node for entry, node in readers[weight] if entry == place.entry]
            if not gone.issuperset(here):
                continue
            for entry, node in readers[weight]:
                if node not in gone:
                    reason = f"{entry} goes on with {weight}, and {place.entry} would not: prune before caching"
                    return Refusal(entry, reason)
    return None


def _kept(graph: Graph, unit: Unit) -> str:
    """Why another step goes on needing what the unit computes; empty where none does."""
    output = graph.output_node
    returned = {node for node in unit.nodes if output in node.users}
    for name, node in zip(graph.signature.outputs, output.args[0], strict=True) if returned else ():  # type: ignore[arg-type]
        if name.startswith(PRESENT) and node in returned:
            return f"later steps reuse what it computes ({name}): prune before caching"
    return ""
