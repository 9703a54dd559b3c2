"""Who reads each weight of a Program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Node

from optpass.ir.program import Program

Readers = Mapping[str, Sequence[tuple[str, Node]]]
"""Of every weight the operators that read it, with the entry of each."""


def readers_of(program: Program) -> Readers:
    """Who reads the weights of ``program``."""
    found: dict[str, list[tuple[str, Node]]] = {}
    for entry, graph in program.entries.items():
        for node in graph.fx.nodes:
            if node.op == "get_attr":
                found.setdefault(str(node.target), []).extend((entry, user) for user in node.users)
    return found
