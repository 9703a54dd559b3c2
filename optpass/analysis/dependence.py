"""Which inputs of its graph every value depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.analysis.computations import UNDEFINED, is_deterministic
from optpass.analysis.operators import aten
from optpass.ir.graph import Graph
from optpass.ir.sizes import is_size, size_of, sizes_of


@dataclass(frozen=True)
class Dependence:
    """Sets of inputs as bits, in the order of ``inputs``; the bit behind them is chance.

    ``of`` has what a node's value depends on, sizes included; ``contents`` the same without what only gives a size.
    Weights depend on nothing. A size is no property of one input: where several have it, a ``sym_size`` depends on
    the first of ``inputs``, and ``sizes`` says on which axis to read it.
    """

    inputs: tuple[str, ...]
    of: Mapping[Node, int]
    contents: Mapping[Node, int]
    sizes: Mapping[Node, tuple[str, int]]

    def mask(self, names: Iterable[str]) -> int:
        """The bits of ``names``, those among them that are no inputs passed over."""
        chosen = set(names)
        return sum(1 << index for index, name in enumerate(self.inputs) if name in chosen)

    def within(self, node: Node, names: int) -> bool:
        """Whether ``node`` depends on nothing outside the bits ``names``."""
        return self.of[node] & ~names == 0


def dependence(graph: Graph, preferred: Sequence[str] = ()) -> Dependence:
    """What every node of ``graph`` depends on; linear in the nodes.

    Sizes are taken from ``preferred`` inputs where these have them, in that order.
    """
    names = graph.signature.inputs
    inputs = (*(name for name in preferred if name in names), *(name for name in names if name not in preferred))
    bit = {name: 1 << index for index, name in enumerate(inputs)}
    placeholders = dict(zip(names, graph.placeholders, strict=True))
    carriers = _carriers({name: placeholders[name] for name in inputs})
    chance = 1 << len(inputs)
    of: dict[Node, int] = {node: bit[name] for name, node in placeholders.items()}
    contents, sizes = dict(of), dict[Node, tuple[str, int]]()
    for node in graph.fx.nodes:
        if node in of:
            continue
        carrier = carriers.get(_open_size(node))
        if carrier is not None:
            sizes[node] = carrier
            of[node], contents[node] = bit[carrier[0]], 0
            continue
        # Of an undefined value, any other is as good.
        defined = node.op == "call_function" and node.target not in UNDEFINED
        random = chance if defined and not is_deterministic(node) else 0
        operands = node.all_input_nodes
        of[node] = reduce(or_, (of[operand] for operand in operands), random)
        contents[node] = 0 if is_size(node) else reduce(or_, (contents[operand] for operand in operands), random)
    return Dependence(inputs, of, contents, sizes)


def _carriers(placeholders: Mapping[str, Node]) -> dict[Any, tuple[str, int]]:
    """Every open size that an input has, with the first that has it and the axis."""
    found: dict[Any, tuple[str, int]] = {}
    for name, node in placeholders.items():
        value = node.meta["val"]
        for axis, size in enumerate(sizes_of(value) if isinstance(value, Tensor) else ()):
            if not isinstance(size, int):
                found.setdefault(size, (name, axis))
    return found


def _open_size(node: Node) -> Any:
    """The size that a ``sym_size`` reads; ``None`` for any other node."""
    return size_of(node.meta["val"]) if node.target is aten.sym_size.int else None
