"""``squeeze`` of a dimension that is not 1 → nothing.

PyTorch lets such a squeeze pass; ONNX's ``Squeeze`` makes the whole model invalid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import Graph, shape_of, value_of

aten = torch.ops.aten
OPERATORS = (aten.squeeze.dim, aten.squeeze.dims)


def idle_squeeze(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Drop every squeeze that drops nothing, and of several dimensions those that stay.

    Whether a symbolic size is 1 was decided at capture: the result's rank tells.
    """
    for node in graph.calls:
        if node.target in OPERATORS:
            _drop_idle(graph, node, *node.args)


def _drop_idle(graph: Graph, node: Node, source: Any, given: Any) -> None:
    sizes = shape_of(source)
    dims = [d % max(len(sizes), 1) for d in (given if isinstance(given, (list, tuple)) else [given])]
    kept = [d for d in dims if sizes[d] == 1] if len(sizes) else []
    if not kept or value_of(node).dim() == len(sizes):
        node.replace_all_uses_with(source)
        graph.fx.erase_node(node)
    elif len(kept) < len(dims):
        node.target, node.args = aten.squeeze.dims, (source, kept)
