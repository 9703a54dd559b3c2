"""Slots: weights whose content may be exchanged after the engine is built.

A pass that puts an adapter in wraps what it makes in a :class:`Slot`, with what stands there without one.
Targets tell where the tensors that contain slots went (:class:`Placement`); the bundle keeps the rest of
their expressions, so that another adapter's values can be written to the same places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from optpass.ir.algebra import Eye, Full
from optpass.ir.weights import Expression, Shape


@dataclass(frozen=True)
class Slot(Expression):
    """``value``, of ``base``'s shape and dtype, which can be exchanged.

    ``name`` is the weight of the original model that the content changes, ``role`` which tensor of the
    content belongs here, ``content`` names what is in it now, for people.
    """

    name: str
    role: str
    base: Expression
    value: Expression
    content: str

    def __post_init__(self) -> None:
        if self.base.shape != self.value.shape or self.base.dtype != self.value.dtype:
            raise ValueError(f"the slot {self.name!r} takes {list(self.base.shape)}, not {list(self.value.shape)}")

    @property
    def shape(self) -> Shape:  # type: ignore[override]
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.base.dtype

    def evaluate(self) -> Tensor:
        return self.value.evaluate()

    def operands(self) -> tuple[Expression, ...]:
        return (self.base, self.value)

    def __str__(self) -> str:
        return f"slot({self.name} {self.role}, {self.value})"


@dataclass(frozen=True)
class Placement:
    """Where a target wrote the values of ``expression``: ``length`` bytes at ``offset`` of ``file``, row-major.

    ``file`` is relative to the folder that the target wrote to.
    """

    file: str
    offset: int
    length: int
    expression: Expression


def slots_in(expression: Expression) -> Iterator[Slot]:
    """The slots that the values of ``expression`` depend on, from the outside in; none inside another's value."""
    if isinstance(expression, Slot):
        yield expression
        return
    for operand in expression.operands():
        yield from slots_in(operand)


def has_slot(expression: Expression) -> bool:
    """Whether the values of ``expression`` can be exchanged."""
    return next(slots_in(expression), None) is not None


def fixed_parts(expression: Expression) -> Iterator[Expression]:
    """What the values of ``expression`` are made of beside its slots' content: what is kept to make them again."""
    if isinstance(expression, Slot):
        yield expression.base
    elif not has_slot(expression):
        yield expression
    else:
        for operand in expression.operands():
            yield from fixed_parts(operand)


def kept_bytes(weights: Mapping[str, Expression]) -> int:
    """Bytes that a bundle keeps beside its engines to exchange what is in the slots of ``weights``."""
    parts = {part for item in weights.values() if has_slot(item) for part in fixed_parts(item)}
    return sum(part.nbytes for part in parts if not isinstance(part, (Eye, Full)))
