"""The list of named rewrites that a captured graph goes through before any pass sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from optpass.canonical.boolean_select import boolean_select
from optpass.canonical.broadcast_copy import broadcast_copy
from optpass.canonical.complex_pairs import complex_pairs
from optpass.canonical.idle_squeeze import idle_squeeze
from optpass.canonical.open_repeat import open_repeat
from optpass.ir.graph import Graph

Rewrite = Callable[[Graph, dict[str, Tensor]], None]
"""Edits a graph in place; may add computed constants under new names. Leaves dead code to the caller."""

REWRITES: Mapping[str, Rewrite] = {
    "broadcast-copy": broadcast_copy,
    "open-repeat": open_repeat,
    "idle-squeeze": idle_squeeze,
    "boolean-select": boolean_select,
    "complex-pairs": complex_pairs,
}


def rewrite(graph: Graph, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Apply all of :data:`REWRITES` to ``graph``; ``constants``, and what the rewrites computed from them."""
    known = dict(constants)
    for apply in REWRITES.values():
        apply(graph, known)
    graph.remove_dead_code()
    return known
