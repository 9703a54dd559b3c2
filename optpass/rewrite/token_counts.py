"""Fewer tokens behind a selection: literal sizes and shapes of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.analysis.pieces import TO_THE_END
from optpass.analysis.token_flow import TokenFlow
from optpass.ir.graph import Graph


def with_count(graph: Graph, node: Node, flow: TokenFlow, counts: Mapping[int, int]) -> None:
    """Bring ``node`` up to date, whose operands are; ``counts`` are the tokens there are behind each selection."""
    rows = flow.rows[node]
    if node.target is aten.slice.Tensor:
        _open_end(node, flow)
    elif node.target in (aten.reshape.default, aten.expand.default):
        count = counts[rows.level] - rows.start
        sizes: list[Any] = list(argument(node, "shape" if node.target is aten.reshape.default else "size"))
        for dim in rows.dims:
            sizes[dim] = count if sizes[dim] != -1 else -1
        node.update_arg(1, sizes)
    node.meta["val"] = graph.infer(node)


def _open_end(node: Node, flow: TokenFlow) -> None:
    """A slice of tokens goes to their end: nothing else with a row for each of them is allowed."""
    source: Any = node.args[0]
    if int(argument(node, "dim")) % len(source.meta["val"].shape) in flow.rows[source].dims and len(node.args) > 3:
        node.update_arg(3, TO_THE_END)
