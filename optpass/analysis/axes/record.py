"""The axes of a Program as a JSON-able record: what may be cut, with every slice, and why the rest may not."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from optpass.analysis.axes.axes import Axes
from optpass.analysis.axes.groups import Slice
from optpass.ir.graph import path_of
from optpass.ir.program import Program


def axes_record(program: Program, found: Axes) -> dict[str, Any]:
    """``inputs`` (names of each dimension), ``groups`` and ``fixed``, in the order in which weights are read."""
    return {
        "inputs": {
            f"{entry}.{name}": [_name(found, node, dim) for dim in range(len(found.of(node)))]
            for entry, graph in program.entries.items()
            for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True)
        },
        "groups": [
            {
                "path": group.path,
                "kind": group.kind,
                "size": group.size,
                "slices": list(map(_slice, group.slices)),
                "norms": [path_of(node) for node in group.norms],
            }
            for group in found.groups
        ],
        "fixed": [
            {
                "path": fixed.path,
                "size": str(fixed.atom.size),
                "slices": list(map(_slice, fixed.slices)),
                "reason": fixed.reason,
            }
            for fixed in found.fixed
        ],
    }


def _slice(item: Slice) -> dict[str, Any]:
    return {"weight": item.weight, "dim": item.dim, "role": item.role}


def _name(found: Axes, node: Node, dim: int) -> str:
    return "·".join(sorted(found.names(found.of(node)[dim])))
