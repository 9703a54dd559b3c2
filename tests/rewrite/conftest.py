from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.evaluate.difference import program_difference
from optpass.ir.dialect import verify, verify_shapes
from optpass.ir.program import Program
from optpass.testing import capture_module


class Body(nn.Module):
    """``body(module, *inputs)`` as a module that has a linear ``features`` (4 → 6) and a ``table`` of eight rows."""

    def __init__(self, body: Callable[..., Any]):
        super().__init__()
        self.body = body
        self.features, self.table = nn.Linear(4, 6), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.body(self, x, y)


def capture_body(body: Callable[..., Any], x: Any = (3, 5, 4), y: Any = (3, 5, 4)) -> Program:
    """``body`` captured on inputs of two shapes; a tensor stands for itself."""
    given = [torch.randn(size) if isinstance(size, tuple) else size for size in (x, y)]
    program, _ = capture_module(lambda: Body(body), x=given[0], y=given[1])
    return program


@pytest.fixture(name="capture_body")
def _capture_body() -> Callable[..., Program]:
    return capture_body


@pytest.fixture(name="same_bits")
def _same_bits() -> Callable[[Program, Program], None]:
    def check(before: Program, after: Program) -> None:
        verify(after)
        verify_shapes(after)
        assert program_difference(before, after).max_abs == 0.0

    return check
