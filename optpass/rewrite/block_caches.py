"""A range of residual blocks that one step computes and later ones reuse: the entries that make such steps.

Each function takes the graph of the one entry that there was, whose steps it splits, and edits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.fx import Node

from optpass.analysis.block_ranges import BlockRange
from optpass.analysis.boundaries import ancestors
from optpass.analysis.residuals import Residual
from optpass.ir.graph import Graph, path_of, value_of
from optpass.ir.interface import Interface
from optpass.ir.loop import CHANGE, ELAPSED, INTERVALS, clock, metric, past, present
from optpass.rewrite.change_metrics import relative_change
from optpass.rewrite.crossing import crossing
from optpass.rewrite.shortcuts import NotCarriedError, shortcut
from optpass.rewrite.splitting import subgraph, unread_inputs
from optpass.rewrite.stepping import results, unique_name

aten = torch.ops.aten


NOTHING: Mapping[str, Node] = MappingProxyType({})


@dataclass(frozen=True)
class Change:
    """What a range of blocks does to one stream: ``after`` = ``before`` + ``residual``, whose state is ``name``."""

    name: str
    before: Node
    after: Node
    residual: Node


def stream_changes(
    graph: Graph, span: BlockRange, found: Mapping[Node, Residual], taken: Sequence[str]
) -> list[Change]:
    """The residual of ``span`` on every stream that is read behind it, computed in ``graph`` behind the range.

    Raises:
        NotCarriedError: a stream is computed on along the way, or scaled by what the range computes.
    """
    read = ancestors(results(graph).values(), stop=span.leaving)
    added = {residual.add for block in span.blocks for residual in block.residuals}
    changes: list[Change] = []
    for after in span.leaving:
        if after not in read:
            continue
        with graph.before(after.next):
            before = shortcut(graph, after, span.entering, found)
            if not added.isdisjoint(ancestors([before], stop=span.entering)):
                raise NotCarriedError(
                    f"the stream that leaves {span.blocks[-1].path} is scaled by what the range computes from it"
                )
            residual = graph.call(aten.sub.Tensor, after, before, like=after)
        name = unique_name(span.blocks[-1].path, [*taken, *(change.name for change in changes)])
        changes.append(Change(name, before, after, residual))
    return changes


def interval_entries(
    graph: Graph, changes: Sequence[Change], *, reads: Mapping[str, Node] = NOTHING, tells: Mapping[str, Node] = NOTHING
) -> tuple[Graph, Graph]:
    """The step that computes every block, and the one that adds what they added then.

    The first besides ``reads`` (stand-ins of inputs by port) and gives what ``tells`` holds (by port).
    """
    outputs = results(graph)
    kept = {present(change.name): change.residual for change in changes}
    full = subgraph(graph, inputs=reads, outputs={**outputs, **kept, **tells}, keep=unread_inputs(graph))
    _add_residuals(graph, [(change, change.residual) for change in changes])
    given = {past(change.name): change.residual for change in changes}
    return full, subgraph(graph, inputs=given, outputs=results(graph))


def taylor_entries(graph: Graph, changes: Sequence[Change], order: int) -> tuple[Graph, Graph, list[str]]:
    """The step that computes every block and how their residual changes, and the one that extrapolates it.

    Third come the states that the first step reads before anything has written them: zeros, of which the
    differences are divided by an infinite interval.
    """
    outputs = results(graph)
    read: dict[str, Node] = {}
    factors: dict[str, Node] = {}
    predicted: list[tuple[Change, Node]] = []
    like = changes[0].after
    with graph.before(graph.calls[0]):
        intervals = graph.call(aten.ones.default, [order], dtype=torch.float32, like=like)
        elapsed = graph.call(aten.ones.default, [], dtype=torch.float32, like=like)
    for change in changes:
        with graph.before(change.residual.next):
            stand_ins, own = _differences(graph, change, intervals, order)
            predicted.append((change, _extrapolated(graph, own, elapsed)))
        read |= {past(_factor(change, index)): node for index, node in enumerate(stand_ins)}
        factors |= {_factor(change, index): node for index, node in enumerate(own)}
    kept = {present(name): node for name, node in factors.items()}
    inputs = {**read, clock(INTERVALS): intervals}
    full = subgraph(graph, inputs=inputs, outputs={**outputs, **kept}, keep=unread_inputs(graph))
    _add_residuals(graph, predicted)
    given = {past(name): node for name, node in factors.items()}
    reuse = subgraph(graph, inputs={**given, clock(ELAPSED): elapsed}, outputs=results(graph))
    return full, reuse, [port.removeprefix(past("")) for port in read]


def _factor(change: Change, index: int) -> str:
    return change.name if index == 0 else f"{change.name}.difference{index}"


def _differences(graph: Graph, change: Change, intervals: Node, order: int) -> tuple[list[Node], list[Node]]:
    """Stand-ins of the last computed step's factors; R, ΔR, Δ²R of this one."""
    like = change.residual
    stand_ins, factors = [], [like]
    for index in range(order):
        stand_ins.append(graph.call(aten.zeros_like.default, like, like=like))
        interval = _as_dtype_of(graph, graph.call(aten.select.int, intervals, 0, index, like=like), like)
        difference = graph.call(aten.sub.Tensor, factors[-1], stand_ins[-1], like=like)
        factors.append(graph.call(aten.div.Tensor, difference, interval, like=like))
    return stand_ins, factors


