"""Units of residual branches taken out of a graph, or put behind a gate that a training can learn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch.fx import Node

from optpass.analysis.carriers import REARRANGEMENTS
from optpass.analysis.operators import aten
from optpass.analysis.places import Place, Places, refusal
from optpass.analysis.readers import readers_of
from optpass.analysis.units import Branch, Unit
from optpass.ir.graph import Graph, value_of
from optpass.ir.program import Program
from optpass.ir.weights import Constant, Expression
from optpass.pipeline.passes import Context
from optpass.rewrite.rules import replace
from optpass.rewrite.shortcuts import unmoved
from optpass.rewrite.unread_states import without_unread_states

GATE = "prune_gate"
"""The last part of the names of gates, f32 [1]."""


def _open() -> Constant:
    """A gate's content, its own: equal constants that are one would be merged into one weight."""
    return Constant(torch.ones(1))


def removable(program: Program, candidates: Places, context: Context) -> Places:
    """Those of the ``candidates`` that can be removed; the others are declined."""
    found: Places = {}
    readers = readers_of(program)
    for path, members in candidates.items():
        if refused := refusal(program, members, readers):
            context.decline(path, refused.reason, refused.entry)
        else:
            found[path] = members
    return found


def report(chosen: Places, context: Context) -> None:
    """Tell ``context`` of every unit that was changed, once for each entry that has it."""
    for path, members in chosen.items():
        for entry in dict.fromkeys(place.entry for place in members):
            context.rewrote(path, entry)


def without_units(program: Program, chosen: Places) -> Program:
    """``program`` without ``chosen`` units of its graphs, which are edited, and what only they needed."""
    for entry, found in _by_entry(chosen).items():
        remove(program.entries[entry], found)
        program.entries[entry].remove_dead_code()
    return without_unread_states(program).pruned()


def with_gates(program: Program, chosen: Places) -> Program:
    """``program`` with a gate on each of the ``chosen`` units of its graphs, which are edited.

    x + f(x) → x + z·f(x) for every branch of a unit, and a·x + b·y → (1 − z·b)·x + z·b·y; z, a new weight, is 1. At 1
    the function is what it was, at 0 the unit is as good as removed.
    """
    weights: dict[str, Expression] = {}
    for entry, found in _by_entry(chosen).items():
        graph = program.entries[entry]
        order = {node: index for index, node in enumerate(graph.fx.nodes)}
        branches = [(branch, gate_of(unit)) for unit in found for branch in unit.branches]
        # From the last on: what a later branch reads of an earlier one is still in its place.
        for branch, name in sorted(branches, key=lambda pair: -order[pair[0].residual.add]):
            _gate(graph, branch, name, weights.setdefault(name, _open()))
    return program.with_untrained(weights)


def _by_entry(chosen: Mapping[str, list[Place]]) -> dict[str, list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for place in (place for members in chosen.values() for place in members):
        found.setdefault(place.entry, []).append(place.unit)
    return found


def remove(graph: Graph, chosen: Iterable[Unit]) -> None:
    """x + f(x) → x for every branch of the ``chosen`` units of ``graph``, and a·x + (1 − a)·y → x.

    Rearrangements that only led to the branch and back go with it. Dead code is left to the caller.
    """
    passed = {branch.residual.add: branch for unit in chosen for branch in unit.branches}
    for add, branch in passed.items():
        value = branch.passed
        while value in passed:
            value = passed[value].passed
        if value_of(value).dtype != value_of(add).dtype:
            with graph.before(add):
                value = graph.call(aten.to.dtype, value, value_of(add).dtype, like=add)
        add.replace_all_uses_with(value)
        _put_back(graph, value)


def _put_back(graph: Graph, value: Node) -> None:
    """Let the readers of what only rearranges ``value`` back read the value from before."""
    pending = list(value.users)
    while pending:
        node = pending.pop()
        if node.target not in REARRANGEMENTS:
            continue
        pending.extend(node.users)
        if (before := unmoved(graph, node)) is not node:
            node.replace_all_uses_with(before)


def gate_of(unit: Unit) -> str:
    """The name of the weight that gates ``unit``."""
    return f"{unit.path}.{GATE}"


def _gate(graph: Graph, branch: Branch, name: str, content: Expression) -> None:
    add = branch.residual.add
    with graph.before(add):
        z = graph.weight(name, content, like=add)
        if (dtype := value_of(branch.residual.branch).dtype) != content.dtype:
            z = graph.call(aten.to.dtype, z, dtype, like=add)
        result = _gated_blend(graph, branch, z) if branch.blend else _gated_sum(graph, branch, z)
    replace(add, result)


def _gated_sum(graph: Graph, branch: Branch, z: Node) -> Node:
    add, gated = branch.residual.add, branch.residual.branch
    product = graph.call(aten.mul.Tensor, gated, z, like=add)
    args = [product if operand is gated else operand for operand in add.args]
    return graph.call(add.target, *args, like=add)


def _gated_blend(graph: Graph, branch: Branch, z: Node) -> Node:
    blend, add = branch.blend, branch.residual.add
    assert blend is not None
    other = graph.call(aten.mul.Tensor, z, blend.other, like=add)
    own = graph.call(aten.rsub.Scalar, other, 1.0, like=add)
    stream = graph.call(aten.mul.Tensor, own, blend.stream, like=add)
    return graph.call(aten.add.Tensor, stream, graph.call(aten.mul.Tensor, other, blend.mixed, like=add), like=add)


def drop_gates(graph: Graph, names: Iterable[str]) -> None:
    """z·y → y wherever one of the weights ``names`` gates anything. Dead code is left to the caller."""
    wanted = set(names)
    for node in list(graph.fx.nodes):
        if node.op != "get_attr" or str(node.target) not in wanted:
            continue
        casts = [user for user in node.users if user.target is aten.to.dtype]
        for z in (node, *casts):
            for product in [user for user in z.users if user.target is aten.mul.Tensor]:
                replace(product, _ungated(graph, product, z))


def _ungated(graph: Graph, product: Node, z: Node) -> Node:
    left, right = product.args
    factor = right if left is z else left
    if isinstance(factor, Node):
        return factor
    with graph.before(product):
        return graph.call(aten.full.default, [1], factor, like=product, dtype=value_of(product).dtype)
