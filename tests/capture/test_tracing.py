"""Tracing leaves nothing out, and an export that fails says in which module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.errors import UserError


class WritesThroughData(nn.Module):
    """A table of which a part is filled in through ``.data``, as positional embeddings are."""

    def forward(self, x: Tensor) -> Tensor:
        table = x.new_zeros(1, 5, 3)
        table.data[:, 2:].copy_(x[:3].cumsum(0))
        return x + table[0]


def test_what_is_written_through_data_arrives(capture_module: Any, assert_same_function: Any) -> None:
    program, module = capture_module(WritesThroughData, x=torch.zeros(5, 3))
    assert_same_function(program, module)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), Branches()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (Branches, r"\(root\)"),
        (lambda: nn.Sequential(nn.ReLU(), Branches()), "1"),
        (lambda: nn.Sequential(nn.ReLU(), Block()), r"1\.layers\.1"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(3, 3)), "1"),
    ],
)
def test_a_refusal_names_the_module(build: Any, path: str, capture_module: Any) -> None:
    with pytest.raises(UserError, match=rf"torch\.export cannot capture \w+: at {path}: \S"):
        capture_module(build, **({"x": torch.zeros(2)} if build is Branches else {"input": torch.zeros(1, 2)}))


def test_a_write_into_a_plain_attribute_is_refused(capture_module: Any) -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = [torch.zeros(2)]

        def forward(self, x: Tensor) -> Tensor:
            return self.seen[0].add_(x) * 2

    with pytest.raises(UserError, match=r"writes to|cannot capture"):
        capture_module(Remembers, x=torch.zeros(2))
