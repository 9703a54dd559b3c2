from __future__ import annotations

import torch

from optpass.ir.computed import Computed
from optpass.ir.weights import Absent, Constant

aten = torch.ops.aten


def test_any_operator_over_expressions():
    a, b = Constant(torch.randn(2, 3)), Constant(torch.randn(1, 3))
    made = Computed(aten.cat.default, ((a, b), 0), (), (3, 3), torch.float32)
    assert made.operands() == (a, b)
    assert torch.equal(made.evaluate(), torch.cat([a.value, b.value]))
    assert str(made) == f"aten.cat.default([{a}, {b}], 0)"
    summed = Computed(aten.sum.dim_IntList, (made, (0,)), (("dtype", torch.float64),), (3,), torch.float64)
    assert torch.equal(summed.evaluate(), torch.cat([a.value, b.value]).sum(0, dtype=torch.float64))
    assert str(summed).endswith("[0], dtype=f64)")


def test_one_of_several_results():
    a = Constant(torch.randn(4, 3))
    parts = [Computed(aten.chunk.default, (a, 2, 0), (), (2, 3), torch.float32, index) for index in (0, 1)]
    assert torch.equal(torch.cat([part.evaluate() for part in parts]), a.value)
    assert str(parts[1]).endswith("[1]")
    assert len({*parts, Computed(aten.chunk.default, (a, 2, 0), (), (2, 3), torch.float32, 1)}) == 2


def test_without_values():
    absent = Absent("w", (2, 3), torch.float32)
    assert not Computed(aten.neg.default, (absent,), (), (2, 3), torch.float32).has_values
