"""What of a graph has no ONNX form, or no kernels in an engine that takes ONNX: by module path, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.interchange.onnx_file import untranslatable
from optpass.ir.graph import Graph, path_of
from optpass.ir.text import operator_name
from optpass.ir.weights import WeightStore, dtype_name
from optpass.pipeline.target import COPIES, Unsupported

DOUBLE = frozenset(
    [
        "arange",
        "arange.start",
        "arange.start_step",
        "cat",
        "cos",
        "div.Tensor",
        "expand",
        "mul.Scalar",
        "mul.Tensor",
        "outer",
        "pow.Scalar",
        "pow.Tensor_Scalar",
        "reciprocal",
        "repeat_interleave.self_int",
        "reshape",
        "sin",
        "slice.Tensor",
        "stack",
        "to.dtype",
        "unsqueeze",
        "_to_copy",
    ]
)
"""Operators that engines take in f64: those in which models compute the angles of rotary embeddings."""
DIVISIBLE = (aten.avg_pool2d.default, aten.avg_pool3d.default)
"""Average pools that take a divisor, which their translation passes over."""
EXPORTER, NODE_IN_MEMORY = 100 << 20, 40 << 10
"""Memory of the exporter and its optimiser, which imports an evaluator; and of each node, in any form of the graph."""
ADVICE = {torch.bfloat16: "; cast to f16 or f32", torch.float64: "; capture or cast to f32"}


def onnx_unsupported(graph: Graph, dtypes: Collection[torch.dtype], engine: str) -> Iterator[Unsupported]:
    """What of ``graph`` cannot be written as ONNX, or computes in none of ``engine``'s ``dtypes``; reads no weight.

    f64 passes where it is one of ``dtypes``, and in the operators of :data:`DOUBLE`.
    """
    for spec in (*graph.inputs, *graph.outputs):
        if spec.dtype not in dtypes:
            yield Unsupported("(interface)", spec.name, _dtype_reason(engine, spec.dtype))
    for node in graph.calls:
        for dtype in _dtypes(node):
            if dtype not in dtypes and not (dtype == torch.float64 and operator_name(node) in DOUBLE):
                yield Unsupported(path_of(node), operator_name(node), _dtype_reason(engine, dtype))
                break
    for node in graph.calls:
        if node.target in DIVISIBLE and argument(node, "divisor_override") is not None:
            yield Unsupported(path_of(node), operator_name(node), "ONNX averages over the window: divisor_override")
    for node in untranslatable(graph):
        yield Unsupported(path_of(node), operator_name(node), "ONNX has no translation of this operator")


def exporting_memory(graph: Graph, weights: WeightStore) -> int:
    """Bytes that writing ``graph`` as ONNX takes at most: the graph, and :data:`COPIES` of its largest weight."""
    read = weights.restricted(graph.weight_names)
    largest = max((expression.nbytes for expression in read.values()), default=0)
    return EXPORTER + NODE_IN_MEMORY * len(graph.calls) + COPIES * largest


def _dtypes(node: Node) -> list[torch.dtype]:
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item.dtype for item in values if isinstance(item, Tensor)]


def _dtype_reason(engine: str, dtype: torch.dtype) -> str:
    return f"{engine} has no {dtype_name(dtype)} kernels for it{ADVICE.get(dtype, '')}"
