"""Feed-forwards: layers of one residual branch with an activation between them, and the axis of their hidden units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from optpass.analysis.axes import Axes, Fixed, Group
from optpass.analysis.carriers import CATS
from optpass.analysis.operators import CONVOLUTIONS, POINTWISE_BINARY, POINTWISE_UNARY, argument, aten, is_view
from optpass.analysis.residuals import Residual, residuals
from optpass.ir.graph import Graph, shape_of
from optpass.ir.program import Program

LINEAR = frozenset({aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default})
ACTIVATIONS = POINTWISE_UNARY - {aten.to.dtype, aten.neg.default, aten.rsub.Scalar} | {
    *(aten.glu.default, aten.prelu.default, aten.relu6.default, aten.hardtanh.default, aten.selu.default),
    *(aten.celu.default, aten.log_sigmoid.default, aten.threshold.default, aten.square.default),
}
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default})
BETWEEN = ACTIVATIONS | POINTWISE_UNARY | POINTWISE_BINARY | NORMS | frozenset(CATS)
"""What may stand between the first layers and the last: activations, gates, norms of the hidden units, views."""


@dataclass(frozen=True)
class FeedForwards:
    """``found`` are the axes of hidden units, in the order in which the graphs read their weights.

    ``refused`` are axes between such layers that may not be cut, or whose layers add to no stream, with why.
    """

    found: tuple[Group, ...]
    refused: tuple[tuple[Group | Fixed, str], ...]


def feed_forwards(program: Program, axes: Axes) -> FeedForwards:
    """The feed-forwards of ``program``, analysed as ``axes``: plain, gated, side by side with an attention.

    Hidden units are what linear layers, or convolutions of one pixel, give, and others of the same branch sum over,
    an activation being between, and a depthwise convolution perhaps (SegFormer, Sana, inverted residuals). Two layers
    without an activation (low-rank adapters) are none. Time linear in the nodes.
    """
    products: dict[str, list[Node]] = {}
    within: dict[Node, set[Node]] = {}
    streams: set[Node] = set()
    additions: list[Residual] = []
    for graph in program.entries.values():
        _note_products(graph, products)
        for residual in residuals(graph).found:
            additions.append(residual)
            streams.add(residual.add)
            for node in residual.nodes:
                within.setdefault(node, set()).add(residual.add)
    added: dict[Node, set[Node]] = {}
    for residual in additions:
        for node in _sources(residual.branch, streams):
            added.setdefault(node, set()).add(residual.add)
    found: list[Group] = []
    refused: list[tuple[Group | Fixed, str]] = []
    items: list[Group | Fixed] = [*axes.groups, *axes.fixed]
    for item in items:
        writers, readers = (_layers(item, role, products) for role in ("out", "in"))
        if not writers or not readers or not all(_is_activated(reader, writers, streams) for reader in readers):
            continue
        if isinstance(item, Fixed):
            refused.append((item, f"its axis of {item.atom.size} units {item.reason}"))
        elif not all(map(added.get, readers)) or not _union(within, writers) >= _union(added, readers):
            refused.append((item, "what it gives is not what a residual addition adds"))
        else:
            found.append(item)
    return FeedForwards(tuple(found), tuple(refused))


def _note_products(graph: Graph, products: dict[str, list[Node]]) -> None:
    """The operators that read each weight, past casts and views of it."""
    sources: dict[Node, str] = {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            sources[node] = str(node.target)
        elif node.op == "call_function":
            names = [sources[operand] for operand in node.all_input_nodes if operand in sources]
            if names and (is_view(node) or node.target is aten.to.dtype):
                sources[node] = names[0]
                continue
            for name in names:
                products.setdefault(name, []).append(node)


def _layers(item: Group | Fixed, role: str, products: Mapping[str, list[Node]]) -> frozenset[Node]:
    """The layers that give ``item`` ("out") or sum over it ("in"); none where one of them is another operator."""
    products_of = (node for part in item.slices if part.role == role for node in products.get(part.weight, ()))
    layers = [node for node in products_of if not _is_depthwise(node)]
    return frozenset(layers if all(map(_is_pointwise_layer, layers)) else ())


def _is_depthwise(node: Node) -> bool:
    """Whether a convolution gives every channel of what that channel was."""
    if node.target not in CONVOLUTIONS:
        return False
    groups = int(argument(node, "groups"))
    return groups > 1 and shape_of(node)[1] == groups == shape_of(node.all_input_nodes[0])[1]


def _is_pointwise_layer(node: Node) -> bool:
    if node.target in CONVOLUTIONS:
        weight: Any = node.args[1]
        return all(size == 1 for size in shape_of(weight)[2:])
    return node.target in LINEAR


def _is_activated(reader: Node, writers: frozenset[Node], streams: set[Node]) -> bool:
    """Whether ``reader`` sees what ``writers`` give, past an activation."""
    passed: list[Node] = []
    is_met = any(not writers.isdisjoint(_sources(operand, streams, passed)) for operand in reader.all_input_nodes)
    return is_met and any(node.target in ACTIVATIONS for node in passed)


def _sources(node: Node, streams: set[Node], passed: list[Node] | None = None) -> set[Node]:
    """The operators that ``node`` is made of by what may stand between layers, which is noted in ``passed``.

    What a residual stream gives is made of nothing.
    """
    pending, seen = [node], {node}
    found: set[Node] = set()
    while pending:
        node = pending.pop()
        if node.op != "call_function" or node in streams:
            continue
        if node.target not in BETWEEN and not is_view(node) and not _is_depthwise(node):
            found.add(node)
            continue
        if passed is not None:
            passed.append(node)
        fresh = [operand for operand in node.all_input_nodes if operand not in seen]
        seen.update(fresh)
        pending += fresh
    return found


def _union(sets: Mapping[Node, set[Node]], nodes: Iterable[Node]) -> set[Node]:
    return set().union(*(sets.get(node, set()) for node in nodes))
