"""``copy`` of one tensor over another → the source itself, in the other's shape and dtype.

Functionalising ``x[:, 1:] = y`` leaves ``copy(x[:, 1:], y)``, which broadcasts ``y``; ONNX's translation does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optpass.ir.graph import Graph, shape_of, value_of

aten = torch.ops.aten


def broadcast_copy(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Spell every ``copy`` as a cast and an ``expand``, of which either is left out where it does nothing."""
    for node in graph.calls:
        if node.target is not aten.copy.default:
            continue
        result: Any = node.args[1]
        with graph.before(node):
            if value_of(result).dtype != value_of(node).dtype:
                result = graph.call(aten.to.dtype, result, value_of(node).dtype, like=node)
            if shape_of(result) != shape_of(node):
                result = graph.call(aten.expand.default, result, list(shape_of(node)), like=node)
        node.replace_all_uses_with(result)
        graph.fx.erase_node(node)
