"""Assignments into slices broadcast and cast what they are given, in the engine too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Assigns(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        table = torch.zeros(2, 5, 3)
        table[:, 2:] = y
        return x + table


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 3), (3,), (1, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_what_is_assigned_is_broadcast_and_cast(
    shape: tuple[int, ...], dtype: torch.dtype, through_onnx_runtime: Any
) -> None:
    y = (torch.randn(shape) * 9).to(dtype)
    found = through_onnx_runtime(Assigns, x=torch.randn(2, 5, 3), y=y)
    assert found["copy"] == 0
    assert found["expand"] == (shape != (2, 3, 3))
    assert found["to.dtype"] == (dtype != torch.float32)
