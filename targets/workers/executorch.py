"""Target ``executorch`` in ExecuTorch's own environment: an exported program → a ``.pte`` file, and its runtime."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import saved_programs
import serving
import torch

SHOWN = 200
PRODUCTS = ("aten.conv", "aten.linear")
DELEGATE = "executorch_call_delegate"
_loaded: dict[str, Any] = {}


def _xnnpack() -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]


def _coreml() -> list[Any]:
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    return [CoreMLPartitioner()]


def _vulkan() -> list[Any]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return [VulkanPartitioner()]


PARTITIONERS: dict[str, Callable[[], list[Any]]] = {
    "xnnpack": _xnnpack,
    "coreml": _coreml,
    "vulkan": _vulkan,
    "portable": list,
}


def lower(program: str, entry: str, backend: str, engine: str) -> dict[str, Any]:
    """Write ``engine`` from the entry of a saved ``program``; what its delegates take, and what they leave."""
    # Registers what quantises between delegates.
    importlib.import_module("executorch.kernels.quantized")
    from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    exported = saved_programs.read(program, entry, make_weights_real)
    edge = to_edge_transform_and_lower(
        exported,
        # XNNPACK drops copies that change nothing, and then fails where both sides of one leave a delegate.
        transform_passes=[RemoveCloneOpsTransform()],
        partitioner=PARTITIONERS[backend](),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    found = coverage(edge.exported_program().graph_module)
    with open(engine, "wb") as file:
        edge.to_executorch().write_to_file(file)
    return {"bytes": os.path.getsize(engine), **found}


def make_weights_real(module: Any) -> None:
    """Give products whose result stays real the real values of integer weights.

    XNNPACK's integer kernels give integers; of a product that gives reals its partitioner takes some, and computes
    with the integers as though they were the weights.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or len(node.args) < 2 or not str(node.target).startswith(PRODUCTS):
            continue
        weight = node.args[1]
        if "dequantize_per_channel" not in str(getattr(weight, "target", "")) or _becomes_integers(node):
            continue
        values = [
            attrgetter(str(each.target))(module) if isinstance(each, torch.fx.Node) else each for each in weight.args
        ]
        name = f"real_{weight.name}"
        module.register_buffer(name, weight.target(*values, **weight.kwargs).detach())
        with module.graph.inserting_before(node):
            node.update_arg(1, module.graph.get_attr(name))


def _becomes_integers(node: Any) -> bool:
    """Whether all readers of ``node`` quantise it, maybe behind an activation that the kernels include."""
    readers = [each for user in node.users for each in (user.users if ".relu" in str(user.target) else [user])]
    return all(".quantize_per" in str(each.target) for each in readers)


def coverage(module: Any) -> dict[str, Any]:
    """The operators in delegates, and those that are left to the portable kernels, by module path."""
    delegated, left = 0, []
    for node in module.graph.nodes:
        if node.op == "get_attr" and hasattr(getattr(module, node.target, None), "original_module"):
            inner = getattr(module, node.target).original_module.graph_module
            delegated += sum(_computes(each) for each in inner.graph.nodes)
        elif _computes(node):
            left.append({"path": saved_programs.path_of(node), "operator": saved_programs.operator_of(node)})
    return {"delegated": delegated, "operators": delegated + len(left), "left": left[:SHOWN]}


def _computes(node: Any) -> bool:
    return node.op == "call_function" and not any(name in str(node.target) for name in (DELEGATE, "getitem"))


def load(engine: str, tensors: str, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
    """Open ``engine``, whose tensors lie in the file ``tensors``."""
    from executorch.runtime import Runtime

    importlib.import_module("executorch.kernels.quantized")
    program = Runtime.get().load_program(engine)
    _loaded["program"], _loaded["method"] = program, program.load_method("forward")
    _loaded["inputs"] = [torch.from_numpy(array) for array in serving.mapped(tensors, inputs)]
    _loaded["outputs"] = [torch.from_numpy(array) for array in serving.mapped(tensors, outputs)]


def call() -> None:
    """Run the open engine."""
    for place, value in zip(_loaded["outputs"], _loaded["method"].execute(_loaded["inputs"])):  # noqa: B905
        place.copy_(value)
