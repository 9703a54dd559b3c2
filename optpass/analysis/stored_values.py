"""Which values to keep so that a part of a graph need not be computed again: the least that holds them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from math import prod
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.analysis.operators import aten, is_view
from optpass.ir.graph import Graph, value_of
from optpass.ir.sizes import example_sizes, is_size

REPEATING = frozenset({aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int})
JOINING = frozenset({aten.cat.default, aten.stack.default})
CREATION = frozenset(
    {
        *(aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format),
        *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
        *(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.scalar_tensor.default),
    }
)


def is_move(node: Node) -> bool:
    """Whether a call only places, repeats, casts or fills: doing it again costs as much as reading its result."""
    return is_view(node) or node.target is aten.to.dtype or node.target in REPEATING | JOINING | CREATION


def stored_values(graph: Graph, known: Set[Node]) -> list[Node]:
    """The values of fewest bytes from which all that the rest of ``graph`` reads of ``known`` follows by moves.

    ``known`` holds the operands of whatever it holds. A value is kept where some operator that is no move
    (:func:`is_move`) went into it: inputs, weights and what is moved of them are there anyway. Between such a value
    and its readers stand moves, and what stays the same along them is kept once: one product instead of the parts
    that it is split into and their transposition, a row before it is repeated, a half before it is widened. Where it
    makes no difference, the last is kept, which leaves fewer moves. Bytes are those of the captured sizes. In the
    order of the graph; linear in the nodes.
    """
    made = _made(graph, known)
    read = {node for node in made if any(user not in known for user in node.users)}
    least: dict[Node, float] = {}
    for node in reversed(list(graph.fx.nodes)):
        if node in made:
            below = sum(least[user] for user in _moved(node, made))
            least[node] = _bytes(node) if node in read else min(_bytes(node), below)
    kept: set[Node] = set()
    served: set[Node] = set()
    for node in graph.fx.nodes:
        if node not in made or not least[node]:
            continue
        source = _source(node, made)
        if source is not None and source in served:
            served.add(node)
        elif node in read or _bytes(node) < sum(least[user] for user in _moved(node, made)):
            kept.add(node)
            served.add(node)
    return [node for node in graph.fx.nodes if node in kept]


def _made(graph: Graph, known: Set[Node]) -> set[Node]:
    """The tensors of ``known`` that some operator other than a move went into."""
    made: set[Node] = set()
    for node in graph.fx.nodes:
        if node not in known or node.op != "call_function" or is_size(node):
            continue
        if not is_move(node) or any(operand in made for operand in node.all_input_nodes):
            made.add(node)
    return made


def _source(node: Node, made: Set[Node]) -> Node | None:
    """What ``node`` is moved from, where that is one value."""
    operands = [operand for operand in node.all_input_nodes if not is_size(operand)]
    return operands[0] if is_move(node) and len(operands) == 1 and operands[0] in made else None


def _moved(node: Node, made: Set[Node]) -> Iterable[Node]:
    return (user for user in node.users if user in made and _source(user, made) is node)


def _bytes(node: Node) -> float:
    """Of a value at the captured sizes; of several values in one there is no tensor to keep."""
    value: Any = node.meta["val"]
    if not isinstance(value, Tensor):
        return math.inf
    return prod(example_sizes(value_of(node))) * value.element_size()
