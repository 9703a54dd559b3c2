"""Sizes as a user writes them: ``8`` is fixed, ``1..4`` stays open, ``64..512:8`` stays open in steps of 8."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optpass.errors import UserError

SPAN = re.compile(r"(\d+)\.\.(\d+)(?::(\d+))?")
PREFERRED = 64
"""The largest power of two that an example size is kept a multiple of: deep models halve their input often."""


@dataclass(frozen=True)
class Span:
    """An open size from ``minimum`` to ``maximum``; ``step`` 0 lets the model say in which steps."""

    minimum: int
    maximum: int
    step: int = 0

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum and not (self.step and (size - self.minimum) % self.step)

    def __str__(self) -> str:
        return f"{self.minimum}..{self.maximum}{f':{self.step}' if self.step else ''}"


Size = int | Span
Sizes = Mapping[str, Sequence[Size]]
"""Sizes by the name of an input; or one size by the name of a dimension that inputs share."""


def size_from(value: int | str, owner: str) -> Size:
    """A size of a recipe or a command.

    Raises:
        UserError: it is neither a positive whole number nor a range of them.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        if value.isascii() and value.isdigit() and int(value) > 0:
            return int(value)
        if found := SPAN.fullmatch(value):
            return _span(*(int(part or 0) for part in found.groups()), owner=owner)
    raise UserError(f"{owner}: a size is a positive whole number, or a range as 1..4 or 64..512:8; got {value!r}")


def _span(minimum: int, maximum: int, step: int, *, owner: str) -> Size:
    if not 1 <= minimum <= maximum:
        raise UserError(f"{owner}: the range {minimum}..{maximum} is empty or begins below 1")
    if step:
        maximum -= (maximum - minimum) % step
    return minimum if minimum == maximum else Span(minimum, maximum, step)


def as_written(sizes: Sequence[Size]) -> list[int | str]:
    """Sizes as JSON and YAML have them."""
    return [size if isinstance(size, int) else str(size) for size in sizes]


def example_size(span: Span, default: int, taken: set[int]) -> int:
    """What an open dimension is captured at: in its range, not 1, and no other dimension's size if that can be.

    torch.export decides a comparison of sizes by the example, so two equal ones would be tied together and
    a size of 1 would be taken for one that broadcasts.
    """
    base = default if default in span else span.minimum
    align = span.step or _power_of_two(base)
    start = base if span.step else -(-span.minimum // align) * align
    aligned = [base, *range(start, span.maximum + 1, align)]
    every = range(span.minimum, span.maximum + 1, span.step or 1)
    for candidates in (aligned, every):
        for size in candidates:
            if size in span and size > 1 and size not in taken:
                return size
    return span.maximum


def _power_of_two(size: int) -> int:
    return min(size & -size, PREFERRED)
