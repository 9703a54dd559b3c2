"""Which values to keep so that a part of a graph need not be computed again: the least that holds them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set

from torch import Tensor
from torch.fx import Node

from optpass.analysis.liveness import result_bytes
from optpass.analysis.mac_rules import macs_of
from optpass.analysis.operators import aten, is_view
from optpass.ir.graph import Graph
from optpass.ir.sizes import is_size

MOVING = frozenset(
    {
        *(aten.to.dtype, aten.cat.default, aten.stack.default),
        *(aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int),
        *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
        *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
        *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default),
    }
)
"""Operators beside views that place, repeat, cast or fill."""
SCALING = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar),
        *(aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.neg.default),
    }
)
"""Arithmetic that is a move where all operands but one are numbers or constants."""
Stored = tuple[float, int]
"""Bytes of what is kept, and how many values that are."""


def stored_values(graph: Graph, known: Set[Node]) -> list[Node]:
    """The values of fewest bytes from which all that the rest of ``graph`` reads of ``known`` follows by moves.

    ``known`` holds the operands of whatever it holds. A value is kept where some operator that is no move
    went into it: inputs, weights and what is moved of them are there anyway, and tables that no product went into are
    for constant folding. A move places, repeats, casts, fills or
    scales, which costs no more than to read its result. Between a value that was made and its readers stand moves,
    and what stays the same along them is kept once: one product instead of the parts that it is split into, a row
    before it is repeated, a half before it is widened, a sum before each block's own table is added. Of equal sizes
    the one that makes fewer values is kept, and of a chain the last, which leaves no moves. Bytes are those of the
    captured sizes. In the order of the graph; linear in the nodes.
    """
    sources = _sources(graph, known)
    made = sources.keys()
    read = {node for node in made if any(user not in known for user in node.users)}
    moved = {node: [user for user in node.users if sources.get(user) is node] for node in made}
    least: dict[Node, Stored] = {}
    for node in reversed(list(graph.fx.nodes)):
        if node in made:
            below = _total(least[user] for user in moved[node])
            least[node] = (_bytes(node), 1) if node in read else min((_bytes(node), 1), below)
    kept, served = list[Node](), set[Node]()
    for node in graph.fx.nodes:
        if node not in made or not least[node][1]:
            continue
        if sources[node] in served:
            served.add(node)
        elif node in read or (_bytes(node), 1) < _total(least[user] for user in moved[node]):
            kept.append(node)
            served.add(node)
    return kept


def _total(parts: Iterable[Stored]) -> Stored:
    """The bytes and the number of several that are kept."""
    listed = list(parts)
    return sum(size for size, _ in listed), sum(count for _, count in listed)


def _sources(graph: Graph, known: Set[Node]) -> dict[Node, Node | None]:
    """The tensors of ``known`` that some operator other than a move went into: what each is moved from, if it is."""
    constant: set[Node] = set()
    sources: dict[Node, Node | None] = {}
    for node in graph.fx.nodes:
        operands = [operand for operand in node.all_input_nodes if operand not in constant and not is_size(operand)]
        if node.op == "get_attr" or (node.op == "call_function" and not operands and not macs_of(node)):
            constant.add(node)
        elif node in known and node.op == "call_function" and not is_size(node):
            moved = _is_move(node, operands)
            if not moved or any(operand in sources for operand in operands):
                sources[node] = operands[0] if moved and len(operands) == 1 else None
    return sources


def _is_move(node: Node, operands: Sequence[Node]) -> bool:
    """Whether a call is a move of ``operands``, those of its operands that are neither constants nor sizes."""
    return is_view(node) or node.target in MOVING or (node.target in SCALING and len(operands) == 1)


def _bytes(node: Node) -> float:
    """Of a tensor at the captured sizes; several in one are no tensor that could be kept."""
    return result_bytes(node) if isinstance(node.meta["val"], Tensor) else math.inf
