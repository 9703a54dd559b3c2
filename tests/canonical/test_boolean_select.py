"""Selection among booleans is logic, for every value of mask and operands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

BITS = torch.tensor([[False, False, True, True], [False, True, False, True]])


class Where(nn.Module):
    def forward(self, mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask, a > 0, b > 0)


class Filled(nn.Module):
    def __init__(self, value: bool) -> None:
        super().__init__()
        self.value = value

    def forward(self, mask: Tensor, a: Tensor) -> Tensor:
        return (a > 0).masked_fill(mask, self.value)


class FilledByTensor(nn.Module):
    def forward(self, mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a > 0).masked_fill(mask, b.sum() > 0)


def selects(found: Any) -> bool:
    return any("where" in name or "masked_fill" in name for name in found)


def test_where(through_onnx_runtime: Any) -> None:
    mask = BITS[0][:, None].expand(4, 2).contiguous()
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    found = through_onnx_runtime(Where, mask=mask, a=a, b=b)
    assert not selects(found)
    assert found["logical_and"] == 2


@pytest.mark.parametrize("value", [False, True])
def test_masked_fill(value: bool, through_onnx_runtime: Any) -> None:
    assert not selects(through_onnx_runtime(lambda: Filled(value), mask=BITS[0], a=BITS[1].float()))


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_masked_fill_by_a_tensor(value: float, through_onnx_runtime: Any) -> None:
    inputs = {"mask": BITS[0], "a": BITS[1].float(), "b": torch.full((3,), value)}
    assert not selects(through_onnx_runtime(FilledByTensor, **inputs))


def test_selection_among_numbers_stays(through_onnx_runtime: Any) -> None:
    class Numbers(nn.Module):
        def forward(self, mask: Tensor, a: Tensor) -> Tensor:
            return torch.where(mask, a, -a)

    assert through_onnx_runtime(Numbers, mask=BITS[0], a=torch.randn(4))["where.self"] == 1
