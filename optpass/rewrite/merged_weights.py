"""Weights that a rewrite makes of others, under the names of the layers that they now belong to."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from optpass.ir.program import Program
from optpass.ir.weights import Expression, WeightStore
from optpass.rewrite.naming import WeightNames


@dataclass(frozen=True)
class Made:
    """What a new weight is: the ``role`` (``weight``, ``bias``) of the layer ``module`` in ``entry``."""

    entry: str
    module: str
    role: str

    @property
    def wish(self) -> str:
        return ".".join(filter(None, (self.module, self.role)))


class MergedWeights:
    """Weights under provisional names, until it is known whose readers are gone and whose names are free."""

    def __init__(self, program: Program) -> None:
        self.store = dict(program.weights)
        self.names = WeightNames(program)
        self.made: dict[str, Made] = {}
        self.of_layer: dict[str, list[str]] = defaultdict(list)

    def put(self, made: Made, value: Expression) -> str:
        """A provisional name for ``value``; entries share what is equal."""
        for name in self.of_layer[made.wish]:
            if self.made[name].entry != made.entry and self.store[name] == value:
                return name
        name = self.names.fresh(made.module, f"merged_{made.role}")
        self.store[name], self.made[name] = value, made
        self.of_layer[made.wish].append(name)
        return name

    def settled(self, program: Program) -> Program:
        """``program`` with these weights, each under the name of the layer's own where nothing reads that any more."""
        reads = [node for graph in program.entries.values() for node in graph.fx.nodes if node.op == "get_attr"]
        taken = {str(node.target) for node in reads}
        final: dict[str, str] = {}
        for name, made in self.made.items():
            if name in taken and made.wish not in taken:
                final[name] = made.wish
                taken.add(made.wish)
                self.store[made.wish] = self.store.pop(name)
        for node in reads:
            node.target = final.get(str(node.target), node.target)
        return replace(program, weights=WeightStore(self.store)).pruned()
