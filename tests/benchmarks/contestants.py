"""Models of other tools as contestants of a benchmark: an ONNX file in ONNX Runtime, a file that OpenVINO reads.

    Contestant("quantize_static", "tests/benchmarks/contestants.py:onnx_file", {"path": "int8.onnx", "threads": 2})

Inputs are seeded and random, with open sizes at 1; ``interface`` stays empty, for tools rename inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from optpass.evaluate.bench_worker import Ready

FLOATS = {"float": np.float32, "float16": np.float16, "double": np.float64}
INTEGERS = {"int64": np.int64, "int32": np.int32, "int8": np.int8, "uint8": np.uint8}


def onnx_file(path: str, threads: int = 0, seed: int = 0) -> Ready:
    """ONNX Runtime on the CPU with all its optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = {item.name: item.type.removeprefix("tensor(").removesuffix(")") for item in session.get_inputs()}
    shapes = {item.name: item.shape for item in session.get_inputs()}
    feeds = _feeds(shapes, kinds, seed)
    return Ready(lambda: session.run(None, feeds), items=_items(feeds), facts={"threads": threads, "file": path})


def openvino_file(path: str, threads: int = 0, precision: str = "f32", seed: int = 0) -> Ready:
    """OpenVINO on the CPU, one request at a time; ``precision`` is its hint, for it takes bf16 where it may."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(model, "CPU", {**settings, **({"INFERENCE_NUM_THREADS": threads} if threads else {})})
    request = compiled.create_infer_request()
    shapes = {
        item.get_any_name(): [size.get_length() if size.is_static else 1 for size in item.get_partial_shape()]
        for item in compiled.inputs
    }
    kinds = {item.get_any_name(): _kind(item.get_element_type().get_type_name()) for item in compiled.inputs}
    feeds = _feeds(shapes, kinds, seed)
    return Ready(lambda: request.infer(feeds), items=_items(feeds), facts={"threads": threads, "file": path})


def _kind(name: str) -> str:
    return {"f32": "float", "f16": "float16", "f64": "double", "i64": "int64", "i32": "int32"}.get(name, name)


def _feeds(shapes: dict[str, Any], kinds: dict[str, str], seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    feeds = {}
    for name, shape in shapes.items():
        sizes, kind = [size if isinstance(size, int) else 1 for size in shape], kinds[name]
        if kind in FLOATS:
            feeds[name] = generator.standard_normal(sizes).astype(FLOATS[kind])
        elif kind in INTEGERS:
            feeds[name] = generator.integers(0, 2, sizes).astype(INTEGERS[kind])
        else:
            feeds[name] = np.ones(sizes, dtype=bool)
    return feeds


def _items(feeds: dict[str, Any]) -> int:
    return next((int(value.shape[0]) for value in feeds.values() if value.ndim > 1), 1)
