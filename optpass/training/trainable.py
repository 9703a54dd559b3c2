"""Which weights of a Program training may change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch.fx import Node

from optpass.analysis.module_paths import matches
from optpass.analysis.operators import aten
from optpass.ir.program import Program
from optpass.ir.slots import has_slot
from optpass.ir.weights import Constant

Which = Literal["new", "scopes", "all"]
STATISTICS: dict[Any, tuple[int, int]] = {
    aten.batch_norm.default: (3, 4),
    aten._native_batch_norm_legit_no_training.default: (3, 4),
}
"""The places of running means and variances among an operator's arguments."""


def chosen(program: Program, which: Which, scopes: Sequence[str]) -> list[str]:
    """The floating weights that are meant: those that passes added, of modules that match ``scopes``, or all."""
    found = [name for name, expression in program.used_weights().items() if expression.dtype.is_floating_point]
    if which == "new":
        return [name for name in found if name in program.untrained]
    return found if which == "all" else [name for name in found if matches(name, scopes)]


def refusal(program: Program, name: str, running: frozenset[str], statistics: frozenset[str]) -> str:
    """Why the weight ``name`` is not trained; empty when it can be.

    ``running`` are the weights that entries read which run at every step, ``statistics`` those of :func:`statistics`.
    """
    expression = program.weights[name]
    if isinstance(expression, Constant) and expression.computed:
        return "it is data that the model's code made"
    if has_slot(expression):
        return "its content is to be exchanged later"
    if name in statistics:
        return "it is a statistic of a batch norm"
    if name not in running:
        return "it is read once for many steps: put hoist-invariants behind this pass"
    return ""


def running(program: Program) -> frozenset[str]:
    """The weights that are read by entries which run at every step."""
    loop = program.loop
    entries = program.entries if loop is None else {entry for chain in loop.variants.values() for entry in chain}
    return frozenset(name for entry in entries for name in program.entries[entry].weight_names)


def statistics(program: Program) -> frozenset[str]:
    """The weights that are means and variances of batch norms."""
    return frozenset(_statistics(program))


def _statistics(program: Program) -> Iterator[str]:
    for graph in program.entries.values():
        for node in graph.calls:
            for place in STATISTICS.get(node.target, ()):
                operand = node.args[place]
                if isinstance(operand, Node) and operand.op == "get_attr":
                    yield str(operand.target)
