"""Lazy weights, any operator: what constant folding leaves of a part of a graph that reads weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optpass.ir.weights import Expression, Shape, dtype_name


@dataclass(frozen=True)
class Computed(Expression):
    """``operator(*args, **kwargs)`` (``[index]`` of it, where it gives several), in the dtypes that the graph had.

    ``args`` are literals, tuples and expressions; ``kwargs`` pairs of a name and such a value. An operand
    that stands in it twice is evaluated twice, so whoever nests these bounds the depth.
    """

    operator: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    shape: Shape
    dtype: torch.dtype
    index: int | None = None

    def evaluate(self) -> Tensor:
        with torch.no_grad():
            result = self.operator(*map(_evaluated, self.args), **{name: _evaluated(v) for name, v in self.kwargs})
        value: Tensor = result if self.index is None else result[self.index]
        return value.contiguous()

    def operands(self) -> tuple[Expression, ...]:
        return tuple(_expressions((self.args, self.kwargs)))

    def __str__(self) -> str:
        named = (f"{name}={_text(value)}" for name, value in self.kwargs)
        called = f"{self.operator}({', '.join([*map(_text, self.args), *named])})"
        return called if self.index is None else f"{called}[{self.index}]"


def _evaluated(value: Any) -> Any:
    if isinstance(value, Expression):
        return value.evaluate()
    return list(map(_evaluated, value)) if isinstance(value, tuple) else value


def _expressions(value: Any) -> Iterator[Expression]:
    if isinstance(value, Expression):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _expressions(item)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return dtype_name(value) if isinstance(value, torch.dtype) else str(value)
