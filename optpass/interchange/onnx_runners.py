"""A Program translated to ONNX and nothing more, run by ONNX Runtime node by node: to see what the translation does."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optpass.errors import UserError
from optpass.interchange.onnx_folder import write_onnx_folder
from optpass.ir.program import Program
from optpass.pipeline.target import Runner

PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
ERRORS_ONLY = 3


def plain_onnx_runners(program: Program, folder: Path) -> dict[str, Runner]:
    """Every entry of ``program`` by the kernels of ONNX Runtime on the CPU, no node folded or fused.

    Raises:
        UserError: a package is missing, something has no ONNX form, or no CPU kernel (bfloat16).
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"needs {', '.join(missing)}: pip install 'optpass[onnxruntime]'")
    written = write_onnx_folder(program, folder, optimize=False, allow_nonfinite=True)
    return {name: _runner(path, list(program.entries[name].signature.outputs)) for name, path in written.paths.items()}


def _runner(path: Path, names: list[str]) -> Runner:
    session = _session(path)

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        taken = {item.name for item in session.get_inputs()}
        feeds = {name: tensor.numpy() for name, tensor in tensors.items() if name in taken}
        results = session.run(None, feeds)
        return {name: torch.from_numpy(value) for name, value in zip(names, results, strict=True)}

    return run


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # ONNX Runtime's errors share no base class but Exception.
        raise UserError(f"ONNX Runtime cannot run {path.name}: {str(error).strip().splitlines()[0]}") from error
