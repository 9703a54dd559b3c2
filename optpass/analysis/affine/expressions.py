"""Small helpers that write weight expressions as short as they can be."""

from __future__ import annotations

from functools import reduce

from optpass.ir.algebra import Einsum, Full
from optpass.ir.weights import Expression, Permute, Reshape, Scale, Shape, Sum


def reshaped(expression: Expression, shape: Shape) -> Expression:
    """``expression`` under ``shape``; itself where it has it, and one reshape where it is one."""
    if expression.shape == shape:
        return expression
    if isinstance(expression, Full):
        return Full(shape, expression.value, expression.dtype)
    if isinstance(expression, Reshape):
        return reshaped(expression.operand, shape)
    return Reshape(expression, shape)


def transposed(matrix: Expression) -> Expression:
    """A matrix with rows and columns exchanged; twice is not at all."""
    return matrix.operand if isinstance(matrix, Permute) and matrix.dims == (1, 0) else Permute(matrix, (1, 0))


def is_ones(expression: Expression) -> bool:
    """Whether it is known without reading it that every element is 1."""
    return isinstance(expression, Full) and expression.value == 1.0


def spread(scalar: Expression, shape: Shape) -> Expression:
    """A scalar everywhere in ``shape``."""
    if isinstance(scalar, Full):
        return Full(shape, scalar.value, scalar.dtype)
    letters = "".join(chr(ord("a") + axis) for axis in range(len(shape)))
    return Einsum(f"{letters},->{letters}", (Full(shape, 1.0, scalar.dtype), scalar))


def times(expression: Expression, scalar: Expression) -> Expression:
    """``expression`` times a scalar."""
    if is_ones(scalar):
        return expression
    if isinstance(scalar, Full):
        return Scale(expression, scalar.value)
    letters = "".join(chr(ord("a") + axis) for axis in range(len(expression.shape)))
    return Einsum(f"{letters},->{letters}", (expression, scalar))


def added(*parts: Expression | None) -> Expression | None:
    """The sum of those that are there."""
    present = [part for part in parts if part is not None]
    return reduce(Sum, present) if present else None


def scalar_product(a: Expression, b: Expression) -> Expression:
    """The product of two scalars, a number where both are."""
    return Full((), a.value * b.value, a.dtype) if isinstance(a, Full) and isinstance(b, Full) else times(a, b)


def scalar_sum(a: Expression | None, b: Expression | None) -> Expression | None:
    """The sum of two scalars that may be missing; None where it is known to be 0."""
    if isinstance(a, Full) and isinstance(b, Full):
        total = a.value + b.value
        return Full((), total, a.dtype) if total else None
    return added(a, b)
