"""Operators as affine maps: a node is the sum of maps of one or two values, or none of this kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.affine.constants import Constants
from optpass.analysis.affine.expressions import added, reshaped, transposed
from optpass.analysis.affine.maps import Affine, Map, Transposed, Uniform, channelwise
from optpass.analysis.operators import CONVOLUTIONS, argument, aten
from optpass.ir.algebra import Einsum, Full, Power
from optpass.ir.graph import shape_of, value_of
from optpass.ir.weights import Expression, Scale, accumulation_dtype


@dataclass(frozen=True)
class Term:
    """``map`` of the value ``operand``."""

    operand: Node
    map: Map


Step = tuple[Term, ...]
"""A node's value is the sum of its terms, of which there are one or two."""


def step_of(node: Node, constants: Constants) -> Step | None:
    """``node`` as a sum of affine maps of activations; None where it is not one, or changes the dtype."""
    rule = RULES.get(node.target) if node.op == "call_function" else None
    # A size among the operands of a sum or product is a number that is not known yet.
    if rule is None or any(isinstance(item, Node) and not _is_tensor(item) for item in node.args):
        return None
    step = rule(node, constants)
    if step is None:
        return None
    dtype = value_of(node).dtype
    same = dtype.is_floating_point and all(value_of(term.operand).dtype == dtype for term in step)
    return step if same else None


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor)


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
    return _dense(left, transposed(weight), None, constants)


def _addmm(node: Node, constants: Constants) -> Step | None:
    weight = constants(argument(node, "mat2"))
    if weight is None or argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        return None
    return _dense(argument(node, "mat1"), transposed(weight), argument(node, "self"), constants)


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


def _transposed_convolution(node: Node, constants: Constants) -> Step | None:
    operand, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    kernel, shift = constants(weight), constants(bias)
    if kernel is None or (bias is not None and shift is None) or len(shape_of(operand)) != len(kernel.shape):
        return None
    names = ("stride", "padding", "output_padding", "dilation")
    sizes = [_per_axis(argument(node, name), len(kernel.shape) - 2) for name in names]
    return (Term(operand, Transposed(kernel, shift, argument(node, "groups"), *sizes)),)


def _average_pool(node: Node, constants: Constants) -> Step | None:
    operand: Any = argument(node, "self")
    spatial = POOLS[node.target]
    kernel = _per_axis(argument(node, "kernel_size"), spatial)
    stride = _per_axis(argument(node, "stride") or kernel, spatial)
    padding = _per_axis(argument(node, "padding"), spatial)
    whole = argument(node, "count_include_pad") or not any(padding)
    divisor = spatial > 1 and argument(node, "divisor_override")
    shape = shape_of(operand)
    if (
        argument(node, "ceil_mode")
        or not whole
        or divisor
        or len(shape) != spatial + 2
        or not isinstance(shape[1], int)
    ):
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
    """The sum of two operands, each times a number."""
    if not isinstance(left[0], Node) or constants(left[0]) is not None:
        left, right = right, left
    operand, factor = left
    if not isinstance(operand, Node) or constants(operand) is not None or shape_of(operand) != shape_of(node):
        return None
    first = Term(operand, Uniform(_number(factor, operand)))
    other, second = right
    if not isinstance(other, Node) or constants(other) is not None:
        return _shifted(operand, factor, other, second, constants)
    if shape_of(other) != shape_of(node):
        return None
    return (first, Term(other, Uniform(_number(second, other))))


def _shifted(operand: Node, factor: float, constant: Any, times: float, constants: Constants) -> Step | None:
    """``operand · factor + constant · times``."""
    made = _pointwise(operand, constant, constants)
    if made is None:
        return None
    shift, spatial = made
    if isinstance(shift, Full):
        shift = Full(shift.shape, shift.value * times, shift.dtype)
    elif times != 1:
        shift = Scale(shift, times)
    if spatial is None:
        nothing = isinstance(shift, Full) and shift.value == 0
        return (Term(operand, Uniform(_number(factor, operand), None if nothing else shift)),)
    return (Term(operand, channelwise(Full(shift.shape, factor, shift.dtype), shift, spatial)),)


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
    return (Term(operand, Uniform(_number(-1.0, operand))),)


def _reshape(node: Node, constants: Constants) -> Step | None:
    """The same rows in another arrangement: nothing, to maps along the last dimension."""
    operand: Any = node.args[0]
    before, after = shape_of(operand), shape_of(node)
    if not before or not after or before[-1] != after[-1] or not isinstance(after[-1], int):
        return None
    ones = Full((after[-1],), 1.0, _wide(operand))
    return (Term(operand, channelwise(ones, None, 0)),)


def _pointwise(operand: Node, constant: Any, constants: Constants) -> tuple[Expression, int | None] | None:
    """``constant`` as it acts on ``operand``: a scalar and None, or [channels] and the number of spatial axes.

    None where it varies along anything but the channels, and for an infinite number: 0·x + ∞·x is no multiple of x.
    """
    shape = shape_of(operand)
    if isinstance(constant, (int, float)):
        return (_number(constant, operand), None) if isfinite(constant) else None
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


def _per_axis(sizes: Any, spatial: int) -> tuple[int, ...]:
    """One size per axis: one given for all of them is repeated."""
    given = tuple(sizes) if isinstance(sizes, (list, tuple)) else (sizes,)
    return given * spatial if len(given) == 1 else given


def _number(value: float, operand: Node) -> Full:
    return Full((), float(value), _wide(operand))


def _wide(operand: Node) -> torch.dtype:
    return accumulation_dtype(value_of(operand).dtype)


POOLS: dict[Any, int] = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
"""Average pools, and the axes that they pool over."""

RULES: dict[Any, Callable[[Node, Constants], Step | None]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
        _transposed_convolution,
    ),
    **dict.fromkeys(POOLS, _average_pool),
    aten.batch_norm.default: _batch_norm,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _add),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _subtract),
    aten.rsub.Scalar: _reversed_subtract,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _multiply),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _divide),
    aten.neg.default: _negative,
    aten.reshape.default: _reshape,
}
"""Operators that are affine in their activations, and their maps."""
