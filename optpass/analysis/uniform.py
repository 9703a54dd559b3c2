"""Tensors that hold one value everywhere, as far as it shows without evaluating a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.analysis.permutations import PERMUTATIONS
from optpass.ir.algebra import Full
from optpass.ir.weights import Constant, WeightStore

FILLS = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
FULL = frozenset({aten.full.default, aten.full_like.default, aten.new_full.default})
COPIES = frozenset(
    {
        aten.expand.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        *PERMUTATIONS,
        aten.slice.Tensor,
        aten.select.int,
        aten.repeat.default,
    }
)
"""Operators whose result has the values of their first operand, some of them, some more than once."""
LIMIT = 1 << 20
"""Bytes of an in-memory constant that are looked at."""


def uniform_value(node: Any, weights: WeightStore) -> bool | int | float | None:
    """The value that ``node`` holds everywhere, ``None`` where it is not known to; a number is its own value.

    Looks at constants that the model's code computed, never at a parameter.
    """
    if isinstance(node, (bool, int, float)):
        return node
    while isinstance(node, Node) and node.target in COPIES:
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    if node.op == "get_attr":
        return _of_weight(weights, str(node.target))
    if node.target in FILLS:
        return bool(FILLS[node.target]) if node.meta["val"].dtype == torch.bool else FILLS[node.target]
    value = argument(node, "fill_value") if node.target in FULL else None
    return value if isinstance(value, (bool, int, float)) else None


def _of_weight(weights: WeightStore, name: str) -> bool | int | float | None:
    expression = weights[name]
    if isinstance(expression, Full):
        return expression.value
    if not isinstance(expression, Constant) or not expression.computed or not 0 < expression.nbytes <= LIMIT:
        return None
    value = expression.value
    if value.dtype.is_complex:
        return None
    first = value.flatten()[0]
    found: bool | int | float | None = first.item() if bool((value == first).all()) else None
    return found
