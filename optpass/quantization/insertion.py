"""Quantisers put into a graph: what a placement and its ranges say becomes operators and integer weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.algebra import Einsum
from optpass.ir.graph import Graph
from optpass.ir.hashing import tensor_digest
from optpass.ir.quantized import (
    DEQUANTIZE,
    DEQUANTIZE_CHANNELS,
    DEQUANTIZE_GROUPS,
    INT32,
    QUANTIZE,
    Quantized,
    Quantizer,
    Steps,
    ZeroPoints,
    is_quantized,
    quantizer_of,
)
from optpass.ir.weights import Constant, Expression, Scale, WeightStore
from optpass.quantization.form import CHANNELS, WeightScheme
from optpass.quantization.placement import Placement, Weight
from optpass.quantization.ranges import Ranges


@dataclass
class Insertion:
    """Puts quantisers into ``graph``, an own copy; new weights are collected in ``made``, to be added to the store.

    Entries of one Program share what they can: a new weight gets the same name wherever it is the same expression.
    """

    graph: Graph
    weights: WeightStore
    made: dict[str, Expression] = field(default_factory=dict)
    scheme: WeightScheme = CHANNELS

    def insert(self, placement: Placement, ranges: Ranges) -> None:
        """Quantisers of activations, integer weights and their steps, smoothing factors and corrected biases."""
        for weight in placement.weights:
            self._correct(weight, ranges)
            self._quantize_weight(weight, ranges)
        shared: dict[tuple[Node, Quantizer, str], Node] = {}
        for value, reader in placement.edges:
            if (quantizer := ranges.activations.get((value.name, reader.name))) is None:
                continue
            factor = ranges.factors.get(reader.name)
            key = value, quantizer, "" if factor is None else tensor_digest(factor)
            if key not in shared:
                shared[key] = self._quantize(value, reader, quantizer, factor)
            reader.replace_input_with(value, shared[key])

    def integer_biases(self) -> None:
        """Biases of operators that read integers → int32 at the product of their operands' scales, zero point 0."""
        for node in self.graph.calls:
            operands = list(node.args[:3])
            if len(operands) < 3 or not all(isinstance(operand, Node) for operand in operands):
                continue
            value, weight, bias = operands
            assert isinstance(value, Node)
            assert isinstance(weight, Node)
            assert isinstance(bias, Node)
            if value.target == DEQUANTIZE and weight.target == DEQUANTIZE_CHANNELS and bias.op == "get_attr":
                self._quantize_bias(node, quantizer_of(value), weight, bias)

    def _quantize(self, value: Node, reader: Node, quantizer: Quantizer, factor: Tensor | None) -> Node:
        after = value
        with self.graph.fx.inserting_after(value):
            if factor is not None:
                read = self._weight(f"{_weight_name(reader)}_smoothing", Constant(factor), reader)
                with self.graph.fx.inserting_after(read):
                    after = self.graph.call(torch.ops.aten.mul.Tensor, value, read, like=reader)
        with self.graph.fx.inserting_after(after):
            integers = self.graph.call(QUANTIZE, after, *quantizer.arguments(), like=value)
        with self.graph.fx.inserting_after(integers):
            return self.graph.call(DEQUANTIZE, integers, *quantizer.arguments(), like=value)

    def _quantize_weight(self, weight: Weight, ranges: Ranges) -> None:
        name, node, scheme = str(weight.read.target), weight.operator, self.scheme
        expression = self.weights[name]
        if (factor := ranges.factors.get(node.name)) is not None:
            expression = _smoothed(expression, factor)
        low, high = scheme.bounds
        groups = expression.shape[1] // scheme.group_size if scheme.group_size else 0
        scale: Expression = Steps(expression, weight.axis, low, high, scheme.symmetric, groups)
        if (multiples := ranges.multiples.get(node.name)) is not None:
            scale = Einsum("o,o->o", (scale, Constant(multiples)))
        zero = None if scheme.symmetric else ZeroPoints(expression, weight.axis, low, high, groups)
        integers = Quantized(expression, scale, zero, weight.axis, low, high, scheme.dtype)
        with self.graph.before(node):
            read = self._weight(f"{name}_int{scheme.bits}", integers, node)
            operands = [read, self._weight(f"{name}_scale", scale, node)]
            operands.append(self._weight(f"{name}_zero_point", zero, node) if zero else None)  # type: ignore[arg-type]
            if groups:
                arguments = (low, high, scheme.dtype, scheme.group_size, expression.dtype)
                real = self.graph.call(DEQUANTIZE_GROUPS, *operands, *arguments, like=node)
            else:
                arguments = (weight.axis, low, high, scheme.dtype)  # type: ignore[assignment]
                other = {} if expression.dtype == torch.float32 else {"out_dtype": expression.dtype}
                real = self.graph.call(DEQUANTIZE_CHANNELS, *operands, *arguments, like=node, **other)
        node.replace_input_with(weight.read, real)

    def _correct(self, weight: Weight, ranges: Ranges) -> None:
        node = weight.operator
        if (corrected := ranges.biases.get(node.name)) is None:
            return
        bias = node.args[2]
        assert isinstance(bias, Node)
        with self.graph.before(node):
            node.update_arg(2, self._weight(f"{bias.target}_corrected", Constant(corrected), node))

    def _quantize_bias(self, node: Node, quantizer: Quantizer, weight: Node, bias: Node) -> None:
        name, step = str(bias.target), weight.args[1]
        assert isinstance(step, Node)
        known = self.made | dict(self.weights)
        scale = Scale(known[str(step.target)], quantizer.scale)
        integers = Quantized(known[name], scale, None, 0, *INT32, torch.int32)
        with self.graph.before(node):
            read = self._weight(f"{name}_int32", integers, node)
            steps = self._weight(f"{name}_int32_scale", scale, node)
            real = self.graph.call(DEQUANTIZE_CHANNELS, read, steps, None, 0, *INT32, torch.int32, like=node)
        node.update_arg(2, real)

    def _weight(self, name: str, expression: Expression, like: Node) -> Node:
        """A read of ``expression`` by ``name``; numbered, where the name stands for something else already."""
        taken, count = name, 1
        while taken in self.weights or (taken in self.made and not _same(self.made[taken], expression)):
            count += 1
            taken = f"{name}_{count}"
        self.made[taken] = self.made.get(taken, expression)
        return self.graph.weight(taken, self.made[taken], like=like)


def _smoothed(weight: Expression, factor: Tensor) -> Expression:
    """The weight of a linear or depthwise convolution whose input is multiplied by ``factor``."""
    if len(weight.shape) == 2:
        return Einsum("oi,i->oi", (weight, Constant(1 / factor)))
    axes = "oabcd"[: len(weight.shape)]
    each = (1 / factor).flatten().repeat_interleave(weight.shape[0] // factor.numel())
    return Einsum(f"{axes},o->{axes}", (weight, Constant(each)))


def _weight_name(operator: Node) -> str:
    """The name of the weight that ``operator`` reads, quantised or not."""
    weight = operator.args[1]
    assert isinstance(weight, Node)
    read = weight.args[0] if is_quantized(weight) else weight
    assert isinstance(read, Node)
    return str(read.target).removesuffix("_int8")


def _same(first: Expression, second: Expression) -> bool:
    """Whether two expressions have the same values, constants being compared by theirs."""
    if isinstance(first, Constant) and isinstance(second, Constant):
        return first.dtype == second.dtype and torch.equal(first.value, second.value)
    if type(first) is not type(second) or str(first) != str(second):
        return False
    pairs = zip(first.operands(), second.operands(), strict=True)
    return first == second or all(_same(a, b) for a, b in pairs)
