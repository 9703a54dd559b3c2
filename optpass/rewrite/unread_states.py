"""A loop without the states that nobody reads any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import Node

from optpass.ir.graph import Graph
from optpass.ir.interface import Interface
from optpass.ir.loop import PAST, PRESENT
from optpass.ir.program import Program
from optpass.rewrite.splitting import subgraph, unread_inputs
from optpass.rewrite.stepping import results


def without_unread_states(program: Program) -> Program:
    """``program`` without states that no operator reads, what computes them, and the inputs that read them.

    The entries keep the inputs of the model's call. An entry that would return nothing stays as it is.
    """
    if program.loop is None:
        return program
    entries, before = dict(program.entries), dict[str, Graph]()
    while entries != before:
        before = dict(entries)
        entries = {name: _without_idle_reads(graph) for name, graph in entries.items()}
        read = {state for graph in entries.values() for state in Interface.of(graph).reads}
        entries = {name: _writing_only(graph, read) for name, graph in entries.items()}
    written = {state for graph in entries.values() for state in Interface.of(graph).writes}
    states = {name: state for name, state in program.loop.states.items() if name in written}
    return replace(program, entries=entries, loop=replace(program.loop, states=states))


def _without_idle_reads(graph: Graph) -> Graph:
    idle = any(name.startswith(PAST) for name in unread_inputs(graph))
    return _part(graph, results(graph)) if idle else graph


def _writing_only(graph: Graph, states: set[str]) -> Graph:
    outputs = {
        name: node
        for name, node in results(graph).items()
        if not name.startswith(PRESENT) or name.removeprefix(PRESENT) in states
    }
    return _part(graph, outputs) if 0 < len(outputs) < len(graph.signature.outputs) else graph


def _part(graph: Graph, outputs: Mapping[str, Node]) -> Graph:
    own = [name for name in graph.signature.inputs if not name.startswith(PAST)]
    return subgraph(graph, inputs={}, outputs=outputs, keep=own)
