"""A Program that optpass saved → an exported program with values, in the torch of a vendor's environment."""

from __future__ import annotations

import importlib
import json
import math
import mmap
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def read(folder: str, entry: str, prepare: Callable[[Any], None] = lambda module: None) -> Any:
    """The entry of the Program saved in ``folder``, traced again over its values, every node with its module's path.

    ``prepare`` may edit the module before.

    Attention is written out as products and a softmax: torch's own form also watches for rows that hide
    everything, in operators that no device has.
    """
    # Registers the operators of quantised programs.
    importlib.import_module("torch.ao.quantization.fx._decomposed")

    with open(os.path.join(folder, "program.json"), encoding="utf-8") as file:
        index = json.load(file)
    exported = torch.export.load(os.path.join(folder, index["entries"][entry]["graph"]))
    if index["weights"]["file"]:
        _fill(exported.state_dict, os.path.join(folder, index["weights"]["file"]))
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    inputs = values[len(exported.graph_signature.parameters) + len(exported.graph_signature.buffers) :]
    module = exported.module(check_guards=False)
    _write_out_attention(module)
    _write_out_zero_points(module)
    _give_readers_their_own(module.graph)
    prepare(module)
    module.recompile()
    example = tuple(torch.zeros(value.shape, dtype=value.dtype) for value in inputs)
    return torch.export.export(module, example, strict=False)


def path_of(node: Any) -> str:
    """The path of the module that ``node`` came from; ``(root)`` for the model's own."""
    stack = node.meta.get("nn_module_stack") or {}
    last = list(stack.values())[-1][0] if stack else ""
    path = last.split("@")[0]
    for prefix in ("L['self'].", "L['self']"):
        path = path[len(prefix) :] if path.startswith(prefix) else path
    return path or "(root)"


def operator_of(node: Any) -> str:
    """The operator's name without namespaces: ``native_group_norm.default``."""
    name = getattr(node.target, "__name__", str(node.target))
    return str(name).replace("aten.", "").replace("dim_order_ops.", "")


def _fill(state: dict[str, Tensor], path: str) -> None:
    """Put the safetensors file's values into ``state``; they stay in the mapped file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(PREFIX), "little")
        header = json.loads(file.read(size))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, record in header.items():
        if name not in state:
            continue
        shape, offset = record["shape"], PREFIX + size + record["data_offsets"][0]
        count = math.prod(shape)
        flat = torch.frombuffer(content, dtype=DTYPES[record["dtype"]], count=count, offset=offset) if count else None
        value = torch.empty(shape, dtype=DTYPES[record["dtype"]]) if flat is None else flat.reshape(shape)
        old = state[name]
        state[name] = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value


def _write_out_attention(module: Any) -> None:
    aten, graph = torch.ops.aten, module.graph
    for node in list(graph.nodes):
        if node.target is not ATTENTION or not _plain(node):
            continue
        query, key, value = node.args[:3]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        scale = node.kwargs.get("scale") or query.meta["val"].shape[-1] ** -0.5
        with graph.inserting_before(node):
            turned = graph.call_function(aten.transpose.int, (key, -2, -1))
            scaled = graph.call_function(aten.mul.Tensor, (query, scale))
            scores = graph.call_function(aten.matmul.default, (scaled, turned))
            masked = scores if mask is None else graph.call_function(aten.add.Tensor, (scores, mask))
            weights = graph.call_function(aten.softmax.int, (masked, -1))
            result = graph.call_function(aten.matmul.default, (weights, value))
        for made in (turned, scaled, scores, masked, weights, result):
            made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack"))
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _write_out_zero_points(module: Any) -> None:
    """Give symmetric channels the zero points that their operator may leave out, and its readers here may not."""
    for index, node in enumerate(list(module.graph.nodes)):
        if "quantize_per_channel" not in str(node.target) or node.args[2] is not None:
            continue
        name = f"zero_points_{index}"
        module.register_buffer(name, torch.zeros(node.args[1].meta["val"].shape, dtype=torch.int64))
        with module.graph.inserting_before(node):
            zeros = module.graph.get_attr(name)
        node.args = (*node.args[:2], zeros, *node.args[3:])


def _give_readers_their_own(graph: Any) -> None:
    """Copy each dequantisation for each of its readers, as torch's own quantisation has it.

    Partitioners take one together with its reader, and shared ones would tie their delegates into knots.
    """
    for node in list(graph.nodes):
        if "dequantize_per" not in str(node.target):
            continue
        for reader in list(node.users)[1:]:
            with graph.inserting_before(reader):
                own = graph.node_copy(node)
            reader.replace_input_with(node, own)


def _plain(node: Any) -> bool:
    """Whether the attention hides nothing but by a mask that is added, and repeats no heads."""
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:]), **node.kwargs)  # noqa: B905
    mask = given.get("attn_mask")
    if mask is not None and not mask.meta["val"].is_floating_point():
        return False
    return not (given.get("is_causal") or given.get("dropout_p") or given.get("enable_gqa"))
