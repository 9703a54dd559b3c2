"""Target ``rknn`` in RKNN-Toolkit2's own environment: ONNX → ``.rknn``, and the toolkit's simulator.

The simulator runs what was built in the same process, and nothing that was read from a file.
"""

from __future__ import annotations

import os
import re
from typing import Any

import serving

ANSI = re.compile(r"\x1b\[[0-9;]*m")
ROW = re.compile(r"^D RKNN: \[[\d:.]+\] \d+ +(\S+) +(\S+) +(NPU|CPU|GPU) +.* (\S+:\S.*?) *$")
ERROR = re.compile(r"(?:^E |E RKNN: \[[\d:.]+\] )(.+)$")
RAISED = re.compile(r"^\w*(?:Error|Exception): (?!Traceback)(.+)$")
RULE = re.compile(r"disable_rules=\['(\w+)'\]")
FATAL = re.compile(r"\bfail|\bexceed|not support|unsupport\w* (?:\w+ )?op\b|\bREGTASK\b|\binvalid\b", re.IGNORECASE)
"""Of what the toolkit logs as errors while it returns success: those after which the file is of no use on a chip."""
NOISE = ("Unkown op target: 0", "rknn-toolkit2 version")
"""Logged as errors of models that its simulator and its own memory planner have no trouble with."""
CRASHING = ("fuse_slice_slice_concat_to_conv",)
"""Rewrites that end the process with a segmentation fault; this one on the swapped halves of a 2-D tensor, which
every embedding of timesteps has."""
ENDS = ("InputOperator", "OutputOperator")
RETRIES = 8
SHOWN = 20
_loaded: dict[str, Any] = {}


class RefusedError(Exception):
    """The toolkit did not make a usable engine."""


def build(onnx: str, platform: str, engine: str, optimization_level: int) -> dict[str, Any]:
    """Write ``engine`` from the file ``onnx``: which operators run where, and which of its rewrites were left out.

    A rewrite that fails in the toolkit's own code is left out, as its message suggests, and the build begun again.
    """
    _give_numbers_a_dimension(onnx)
    left_out = list(CRASHING)
    while True:
        start = len(serving.logged())
        try:
            _loaded["rknn"] = _built(onnx, platform, engine, optimization_level, left_out)
        except Exception as error:
            log = ANSI.sub("", serving.logged()[start:])
            again = [rule for rule in RULE.findall(log) if rule not in left_out]
            if again and len(left_out) < RETRIES:
                left_out += again
                continue
            raise RefusedError(_reason(log) or str(error)) from None
        log = ANSI.sub("", serving.logged()[start:])
        complaints = _complaints(log)
        if fatal := [text for text in complaints if FATAL.search(text)]:
            raise RefusedError(fatal[0])
        break
    placed = [match.groups() for match in map(ROW.match, log.splitlines()) if match and match[1] not in ENDS]
    return {
        "bytes": os.path.getsize(engine),
        "operators": len(placed),
        "native": sum(where == "NPU" for _, _, where, _ in placed),
        "integer": sum(dtype.startswith("INT8") for _, dtype, _, _ in placed),
        "left": [
            {"operator": kind, "name": name.split(":", 1)[-1]} for kind, _, where, name in placed if where != "NPU"
        ],
        "left_out": left_out[len(CRASHING) :],
        "complaints": complaints[:SHOWN],
    }


def _give_numbers_a_dimension(path: str) -> None:
    """Make inputs of no dimension vectors of one element, in place: the toolkit's simulator fails with the former."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    numbers = [value for value in model.graph.input if not value.type.tensor_type.shape.dim]
    if not numbers:
        return
    for value in numbers:
        name, within = value.name, f"{value.name}.number"
        for node in model.graph.node:
            node.input[:] = [within if each == name else each for each in node.input]
        value.type.tensor_type.shape.dim.add().dim_value = 1
        model.graph.node.insert(0, onnx.helper.make_node("Squeeze", [name], [within], name=f"(root)/{within}"))
    onnx.save(model, path)


def _built(onnx: str, platform: str, engine: str, optimization_level: int, left_out: list[str]) -> Any:
    from rknn.api import RKNN

    rknn = RKNN(verbose=True)
    options = {"target_platform": platform, "optimization_level": optimization_level, "disable_rules": left_out}
    _expect("config", rknn.config(**options))
    _expect("load_onnx", rknn.load_onnx(onnx))
    _expect("build", rknn.build(do_quantization=False))
    _expect("export_rknn", rknn.export_rknn(engine))
    if not os.path.isfile(engine):
        raise RefusedError("export_rknn wrote nothing")
    return rknn


def _expect(step: str, status: int) -> None:
    if status != 0:
        raise RefusedError(f"{step} failed")


def _reason(log: str) -> str:
    """Why a step failed: what was raised in the toolkit, else the first error that it logged."""
    raised = [match[0] for match in map(RAISED.match, log.splitlines()) if match]
    return next(iter([*raised, *_complaints(log)]), "")


def _complaints(log: str) -> list[str]:
    """The errors that the toolkit logged, each once."""
    found = [match[1].strip() for match in map(ERROR.search, log.splitlines()) if match]
    return [text for text in dict.fromkeys(found) if not text.startswith(NOISE) and "Traceback" not in text]


def load(engine: str, tensors: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    """Simulate what was built last; its tensors lie in the file ``tensors``."""
    if _loaded["rknn"].init_runtime() != 0:
        raise RefusedError(_reason(ANSI.sub("", serving.logged())) or "the simulator does not start")
    _loaded["inputs"], _loaded["outputs"] = serving.mapped(tensors, inputs), serving.mapped(tensors, outputs)


def call() -> None:
    """Run the simulator once."""
    import numpy

    # Copies in memory, and numbers as what _give_numbers_a_dimension made of them.
    inputs = [numpy.array(array).reshape(array.shape or (1,)) for array in _loaded["inputs"]]
    results = _loaded["rknn"].inference(inputs=inputs, data_format=["nchw"] * len(inputs))
    if results is None:
        raise RefusedError(_reason(ANSI.sub("", serving.logged())) or "the simulator gave no result")
    for place, value in zip(_loaded["outputs"], results):  # noqa: B905 - older Pythons
        place[...] = numpy.asarray(value).reshape(place.shape)
