"""ONNX models → the forms that compilers of accelerators take best: attention that they fuse, products, constants.

The exporter spells scaled dot-product attention for every case at once. What that leaves between the two products
keeps a compiler from seeing one attention, and every operator rounds where precision is half.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optpass.interchange.external_data import EXPRESSION

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_MASK = 64 << 20
"""Bytes of the largest constant that is read to see whether it hides a key."""
KEEPS_VALUES = ("Cast", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators whose result has the values of their first operand, so far as one value everywhere stays that."""


def fusible_attention(model: ir.Model) -> int:
    """Rewrite attention in ``model`` in place, before its weights are written; how many places changed.

    1. A mask of zeros → none.
    2. The guard of a softmax against rows without a key → none, where there is no mask or a constant one that
       leaves every row a key.
    3. Keys transposed by way of three dimensions → one ``Transpose``.
    4. ``(q·c)(kᵀ·c)`` → ``(q·c²)kᵀ``: one rounding less, and none where c² is a power of two.

    Leaves alone: masks that are computed from inputs, and their guards.
    """
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    changed = sum(_drop_zero_mask(node) + _drop_guard(node) for node in softmaxes)
    changed += sum(_transpose_directly(node) for node in list(model.graph) if node.op_type == "Transpose")
    changed += sum(_scale_once(node, model) for node in list(model.graph) if node.op_type == "MatMul")
    _remove_dead(model)
    return changed


def biases_first(model: ir.Model) -> int:
    """float32 ``x·W + b`` → ``b + x·W`` in ``model``, in place; how many places changed.

    The HTP's compiler makes one operator of the first, which is less exact: a ViT of 12 layers is 39 dB from float32
    then, and 54 with the second. Of float16 it is the other way round, and those stay as the exporter has them
    (onnxruntime-qnn 2.7 for v75, emulated).
    """
    import onnx_ir

    changed = 0
    for node in model.graph:
        if node.op_type != "Add" or _producer(node, 0, "MatMul") is None:
            continue
        product, bias = node.inputs
        if bias is not None and bias.producer() is None and bias.dtype == onnx_ir.DataType.FLOAT:
            node.replace_input_with(0, bias)
            node.replace_input_with(1, product)
            changed += 1
    return changed


