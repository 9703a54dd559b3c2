"""What every rewrite must show: the same function, another spelling, and an engine that runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from optpass.ir.dialect import verify_shapes
from optpass.ir.text import operator_name
from optpass.pipeline.target import Lowering
from optpass.runtime.module import EngineModule
from optpass.targets.onnxruntime import OnnxRuntime
from optpass.testing import capture_module


@pytest.fixture
def through_onnx_runtime(tmp_path: Path) -> Callable[..., Counter[str]]:
    """Capture a module, run Program and engine on the same real inputs as eager, and count its operators."""

    def run(build: Callable[[], nn.Module], rtol: float = 1e-6, **inputs: Tensor) -> Counter[str]:
        program, module = capture_module(build, **inputs)
        verify_shapes(program)
        graph = program.entries["full"]
        with torch.no_grad():
            expected = module(**inputs)
            (found,) = graph.module(program.weights)(*(inputs[spec.name] for spec in graph.inputs))
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
        entry = OnnxRuntime(threads=1).lower(program, Lowering(tmp_path))["full"]
        record = {"engine": entry.main, "outputs": [spec.as_json() for spec in entry.outputs]}
        runner = OnnxRuntime.load(tmp_path, record, {"threads": 1})
        engine = EngineModule(graph.signature, graph.inputs, graph.outputs, runner)
        torch.testing.assert_close(engine(**inputs), expected, rtol=max(rtol, 1e-5), atol=max(rtol, 1e-5))
        return Counter(operator_name(node) for node in graph.calls)

    return run
