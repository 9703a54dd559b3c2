"""Lazy weights: names mapped to expressions over memory-mapped files, evaluated one tensor at a time.

A pass never reads a weight; it builds an expression. Whoever writes the result (the safetensors
writer, the ONNX target) evaluates the expressions one after another, so peak memory is the largest
single tensor and not the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from optpass.errors import MissingValuesError, WeightError, nearest
from optpass.ir.hashing import tensor_digest

Shape = tuple[int, ...]
LARGEST = 2048
"""Expressions in one beyond which a rewrite begins another; one that stands in it twice is evaluated twice."""


class Expression(ABC):
    """A tensor that has a shape and a dtype now and values when :meth:`evaluate` is called."""

    shape: Shape
    dtype: torch.dtype

    @abstractmethod
    def evaluate(self) -> Tensor:
        """The values, a CPU tensor of ``shape`` and ``dtype``; never cached.

        Raises:
            MissingValuesError: a leaf was captured structure-only.
            WeightError: a file under a leaf is damaged.
        """

    @abstractmethod
    def operands(self) -> tuple[Expression, ...]:
        """The expressions that this one is built from; empty for a leaf."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def has_values(self) -> bool:
        """False when a leaf below is :class:`Absent`."""
        return all(operand.has_values for operand in self.operands())


@dataclass(frozen=True)
class Absent(Expression):
    """A weight of a checkpoint that was captured without weights (structure only)."""

    name: str
    shape: Shape
    dtype: torch.dtype

    def evaluate(self) -> Tensor:
        raise MissingValuesError(
            f"weight {self.name!r} has no values: the checkpoint was captured structure-only; "
            "give a folder with weights, or pass --structure-only to ask for the report alone"
        )

    def operands(self) -> tuple[Expression, ...]:
        return ()

    @property
    def has_values(self) -> bool:
        return False

    def __str__(self) -> str:
        return "absent"


@dataclass(frozen=True, eq=False)
class Constant(Expression):
    """A tensor held in memory: a baked buffer or a small value that a pass computed.

    ``computed`` marks what the model's code made (frequencies, position tables, literals): data, not a parameter.
    """

    value: Tensor
    computed: bool = False
    shape: Shape = field(init=False)
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", self.value.detach().cpu().contiguous())
        object.__setattr__(self, "shape", tuple(self.value.shape))
        object.__setattr__(self, "dtype", self.value.dtype)

    def evaluate(self) -> Tensor:
        return self.value

    def operands(self) -> tuple[Expression, ...]:
        return ()

    def __str__(self) -> str:
        return f"constant({tensor_digest(self.value)[:12]})"


@dataclass(frozen=True)
class Unary(Expression):
    """What is made from one ``operand``; of its dtype and shape, where a subclass says nothing else."""

    operand: Expression

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.operand.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.operand.shape

    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)


@dataclass(frozen=True)
class Cast(Expression):
    """``operand`` in another dtype, rounded to nearest."""

    operand: Expression
    dtype: torch.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.operand.shape

    def evaluate(self) -> Tensor:
        return self.operand.evaluate().to(self.dtype)

    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)

    def __str__(self) -> str:
        return f"cast({self.operand}, {dtype_name(self.dtype)})"


@dataclass(frozen=True)
class Select(Unary):
    """``operand`` at ``indices`` along ``dim``: what remains after cutting an axis."""

    dim: int
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_dimension(self.dim, self.operand)
        size = self.operand.shape[self.dim]
        if any(not 0 <= index < size for index in self.indices):
            raise ValueError(f"an index is outside dimension {self.dim} of size {size}")

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        shape = self.operand.shape
        dim = self.dim % len(shape)
        return (*shape[:dim], len(self.indices), *shape[dim + 1 :])

    def evaluate(self) -> Tensor:
        index = torch.tensor(self.indices, dtype=torch.long)
        return self.operand.evaluate().index_select(self.dim, index)

    def __str__(self) -> str:
        return f"select({self.operand}, dim={self.dim}, {compress(self.indices)})"


