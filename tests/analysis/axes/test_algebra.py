"""Structures unified and refined: atoms, products, concatenations."""

from __future__ import annotations

import itertools

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from optpass.analysis.axes.algebra import Algebra
from optpass.analysis.axes.structure import (
    UNIT,
    Atom,
    Concatenation,
    Product,
    atoms,
    concatenation,
    factors,
    is_unit,
    kept_indices,
    kept_size,
    product,
    quotient,
    resolved,
    terms,
)


def same(one, other):
    return resolved(one) is resolved(other)


def reasons(algebra):
    """The reason of every atom that is fixed."""
    return {atom: item.reason for item in reversed(algebra.fixed) for atom in atoms(item.structure)}


def test_simplest_forms():
    a, b, c = Atom(2), Atom(3), Atom(5)
    assert product([a]) is a
    assert is_unit(product([]))
    assert factors(product([product([a, b]), c])) == [a, b, c]
    assert terms(concatenation([concatenation([a, b]), c])) == [a, b, c]
    assert concatenation([a]) is a
    assert product([a, UNIT, b]).size == 6
    assert repr(product([concatenation([a, b]), c])) == "(2 + 3) × 5"


def test_a_bound_atom_is_what_it_is_bound_to():
    algebra = Algebra()
    whole, middle, other = Atom(6), Atom(6), Atom(6)
    algebra.unify(whole, middle)
    algebra.unify(middle, other)
    heads, width = algebra.split(other, 2, 3)
    assert [factor for atom in (whole, middle) for factor in factors(atom)] == [heads, width] * 2


def test_products_are_walked_from_the_left():
    algebra = Algebra()
    one, other = product([Atom(4), Atom(6)]), product([Atom(2), Atom(12)])
    algebra.unify(one, other)
    assert [f.size for f in factors(one)] == [f.size for f in factors(other)] == [2, 2, 6]
    assert all(map(same, factors(one), factors(other)))
    assert not algebra.fixed


def test_products_without_a_border_are_fixed():
    algebra = Algebra()
    one, other = product([Atom(4), Atom(3)]), product([Atom(6), Atom(2)])
    algebra.place = "block.attn"
    algebra.unify(one, other)
    assert len(reasons(algebra)) == 4
    assert set(reasons(algebra).values()) == {"sizes 4 and 6 share no border (block.attn)"}


def test_concatenations_are_walked_by_sums():
    algebra = Algebra()
    one, other = concatenation([Atom(4), Atom(6)]), concatenation([Atom(2), Atom(8)])
    algebra.unify(one, other)
    assert [t.size for t in terms(one)] == [t.size for t in terms(other)] == [2, 2, 6]
    assert all(map(same, terms(one), terms(other)))
    assert not algebra.fixed


def test_a_seam_inside_of_a_row_is_fixed():
    algebra = Algebra()
    one, other = concatenation([product([Atom(2), Atom(3)]), Atom(4)]), concatenation([Atom(4), Atom(6)])
    algebra.unify(one, other)
    assert "parts of 6 and 4 share no seam" in reasons(algebra).values()


def test_a_product_with_a_concatenation_has_rows_in_every_part():
    """The groups of a group convolution over a skip: their number is split over both parts, their width is one."""
    algebra = Algebra()
    joined, rows = concatenation([Atom(4), Atom(8)]), product([Atom(3), Atom(4)])
    algebra.unify(joined, rows)
    assert not algebra.fixed
    first, second = terms(joined)
    outer, width = factors(rows)
    assert is_unit(factors(first)[0]) or factors(first)[0].size == 4
    assert [row.size for row in terms(outer)] == [1, 2]
    assert all(same(factors(part)[-1], width) for part in (first, second))


def test_rows_that_cross_a_seam_are_fixed():
    algebra = Algebra()
    joined = concatenation([Atom(4), Atom(8)])
    algebra.unify(joined, product([Atom(2), Atom(6)]))
    assert "rows of 6 cross the seam between 4 and 8" in reasons(algebra).values()


def test_a_part_of_itself_is_fixed():
    """x.reshape(2, 3).T.reshape(6) + x: no choice of indices is closed under it."""
    algebra = Algebra()
    whole = Atom(6)
    outer, inner = algebra.split(whole, 2, 3)
    algebra.unify(whole, product([inner, outer]))
    assert set(reasons(algebra).values()) == {"sizes 2 and 3 share no border"}
    atom = Atom(4)
    algebra.unify(atom, Product((atom, UNIT)))
    assert resolved(atom) is atom


def test_different_sizes_are_fixed_and_not_unified():
    algebra = Algebra()
    one, other = Atom(4), Atom(5)
    algebra.unify(one, other)
    assert not same(one, other)
    assert reasons(algebra) == {one: "meets a dimension of size 5", other: "meets a dimension of size 4"}


def test_what_is_fixed_stays_fixed_when_refined_or_unified():
    algebra = Algebra()
    whole, other = Atom(6), Atom(6)
    algebra.fix(whole, "is an input")
    algebra.unify(other, whole)
    parts = algebra.cut(other, [2, 4])
    assert set(reasons(algebra)) == {resolved(part) for part in parts}