def dequantise_weights(path: Path, names: Collection[str]) -> int:
    """Constants behind the ``DequantizeLinear`` nodes of ``names`` → their real values, in the file; how many.

    The function stays the same; the products that read them are no longer integer ones.
    """
    import onnx_ir

    model = onnx_ir.load(path)
    found = [node for node in model.graph if node.op_type == "DequantizeLinear" and node.name in names]
    found = [node for node in found if all(value is None or value.const_value is not None for value in node.inputs)]
    for node in found:
        result = node.outputs[0]
        tensor = onnx_ir.tensor(_dequantised(node), name=f"{result.name}.real")
        value = onnx_ir.Value(
            name=tensor.name,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            type=onnx_ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        model.graph.register_initializer(value)
        result.replace_all_uses_with(value)
    _remove_dead(model)
    onnx_ir.save(model, path)
    return len(found)


def _dequantised(node: ir.Node) -> Any:
    constants = [value.const_value for value in node.inputs if value is not None]
    values, steps, *zeros = [constant.numpy() for constant in constants if constant is not None]
    axis = node.attributes.get_int("axis", 1) % max(values.ndim, 1)
    shape = [-1 if index == axis else 1 for index in range(values.ndim)] if steps.ndim == 1 else []
    moved = values.astype(steps.dtype)
    for zero in zeros:
        moved = moved - zero.astype(steps.dtype).reshape(shape)
    return moved * steps.reshape(shape)


def _drop_zero_mask(softmax: ir.Node) -> bool:
    add = _producer(softmax, 0, "Add")
    if add is None:
        return False
    for index, value in enumerate(add.inputs):
        other = add.inputs[1 - index]
        if _uniform(value) != 0 or other is None:
            continue
        if value is not None and value.shape is not None and len(value.shape) <= len(other.shape or ()):
            softmax.replace_input_with(0, other)
            return True
    return False


def _drop_guard(softmax: ir.Node) -> bool:
    """``Where(IsNaN(s), c, s)`` of a softmax s."""
    add = _producer(softmax, 0, "Add")
    if add is not None and not any(_leaves_a_key(value) for value in add.inputs):
        return False
    result = softmax.outputs[0]
    for check in [node for node in result.consumers() if node.op_type == "IsNaN"]:
        for guard in [node for node in check.outputs[0].consumers() if node.op_type == "Where"]:
            if guard.inputs[0] is check.outputs[0] and guard.inputs[2] is result:
                guard.outputs[0].replace_all_uses_with(result)
                return True
    return False


def _leaves_a_key(mask: ir.Value | None) -> bool:
    """Whether ``mask`` is a constant that leaves at least one key visible to every query.

    The exporter hides keys by the lowest number of the dtype, to which a logit may still add up to -inf.
    """
    import numpy as np

    values = _constant(mask)
    if values is None or values.ndim == 0 or values.dtype.kind != "f":
        return False
    return bool((values > np.finfo(values.dtype).min / 2).any(axis=-1).all())


def _transpose_directly(node: ir.Node) -> bool:
    """``[b, h, n, d] → [b·h, n, d] → [b·h, d, n] → [b, h, d, n]`` becomes one transposition of four dimensions."""
    before = _producer(node, 0, "Reshape")
    if before is None or tuple(node.attributes.get_ints("perm", ())) != (0, 2, 1):
        return False
    source, [*readers] = before.inputs[0], node.outputs[0].consumers()
    if source is None or len(readers) != 1 or readers[0].op_type != "Reshape" or node.outputs[0].is_graph_output():
        return False
    given, found = _sizes(source), _sizes(readers[0].outputs[0])
    if given is None or found is None or len(given) != 4 or found != [given[i] for i in (0, 1, 3, 2)]:
        return False
    if (middle := _sizes(before.outputs[0])) is None or middle[1:] != given[2:]:
        return False
    node.replace_input_with(0, source)
    node.attributes["perm"] = _ints("perm", (0, 1, 3, 2))
    node.outputs[0].shape = readers[0].outputs[0].shape
    readers[0].outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    return True


def _scale_once(node: ir.Node, model: ir.Model) -> bool:
    import numpy as np
    import onnx_ir

    queries, keys = _producer(node, 0, "Mul"), _producer(node, 1, "Mul")
    if queries is None or keys is None or queries is keys or len(queries.outputs[0].uses()) != 1:
        return False
    (query, first), (key, second) = _scaled(queries), _scaled(keys)
    if query is None or key is None or first is None or first != second:
        return False
    dtype = queries.outputs[0].dtype
    assert dtype is not None
    scale = np.array(first * second, dtype=dtype.numpy())
    name = f"{queries.outputs[0].name}.scale"
    value = onnx_ir.Value(
        name=name,
        shape=onnx_ir.Shape(()),
        type=onnx_ir.TensorType(dtype),
        const_value=onnx_ir.tensor(scale, dtype=dtype, name=name),
    )
    model.graph.register_initializer(value)
    queries.replace_input_with(0, query)
    queries.replace_input_with(1, value)
    node.replace_input_with(1, key)
    return True


def _scaled(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    """The operand and the factor of a multiplication by one constant number."""
    for index, value in enumerate(node.inputs):
        values = _constant(value)
        if values is not None and values.size == 1:
            return node.inputs[1 - index], float(values.reshape(()))
    return None, None


def _uniform(value: ir.Value | None) -> float | None:
    """The number that ``value`` has everywhere, if it is a constant of one number."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Where":
            condition = _uniform(node.inputs[0])
            if condition is None:
                return None
            value = node.inputs[1 if condition else 2]
        elif node.op_type in KEEPS_VALUES:
            value = node.inputs[0]
        else:
            return None
    values = _constant(value)
    if values is None or values.size == 0 or (values != values.flat[0]).any():
        return None
    return float(values.flat[0])


def _constant(value: ir.Value | None) -> Any:
    """The array behind ``value`` where it is a constant that is no weight of the model."""
    tensor = value.const_value if value is not None and value.producer() is None else None
    if tensor is None or EXPRESSION in tensor.meta or tensor.nbytes > LARGEST_MASK:
        return None
    return tensor.numpy()


def _producer(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    value = node.inputs[index]
    found = value.producer() if value is not None else None
    return found if found is not None and found.op_type == op_type else None


def _sizes(value: ir.Value) -> list[Any] | None:
    """The sizes of ``value``, open ones as their expressions; ``None`` if one is unknown."""
    if value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in sizes else sizes


def _ints(name: str, values: tuple[int, ...]) -> ir.Attr:
    import onnx_ir

    return onnx_ir.AttrInt64s(name, values)


def _remove_dead(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
