"""Names for weights that a rewrite makes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from optpass.ir.program import Program


class WeightNames:
    """The names of a Program's weights, to which new ones are added without clashes.

    A dot parts modules: a name may be no other's prefix, for a module attribute is a tensor or has parts.
    """

    def __init__(self, program: Program) -> None:
        names = [str(node.target) for graph in program.entries.values() for node in graph.fx.nodes if _is_weight(node)]
        self._taken: set[str] = set()
        for name in (*program.weights, *names):
            self._take(name)

    def fresh(self, path: str, leaf: str) -> str:
        """``path.leaf``, with a number behind it where that is taken; what no attribute can be called becomes ``_``."""
        base = re.sub(r"\W", "_", leaf) or "_"
        parents = [part for part in path.split(".") if part and part != "(root)"]
        candidates: Iterable[str] = (base, *(f"{base}_{number}" for number in range(1, len(self._taken) + 2)))
        for candidate in candidates:
            name = ".".join([*parents, candidate])
            if name not in self._taken:
                self._take(name)
                return name
        raise AssertionError("more candidates than taken names")

    def _take(self, name: str) -> None:
        parts = name.split(".")
        self._taken.update(".".join(parts[: count + 1]) for count in range(len(parts)))


def _is_weight(node: object) -> bool:
    return getattr(node, "op", "") == "get_attr"