@dataclass(frozen=True)
class Concat(Expression):
    """``parts`` joined along ``dim``; they agree in dtype and in every other dimension."""

    parts: tuple[Expression, ...]
    dim: int

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("nothing to concatenate")
        first = self.parts[0]
        _check_dimension(self.dim, first)
        for part in self.parts[1:]:
            if part.dtype != first.dtype or self._others(part) != self._others(first):
                raise ValueError(
                    f"cannot concatenate {dtype_name(part.dtype)}{list(part.shape)} to"
                    f" {dtype_name(first.dtype)}{list(first.shape)} along {self.dim}"
                )

    def _others(self, part: Expression) -> list[int]:
        """The rank and the sizes that all parts share."""
        joined = self.dim % len(self.parts[0].shape)
        return [len(part.shape), *(size for i, size in enumerate(part.shape) if i != joined)]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.parts[0].dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        shape = self.parts[0].shape
        dim = self.dim % len(shape)
        joined = sum(part.shape[dim] for part in self.parts)
        return (*shape[:dim], joined, *shape[dim + 1 :])

    def evaluate(self) -> Tensor:
        return torch.cat([part.evaluate() for part in self.parts], self.dim)

    def operands(self) -> tuple[Expression, ...]:
        return self.parts

    def __str__(self) -> str:
        return f"concat([{', '.join(map(str, self.parts))}], dim={self.dim})"


@dataclass(frozen=True)
class Reshape(Expression):
    """``operand`` with the same values, row-major, under another shape."""

    operand: Expression
    shape: Shape

    def __post_init__(self) -> None:
        if prod(self.shape) != self.operand.numel or any(size < 0 for size in self.shape):
            raise ValueError(f"cannot reshape {self.operand.shape} to {self.shape}")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.operand.dtype

    def evaluate(self) -> Tensor:
        return self.operand.evaluate().reshape(self.shape)

    def operands(self) -> tuple[Expression, ...]:
        return (self.operand,)

    def __str__(self) -> str:
        return f"reshape({self.operand}, {list(self.shape)})"


@dataclass(frozen=True)
class Permute(Unary):
    """``operand`` with its dimensions in the order ``dims``."""

    dims: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.dims) != list(range(len(self.operand.shape))):
            raise ValueError(f"{self.dims} is not an order of {len(self.operand.shape)} dimensions")

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        shape = self.operand.shape
        return tuple(shape[dim] for dim in self.dims)

    def evaluate(self) -> Tensor:
        return self.operand.evaluate().permute(self.dims).contiguous()

    def __str__(self) -> str:
        return f"permute({self.operand}, {list(self.dims)})"


@dataclass(frozen=True)
class Scale(Unary):
    """``operand · factor`` for a scalar, computed in float32 and rounded once."""

    factor: float

    def evaluate(self) -> Tensor:
        value = self.operand.evaluate()
        return (value.to(accumulation_dtype(self.dtype)) * self.factor).to(self.dtype)

    def __str__(self) -> str:
        return f"scale({self.operand}, {self.factor!r})"


@dataclass(frozen=True)
class Sum(Expression):
    """``left + right`` of one shape, computed in float32 (float64 stays) and rounded once to ``left``'s dtype."""

    left: Expression
    right: Expression

    def __post_init__(self) -> None:
        if self.left.shape != self.right.shape:
            raise ValueError(f"cannot add {self.right.shape} to {self.left.shape}")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.left.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.left.shape

    def evaluate(self) -> Tensor:
        wide = accumulation_dtype(self.dtype)
        return (self.left.evaluate().to(wide) + self.right.evaluate().to(wide)).to(self.dtype)

    def operands(self) -> tuple[Expression, ...]:
        return (self.left, self.right)

    def __str__(self) -> str:
        return f"sum({self.left}, {self.right})"


