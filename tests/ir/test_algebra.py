from __future__ import annotations

import pytest
import torch

from optpass.ir.algebra import Einsum, Eye, Full, Pad, Power, Update
from optpass.ir.weights import Cast, Constant


def constant(*shape):
    return Constant(torch.randn(shape))


def test_einsum_is_torch_s():
    a, b, v = constant(3, 4), constant(4, 5), constant(3)
    made = Einsum("oi,ik,o->ok", (a, b, v))
    assert made.shape == (3, 5)
    torch.testing.assert_close(made.evaluate(), (a.value @ b.value) * v.value[:, None])
    kronecker = Einsum("ab,cd->acbd", (a, b))
    torch.testing.assert_close(kronecker.evaluate().reshape(12, 20), torch.kron(a.value, b.value))


def test_einsum_computes_wide_and_rounds_once():
    a, b = (Cast(constant(64, 64), torch.float16) for _ in range(2))
    found = Einsum("ij,jk->ik", (a, b)).evaluate()
    expected = (a.evaluate().float() @ b.evaluate().float()).half()
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("equation", ["oi,ik", "oi->o", "oi,kk->ok", "oi,ok->oik", "oii,ik->ok", "oi,ik->oz"])
def test_einsum_refuses(equation):
    with pytest.raises(ValueError, match=r"equation|axis|axes"):
        Einsum(equation, (constant(3, 4), constant(4, 5)))


def test_power_pad_eye_full():
    v = Constant(torch.rand(4) + 0.1)
    torch.testing.assert_close(Power(v, -0.5, 1e-5).evaluate(), torch.rsqrt(v.value + 1e-5))
    w = constant(2, 3, 1, 1)
    padded = Pad(w, (0, 0, 1, 1), (0, 0, 1, 2))
    assert padded.shape == (2, 3, 3, 4)
    assert torch.equal(padded.evaluate()[:, :, 1:2, 1:2], w.value)
    assert padded.evaluate().count_nonzero() == 6
    assert torch.equal(Eye(3, torch.float32).evaluate(), torch.eye(3))
    assert torch.equal(Full((2, 1), 0.25, torch.float16).evaluate(), torch.full((2, 1), 0.25).half())
    with pytest.raises(ValueError, match="cannot pad"):
        Pad(w, (0, 0, 1), (0, 0, 1))


def test_equal_expressions_are_one():
    w = constant(2, 3)
    assert Einsum("oi->o", (w,)) == Einsum("oi->o", (w,))
    assert len({str(Einsum("oi->o", (w,))), str(Einsum("oi->i", (w,)))}) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 90, 1 << 18])
def test_update_is_a_sum_with_a_product_and_leaves_its_base(dtype, block, monkeypatch):
    monkeypatch.setattr("optpass.ir.algebra.BLOCK", block)
    torch.manual_seed(0)
    base = Constant(torch.randn(6, 4, 3, 3).to(dtype))
    left, right = constant(6, 2), constant(2, 36)
    before = base.value.clone()
    found = Update(base, left, right).evaluate()
    product = left.value.double() @ right.value.double()
    expected = (before.double() + product.reshape(6, 4, 3, 3)).to(dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)
    assert torch.equal(base.value, before)
    with pytest.raises(ValueError, match="cannot add the product"):
        Update(base, left, constant(2, 35))
