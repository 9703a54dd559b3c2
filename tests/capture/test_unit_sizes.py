"""Ranges that begin at 1: kept where only a memory layout asks about 1, refused where the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.capture.inputs import Input, Inputs
from optpass.capture.spans import Span
from optpass.errors import UserError
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Constant
from optpass.testing import randomised


class Pooled(nn.Module):
    """Attention with a query that it learned, as SigLIP pools: its kernel asks about a batch of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        rows = image.flatten(2).transpose(1, 2)
        found: Tensor = self.attention(self.query.repeat(rows.shape[0], 1, 1), rows, rows)[0]
        return found


class Permuted(nn.Module):
    """A convolution of what was last-channelled before, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.second(self.norm(self.first(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return found


class Choosing(nn.Module):
    """Does something else for a batch of 1."""

    def forward(self, image: Tensor) -> Tensor:
        return image + 1 if image.shape[0] == 1 else image - 1


def opened(build: Callable[[], nn.Module], batch: Span) -> tuple[Program, nn.Module]:
    real = randomised(build().eval())
    fake, mode = build_fake(build)
    inputs = Inputs({"image": Input(("batch", 8, 6, 4))}, {"batch": 1})
    example = inputs.arguments({"batch": [batch]}, {}, torch.float32)
    weights = {name: Constant(value) for name, value in real.state_dict().items()}
    return export_program(fake, mode, example, weights, Origin("test")), real


@pytest.mark.parametrize("build", [Pooled, Permuted])
@pytest.mark.parametrize("maximum", [2, 5])
def test_what_only_a_layout_asks_is_no_limit(build: Any, maximum: int) -> None:
    program, real = opened(build, Span(1, maximum))
    graph = program.entries["full"]
    (batch,) = graph.dimensions
    assert (batch.minimum, batch.maximum, graph.dimensions.guards) == (1, maximum, ())
    for size in range(1, maximum + 1):
        image = torch.randn(size, 8, 6, 4)
        with torch.no_grad():
            (found,) = graph.module(program.weights)(image)
            torch.testing.assert_close(found, real(image))


def test_what_the_model_asks_is_one() -> None:
    with pytest.raises(UserError, match=r"batch from 2 to 5, not 1\.\.5"):
        opened(Choosing, Span(1, 5))


def test_the_rest_of_the_range_is_had() -> None:
    program, real = opened(Choosing, Span(2, 5))
    image = torch.randn(4, 8, 6, 4)
    torch.testing.assert_close(program.entries["full"].module(program.weights)(image)[0], real(image))
