"""Where a Program can be adapted: the linears and convolutions, by the path of their module."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.fx import Node

from optpass.analysis.operators import CONVOLUTIONS
from optpass.ir.graph import path_of
from optpass.ir.program import Program
from optpass.ir.text import operator_name

aten = torch.ops.aten

ADAPTED = CONVOLUTIONS | {aten.linear.default}
"""Operators whose ``weight`` adapters change."""
SUFFIX = ".weight"


@dataclass(frozen=True)
class Reader:
    """A node that reads a weight, and the entry that it stands in."""

    entry: str
    node: Node

    @property
    def adapts(self) -> bool:
        return self.node.target in ADAPTED


@dataclass(frozen=True)
class Site:
    """A weight ``PATH.weight`` and every node that reads it."""

    weight: str
    readers: tuple[Reader, ...]

    @property
    def path(self) -> str:
        return self.weight.removesuffix(SUFFIX)

    @property
    def doubt(self) -> str:
        """Why changing the weight is not what the adapter does; empty where it is."""
        others = [reader.node for reader in self.readers if not reader.adapts]
        if others:
            return (
                f"{self.weight} is read by {operator_name(others[0])} ({path_of(others[0])}), no linear or convolution"
            )
        paths = sorted({path_of(reader.node) for reader in self.readers})
        if len(paths) > 1:
            return f"{self.weight} is shared by {paths[0]} and {paths[1]}: a merged weight would change both"
        return ""


def sites(program: Program) -> dict[str, Site]:
    """All weights that are called ``PATH.weight``, by PATH."""
    readers: dict[str, list[Reader]] = defaultdict(list)
    for entry, graph in program.entries.items():
        for node in graph.fx.nodes:
            if node.op == "get_attr" and str(node.target).endswith(SUFFIX):
                readers[str(node.target)] += [Reader(entry, user) for user in node.users]
    return {name.removesuffix(SUFFIX): Site(name, tuple(found)) for name, found in readers.items() if found}
