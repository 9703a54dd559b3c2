"""A squeeze that drops nothing goes; one that drops something stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Squeezes(nn.Module):
    def __init__(self, dims: Any) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(self.dims) + 1


@pytest.mark.parametrize(
    ("dims", "left"),
    [
        (1, {}),
        (-1, {}),
        ((1, 3), {}),
        (2, {"squeeze.dim": 1}),
        (-2, {"squeeze.dim": 1}),
        ((0, 2), {"squeeze.dims": 1}),
        ((0, 1, -2), {"squeeze.dims": 1}),
        ((), {}),
    ],
)
def test_only_dimensions_of_one_are_squeezed(dims: Any, left: dict[str, int], through_onnx_runtime: Any) -> None:
    found = through_onnx_runtime(lambda: Squeezes(dims), x=torch.randn(1, 3, 1, 4))
    assert {name: count for name, count in found.items() if "squeeze" in name} == left
