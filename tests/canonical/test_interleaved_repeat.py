"""Every element beside its copies, at sizes other than the captured ones too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.capture.inputs import Input, Inputs
from optpass.capture.spans import Span
from optpass.ir.program import Origin
from optpass.pipeline.target import Lowering
from optpass.runtime.module import EngineModule
from optpass.targets.onnxruntime import OnnxRuntime


class Repeats(nn.Module):
    def __init__(self, repeats: int, dim: int | None) -> None:
        super().__init__()
        self.repeats, self.dim = repeats, dim

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.repeats, self.dim) * 2


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_every_dimension(dim: int | None, through_onnx_runtime: Any) -> None:
    found = through_onnx_runtime(lambda: Repeats(3, dim), x=torch.randn(2, 3, 4))
    assert "repeat_interleave.self_int" not in found


class PerFrame(nn.Module):
    """One vector a clip, repeated for its frames."""

    def forward(self, clip: Tensor, vector: Tensor) -> Tensor:
        repeated = vector.repeat_interleave(clip.shape[1], dim=0)
        return clip.flatten(0, 1) + repeated


def test_open_sizes(tmp_path: Path) -> None:
    inputs = Inputs({"clip": Input(("batch", "frames", 3)), "vector": Input(("batch", 3))}, {"batch": 2, "frames": 4})
    module, mode = build_fake(PerFrame)
    example = inputs.arguments({"batch": [Span(2, 5)], "frames": [Span(2, 9)]}, {}, torch.float32)
    program = export_program(module, mode, example, {}, Origin("test"))
    graph = program.entries["full"]
    entry = OnnxRuntime(threads=1).lower(program, Lowering(tmp_path))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs]}
    runner = OnnxRuntime.load(tmp_path, record, {"threads": 1})
    engine = EngineModule(graph.signature, entry.inputs, entry.outputs, runner, dimensions=graph.dimensions)
    for batch, frames in [(2, 4), (5, 3), (3, 9)]:
        clip, vector = torch.randn(batch, frames, 3), torch.randn(batch, 3)
        torch.testing.assert_close(engine(clip=clip, vector=vector), PerFrame()(clip, vector))
