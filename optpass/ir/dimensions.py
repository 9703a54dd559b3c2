"""Open dimensions: named sizes that a caller chooses per call, within ranges that the engine declares.

A graph that was captured with open dimensions works for every size in their ranges. What its model asks
beyond ranges (relations between dimensions) is kept as guards; a call outside either is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optpass.errors import UserError
from optpass.ir.guards import Guard, identifier, size_at

Size = int | str
"""A fixed size, or an expression over the names of open dimensions (for inputs a name, or a multiple of one)."""


@dataclass(frozen=True)
class Dimension:
    """Sizes ``minimum``, ``minimum + step`` … up to ``maximum``; ``example`` is the one it was captured at.

    ``symbol`` is what stands for it in symbolic shapes: size = step · symbol + minimum mod step.
    """

    name: str
    minimum: int
    maximum: int
    step: int = 1
    example: int = 0
    symbol: str = ""

    @property
    def offset(self) -> int:
        return self.minimum % self.step

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum and (size - self.minimum) % self.step == 0

    def __str__(self) -> str:
        return f"{self.minimum}..{self.maximum}{f' in steps of {self.step}' if self.step > 1 else ''}"

    def samples(self) -> list[int]:
        """A few sizes: both ends, their neighbours, the middle and the example."""
        count = (self.maximum - self.minimum) // self.step
        steps = {0, 1, count // 2, count - 1, count}
        found = {self.minimum + self.step * n for n in steps if 0 <= n <= count}
        return sorted(found | ({self.example} if self.example in self else set()))

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "step": self.step,
            "example": self.example,
            "symbol": self.symbol,
        }


@dataclass(frozen=True)
class Dimensions:
    """The open dimensions of a graph, and the guards between them. Empty for a graph of fixed sizes."""

    items: tuple[Dimension, ...] = ()
    guards: tuple[str, ...] = ()
    by_name: Mapping[str, Dimension] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {item.name: item for item in self.items})

    def __iter__(self) -> Iterator[Dimension]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def examples(self) -> dict[str, int]:
        """The size that each was captured at."""
        return {item.name: item.example for item in self.items}

    def alternatives(self) -> list[dict[str, int]]:
        """Sizes of all dimensions together that no guard refuses, far from the examples: the ends of their ranges."""
        corners = [{item.name: end(item) for item in self.items} for end in (_smallest, _largest)]
        return [sizes for sizes in corners if self.items and not self._broken(sizes)]

    def resolve(self, shapes: Iterable[tuple[str, Sequence[Size], Sequence[int]]]) -> dict[str, int]:
        """The sizes that a call chooses, from ``(input, declared shape, given shape)`` of equal rank each.

        Raises:
            UserError: two inputs disagree, a size is outside its range, or a guard does not hold.
        """
        found: dict[str, int] = {}
        said_by: dict[str, str] = {}
        following: list[tuple[str, str, int]] = []
        for name, declared, given in shapes:
            for axis, (size, actual) in enumerate(zip(declared, given, strict=True)):
                if isinstance(size, int):
                    continue
                place = f"{name}[{axis}]"
                if size not in self.by_name:
                    following.append((place, size, actual))
                    continue
                if found.setdefault(size, actual) != actual:
                    raise UserError(
                        f"inputs {said_by[size]} and {place} disagree on {size}: {found[size]} and {actual}"
                    )
                said_by.setdefault(size, place)
        for size, actual in found.items():
            if actual not in self.by_name[size]:
                raise UserError(
                    f"input {said_by[size]}: {size} is {actual}, and the engine was built for {self.by_name[size]}"
                )
        for place, size, actual in following:
            if actual != size_at(size, {**self.examples, **found}):
                raise UserError(f"input {place} is {actual}, and follows from the other inputs' sizes: {size}")
        if broken := self._broken(found):
            listed = ", ".join(f"{name}={size}" for name, size in found.items())
            raise UserError(f"the engine cannot take {listed}: the model needs {broken}")
        return found

    def _broken(self, sizes: Mapping[str, int]) -> str:
        known = {identifier(name): size for name, size in sizes.items()}
        return next((guard for guard in self.guards if not Guard(guard).holds(known)), "")

    @staticmethod
    def joined(each: Iterable[Dimensions]) -> Dimensions:
        """Those of several graphs of one capture, each dimension and guard once."""
        parts = list(each)
        items = {item.name: item for part in parts for item in part}
        guards = dict.fromkeys(guard for part in parts for guard in part.guards)
        return Dimensions(tuple(items.values()), tuple(guards))

    def restricted(self, symbols: Collection[str]) -> Dimensions:
        """The dimensions of ``symbols`` alone, with the guards that speak of no other."""
        items = tuple(item for item in self.items if item.symbol in symbols)
        known = {identifier(item.name) for item in items}
        return Dimensions(items, tuple(guard for guard in self.guards if Guard(guard).names <= known))

    def as_json(self) -> dict[str, Any]:
        return {"items": [item.as_json() for item in self.items], "guards": list(self.guards)}

    @staticmethod
    def from_json(json: Mapping[str, Any]) -> Dimensions:
        """
        Raises:
            UserError: a guard is no comparison of sizes.
            KeyError, TypeError: the record is damaged.
        """
        guards = tuple(str(guard) for guard in json["guards"])
        for guard in guards:
            Guard(guard)
        return Dimensions(tuple(Dimension(**item) for item in json["items"]), guards)


FIXED = Dimensions()
"""No size is open."""


def _smallest(item: Dimension) -> int:
    return item.minimum


def _largest(item: Dimension) -> int:
    return item.maximum - (item.maximum - item.minimum) % item.step