def _extrapolated(graph: Graph, factors: Sequence[Node], elapsed: Node) -> Node:
    """Σ ΔⁿR·kⁿ / n! for k = ``elapsed``."""
    like = value = factors[0]
    coefficient = steps = _as_dtype_of(graph, elapsed, like)
    for index, factor in enumerate(factors[1:], start=1):
        if index > 1:
            product = graph.call(aten.mul.Tensor, coefficient, steps, like=like)
            coefficient = graph.call(aten.div.Tensor, product, index, like=like)
        value = graph.call(
            aten.add.Tensor, value, graph.call(aten.mul.Tensor, factor, coefficient, like=like), like=like
        )
    return value


def _as_dtype_of(graph: Graph, node: Node, like: Node) -> Node:
    dtype = value_of(like).dtype
    return node if value_of(node).dtype == dtype else graph.call(aten.to.dtype, node, dtype, like=like)


def threshold_entries(
    graph: Graph, span: BlockRange, changes: Sequence[Change], head: Change, taken: Sequence[str]
) -> tuple[Graph, Graph, Graph, str]:
    """The blocks in front with their metric, the range, and what adds what the range added then.

    ``head`` is what the blocks in front do to the sample's stream. Fourth comes the state that holds its residual
    at the last computed step, zero at first.
    """
    now, then = f"{head.name}.now", head.name
    with graph.before(head.residual.next):
        stand_in = graph.call(aten.zeros_like.default, head.residual, like=head.residual)
        told = relative_change(graph, head.residual, stand_in)
    kept = {present(change.name): change.residual for change in changes}
    first = ancestors([*span.entering, head.residual])
    handed = crossing(graph, first, [*results(graph).values(), *kept.values()], span.entering)
    names: dict[str, Node] = {}
    for node in dict.fromkeys([*span.entering, *handed]):
        if node.op == "call_function":
            names[unique_name(f"{path_of(node)}.out", [*taken, *names])] = node
    body = _reading(graph, names, {past(now): head.residual}, {**kept, present(then): head.residual})
    _add_residuals(graph, [(change, change.residual) for change in changes])
    tail = _reading(graph, names, {past(change.name): change.residual for change in changes}, {})
    used = {*Interface.of(body).reads, *Interface.of(tail).reads}
    wrote = {present(name): node for name, node in names.items() if name in used}
    start = subgraph(
        graph,
        inputs={past(then): stand_in},
        outputs={**wrote, present(now): head.residual, metric(CHANGE): told},
        keep=unread_inputs(graph),
    )
    return start, body, tail, then


def _reading(graph: Graph, names: Mapping[str, Node], given: Mapping[str, Node], kept: Mapping[str, Node]) -> Graph:
    """What gives the results and what is ``kept``, from ``given`` and those values of ``names`` that it needs."""
    outputs = {**results(graph), **kept}
    reached = ancestors(outputs.values(), stop={*names.values(), *given.values()})
    inputs = {past(name): node for name, node in names.items() if node in reached}
    return subgraph(graph, inputs={**inputs, **given}, outputs=outputs)


def branch_entry(graph: Graph, branches: Mapping[str, Node], reused: Sequence[str]) -> Graph:
    """The step that takes the ``branches`` (by state) called ``reused`` from their states and computes the others."""
    inputs = {past(name): branches[name] for name in reused}
    kept = {present(name): node for name, node in branches.items() if name not in reused}
    keep = [] if reused else unread_inputs(graph)
    return subgraph(graph, inputs=inputs, outputs={**results(graph), **kept}, keep=keep)


def _add_residuals(graph: Graph, residuals: Sequence[tuple[Change, Node]]) -> None:
    """Let what follows the range read ``before`` + the given residual."""
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    for change, residual in residuals:
        behind = [user for user in change.after.users if user is not change.residual]
        with graph.before(max((change.before, change.after, residual), key=order.__getitem__).next):
            made = graph.call(aten.add.Tensor, change.before, residual, like=change.after)
        for user in behind:
            user.replace_input_with(change.after, made)
