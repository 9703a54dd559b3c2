"""A Program in float32 throughout, for checks that half precision's rounding would drown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

from optpass.capture.digest import Watched
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.ir.weights import Cast, Expression, with_operands

NARROW = (torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)


def widened(program: Program, *, unrounded: bool = False) -> Program:
    """``program`` with every float16 and bfloat16 weight, input and operator in float32; itself if it has none.

    The same function with less rounding: to execute, for its casts may change nothing. ``unrounded`` leaves
    out the roundings inside the weights' expressions as well: what a pass computes in float32 is rounded
    once, and an exact contract is about what was computed.
    """
    narrow = {name: expression for name, expression in program.weights.items() if expression.dtype in NARROW}
    if not narrow and not any(
        _is_narrow(node.meta.get("val")) for g in program.entries.values() for node in g.fx.nodes
    ):
        return program
    wide = program.copy()
    for graph in wide.entries.values():
        _widen(graph)
    if unrounded:
        # A float32 weight may be computed from rounded ones: constant keys of prompts, from merged projections.
        narrow = {name: _unrounded(e) for name, e in program.weights.items() if e.dtype in (*NARROW, *WIDE)}
    return replace(
        wide, weights=wide.weights.updated({name: _cast(e) for name, e in narrow.items()})
    ).with_written_states()


def _cast(expression: Expression) -> Expression:
    return expression if expression.dtype in WIDE else Cast(expression, torch.float32)


def _unrounded(expression: Expression) -> Expression:
    """``expression`` in float32 from its leaves on."""
    if isinstance(expression, Cast) and expression.dtype in NARROW:
        found = _unrounded(expression.operand)
    else:
        # What watches a leaf for its digest must go on reading that leaf.
        found = expression if isinstance(expression, Watched) else with_operands(expression, _unrounded)
    return found if found.dtype in WIDE or not expression.dtype.is_floating_point else _cast(found)


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
