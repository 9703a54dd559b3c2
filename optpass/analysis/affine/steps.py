"""Operators as affine maps: a node is the sum of maps of one or two values, or none of this kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.affine.maps import Affine, Map, Uniform, added, channelwise, reshaped
from optpass.analysis.operators import argument, aten
from optpass.ir.algebra import Einsum, Full, Power
from optpass.ir.graph import shape_of, value_of
from optpass.ir.weights import Cast, Expression, Permute, Reshape, Scale, accumulation_dtype


@dataclass(frozen=True)
class Term:
    """``map`` of the value ``operand``."""

    operand: Node
    map: Map


Step = tuple[Term, ...]
"""A node's value is the sum of its terms, of which there are one or two."""


@dataclass
class Constants:
    """The values of a graph that depend on weights alone, as expressions in accumulation precision.

    A transposed, permuted or reshaped weight is one; other arithmetic on weights is not.
    """

    weights: Mapping[str, Expression]
    known: dict[Node, Expression | None] = field(default_factory=dict)

    def __call__(self, value: Any) -> Expression | None:
        """The expression of ``value``, or None where it is an activation, a number or not of floating point."""
        if not isinstance(value, Node):
            return None
        if value not in self.known:
            self.known[value] = self._find(value)
        return self.known[value]

    def _find(self, node: Node) -> Expression | None:
        if node.op == "get_attr":
            leaf = self.weights[str(node.target)]
            if not leaf.dtype.is_floating_point:
                return None
            wide = accumulation_dtype(leaf.dtype)
            return leaf if wide == leaf.dtype else Cast(leaf, wide)
        if node.op != "call_function" or node.target not in REARRANGED:
            return None
        source = self(node.args[0])
        return None if source is None else REARRANGED[node.target](node, source)


def _transposed(node: Node, source: Expression) -> Expression:
    order = list(range(len(source.shape)))
    if node.target is aten.transpose.int:
        first, second = int(argument(node, "dim0")), int(argument(node, "dim1"))
        order[first], order[second] = order[second], order[first]
    else:
        order.reverse()
    return Permute(source, tuple(order))


def _permuted(node: Node, source: Expression) -> Expression:
    return Permute(source, tuple(int(dim) % len(source.shape) for dim in argument(node, "dims")))


def _reshaped(node: Node, source: Expression) -> Expression:
    return Reshape(source, tuple(map(int, shape_of(node))))


REARRANGED: dict[Any, Callable[[Node, Expression], Expression]] = {
    aten.transpose.int: _transposed,
    aten.t.default: _transposed,
    aten.permute.default: _permuted,
    aten.reshape.default: _reshaped,
    aten.unsqueeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
}
"""Operators that move a weight's elements around, and what they make of it."""


