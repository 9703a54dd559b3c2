"""What counts as a difference of two tensors."""

from __future__ import annotations

import math

import pytest
import torch

from optpass.evaluate.difference import EQUAL, tensor_difference


def test_what_is_infinite_in_both_is_no_difference() -> None:
    a = torch.tensor([1.0, -math.inf, math.nan, 4.0])
    b = torch.tensor([1.0, -math.inf, math.nan, 4.0 + 4e-6])
    assert tensor_difference(a, b).relative_error == pytest.approx(1e-6, rel=0.2)
    assert tensor_difference(a, a.clone()) == EQUAL


@pytest.mark.parametrize("other", [math.inf, math.nan, 0.0])
def test_what_is_infinite_in_one_is_worse_than_any_bound(other: float) -> None:
    a = torch.tensor([1.0, -math.inf, 4.0])
    found = tensor_difference(a, torch.tensor([1.0, other, 4.0]))
    assert math.isnan(found.relative_error)
    assert math.isnan(found.snr)
    assert not found.relative_error <= 1.0


def test_figures() -> None:
    found = tensor_difference(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.5]))
    assert (found.max_abs, found.relative_error) == (0.5, 0.125)
    assert found.snr == pytest.approx(20.0)
