from __future__ import annotations

import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optpass.errors import WeightError
from optpass.interchange.expression_json import decode, encode
from optpass.ir import decompositions
from optpass.ir.decompositions import Adaptors, Factors, halves
from optpass.ir.safetensors_io import read_safetensors, write_safetensors
from optpass.ir.slots import Slot
from optpass.ir.weights import Cast, Constant


def pair(batch, axis, writes, reads, *, rank=None, dtype=torch.float64):
    """Random matrices around an axis; of a lower ``rank`` than their sizes, if it is given."""

    def made(rows, columns):
        if rank is None:
            return torch.randn(batch, rows, columns, dtype=dtype)
        return torch.randn(batch, rows, rank, dtype=dtype) @ torch.randn(batch, rank, columns, dtype=dtype)

    return Constant(made(axis, writes)), Constant(made(reads, axis))


def truncated(product, rank):
    u, values, vh = torch.linalg.svd(product, full_matrices=False)
    return (u[..., :rank] * values[:, None, :rank]) @ vh[:, :rank]


SIZES = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 3), axis=SIZES, writes=SIZES, reads=SIZES, rank=SIZES, seed=st.integers(0, 99))
def test_the_halves_are_the_truncated_svd_of_the_product(batch, axis, writes, reads, rank, seed):
    torch.manual_seed(seed)
    first, second = pair(batch, axis, writes, reads)
    inner, outer = (half.evaluate() for half in halves(Factors(first, second, rank), writes))
    assert inner.shape == (batch, rank, writes)
    assert outer.shape == (batch, reads, rank)
    product = second.value @ first.value
    expected = truncated(product, rank)
    torch.testing.assert_close(outer @ inner, expected, rtol=0, atol=1e-10 * float(product.abs().max()))
    # The square root of the singular values stands on both sides.
    torch.testing.assert_close(inner @ inner.mT, outer.mT @ outer, rtol=0, atol=1e-9 * float(product.abs().max()))


def test_whole_rank_gives_the_product_and_less_the_best():
    torch.manual_seed(0)
    first, second = pair(2, 12, 40, 30)
    product = second.value @ first.value
    inner, outer = (half.evaluate() for half in halves(Factors(first, second, 12), 40))
    torch.testing.assert_close(outer @ inner, product, rtol=0, atol=1e-12 * float(product.abs().max()))
    inner, outer = (half.evaluate() for half in halves(Factors(first, second, 6), 40))
    error = (outer @ inner - product).norm()
    tail = torch.linalg.svdvals(product)[:, 6:].norm()
    assert math.isclose(float(error), float(tail), rel_tol=1e-10)
    for seed in range(5):
        torch.manual_seed(seed)
        others = torch.randn(2, 6, 12, dtype=torch.float64)
        # The best that any six directions of the axis can do, each on its own optimal readers.
        reduced = others @ first.value
        best = product @ torch.linalg.pinv(reduced)
        assert (best @ reduced - product).norm() >= error


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_matrices_without_full_rank_do_not_blow_up(rank):
    torch.manual_seed(0)
    first, second = pair(2, 8, 20, 16, rank=3)
    product = second.value @ first.value
    inner, outer = (half.evaluate() for half in halves(Factors(first, second, rank), 20))
    atol = 1e-10 * float(product.abs().max())
    torch.testing.assert_close(outer @ inner, truncated(product, rank), rtol=0, atol=atol)
    narrow, wide = (half.evaluate() for half in halves(Adaptors(first, second, rank), 8))
    torch.testing.assert_close(narrow @ first.value, inner, rtol=0, atol=atol)
    torch.testing.assert_close(second.value @ wide, outer, rtol=0, atol=atol)
    assert max(part.abs().max() for part in (inner, outer, narrow, wide)) < 1e3


def test_zeros_give_zeros():
    first, second = Constant(torch.zeros(1, 4, 6)), Constant(torch.randn(1, 5, 4))
    assert Factors(first, second, 2).evaluate().count_nonzero() == 0


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    first, second = pair(1, 8, 20, 16, dtype=torch.float32)
    first, second = Constant(first.value.half()), Constant(second.value.half())
    wide = Factors(Cast(first, torch.float32), Cast(second, torch.float32), 4)
    narrow = Factors(first, second, 4)
    assert narrow.dtype == torch.float16
    assert torch.equal(narrow.evaluate(), wide.evaluate().half())
    exact = Factors(Cast(first, torch.float64), Cast(second, torch.float64), 4)
    torch.testing.assert_close(wide.evaluate(), exact.evaluate().float(), rtol=1e-6, atol=1e-7)


def test_signs_do_not_depend_on_who_computes():
    torch.manual_seed(0)
    first, second = pair(1, 6, 20, 16)
    whole = Factors(first, second, 4).evaluate()
    flipped = torch.diag(torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64))
    other = Factors(Constant(flipped @ first.value), Constant(second.value @ flipped), 4)
    torch.testing.assert_close(other.evaluate(), whole, rtol=0, atol=1e-10)


def test_one_decomposition_serves_both_halves(monkeypatch):
    counted = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: counted.append(1) or svd(*a, **k))
    ours, others = (Factors(*pair(1, 6, 20, 16), 4) for _ in range(2))
    for expression in (*halves(ours, 20), *halves(others, 20), *halves(ours, 20)):
        expression.evaluate()
    # The last one alone is kept.
    assert len(counted) == 3
    del ours, others, expression
    gc.collect()
    assert not decompositions._latest


def test_through_a_file(tmp_path):
    torch.manual_seed(0)
    first, second = pair(2, 6, 10, 8)
    slot = Slot("w", "weight", first, first, "nothing")
    inner, outer = halves(Factors(slot, second, 3), 10)
    kept = {str(part): part for part in (first, second)}
    record = encode(inner, str)
    again = decode(record, kept.__getitem__, lambda name, role, base: first)
    assert torch.equal(again.evaluate(), inner.evaluate())
    write_safetensors({"inner": inner, "outer": outer}, tmp_path / "w.safetensors")
    stored = read_safetensors(tmp_path / "w.safetensors")
    assert torch.equal(stored["outer"].evaluate(), outer.evaluate())


def test_refuses():
    first, second = pair(2, 6, 10, 8)
    for rank, other in ((0, second), (3, Constant(second.value[:1])), (3, Constant(second.value.mT))):
        with pytest.raises(ValueError, match="cannot couple"):
            Factors(first, other, rank)
    broken = Constant(torch.full((2, 8, 6), math.nan, dtype=torch.float64))
    with pytest.raises(WeightError, match="NaN or Inf"):
        Factors(first, broken, 3).evaluate()
