"""What a dimension is made of: atoms, products of them (heads × head-dim), concatenations of them (skips)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import sympy

Size = Any
"""A whole number, or a SymPy expression where a dimension is open."""


@dataclass(eq=False)
class Atom:
    """A dimension of which nothing is known inside. It may turn out to be more: then it is ``bound`` to that."""

    size: Size
    bound: Structure | None = None

    def __repr__(self) -> str:
        return f"{self.size}" if self.bound is None else repr(resolved(self))


@dataclass(frozen=True, eq=False)
class Product:
    """Row-major: the last part runs fastest. Without parts it is :data:`UNIT`, a dimension of size 1."""

    parts: tuple[Structure, ...]

    @property
    def size(self) -> Size:
        return prod(part.size for part in self.parts)

    def __repr__(self) -> str:
        return " × ".join(f"({p!r})" if isinstance(p, Concatenation) else repr(p) for p in map(resolved, self.parts))


@dataclass(frozen=True, eq=False)
class Concatenation:
    """Parts after one another."""

    parts: tuple[Structure, ...]

    @property
    def size(self) -> Size:
        return sum(part.size for part in self.parts)

    def __repr__(self) -> str:
        return " + ".join(repr(resolved(part)) for part in self.parts)


Structure = Atom | Product | Concatenation
UNIT = Product(())


def resolved(structure: Structure) -> Structure:
    """``structure``, past the atoms that were bound to something."""
    while isinstance(structure, Atom) and structure.bound is not None:
        if isinstance(structure.bound, Atom) and structure.bound.bound is not None:
            structure.bound = structure.bound.bound
        structure = structure.bound
    return structure


def factors(structure: Structure) -> list[Structure]:
    """The parts of a product, none of which is one; of anything else, itself."""
    structure = resolved(structure)
    if not isinstance(structure, Product):
        return [structure]
    return [factor for part in structure.parts for factor in factors(part)]


def terms(structure: Structure) -> list[Structure]:
    """The parts of a concatenation, none of which is one; of anything else, itself."""
    structure = resolved(structure)
    if not isinstance(structure, Concatenation):
        return [structure]
    return [term for part in structure.parts for term in terms(part)]


def product(parts: list[Structure]) -> Structure:
    """``parts`` multiplied, in the simplest form."""
    flat = [factor for part in parts for factor in factors(part)]
    return flat[0] if len(flat) == 1 else Product(tuple(flat)) if flat else UNIT


def concatenation(parts: list[Structure]) -> Structure:
    """``parts`` after one another, in the simplest form."""
    flat = [term for part in parts for term in terms(part)]
    return flat[0] if len(flat) == 1 else Concatenation(tuple(flat))


def atoms(structure: Structure) -> Iterator[Atom]:
    """Every atom in ``structure``, from the left; one that stands in it twice comes twice."""
    structure = resolved(structure)
    if isinstance(structure, Atom):
        yield structure
        return
    for part in structure.parts:
        yield from atoms(part)


def is_unit(structure: Structure) -> bool:
    """Whether a dimension has one element and always will."""
    structure = resolved(structure)
    return isinstance(structure, Product) and not factors(structure)


Kept = dict[Atom, tuple[int, ...]]
"""Which indices of an atom stay, ascending; all of those that are not named."""


def sized(structure: Structure, size: Callable[[Atom], Size]) -> Size:
    """The size of ``structure`` when its atoms have those that ``size`` says."""
    structure = resolved(structure)
    if isinstance(structure, Atom):
        return size(structure)
    sizes = [sized(part, size) for part in structure.parts]
    return sum(sizes) if isinstance(structure, Concatenation) else prod(sizes)


def kept_size(structure: Structure, kept: Kept) -> Size:
    """The size of ``structure`` when only ``kept`` stays."""
    return sized(structure, lambda atom: len(kept[atom]) if atom in kept else atom.size)


def kept_indices(structure: Structure, kept: Kept) -> list[int]:
    """The indices of ``structure``, whose size is a number, that stay when only ``kept`` does."""
    structure = resolved(structure)
    if isinstance(structure, Atom):
        return list(kept.get(structure, range(structure.size)))
    if isinstance(structure, Concatenation):
        starts = [0, *accumulate(part.size for part in structure.parts)]
        pairs = zip(starts, structure.parts, strict=False)
        return [start + index for start, part in pairs for index in kept_indices(part, kept)]
    found = [0]
    for part in structure.parts:
        inner = kept_indices(part, kept)
        found = [index * part.size + other for index in found for other in inner]
    return found


def is_cut(structure: Structure, kept: Kept) -> bool:
    """Whether anything of ``structure`` goes."""
    return any(atom in kept for atom in atoms(structure))


def quotient(whole: Size, part: Size) -> Size | None:
    """``whole / part`` where it is a whole number whatever open sizes are; ``None`` elsewhere."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    ratio = sympy.cancel(sympy.sympify(whole) / part)
    if sympy.fraction(sympy.together(ratio))[1] != 1:
        return None
    return int(ratio) if ratio.is_number else ratio
