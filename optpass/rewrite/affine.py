"""Affine maps as operators of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from optpass.analysis.affine.expressions import is_ones, reshaped
from optpass.analysis.affine.maps import Affine, Map, Transposed, Uniform
from optpass.analysis.affine.norms import NORMS
from optpass.analysis.operators import aten
from optpass.ir.algebra import Full
from optpass.ir.graph import Graph, value_of
from optpass.ir.weights import Cast, Expression

Store = Callable[[str, Expression], Node]
"""Reads a weight: its role (``weight``, ``bias``) and values → a node at the graph's insertion point."""

CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
TRANSPOSED = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def emit(graph: Graph, operand: Node, made: Map, *, like: Node, store: Store) -> Node:
    """``made`` of ``operand``, inserted at the insertion point: one operator, or a product and a sum per channel.

    ``operand`` itself where ``made`` is the identity. Weights are rounded once, to the dtype of ``operand``.
    """
    dtype = value_of(operand).dtype

    def read(role: str, value: Expression) -> Node:
        return store(role, value if value.dtype == dtype else Cast(value, dtype))

    if isinstance(made, Uniform) or (isinstance(made, Affine) and made.is_elementwise):
        return _scale_and_shift(graph, operand, made, like, read)
    bias = None if made.bias is None else read("bias", made.bias)
    if isinstance(made, Affine) and not made.spatial:
        assert made.groups == 1, "a linear layer has no groups"
        return graph.call(aten.linear.default, operand, read("weight", made.weight), bias, like=like)
    weight = read("weight", made.weight)
    stride, padding, dilation = list(made.stride), list(made.padding), list(made.dilation)
    if isinstance(made, Transposed):
        geometry = (stride, padding, list(made.output_padding), made.groups, dilation)
        return graph.call(TRANSPOSED[made.spatial], operand, weight, bias, *geometry, like=like)
    operator = CONVOLUTIONS[made.spatial]
    return graph.call(operator, operand, weight, bias, stride, padding, dilation, made.groups, like=like)


def _scale_and_shift(graph: Graph, operand: Node, made: Uniform | Affine, like: Node, read: Store) -> Node:
    scale, shift = (made.scale, made.shift) if isinstance(made, Uniform) else (made.weight, made.bias)
    ones = [1] * made.spatial if isinstance(made, Affine) else []
    result = operand
    for operator, role, value in ((aten.mul.Tensor, "weight", scale), (aten.add.Tensor, "bias", shift)):
        if value is None or (role == "weight" and is_ones(value)):
            continue
        if isinstance(value, Full) and not value.shape:
            factor: Any = value.value
        else:
            shape = (value.numel, *ones) if isinstance(made, Affine) else ()
            factor = read(role, reshaped(value, shape))
        result = graph.call(operator, result, factor, like=like)
    return result


def emit_bare(graph: Graph, norm: Node) -> Node:
    """The normalisation ``norm`` without its scale and shift, inserted at the insertion point."""
    schema: Any = norm.target._schema  # type: ignore[union-attr]
    names = [item.name for item in schema.arguments]
    positional = dict(zip(names, norm.args, strict=False))
    for name in NORMS[norm.target]:
        if name in positional:
            positional[name] = None
    kwargs = {name: value for name, value in norm.kwargs.items() if name not in NORMS[norm.target]}
    return graph.call(norm.target, *positional.values(), like=norm, **kwargs)
