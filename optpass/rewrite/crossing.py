"""What crosses a cut through a graph: values that one part computes and another reads, and which are worth keeping."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor
from torch.fx import Node

from optpass.analysis.mac_rules import macs_of
from optpass.analysis.operators import is_view
from optpass.ir.graph import Graph


def crossing(graph: Graph, first: Collection[Node], outputs: Iterable[Node], cut: Collection[Node]) -> list[Node]:
    """The values, beside ``cut``, that what computes ``outputs`` should take over from ``first``, in order.

    ``first`` are the nodes of the part that runs before. Those whose making costs products of matrices are handed
    over, before views are taken of them; what is free to compute is computed again.
    """
    costly: set[Node] = set()
    for node in graph.fx.nodes:
        if macs_of(node) or any(operand in costly for operand in node.all_input_nodes):
            costly.add(node)
    taken: set[Node] = set()
    seen, pending = set(cut), [node for node in outputs if node not in cut]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in first and node in costly and isinstance(node.meta["val"], Tensor) and not is_view(node):
            taken.add(node)
        else:
            pending.extend(node.all_input_nodes)
    return [node for node in graph.fx.nodes if node in taken]
