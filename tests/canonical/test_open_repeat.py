"""Repeats by an open number are the eager ones at every size, through ONNX Runtime as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optpass.capture.export import build_fake, export_program
from optpass.capture.inputs import Input, Inputs
from optpass.capture.spans import Span
from optpass.ir.program import Origin
from optpass.pipeline.target import Lowering
from optpass.targets.onnxruntime import OnnxRuntime


class Repeats(nn.Module):
    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, frames: Tensor) -> Tensor:
        return x.repeat_interleave(frames.shape[0], dim=self.dim) * 2


@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_copies_stand_beside_what_they_copy(dim: int | None, tmp_path: Path) -> None:
    module, mode = build_fake(lambda: Repeats(dim))
    inputs = Inputs({"x": Input(("batch", 3, 2)), "frames": Input(("frames",))}, {"batch": 2, "frames": 3})
    spans = {"x": (Span(1, 8), 3, 2), "frames": (Span(1, 8),)}
    program = export_program(module, mode, inputs.arguments(spans, {}, torch.float32), None, Origin("test"))
    names = [str(node.target) for node in program.entries["full"].calls]
    assert not any("repeat_interleave" in name for name in names)
    entry = OnnxRuntime(threads=1).lower(program, Lowering(tmp_path))["full"]
    record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs]}
    engine = OnnxRuntime.load(tmp_path, record, {"threads": 1})
    for batch, frames in ((1, 1), (2, 3), (3, 2), (8, 5)):
        tensors = {"x": torch.randn(batch, 3, 2), "frames": torch.zeros(frames)}
        assert torch.equal(engine(tensors)["output"], Repeats(dim)(**tensors))