@pytest.mark.parametrize(
    ("old", "new", "factored"),
    [
        ([2, 12], [2, 3, 4], [[2], [3], [4]]),
        ([2, 3, 4], [2, 12], [[2], [3, 4]]),
        ([2, 3, 4], [6, 4], [[2, 3], [4]]),
        ([2, 3, 4], [24], [[2, 3, 4]]),
        ([6, 4], [2, 12], [[2], [3, 4]]),
        ([2, 1, 6], [2, 6], [[2], [6]]),
        ([4, 6], [4, 1, 6], [[4], [], [6]]),
        ([2, 5, 6], [2, 5, 3, 2], [[2], [5], [3], [2]]),
    ],
)
def test_reshape(old, new, factored):
    algebra = Algebra()
    dims = [algebra.new(size) for size in old]
    found = algebra.reshaped(dims, new)
    assert [[factor.size for factor in factors(dim)] for dim in found] == factored
    assert [dim.size for dim in found] == new
    assert not algebra.fixed


def test_a_reshape_without_common_borders_is_fixed_only_there():
    algebra = Algebra()
    dims = [Atom(5), Atom(4), Atom(3), Atom(7)]
    found = algebra.reshaped(dims, [5, 6, 2, 7])
    assert same(found[0], dims[0])
    assert same(found[3], dims[3])
    assert set(reasons(algebra)) == {dims[1], dims[2], *found[1:3]}
    assert "reshaped from [4, 3] to [6, 2], which share no border" in reasons(algebra).values()


def test_open_sizes():
    algebra = Algebra()
    batch, height = sympy.Symbol("batch", integer=True, positive=True), sympy.Symbol("h", integer=True, positive=True)
    dims = [Atom(batch), Atom(8 * height), Atom(6)]
    found = algebra.reshaped(dims, [batch, height, 8, 6])
    assert [dim.size for dim in found] == [batch, height, 8, 6]
    merged = algebra.reshaped(found, [batch * height, 48])
    assert [dim.size for dim in merged] == [batch * height, 48]
    assert not algebra.fixed
    assert quotient(8 * height, 3) is None
    first, second = algebra.cut(Atom(batch + 2), [2, batch])
    assert (first.size, second.size) == (2, batch)


def test_cut_through_what_it_is_made_of():
    algebra = Algebra()
    joined = concatenation([Atom(4), product([Atom(2), Atom(3)])])
    parts = algebra.cut(joined, [2, 2, 3, 3])
    assert [part.size for part in parts] == [2, 2, 3, 3]
    assert same(factors(parts[2])[-1], factors(parts[3])[-1])
    assert not algebra.fixed
    [whole] = algebra.cut(Atom(3), [3])
    assert isinstance(whole, Atom)
    across = algebra.cut(product([Atom(2), Atom(3)]), [2, 4])
    assert [part.size for part in across] == [2, 4]
    assert "cut into 2, 4, across what it is made of (2 × 3)" in reasons(algebra).values()


def test_kept_indices_multiply_out_and_move_along():
    rows, row, rest = Atom(3), Atom(2), Atom(4)
    structure = concatenation([product([rows, row]), rest])
    kept = {rows: (0, 2), rest: (1,)}
    assert kept_indices(structure, kept) == [0, 1, 4, 5, 7]
    assert kept_size(structure, kept) == 5
    assert kept_indices(product([rows, row]), {row: (1,)}) == [1, 3, 5]
    assert kept_indices(UNIT, kept) == [0]


SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=5)


@st.composite
def reshapes(draw):
    """Two shapes of equally many elements."""
    sizes = draw(SHAPES)
    return sizes, _regrouped(draw, sizes)


def _regrouped(draw, sizes):
    cuts = sorted(draw(st.sets(st.integers(1, len(sizes)), max_size=len(sizes))) | {len(sizes)})
    return [_product(sizes[start:end]) for start, end in itertools.pairwise([0, *cuts])]


def _product(sizes):
    total = 1
    for size in sizes:
        total *= size
    return total


@settings(max_examples=200, deadline=None)
@given(reshapes(), st.randoms(use_true_random=False))
def test_any_choice_of_indices_of_a_reshape_selects_the_same_elements(shapes, random):
    """Numbered elements, selected before or after, are the same ones."""
    import torch

    old, new = shapes
    algebra = Algebra()
    dims = [algebra.new(size) for size in old]
    found = algebra.reshaped(dims, new)
    fixed = set(reasons(algebra))
    free = [atom for dim in found for atom in atoms(dim) if atom not in fixed]
    kept = {atom: tuple(sorted(random.sample(range(atom.size), random.randint(1, atom.size)))) for atom in free}
    numbered = torch.arange(_product(old))
    assert torch.equal(_selected(numbered.reshape(old), dims, kept), _selected(numbered.reshape(new), found, kept))


def _selected(tensor, dims, kept):
    for index, structure in enumerate(dims):
        tensor = tensor[(slice(None),) * index + (kept_indices(structure, kept),)]
    return tensor.flatten()


def test_fixed_by_a_bound_that_contains_it():
    """An atom bound to a concatenation of which it is a part."""
    algebra = Algebra()
    atom = Atom(4)
    algebra.unify(atom, Concatenation((atom,)))
    assert resolved(atom) is atom
