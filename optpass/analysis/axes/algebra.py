"""Union-find over structures: what must be cut together is unified, what an operator takes apart is refined.

Statements about dimensions (unified, fixed, normalised over) are made while operators are walked, and keep
holding for whatever the atoms in them turn out to be made of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from optpass.analysis.axes.structure import (
    UNIT,
    Atom,
    Concatenation,
    Size,
    Structure,
    atoms,
    concatenation,
    factors,
    product,
    quotient,
    resolved,
    terms,
)


@dataclass(frozen=True)
class Statement:
    """``structure`` may not be cut, for ``reason``."""

    structure: Structure
    reason: str


@dataclass
class Algebra:
    """Dimensions, and what is known about them; ``place`` says in reasons where a statement comes from."""

    fixed: list[Statement] = field(default_factory=list)
    place: str = ""

    def new(self, size: Size) -> Structure:
        """A dimension of which nothing is known."""
        return UNIT if size == 1 and isinstance(size, int) else Atom(size)

    def fix(self, structure: Structure, reason: str) -> Structure:
        """No element of ``structure`` may be cut away."""
        self.fixed.append(Statement(structure, f"{reason} ({self.place})" if self.place else reason))
        return structure

    def fixed_new(self, size: Size, reason: str) -> Structure:
        return self.fix(self.new(size), reason)

    def unify(self, one: Structure, other: Structure) -> Structure:
        """Element i of ``one`` and of ``other`` stay or go together; both have one size."""
        one, other = resolved(one), resolved(other)
        if one is other:
            return one
        if one.size != other.size:
            self.fix(one, f"meets a dimension of size {other.size}")
            self.fix(other, f"meets a dimension of size {one.size}")
        elif isinstance(one, Atom):
            self._bind(one, other)
        elif isinstance(other, Atom):
            self._bind(other, one)
        elif isinstance(one, Concatenation) and isinstance(other, Concatenation):
            self._walk_terms(one, other)
        else:
            self._walk_factors(one, other)
        return resolved(one)

    def split(self, structure: Structure, outer: Size, inner: Size) -> tuple[Structure, Structure]:
        """``structure`` as ``outer`` × ``inner``, whose product is its size."""
        structure = resolved(structure)
        if isinstance(structure, Atom):
            pair = (self.new(outer), self.new(inner))
            structure.bound = product(list(pair))
            return pair
        if isinstance(structure, Concatenation):
            return self._split_terms(structure, outer, inner)
        first, second = self.reshaped([structure], [outer, inner])
        return first, second

    def cut(self, structure: Structure, sizes: Sequence[Size]) -> list[Structure]:
        """``structure`` as a concatenation of parts of ``sizes``, whose sum is its size."""
        pending, parts = deque(terms(structure)), []
        for size in sizes:
            taken: list[Structure] = []
            while size != 0:
                if not pending:
                    return self._seam(structure, sizes)
                term = _next_term(pending)
                if term.size != size and not _is_less(term.size, size):
                    pair = self._cut_term(term, size) if _is_less(size, term.size) else None
                    if pair is None:
                        return self._seam(structure, sizes)
                    term = pair[0]
                    pending.appendleft(pair[1])
                taken.append(term)
                size = size - term.size
            parts.append(concatenation(taken) if taken else Concatenation(()))
        return parts

    def reshaped(self, dims: Sequence[Structure], sizes: Sequence[Size]) -> list[Structure]:
        """The dimensions of a row-major reshape of ``dims`` to ``sizes``.

        Where a new dimension begins inside an old one that it does not divide, everything from there to the next
        common border is fixed.
        """
        result: list[Structure] = []
        for old, new in _aligned([dim.size for dim in dims], sizes):
            block, wanted = dims[old[0] : old[1]], sizes[new[0] : new[1]]
            result += self._block(list(block), list(wanted))
        return result

    def _bind(self, atom: Atom, structure: Structure) -> None:
        if any(atom is part for part in atoms(structure)):
            self.fix(structure, "is a part of itself")
        else:
            atom.bound = structure

    def _walk_factors(self, one: Structure, other: Structure) -> None:
        left, right = deque(factors(one)), deque(factors(other))
        while left and right:
            a, b = left.popleft(), right.popleft()
            if a.size == b.size:
                self.unify(a, b)
            elif (inner := quotient(a.size, b.size)) is not None:
                outer, rest = self.split(a, b.size, inner)
                self.unify(outer, b)
                left.extendleft(reversed(factors(rest)))
            elif (inner := quotient(b.size, a.size)) is not None:
                outer, rest = self.split(b, a.size, inner)
                self.unify(a, outer)
                right.extendleft(reversed(factors(rest)))
            else:
                for rest in (a, b, *left, *right):
                    self.fix(rest, f"sizes {a.size} and {b.size} share no border")
                return

    def _walk_terms(self, one: Concatenation, other: Concatenation) -> None:
        left, right = deque(terms(one)), deque(terms(other))
        while left and right:
            a, b = _next_term(left), _next_term(right)
            if a.size == b.size:
                self.unify(a, b)
                continue
            longer, shorter, queue = (a, b, left) if _is_less(b.size, a.size) else (b, a, right)
            pair = self._cut_term(longer, shorter.size) if _is_less(shorter.size, longer.size) else None
            if pair is None:
                for rest in (a, b, *left, *right):
                    self.fix(rest, f"parts of {a.size} and {b.size} share no seam")
                return
            self.unify(pair[0], shorter)
            queue.appendleft(pair[1])

    def _cut_term(self, term: Structure, size: Size) -> tuple[Structure, Structure] | None:
        """``term`` before and after its first ``size`` elements."""
        rest = term.size - size
        if isinstance(term, Atom):
            pair = (self.new(size), self.new(rest))
            term.bound = Concatenation(pair)
            return pair
        outer, *inner = factors(term)
        row = product(inner)
        if not inner or (rows := quotient(size, row.size)) is None:
            return None
        first, second = self.cut(outer, [rows, outer.size - rows])
        return product([first, row]), product([second, row])

    def _split_terms(self, structure: Concatenation, outer: Size, inner: Size) -> tuple[Structure, Structure]:
        """Every part is some rows of one and the same inner dimension."""
        parts, rows = terms(structure), []
        counts = [quotient(part.size, inner) for part in parts]
        if any(count is None for count in counts):
            reason = f"rows of {inner} cross the seam between {' and '.join(str(part.size) for part in parts)}"
            self.fix(structure, reason)
            return self.fixed_new(outer, reason), self.fixed_new(inner, reason)
        row = self.new(inner)
        for part, count in zip(parts, counts, strict=True):
            first, second = self.split(part, count, inner)
            self.unify(second, row)
            rows.append(first)
        return concatenation(rows), row

    def _block(self, dims: list[Structure], sizes: list[Size]) -> list[Structure]:
        if len(dims) == 1 and len(sizes) == 1:
            return dims
        pending, result = deque(factor for dim in dims for factor in factors(dim)), []
        for size in sizes:
            taken: list[Structure] = []
            while size != 1:
                if not pending:
                    return self._unaligned(dims, sizes)
                factor = pending.popleft()
                if (rest := quotient(size, factor.size)) is not None:
                    size = rest
                elif (inner := quotient(factor.size, size)) is not None:
                    factor, row = self.split(factor, size, inner)
                    pending.extendleft(reversed(factors(row)))
                    size = 1
                else:
                    return self._unaligned(dims, sizes)
                taken.append(factor)
            result.append(product(taken))
        return result

    def _unaligned(self, dims: list[Structure], sizes: list[Size]) -> list[Structure]:
        before = ", ".join(str(dim.size) for dim in dims)
        reason = f"reshaped from [{before}] to [{', '.join(map(str, sizes))}], which share no border"
        for dim in dims:
            self.fix(dim, reason)
        return [self.fixed_new(size, reason) for size in sizes]

    def _seam(self, structure: Structure, sizes: Sequence[Size]) -> list[Structure]:
        shown = ", ".join(str(size) for size in sizes if size != 0)
        reason = f"cut into {shown}, across what it is made of ({structure!r})"
        self.fix(structure, reason)
        return [self.fixed_new(size, reason) if size != 0 else Concatenation(()) for size in sizes]


def _next_term(pending: deque[Structure]) -> Structure:
    """Take the first term of ``pending``: one that stands there twice may be a concatenation by now."""
    first, *rest = terms(pending.popleft())
    pending.extendleft(reversed(rest))
    return first


def _is_less(one: Size, other: Size) -> bool:
    """Whether ``one`` is smaller whatever open sizes are."""
    gap = other - one
    return bool(gap > 0) if isinstance(gap, int) else bool(gap.is_positive)


def _aligned(old: Sequence[Size], new: Sequence[Size]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The smallest pieces of both shapes that have equally many elements: positions from, to."""
    pieces, i, j, from_i, from_j = [], 0, 0, 0, 0
    before: Size = 1
    after: Size = 1
    borders: dict[Size, int] = {}
    for i, size in enumerate(old, start=1):
        before = before * size
        borders.setdefault(before, i)
    for j, size in enumerate(new, start=1):
        after = after * size
        at = borders.get(after)
        if at is None or at <= from_i or j == len(new):
            continue
        pieces.append(((from_i, at), (from_j, j)))
        from_i, from_j = at, j
    if from_i < len(old) or from_j < len(new):
        pieces.append(((from_i, len(old)), (from_j, len(new))))
    return pieces
