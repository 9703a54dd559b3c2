"""Open sizes as expressions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.capture.inputs import Input, Inputs
from optpass.capture.spans import Span
from optpass.ir.program import Origin


class Centres(nn.Module):
    """Centres of patches, as DINOv3 makes them: as many as there are, counted from ``first``."""

    def __init__(self, first: float) -> None:
        super().__init__()
        self.first = first

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2] // 4, image.shape[-1] // 4
        rows, columns = torch.arange(self.first, height), torch.arange(self.first, width)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)


@pytest.mark.parametrize("first", [0.5, 1.5, 2.0])
def test_the_length_of_a_range_of_fractions_is_a_whole_expression(first: float) -> None:
    fake, mode = build_fake(lambda: Centres(first))
    inputs = Inputs({"image": Input((1, 3, "height", "width"))}, {"height": 24, "width": 32})
    sizes: Any = {"height": [Span(16, 64)], "width": [Span(16, 64)]}
    program = export_program(fake, mode, inputs.arguments(sizes, {}, torch.float32), {}, Origin("test"))
    graph = program.entries["full"]
    assert "ceil" not in str(graph.outputs[0]).lower()
    for height, width in ((16, 64), (35, 43)):
        image = torch.zeros(1, 3, height, width)
        (found,) = graph.module(program.weights)(image)
        torch.testing.assert_close(found, Centres(first)(image))
