"""``repeat_interleave`` → ``unsqueeze``, ``expand``, ``reshape``.

ONNX's translation bakes the sizes of the example where they are open.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import Graph, shape_of
from optpass.ir.sizes import size_of

aten = torch.ops.aten


def interleaved_repeat(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Spell every repeat by one number; repeats that differ from element to element are left alone."""
    for node in graph.calls:
        if node.target is not aten.repeat_interleave.self_int:
            continue
        with graph.before(node):
            result = _repeated(graph, node, *node.args[:3])
        node.replace_all_uses_with(result)
        graph.fx.erase_node(node)


def _repeated(graph: Graph, node: Node, source: Any, repeats: Any, dim: Any = None) -> Node:
    if dim is None:
        source, dim = graph.call(aten.reshape.default, source, [-1], like=node), 0
    shape = list(shape_of(source))
    after = dim % len(shape) + 1
    times = size_of(repeats.meta["val"]) if isinstance(repeats, Node) else repeats
    apart = graph.call(aten.unsqueeze.default, source, after, like=node)
    repeated = graph.call(aten.expand.default, apart, [*shape[:after], times, *shape[after:]], like=node)
    return graph.call(aten.reshape.default, repeated, list(shape_of(node)), like=node)
