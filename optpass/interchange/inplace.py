"""In-place operators on values that nobody else looks at → the operators that return their result.

``torch.export`` keeps a model's ``x += y`` as ``add_``. Functionalisation takes any of them, by tracing the graph
once more; a graph whose in-place operators are all of this plain kind is spared that, half of its capture.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from optpass.ir.dialect import ALIASES, EXPANSIONS, IDENTITIES, is_inplace
from optpass.ir.sizes import open_rules

aten = torch.ops.aten

COPIES = frozenset({aten.clone.default, aten.lift_fresh_copy.default})
SHARING = (IDENTITIES | ALIASES | EXPANSIONS) - COPIES
"""Operators that may return their operand's own memory, whatever their schema says."""


def make_functional(graph: fx.Graph) -> bool:
    """Replace the in-place operators of an exported ``graph`` if all of them are plain; whether that was done.

    ``x.add_(y)`` becomes ``x + y`` and later readers of ``x`` read the sum, where ``x`` was computed in this graph and
    no other value that shares its memory is read later. Not plain is what writes to an input, a weight, or a part
    of a value that is read as a whole, and any graph with nested graphs.
    """
    found = _plain(graph)
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node, functional in (found or {}).items():
        node.target = functional
        operand: Any = node.args[0]  # no longer what it was, where a former replacement changed it
        for user in [user for user in operand.users if position[user] > position[node]]:
            user.replace_input_with(operand, node)
    return bool(found)


def _plain(graph: fx.Graph) -> dict[fx.Node, Any] | None:
    """In-place nodes in order, with their functional operators; ``None`` when one has none or is not plain."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    owner: dict[fx.Node, fx.Node] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    found: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return None
        if node.op == "call_function" and is_inplace(node.target):
            functional = _functional(node)
            if functional is None or not _is_private(node, owner, sharing, position):
                return None
            found[node] = functional
        source = _memory_of(node)
        owner[node] = node if source is None else owner[source]
        sharing.setdefault(owner[node], []).append(node)
    return found


def _is_private(
    node: fx.Node,
    owner: Mapping[fx.Node, fx.Node],
    sharing: Mapping[fx.Node, list[fx.Node]],
    position: Mapping[fx.Node, int],
) -> bool:
    """Whether what ``node`` writes to was computed in the graph, and is read later under the operand's name only."""
    operand: Any = node.args[0]
    if owner[operand].op != "call_function":
        return False
    others = (other for other in sharing[owner[operand]] if other is not operand)
    return not any(position[user] > position[node] for other in others for user in other.users)


def _functional(node: fx.Node) -> Any:
    """The operator that returns what ``node`` writes; ``None`` where there is none of the same dtype."""
    packet, overload = str(node.target).removeprefix("aten.").rsplit(".", 1)
    functional = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    value = node.meta.get("val")
    if functional is None or functional is node.target or not isinstance(value, Tensor):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    mode = value.fake_mode  # type: ignore[attr-defined]
    with open_rules(mode), mode, torch.no_grad():
        result = functional(*args, **kwargs)
    return functional if result.dtype == value.dtype else None


def _memory_of(node: fx.Node) -> fx.Node | None:
    """The operand whose memory ``node`` may share; ``None`` when its memory is its own."""
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    if node.op != "call_function" or not operands:
        return None
    target: Any = node.target
    shares = target is operator.getitem or target in SHARING
    if not shares and isinstance(target, torch._ops.OpOverload):
        shares = any(result.alias_info is not None for result in target._schema.returns)
    return operands[0] if shares else None
