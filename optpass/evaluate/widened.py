"""A Program in float32 throughout, for checks that half precision's rounding would drown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.ir.weights import Cast

NARROW = (torch.float16, torch.bfloat16)


def widened(program: Program) -> Program:
    """``program`` with every float16 and bfloat16 weight, input and operator in float32; itself if it has none.

    The same function with less rounding: to execute, for its casts may change nothing.
    """
    narrow = {name: expression for name, expression in program.weights.items() if expression.dtype in NARROW}
    if not narrow and not any(
        _is_narrow(node.meta.get("val")) for g in program.entries.values() for node in g.fx.nodes
    ):
        return program
    wide = program.copy()
    for graph in wide.entries.values():
        _widen(graph)
    return replace(wide, weights=wide.weights.updated({n: Cast(e, torch.float32) for n, e in narrow.items()}))


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in NARROW


def _widen(graph: Graph) -> None:
    for node in graph.fx.nodes:
        if node.op in ("placeholder", "get_attr"):
            if _is_narrow(node.meta["val"]):
                with graph.mode:
                    node.meta["val"] = torch.empty_like(node.meta["val"], dtype=torch.float32)
        elif node.op == "call_function":
            node.args, node.kwargs = map_aggregate((node.args, node.kwargs), _wide)
            node.meta["val"] = graph.infer(node)


def _wide(argument: Any) -> Any:
    return torch.float32 if argument in NARROW else argument
