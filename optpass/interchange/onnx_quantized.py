"""Quantised weights in ONNX, in the form by which runtimes find their integer kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

DEQUANTIZE, TRANSPOSE = "DequantizeLinear", "Transpose"


def dequantize_last(model: ir.Model) -> None:
    """Transpose(DequantizeLinear(w)) → DequantizeLinear(Transpose(w)): kernels look for the former behind a product."""
    for node in list(model.graph):
        if node.op_type == TRANSPOSE and (source := _dequantized(model, node)) is not None:
            _swap(model, node, source)


def write_zero_points(model: ir.Model) -> None:
    """Zero points of 0 written out.

    ONNX Runtime leaves a product in floating point whose DequantizeLinear has none, though the standard says 0 then.
    """
    for node in list(model.graph):
        if node.op_type == DEQUANTIZE and len(node.inputs) == 2:
            _write_zero_point(model, node)


def _dequantized(model: ir.Model, node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a weight that ``node`` reads."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type != DEQUANTIZE or source.inputs[0] is None:
        return None
    return source if source.inputs[0].name in model.graph.initializers else None


def _swap(model: ir.Model, transpose: ir.Node, source: ir.Node) -> None:
    """Transpose(DequantizeLinear(w)) → DequantizeLinear(Transpose(w))."""
    import onnx_ir

    order = list(transpose.attributes.get_ints("perm"))
    turned = onnx_ir.node(TRANSPOSE, [source.inputs[0]], {"perm": order}, metadata_props=dict(source.metadata_props))
    attributes = [item for name, item in source.attributes.items() if name != "axis"]
    axis = onnx_ir.AttrInt64("axis", order.index(source.attributes.get_int("axis", 1)))
    operands = [turned.outputs[0], *source.inputs[1:]]
    real = onnx_ir.Node("", DEQUANTIZE, operands, [*attributes, axis], metadata_props=dict(source.metadata_props))
    real.outputs[0].type, real.outputs[0].shape = transpose.outputs[0].type, transpose.outputs[0].shape
    model.graph.insert_before(transpose, [turned, real])
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
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    if name not in model.graph.initializers:
        model.graph.register_initializer(value)
    node.resize_inputs(3)
    node.replace_input_with(2, model.graph.initializers[name])
