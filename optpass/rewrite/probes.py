"""Graphs that also return what their modules return: the same computation, looked at in between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch.fx import Node

from optpass.errors import UserError, nearest_paths
from optpass.ir.graph import PATH, Graph, operators, value_of
from optpass.ir.program import Program
from optpass.ir.signature import Signature

PROBE = "probe."
"""Before the number of a probe, in the name of its port."""

Choice = Callable[[str], Iterator[str]]
"""The modules around a value that are looked at, by the path of the module that it came from."""


@dataclass(frozen=True)
class Probe:
    """The last value that leaves a module: ``port`` is its name among the outputs of the probed graph."""

    path: str
    port: str
    node: Node


def choice_of(text: str) -> Choice:
    """``"2"`` looks at modules two levels deep (and at shallower ones without children), a pattern at those it matches.

    Raises:
        UserError: a depth below 1.
    """
    if not text.isdecimal():
        return matching([text])
    depth = int(text)
    if depth < 1:
        raise UserError("modules are looked at by their depth, 1 or more, or by a pattern such as '*.attentions.*'")
    return lambda path: iter([".".join(path.split(".")[:depth])])


def matching(patterns: Collection[str]) -> Choice:
    """Looks at the modules that match one of ``patterns``."""
    return lambda path: (module for module in _around(path) if any(fnmatchcase(module, each) for each in patterns))


def probes(graph: Graph, choice: Choice) -> dict[str, Probe]:
    """By module path, in the order of execution, the last floating value that something outside of the module reads.

    What is computed from sizes alone, and what the outermost module does itself, belongs to none.
    """
    found: dict[str, Node] = {}
    for node in operators(graph):
        path = str(node.meta.get(PATH) or "")
        if not path or not _is_floating(node):
            continue
        for module in choice(path):
            if any(not _inside(user, module) for user in node.users):
                found[module] = node
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    ordered = sorted(found.items(), key=lambda item: order[item[1]])
    return {module: Probe(module, f"{PROBE}{index}", node) for index, (module, node) in enumerate(ordered)}


def probed(program: Program, choice: Choice, named: str) -> tuple[Program, dict[str, dict[str, Probe]]]:
    """A copy of ``program``, without its loop, whose entries return the values of :func:`probes` besides; and these.

    ``named`` is the choice in the user's words.

    Raises:
        UserError: no module is chosen.
    """
    found = {name: probes(graph, choice) for name, graph in program.entries.items()}
    if not any(found.values()):
        paths = {str(n.meta.get(PATH) or "") for graph in program.entries.values() for n in operators(graph)}
        raise UserError(f"no module matches {named!r}{nearest_paths(named, paths - {''})}")
    entries = {name: with_outputs(graph, found[name]) for name, graph in program.entries.items()}
    return replace(program, entries=entries, loop=None), found


def with_outputs(graph: Graph, looked_at: Mapping[str, Probe]) -> Graph:
    """A copy of ``graph`` that returns the nodes of ``looked_at``, which are its own, after its outputs."""
    copy = graph.copy()
    nodes = {node.name: node for node in copy.fx.nodes}
    results = copy.output_node.args[0]
    assert isinstance(results, tuple)
    copy.output_node.args = ((*results, *(nodes[probe.node.name] for probe in looked_at.values())),)
    ports = [probe.port for probe in looked_at.values()]
    copy.signature = Signature.flat(graph.signature.inputs, [*graph.signature.outputs, *ports])
    return copy


def _around(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))


def _inside(node: Node, module: str) -> bool:
    path = str(node.meta.get(PATH) or "")
    return node.op == "call_function" and (path == module or path.startswith(f"{module}."))


def _is_floating(node: Node) -> bool:
    try:
        return value_of(node).dtype.is_floating_point
    except TypeError:
        return False
