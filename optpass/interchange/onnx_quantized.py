"""Quantised weights in ONNX, in the form by which runtimes find their integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import Graph
from optpass.ir.quantized import DEQUANTIZE as DEQUANTIZE_TENSOR
from optpass.ir.quantized import DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS, Quantized, ZeroPoints, quantizer_of
from optpass.ir.weights import Cast, Expression, Permute, Shape, Unary

if TYPE_CHECKING:
    import onnx_ir as ir

DEQUANTIZE, TRANSPOSE = "DequantizeLinear", "Transpose"
LATE_OPSET = 21
"""The first operator set whose DequantizeLinear knows blocks, 4 bits and 16."""


def opset_for(graph: Graph, asked: int) -> int:
    """``asked``, or the first operator set that has what ``graph`` needs."""
    return max(asked, LATE_OPSET) if any(map(_is_late, graph.calls)) else asked


def _is_late(node: Node) -> bool:
    """Whether ``node`` makes real values of 4 bits or 16, or in groups."""
    if node.target == DEQUANTIZE_TENSOR:
        return quantizer_of(node).dtype == torch.uint16
    if node.target != DEQUANTIZE_CHANNELS:
        return node.target == DEQUANTIZE_GROUPS
    low, high = node.args[4:6]
    return bool(high - low < 16)  # type: ignore[operator]


def translations() -> dict[Any, Callable[..., Any]]:
    """Translations of operators that the exporter does not know."""
    from onnxscript import opset21

    def dequantize_groups(  # type: ignore[no-untyped-def]
        integers, scales, zero_points, quant_min, quant_max, dtype, group_size=128, output_dtype=None
    ):
        operands = (integers, scales) if zero_points is None else (integers, scales, zero_points)
        return opset21.DequantizeLinear(*operands, axis=1, block_size=group_size)

    return {DEQUANTIZE_GROUPS: dequantize_groups}


@dataclass(frozen=True)
class Packed(Unary):
    """4-bit integers, two in a byte, the first in the low half: as ONNX stores them. uint8 of shape [⌈numel / 2⌉]."""

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.uint8

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (-(-self.operand.numel // 2),)

    def evaluate(self) -> Tensor:
        nibbles = self.operand.evaluate().flatten().to(torch.int16) & 0xF
        if nibbles.numel() % 2:
            nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
        return (nibbles[0::2] | nibbles[1::2] << 4).to(torch.uint8)

    def __str__(self) -> str:
        return f"packed({self.operand})"


def stored(expression: Expression) -> tuple[ir.DataType | None, Expression]:
    """The type that ONNX has for a quantised weight or its zero points, and their bytes.

    ``None`` and the expression itself where its own dtype is the type.
    """
    import onnx_ir

    inner = expression.operand if isinstance(expression, Permute) else expression
    if isinstance(inner, Quantized) and inner.bits == 4:
        return (onnx_ir.DataType.INT4 if inner.low < 0 else onnx_ir.DataType.UINT4), Packed(expression)
    if isinstance(inner, ZeroPoints):
        narrow = Cast(expression, torch.uint8)
        return (onnx_ir.DataType.UINT4, Packed(narrow)) if inner.high == 15 else (onnx_ir.DataType.UINT8, narrow)
    return None, expression


def dequantize_last(model: ir.Model) -> None:
    """Transpose(DequantizeLinear(w)) → DequantizeLinear(Transpose(w)): kernels look for the former behind a product."""
    for node in list(model.graph):
        if node.op_type == TRANSPOSE and (source := _dequantized(model, node)) is not None:
            _swap(model, node, source)


def read_zero_points(model: ir.Model) -> None:
    """DequantizeLinear(w, s, Cast(z)) → DequantizeLinear(w, s, z): z is stored in w's type, which has 4 bits perhaps.

    Before anything folds the conversion, which the exporter writes.
    """
    for node in list(model.graph):
        zero = node.inputs[2] if node.op_type == DEQUANTIZE and len(node.inputs) == 3 else None
        cast = zero.producer() if zero is not None else None
        if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
            continue
        if cast.inputs[0].name in model.graph.initializers:
            node.replace_input_with(2, cast.inputs[0])
            if not cast.outputs[0].uses():
                model.graph.remove(cast, safe=True)


def write_zero_points(model: ir.Model) -> None:
    """Zero points of 0 written out.

    ONNX Runtime leaves a product in floating point whose DequantizeLinear has none, though the standard says 0 then.
    """
    for node in list(model.graph):
        if node.op_type == DEQUANTIZE and len(node.inputs) == 2 and "block_size" not in node.attributes:
            _write_zero_point(model, node)


def _dequantized(model: ir.Model, node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a weight that ``node`` reads."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type != DEQUANTIZE or source.inputs[0] is None:
        return None
    return source if source.inputs[0].name in model.graph.initializers else None


def _swap(model: ir.Model, transpose: ir.Node, source: ir.Node) -> None:
    """Transpose(DequantizeLinear(w)) → DequantizeLinear(Transpose(w)); scales in blocks are transposed as well."""
    import onnx_ir

    order = list(transpose.attributes.get_ints("perm"))
    blocked = "block_size" in source.attributes
    operands: list[ir.Value | None] = list(source.inputs)
    turned = [
        onnx_ir.node(TRANSPOSE, [value], {"perm": order}, metadata_props=dict(source.metadata_props))
        for value in operands[: len(operands) if blocked else 1]
    ]
    operands[: len(turned)] = [node.outputs[0] for node in turned]
    attributes = [item for name, item in source.attributes.items() if name != "axis"]
    axis = onnx_ir.AttrInt64("axis", order.index(source.attributes.get_int("axis", 1)))
    real = onnx_ir.Node("", DEQUANTIZE, operands, [*attributes, axis], metadata_props=dict(source.metadata_props))
    real.outputs[0].type, real.outputs[0].shape = transpose.outputs[0].type, transpose.outputs[0].shape
    model.graph.insert_before(transpose, [*turned, real])
    transpose.outputs[0].replace_all_uses_with(real.outputs[0])
    model.graph.remove(transpose, safe=True)
    if not source.outputs[0].uses() and not source.outputs[0].is_graph_output():
        model.graph.remove(source, safe=True)


def _write_zero_point(model: ir.Model, node: ir.Node) -> None:
    import numpy as np
    import onnx_ir

    integers, scale = node.inputs[:2]
    assert integers is not None
    assert scale is not None
    assert integers.dtype is not None
    assert integers.shape is not None
    known = scale.shape or integers.shape[node.attributes.get_int("axis", 1) :][:1]
    shape = tuple(int(size) for size in known)  # type: ignore[arg-type]
    tensor = onnx_ir.tensor(np.zeros(shape, integers.dtype.numpy()), integers.dtype)
    # One for each: OpenVINO takes no weight for quantised that shares its zero point.
    name = f"{integers.name}.zero_point"
    kind = onnx_ir.TensorType(tensor.dtype)
    value = onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=kind, const_value=tensor)
    if name not in model.graph.initializers:
        model.graph.register_initializer(value)
    node.resize_inputs(3)
    node.replace_input_with(2, model.graph.initializers[name])