def step_of(node: Node, constants: Constants) -> Step | None:
    """``node`` as a sum of affine maps of activations; None where it is not one, or changes the dtype."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    step = rule(node, constants) if rule else None
    if step is None:
        return None
    dtype = value_of(node).dtype
    same = dtype.is_floating_point and all(value_of(term.operand).dtype == dtype for term in step)
    return step if same else None


def norm_affine(node: Node, constants: Constants) -> Affine | None:
    """Scale and shift per channel that end a normalisation; None where there are none.

    The normalisation before them is no affine map of its input.
    """
    names = NORMS.get(node.target) if node.op == "call_function" else None
    if names is None or not all(argument(node, name) is None or constants(argument(node, name)) for name in names):
        return None
    weight, bias = (constants(argument(node, name)) for name in (*names, *names)[:2])
    if len(names) == 1:
        bias = None
    given = weight if weight is not None else bias
    if given is None or len(given.shape) != 1:
        return None
    spatial = len(shape_of(node)) - 2 if node.target is aten.group_norm.default else 0
    ones: Expression = Full(given.shape, 1.0, given.dtype)
    return channelwise(ones if weight is None else weight, bias, spatial)


NORMS: dict[Any, tuple[str, ...]] = {
    aten.layer_norm.default: ("weight", "bias"),
    aten.group_norm.default: ("weight", "bias"),
    aten.rms_norm.default: ("weight",),
}
"""Normalisations by the statistics of their input, and the names of the arguments that scale and shift after it."""


def _linear(node: Node, constants: Constants) -> Step | None:
    weight, bias = constants(argument(node, "weight")), argument(node, "bias")
    return _dense(argument(node, "input"), weight, bias, constants)


def _dense(operand: Any, weight: Expression | None, bias: Any, constants: Constants) -> Step | None:
    """x·Wᵀ + b for W [out, in]."""
    if not isinstance(operand, Node) or weight is None or len(weight.shape) != 2:
        return None
    shift = constants(bias)
    if bias is not None and (shift is None or shift.shape != weight.shape[:1]):
        return None
    return (Term(operand, Affine(weight, shift, 1)),)


def _matmul(node: Node, constants: Constants) -> Step | None:
    left, right = node.args[:2]
    weight = constants(right)
    if weight is None or constants(left) is not None or len(weight.shape) != 2:
        return None
    return _dense(left, Permute(weight, (1, 0)), None, constants)


def _addmm(node: Node, constants: Constants) -> Step | None:
    weight = constants(argument(node, "mat2"))
    if weight is None or argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        return None
    return _dense(argument(node, "mat1"), Permute(weight, (1, 0)), argument(node, "self"), constants)


def _convolution(node: Node, constants: Constants) -> Step | None:
    operand, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    kernel, shift = constants(weight), constants(bias)
    if kernel is None or (bias is not None and shift is None) or len(shape_of(operand)) != len(kernel.shape):
        return None
    spatial = len(kernel.shape) - 2
    stride, dilation = (_per_axis(argument(node, name), spatial) for name in ("stride", "dilation"))
    padding = argument(node, "padding")
    if isinstance(padding, str):
        around = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
        if any(total % 2 for total in around):
            return None
        padding = [total // 2 for total in around]
    dilation = tuple(d if k > 1 else 1 for d, k in zip(dilation, kernel.shape[2:], strict=True))
    made = Affine(kernel, shift, argument(node, "groups"), stride, _per_axis(padding, spatial), dilation)
    return (Term(operand, made),)


def _average_pool(node: Node, constants: Constants) -> Step | None:
    operand: Any = argument(node, "self")
    spatial = POOLS[node.target]
    kernel = _per_axis(argument(node, "kernel_size"), spatial)
    stride = _per_axis(argument(node, "stride") or kernel, spatial)
    padding = _per_axis(argument(node, "padding"), spatial)
    whole = argument(node, "count_include_pad") or not any(padding)
    divisor = spatial > 1 and argument(node, "divisor_override")
    shape = shape_of(operand)
    if argument(node, "ceil_mode") or not whole or divisor or len(shape) != spatial + 2 or not _is_fixed(shape[1]):
        return None
    weight = Full((shape[1], 1, *kernel), 1 / prod(kernel), _wide(operand))
    return (Term(operand, Affine(weight, None, shape[1], stride, padding, (1,) * spatial)),)


def _batch_norm(node: Node, constants: Constants) -> Step | None:
    """(x − μ)·γ/√(σ² + ε) + β, as scale s = γ/√(σ² + ε) and shift β − μ·s."""
    names = ("weight", "bias", "running_mean", "running_var")
    given = [argument(node, name) for name in names]
    gamma, beta, mean, variance = map(constants, given)
    if argument(node, "training") or mean is None or variance is None:
        return None
    if any(value is not None and found is None for value, found in zip(given, (gamma, beta), strict=False)):
        return None
    scale: Expression = Power(variance, -0.5, float(argument(node, "eps")))
    if gamma is not None:
        scale = Einsum("c,c->c", (gamma, scale))
    shift = added(beta, Scale(Einsum("c,c->c", (mean, scale)), -1.0))
    operand = argument(node, "input")
    return (Term(operand, channelwise(scale, shift, len(shape_of(operand)) - 2)),)


def _add(node: Node, constants: Constants) -> Step | None:
    return _sum(node, constants, 1.0)


def _subtract(node: Node, constants: Constants) -> Step | None:
    return _sum(node, constants, -1.0)


def _sum(node: Node, constants: Constants, sign: float) -> Step | None:
    """left + sign·alpha·right, either of which may be a number or a constant."""
    left, right = node.args[:2]
    factor = sign * float(argument(node, "alpha"))
    return _weighted(node, (left, 1.0), (right, factor), constants)


def _reversed_subtract(node: Node, constants: Constants) -> Step | None:
    left, right = node.args[:2]
    return _weighted(node, (left, -float(argument(node, "alpha"))), (right, 1.0), constants)


def _weighted(node: Node, left: tuple[Any, float], right: tuple[Any, float], constants: Constants) -> Step | None:
    terms, shift = [], None
    for operand, factor in (left, right):
        if isinstance(operand, Node) and constants(operand) is None:
            if shape_of(operand) != shape_of(node):
                return None
            terms.append(Term(operand, Uniform(Full((), factor, _wide(operand)))))
        else:
            shift = (operand, factor)
    if len(terms) != 1 or shift is None:
        return tuple(terms) if terms and shift is None else None
    made = _pointwise(terms[0].operand, shift[0], constants)
    if made is None:
        return None
    constant, spatial = made
    constant = _multiplied(constant, shift[1])
    scale = terms[0].map.scale  # type: ignore[union-attr]
    if spatial is None:
        nothing = isinstance(constant, Full) and constant.value == 0
        return (Term(terms[0].operand, Uniform(scale, None if nothing else constant)),)
    weight = Full(constant.shape, scale.value, constant.dtype)  # type: ignore[union-attr]
    return (Term(terms[0].operand, channelwise(weight, constant, spatial)),)


def _multiply(node: Node, constants: Constants) -> Step | None:
    left, right = node.args[:2]
    if constants(left) is not None:
        left, right = right, left
    return _scaled(node, left, right, 1.0, constants)


def _divide(node: Node, constants: Constants) -> Step | None:
    left, right = node.args[:2]
    if "rounding_mode" in node.kwargs or constants(left) is not None:
        return None
    return _scaled(node, left, right, -1.0, constants)


def _scaled(node: Node, operand: Any, factor: Any, exponent: float, constants: Constants) -> Step | None:
    """``operand · factor ** exponent``."""
    if not isinstance(operand, Node) or shape_of(operand) != shape_of(node) or (factor == 0 and exponent < 0):
        return None
    made = _pointwise(operand, factor, constants)
    if made is None:
        return None
    scale, spatial = made
    if exponent != 1:
        scale = Full((), scale.value**exponent, scale.dtype) if isinstance(scale, Full) else Power(scale, exponent)
    return (Term(operand, Uniform(scale) if spatial is None else channelwise(scale, None, spatial)),)


def _negative(node: Node, constants: Constants) -> Step | None:
    operand: Any = node.args[0]
    return (Term(operand, Uniform(Full((), -1.0, _wide(operand)))),)


def _pointwise(operand: Node, constant: Any, constants: Constants) -> tuple[Expression, int | None] | None:
    """``constant`` as it acts on ``operand``: a scalar and None, or [channels] and the number of spatial axes.

    None where it varies along anything but the channels.
    """
    shape = shape_of(operand)
    if isinstance(constant, (int, float)):
        return Full((), float(constant), _wide(operand)), None
    found = constants(constant)
    if found is None or len(found.shape) > len(shape):
        return None
    if found.numel == 1:
        return reshaped(found, ()), None
    sizes = (1,) * (len(shape) - len(found.shape)) + found.shape
    [axis, *others] = [axis for axis, size in enumerate(sizes) if size != 1]
    if others or shape[axis] != sizes[axis]:
        return None
    if axis == len(shape) - 1:
        return reshaped(found, (found.numel,)), 0
    return (reshaped(found, (found.numel,)), len(shape) - 2) if axis == 1 else None


def _multiplied(expression: Expression, factor: float) -> Expression:
    if isinstance(expression, Full):
        return Full(expression.shape, expression.value * factor, expression.dtype)
    return expression if factor == 1 else Scale(expression, factor)


def _per_axis(sizes: Any, spatial: int) -> tuple[int, ...]:
    """One size per axis: one given for all of them is repeated."""
    given = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,)
    return given * spatial if len(given) == 1 else given


def _is_fixed(size: Any) -> bool:
    return isinstance(size, int)


def _wide(operand: Node) -> torch.dtype:
    return accumulation_dtype(value_of(operand).dtype)


POOLS: dict[Any, int] = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
"""Average pools, and the axes that they pool over."""

RULES: dict[Any, Callable[[Node, Constants], Step | None]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    **dict.fromkeys(
        (
            aten.conv1d.default,
            aten.conv2d.default,
            aten.conv3d.default,
            aten.conv1d.padding,
            aten.conv2d.padding,
            aten.conv3d.padding,
        ),
        _convolution,
    ),
    **dict.fromkeys(POOLS, _average_pool),
    aten.batch_norm.default: _batch_norm,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _add),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _subtract),
    aten.rsub.Scalar: _reversed_subtract,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _multiply),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _divide),
    aten.neg.default: _negative,
}
"""Operators that are affine in their activations, and their maps."""
