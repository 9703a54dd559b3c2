"""``repeat_interleave`` by an open size → a broadcast beside the repeated dimension, and both made one.

ONNX's translation of a number of repeats that is not fixed puts the copies before the dimension and not
after it (onnxscript 0.7): wrong, or no shape at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import Graph, shape_of

aten = torch.ops.aten


def open_repeat(graph: Graph, constants: dict[str, Tensor]) -> None:
    """[.., n, ..] repeated ``r`` times along ``dim`` → [.., n, 1, ..] → [.., n, r, ..] → [.., n·r, ..]."""
    for node in graph.calls:
        if node.target is aten.repeat_interleave.self_int and isinstance(node.args[1], Node):
            with graph.before(node):
                result = _repeated(graph, node, *node.args)
            node.replace_all_uses_with(result)
            graph.fx.erase_node(node)


def _repeated(graph: Graph, node: Node, source: Any, repeats: Any, dim: Any = None) -> Node:
    if dim is None:
        source, dim = graph.call(aten.reshape.default, source, [-1], like=node), 0
    sizes = graph.sizes(source)
    axis = dim % len(sizes)
    beside = graph.call(aten.unsqueeze.default, source, axis + 1, like=node)
    copies = [*sizes[: axis + 1], repeats, *sizes[axis + 1 :]]
    expanded = graph.call(aten.expand.default, beside, copies, like=node)
    return graph.call(aten.reshape.default, expanded, list(shape_of(node)), like=node)
