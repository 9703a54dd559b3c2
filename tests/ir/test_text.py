"""The text form of a Program, golden."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optpass.ir.text import graph_text, operator_name, program_text
from optpass.ir.weights import Select


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Dropout(0.1))
        self.register_buffer("scale", torch.full((6,), 2.0), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.project(x.to(torch.float32)).contiguous() * self.scale
        first, second = hidden.view(2, 2, 3).chunk(2, dim=-2)
        return {"sum": first + second, "half": hidden.half()}


GOLDEN = """\
full(x: f32[2, 4]):
  %linear = linear(%x, @project.0.weight, @project.0.bias) : f32[2, 6]  ; project.0
  %silu = silu(%linear) : f32[2, 6]  ; project.1
  %mul = mul.Tensor(%silu, @scale) : f32[2, 6]  ; (root)
  %view = reshape(%mul, [2, 2, 3]) : f32[2, 2, 3]  ; (root)
  %chunk = chunk(%view, 2, -2) : (f32[2, 1, 3], f32[2, 1, 3])  ; (root)
  %getitem = getitem(%chunk, 0) : f32[2, 1, 3]  ; (root)
  %getitem_1 = getitem(%chunk, 1) : f32[2, 1, 3]  ; (root)
  %add = add.Tensor(%getitem, %getitem_1) : f32[2, 1, 3]  ; (root)
  %to_1 = to.dtype(%mul, f16) : f16[2, 6]  ; (root)
  return sum=%add, half=%to_1"""


def test_a_graph_reads_like_this(capture_module: Any) -> None:
    program, _ = capture_module(Small, x=torch.zeros(2, 4))
    assert graph_text(program.entries["full"], "full") == GOLDEN


def test_a_program_lists_its_weights_below(capture_module: Any) -> None:
    program, _ = capture_module(Small, x=torch.zeros(2, 4))
    cut = Select(program.weights["project.0.bias"], 0, (0, 1, 2, 3, 4, 5))
    text = program_text(program.with_weights({"project.0.bias": cut}))
    assert text.startswith(GOLDEN + "\n\nweights:\n  @project.0.weight = constant(")
    assert ", dim=0, 0:6) : f32[6]" in text
    assert program_text(program, weights=False) == GOLDEN + "\n"


def test_the_text_does_not_depend_on_the_run(capture_module: Any) -> None:
    first, second = (capture_module(Small, x=torch.zeros(2, 4))[0] for _ in range(2))
    assert program_text(first) == program_text(second)


def test_operators_are_called_by_their_aten_names(capture_module: Any) -> None:
    program, _ = capture_module(Small, x=torch.zeros(2, 4))
    names = [operator_name(node) for node in program.entries["full"].calls]
    assert names[:4] == ["linear", "silu", "mul.Tensor", "reshape"]
