"""Other ways from a PyTorch module to an int8 engine on the CPU, as their documentation has them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantization_models import Subject

Arrays = dict[str, np.ndarray[Any, Any]]
Runner = Callable[[Arrays], np.ndarray[Any, Any]]
OLIVE = os.environ.get("OPTPASS_OLIVE", "")
"""Python of an environment with olive-ai, whose pins clash with others'."""


def export(subject: Subject, path: Path) -> Path:
    """The module as PyTorch's own exporter writes it, optimised by it."""
    with quietly():
        torch.onnx.export(
            subject.module,
            tuple(subject.calls[0].values()),
            str(path),
            input_names=list(subject.calls[0]),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    return path


def nncf_onnx(subject: Subject, source: Path, path: Path) -> Path:
    """``nncf.quantize`` of the ONNX file."""
    import nncf
    import onnx

    data = nncf.Dataset([arrays(call) for call in subject.calls], lambda call: call)
    kind = nncf.ModelType.TRANSFORMER if subject.transformer else None
    with quietly():
        onnx.save(nncf.quantize(onnx.load(source), data, subset_size=len(subject.calls), model_type=kind), path)
    return path


def nncf_fx(subject: Subject) -> Any:
    """``nncf.quantize`` of the exported program → an OpenVINO model."""
    import nncf
    import openvino

    example = tuple(subject.calls[0].values())
    data = nncf.Dataset([tuple(call.values()) for call in subject.calls], lambda call: call)
    kind = nncf.ModelType.TRANSFORMER if subject.transformer else None
    with quietly():
        module = torch.export.export(subject.module, example, strict=False).module(check_guards=False)
        quantized = nncf.quantize(module, data, subset_size=len(subject.calls), model_type=kind)
        return openvino.convert_model(torch.export.export(quantized, example, strict=False), example_input=example)


def ort_static(subject: Subject, source: Path, path: Path) -> Path:
    """ONNX Runtime's ``quantize_static`` behind its own pre-processing, weights by channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.calls = iter([arrays(call) for call in subject.calls])

        def get_next(self) -> Arrays | None:
            return next(self.calls, None)

    prepared = path.with_suffix(".prepared.onnx")
    with quietly():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    return path


def olive(subject: Subject, source: Path, folder: Path) -> Path:
    """Olive's ``OnnxStaticQuantization`` with its defaults, in an environment of its own.

    Raises:
        RuntimeError: there is no such environment, or Olive wrote no model.
    """
    if not OLIVE:
        raise RuntimeError("set OPTPASS_OLIVE to the Python of an environment with olive-ai")
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "calls"
    data.mkdir()
    for index, call in enumerate(subject.calls):
        np.savez(data / f"{index:03}.npz", **arrays(call))
    (folder / "user_script.py").write_text(SCRIPT.replace("FOLDER", str(data)), encoding="utf-8")
    configuration = {
        "input_model": {"type": "ONNXModel", "model_path": str(source)},
        "systems": {
            "local": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [
            {
                "name": "calls",
                "user_script": str(folder / "user_script.py"),
                "load_dataset_config": {"type": "recorded"},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "dataloader_config": {"type": "recorded_loader"},
            }
        ],
        "passes": {"quantize": {"type": "OnnxStaticQuantization", "data_config": "calls"}},
        "host": "local",
        "target": "local",
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }
    (folder / "olive.json").write_text(json.dumps(configuration), encoding="utf-8")
    command = [OLIVE, "-m", "olive", "run", "--config", str(folder / "olive.json")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    found = sorted((folder / "out").rglob("*.onnx"))
    if not found:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise RuntimeError(f"Olive wrote no model and exited {result.returncode}: {lines[-1] if lines else ''}")
    return found[0]


SCRIPT = """
import glob
import numpy as np
from olive.data.registry import Registry

class Recorded:
    def __init__(self): self.files = sorted(glob.glob("FOLDER/*.npz"))
    def __len__(self): return len(self.files)
    def __getitem__(self, index):
        found = np.load(self.files[index])
        return {name: found[name] for name in found.files}, 0

@Registry.register_dataset()
def recorded(**options): return Recorded()

@Registry.register_dataloader()
def recorded_loader(dataset, **options): return dataset
"""


def ort_runner(path: Path, threads: int) -> Runner:
    """A session with ONNX Runtime's defaults."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Its threads would go on spinning in the next engine's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {item.name for item in session.get_inputs()}

    def run(call: Arrays) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = session.run(None, {name: call[name] for name in names})[0]
        return result

    return run


def openvino_runner(model: Any, threads: int, precision: str = "f32") -> Runner:
    """A compiled model, of a file or of one in memory, for latency."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(str(model) if isinstance(model, Path) else model, "CPU", settings)
    request = compiled.create_infer_request()

    def run(call: Arrays) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = np.array(request.infer(list(call.values()))[0])
        return result

    return run


def arrays(call: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in call.items()}


@contextlib.contextmanager
def quietly() -> Any:
    """Without the bars and notes of exporters and quantisers."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
