"""Target ``ethos-u`` in ExecuTorch's environment: a quantised program → ``.pte`` through Vela, and Arm's TOSA model.

What the NPU is given is TOSA, which Arm's reference model computes bit by bit; it does so here with the operators
between, in the process that compiled them.
"""

from __future__ import annotations

import copy
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import saved_programs
import serving
import torch

SHOWN = 200
COUNT = re.compile(r"^(CPU|NPU) operators = (\d+)", re.MULTILINE)
BORDER = ("quantize_per_tensor", "dequantize_per_tensor")
"""What turns floats into integers and back, where a delegate's tensors come from the outside."""
PRODUCTS, ACTIVATIONS = ("aten.conv", "aten.linear"), ("aten.relu", "aten.hardtanh")
COMPOSITE = ("aten.group_norm", "aten.layer_norm", "aten.softmax", "aten.mean", "aten.var", "aten.rms_norm")
"""What Arm's compiler breaks into operators whose own values would have to be quantised too."""
UNMARKED = "Node was not marked as quantized in the Arm backend."
APART = "it is made of operators whose values between are real; the NPU has integers alone"
_loaded: dict[str, Any] = {}


def lower(program: str, entry: str, device: str, engine: str, system: str, memory: str) -> dict[str, Any]:
    """Write ``engine`` from the entry of a saved ``program``; how many operators run on the NPU, and what does not."""
    # Registers what quantises between delegates.
    importlib.import_module("executorch.kernels.quantized")
    from executorch.backends.arm.ethosu import EthosUCompileSpec, EthosUPartitioner
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    exported = saved_programs.read(program, entry, mark_integers)
    spec = EthosUCompileSpec(device, system_config=system or None, memory_mode=memory or None)
    start = len(serving.logged())
    tosa: dict[bytes, bytes] = {}
    reasons: dict[str, str] = {}
    with _recorded(tosa, reasons):
        edge = to_edge_transform_and_lower(
            exported,
            transform_passes=[RemoveCloneOpsTransform()],
            partitioner=[EthosUPartitioner(spec)],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
    lowered = edge.exported_program()
    left = list(_left(lowered.graph_module, reasons))
    # What follows rewrites the graph for ExecuTorch's memory planner.
    _loaded["built"] = Emulated(lowered, tosa)
    with open(engine, "wb") as file:
        edge.to_executorch().write_to_file(file)
    counted = {"CPU": 0, "NPU": 0}
    for where, count in COUNT.findall(serving.logged()[start:]):
        counted[where] += int(count)
    return {
        "bytes": os.path.getsize(engine),
        "npu": counted["NPU"],
        "operators": counted["NPU"] + counted["CPU"] + len(left),
        "delegates": len(tosa),
        "left": left[:SHOWN],
    }


def mark_integers(module: Any) -> None:
    """Say of every operator between integers that it is one of integers.

    Arm's partitioner takes only what its own quantiser has marked so, in each node's ``custom`` metadata.
    """
    from executorch.backends.arm.common.annotation_meta import ArmAnnotationInfo

    for node in module.graph.nodes:
        if node.op == "call_function" and _of_integers(node):
            mark = dict(ArmAnnotationInfo(quantized=True))
            node.meta["custom"] = {**node.meta.get("custom", {}), ArmAnnotationInfo.CUSTOM_META_KEY: mark}


def _of_integers(node: Any) -> bool:
    """Whether all that ``node`` reads was integers, and all that it gives becomes integers.

    An activation behind a convolution or product is one with it: no integers stand between.
    """
    name = str(node.target)
    if "quantize_per" in name or name.startswith(COMPOSITE):
        return False
    read = [each for each in node.all_input_nodes if each.op != "get_attr"]
    if name.startswith(ACTIVATIONS) and str(read[0].target).startswith(PRODUCTS):
        return _of_integers(read[0])
    given = [each for reader in node.users for each in (reader.users if _is_passed(reader, name) else [reader])]
    whole = "getitem" in name or all("dequantize_per" in str(each.target) for each in read)
    return whole and all(".quantize_per" in str(user.target) for user in given)


def _is_passed(reader: Any, name: str) -> bool:
    activated = name.startswith(PRODUCTS) and str(reader.target).startswith(ACTIVATIONS)
    return activated or "getitem" in str(reader.target)


@contextmanager
def _recorded(tosa: dict[bytes, bytes], reasons: dict[str, str]) -> Iterator[None]:
    """Inside, ``tosa`` gets what the NPU's programs were made from, and ``reasons`` why nodes were refused."""
    from executorch.backends.arm.ethosu import EthosUBackend
    from executorch.exir.backend.utils import WhyNoPartitionReporter

    compiled, refused = EthosUBackend._compile_tosa_flatbuffer, WhyNoPartitionReporter.report_reject

    def compile_tosa(flatbuffer: bytes, spec: Any) -> Any:
        result = compiled(flatbuffer, spec)
        tosa[bytes(result.processed_bytes)] = bytes(flatbuffer)
        return result

    def report(self: Any, node: Any, reason: str) -> None:
        reasons.setdefault(node.name, " ".join(reason.split()))
        refused(self, node, reason)

    EthosUBackend._compile_tosa_flatbuffer = staticmethod(compile_tosa)
    WhyNoPartitionReporter.report_reject = report
    try:
        yield
    finally:
        EthosUBackend._compile_tosa_flatbuffer = staticmethod(compiled)
        WhyNoPartitionReporter.report_reject = refused


def _left(module: Any, reasons: dict[str, str]) -> Iterator[dict[str, str]]:
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op != "call_function" or "executorch_call_delegate" in name or "getitem" in name:
            continue
        if not any(each in name for each in BORDER):
            operator = saved_programs.operator_of(node)
            yield {
                "path": saved_programs.path_of(node),
                "operator": operator,
                "reason": reasons.get(node.name, "").replace(UNMARKED, APART),
            }


def load(engine: str, tensors: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    """Emulate what was lowered last; its tensors lie in the file ``tensors``."""
    _loaded["program"] = _loaded["built"]
    _loaded["inputs"] = [torch.from_numpy(array) for array in serving.mapped(tensors, inputs)]
    _loaded["outputs"] = [torch.from_numpy(array) for array in serving.mapped(tensors, outputs)]


def call() -> None:
    """Run the emulated engine once."""
    for place, value in zip(_loaded["outputs"], _loaded["program"](_loaded["inputs"])):  # noqa: B905
        place.copy_(value)


class Emulated(torch.fx.Interpreter):
    """A lowered program whose delegates Arm's reference model of TOSA computes, and torch the other operators."""

    def __init__(self, program: Any, tosa: dict[bytes, bytes]) -> None:
        module = program.graph_module
        super().__init__(module, graph=copy.deepcopy(module.graph))
        self.tosa = tosa
        constants = {**program.state_dict, **program.constants}
        targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
        self.placeholders = [
            constants.get(targets.get(node.name) or "") for node in program.graph.nodes if node.op == "placeholder"
        ]

    def __call__(self, inputs: list[Any]) -> Any:
        given = iter(inputs)
        return self.run(*[next(given) if value is None else value for value in self.placeholders])

    def run_node(self, n: Any) -> Any:
        """As the interpreter, but for delegates."""
        if n.op == "get_attr" and hasattr(getattr(self.module, n.target, None), "processed_bytes"):
            return getattr(self.module, n.target)
        if "executorch_call_delegate" not in str(n.target):
            return super().run_node(n)
        (delegate, *tensors), _ = self.fetch_args_kwargs_from_env(n)
        values = n.meta["val"]
        return self._delegate(delegate, tensors, values if isinstance(values, (tuple, list)) else (values,))

    def _delegate(self, delegate: Any, tensors: list[Any], values: Any) -> list[Any]:
        import tosa_reference_model

        arrays = [np.ascontiguousarray(tensor.numpy()) for tensor in tensors]
        results, status = tosa_reference_model.run(
            self.tosa[bytes(delegate.processed_bytes)], arrays, initialize_variable_tensor_from_numpy=1
        )
        if status != tosa_reference_model.GraphStatus.TOSA_VALID:
            raise RuntimeError(f"the TOSA reference model refuses the program: {status}")
        return [
            torch.from_numpy(np.array(result)).view(value.dtype).reshape(value.shape)
            for result, value in zip(results, values)  # noqa: B905
        ]