@dataclass(frozen=True)
class Product(Expression):
    """The matrix product ``left @ right`` of two 2-d operands, rounded once to ``left``'s dtype."""

    left: Expression
    right: Expression

    def __post_init__(self) -> None:
        left, right = self.left.shape, self.right.shape
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise ValueError(f"cannot multiply matrices {left} and {right}")

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.left.dtype

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return (self.left.shape[0], self.right.shape[1])

    def evaluate(self) -> Tensor:
        wide = accumulation_dtype(self.dtype)
        return (self.left.evaluate().to(wide) @ self.right.evaluate().to(wide)).to(self.dtype)

    def operands(self) -> tuple[Expression, ...]:
        return (self.left, self.right)

    def __str__(self) -> str:
        return f"product({self.left}, {self.right})"


def with_operands(expression: Expression, change: Callable[[Expression], Expression]) -> Expression:
    """``expression`` over what ``change`` makes of each of its operands; itself where it has none."""
    if not is_dataclass(expression) or not expression.operands():
        return expression

    def changed(value: Any) -> Any:
        if isinstance(value, Expression):
            return change(value)
        return tuple(map(changed, value)) if isinstance(value, tuple) else value

    return replace(expression, **{f.name: changed(getattr(expression, f.name)) for f in fields(expression) if f.init})


def is_larger(expression: Expression, limit: int = LARGEST) -> bool:
    """Whether evaluating ``expression`` evaluates more than ``limit`` of them; what stands in it twice counts twice."""
    pending, count = [expression], 0
    while pending and count <= limit:
        pending.extend(pending.pop().operands())
        count += 1
    return count > limit


class WeightStore(Mapping[str, Expression]):
    """Checkpoint names → expressions. Immutable: a change gives a new store that shares the rest."""

    def __init__(self, expressions: Mapping[str, Expression] | None = None) -> None:
        self._expressions = dict(expressions or {})

    def __getitem__(self, name: str) -> Expression:
        try:
            return self._expressions[name]
        except KeyError:
            raise WeightError(f"no weight named {name!r}{nearest(name, self._expressions)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._expressions

    def __iter__(self) -> Iterator[str]:
        return iter(self._expressions)

    def __len__(self) -> int:
        return len(self._expressions)

    def updated(self, changes: Mapping[str, Expression]) -> WeightStore:
        """This store with ``changes`` added or put in place of what had the name."""
        return WeightStore({**self._expressions, **changes})

    def restricted(self, names: Iterable[str]) -> WeightStore:
        """Only ``names``, in this store's order."""
        kept = set(names)
        return WeightStore({n: e for n, e in self._expressions.items() if n in kept})

    @property
    def has_values(self) -> bool:
        return all(expression.has_values for expression in self._expressions.values())

    @property
    def nbytes(self) -> int:
        return sum(expression.nbytes for expression in self._expressions.values())


def _check_dimension(dim: int, operand: Expression) -> None:
    rank = len(operand.shape)
    if not -rank <= dim < rank:
        raise ValueError(f"there is no dimension {dim} in {list(operand.shape)}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower float, the dtype itself for integers."""
    if not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    return torch.float32


DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8_e4m3",
    torch.float8_e5m2: "f8_e5m2",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint16: "u16",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name used in text, manifests and messages: ``f32``, ``bf16``, ``i64``."""
    return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def dtype_from_name(name: str) -> torch.dtype:
    """The inverse of :func:`dtype_name`.

    Raises:
        WeightError: no dtype has this name.
    """
    for dtype, known in DTYPE_NAMES.items():
        if known == name:
            return dtype
    raise WeightError(f"unknown dtype {name!r}{nearest(name, DTYPE_NAMES.values())}")


def compress(indices: tuple[int, ...]) -> str:
    """``0:4`` for a run, else the list itself."""
    if indices and indices == tuple(range(indices[0], indices[0] + len(indices))):
        return f"{indices[0]}:{indices[0] + len(indices)}"
    return str(list(indices))
