"""Lazy weights, the algebra: what folding, merging and reparameterising compute from other weights.

Each is evaluated in float32 (float64 stays float64) and rounded once to its dtype, as in
:mod:`optpass.ir.weights`. An expression of several steps that a half-precision weight ends in is written
over ``Cast(leaf, torch.float32)`` with one ``Cast`` back around it, so that it is rounded once as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from optpass.ir.weights import Expression, Shape, Unary, accumulation_dtype, dtype_name

BLOCK = 1 << 18
"""Elements of a wide block: 1 MiB of float32, which stays in the cache."""


@dataclass(frozen=True)
class Einsum(Expression):
    """``torch.einsum(equation, *factors)``: matrix and Kronecker products, scaled channels, sums over axes.

    Letters for every axis, ``->`` written out; the dtype is the first factor's.
    """

    equation: str
    factors: tuple[Expression, ...]
    shape: Shape = field(init=False, compare=False)

    def __post_init__(self) -> None:
        inputs, arrow, output = self.equation.partition("->")
        terms = inputs.split(",")
        if not arrow or len(terms) != len(self.factors) or not self.factors:
            raise ValueError(f"{self.equation!r} is not an equation of {len(self.factors)} factors")
        sizes: dict[str, int] = {}
        for term, factor in zip(terms, self.factors, strict=True):
            if len(term) != len(factor.shape):
                raise ValueError(f"{term!r} of {self.equation!r} does not name the axes of {list(factor.shape)}")
            for letter, size in zip(term, factor.shape, strict=True):
                if sizes.setdefault(letter, size) != size:
                    raise ValueError(f"axis {letter!r} of {self.equation!r} is both {sizes[letter]} and {size}")
        if not set(output) <= set(sizes):
            raise ValueError(f"{self.equation!r} makes an axis from nothing")
        object.__setattr__(self, "shape", tuple(sizes[letter] for letter in output))

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.factors[0].dtype

    def evaluate(self) -> Tensor:
        wide = accumulation_dtype(self.dtype)
        return torch.einsum(self.equation, *(factor.evaluate().to(wide) for factor in self.factors)).to(self.dtype)

    def operands(self) -> tuple[Expression, ...]:
        return self.factors

    def __str__(self) -> str:
        return f"einsum({self.equation}, {', '.join(map(str, self.factors))})"


@dataclass(frozen=True)
class Update(Expression):
    """``base + left @ right``, where ``base`` [m, n…] is seen as a matrix [m, n].

    Made in blocks of rows, so that nothing wide of ``base``'s size is ever held: a sum with a product would hold
    three, and a merge's peak is what its largest matrix takes.
    """

    base: Expression
    left: Expression
    right: Expression

    def __post_init__(self) -> None:
        shape, left, right = self.base.shape, self.left.shape, self.right.shape
        fits = len(shape) > 1 and len(left) == len(right) == 2 and left[1] == right[0]
        if not fits or (left[0], right[1]) != (shape[0], prod(shape[1:])):
            raise ValueError(f"cannot add the product of {list(left)} and {list(right)} to {list(shape)}")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.base.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.base.shape

    def evaluate(self) -> Tensor:
        wide = accumulation_dtype(self.dtype)
        base, result = self.base.evaluate(), torch.empty(self.shape, dtype=self.dtype)
        left, right = self.left.evaluate().to(wide), self.right.evaluate().to(wide)
        rows = max(1, BLOCK // right.shape[1])
        matrices = (base.reshape(left.shape[0], -1), left, result.view(left.shape[0], -1))
        for start in range(0, left.shape[0], rows):
            block, factor, target = (matrix[start : start + rows] for matrix in matrices)
            target.copy_(torch.addmm(block.to(wide), factor, right))
        return result

    def operands(self) -> tuple[Expression, ...]:
        return (self.base, self.left, self.right)

    def __str__(self) -> str:
        return f"update({self.base}, {self.left}, {self.right})"


@dataclass(frozen=True)
class Power(Unary):
    """``(operand + offset) ** exponent``, element by element: ``-0.5`` and ε for a normalisation's 1/σ."""

    exponent: float
    offset: float = 0.0

    def evaluate(self) -> Tensor:
        value = self.operand.evaluate().to(accumulation_dtype(self.dtype))
        return (value + self.offset).pow(self.exponent).to(self.dtype)

    def __str__(self) -> str:
        return f"power({self.operand}, {self.exponent!r}, {self.offset!r})"


@dataclass(frozen=True)
class Pad(Unary):
    """``operand`` with ``before[d]`` zeros in front of it and ``after[d]`` behind it along each dimension."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def __post_init__(self) -> None:
        rank = len(self.operand.shape)
        if len(self.before) != rank or len(self.after) != rank or min((*self.before, *self.after), default=0) < 0:
            raise ValueError(f"cannot pad {list(self.operand.shape)} by {self.before} and {self.after}")

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return tuple(b + size + a for b, size, a in zip(self.before, self.operand.shape, self.after, strict=True))

    def evaluate(self) -> Tensor:
        pairs = [amount for pair in zip(reversed(self.before), reversed(self.after), strict=True) for amount in pair]
        return pad(self.operand.evaluate(), pairs)

    def __str__(self) -> str:
        return f"pad({self.operand}, {list(self.before)}, {list(self.after)})"


@dataclass(frozen=True)
class Eye(Expression):
    """The identity matrix of ``size``."""

    size: int
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (self.size, self.size)

    def evaluate(self) -> Tensor:
        return torch.eye(self.size, dtype=self.dtype)

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"eye({self.size}, {dtype_name(self.dtype)})"


@dataclass(frozen=True)
class Full(Expression):
    """``value`` everywhere."""

    shape: Shape
    value: float
    dtype: torch.dtype

    def evaluate(self) -> Tensor:
        return torch.full(self.shape, self.value, dtype=self.dtype)

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"full({list(self.shape)}, {self.value!r}, {dtype_name(self.dtype)})"
