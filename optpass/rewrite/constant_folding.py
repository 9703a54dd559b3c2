"""Constant folding, bounded in size: what reads weights and literals alone becomes a weight.

What reads literals alone (position tables, frequencies, masks) is computed here; what reads weights
becomes an expression over them, which nobody evaluates before the weights are written.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from optpass.analysis.computations import is_deterministic
from optpass.analysis.operators import aten, is_view
from optpass.analysis.permutations import permutation_of
from optpass.analysis.uniform import FILLS, FULL
from optpass.ir.computed import Computed
from optpass.ir.graph import Graph, path_of
from optpass.ir.program import Program
from optpass.ir.sizes import is_size, sizes_of
from optpass.ir.slots import has_slot
from optpass.ir.weights import Cast, Constant, Expression, Permute, Reshape, is_larger
from optpass.rewrite.naming import WeightNames
from optpass.rewrite.rules import replace
from optpass.rewrite.views import RESHAPES

LIMIT = 1 << 20
"""Bytes of a result that is folded although the weights that it is made from may stay."""
STEPS = 64
"""Operators in one expression."""
NARROW = (torch.float16, torch.bfloat16)
MOVING = frozenset(
    {aten.cat.default, aten.stack.default, aten.index.Tensor, aten.index_select.default, aten.flip.default}
)
"""Operators beside views that move values and round nothing."""
CHEAP = frozenset({aten.expand.default, aten.repeat.default, *FILLS, *FULL})
"""Operators that stay as they are: repeating and filling costs less than bytes to store."""


@dataclass(frozen=True)
class Known:
    """A value that depends on no input: the values themselves, or the expression that gives them.

    Of a split that reads weights neither; its parts have expressions. ``owned`` are the bytes of the
    weights under it that nothing else reads, ``steps`` the operators.
    """

    values: Any
    expression: Expression | None
    owned: int
    steps: int


def fold_constants(program: Program, entry: str) -> tuple[Program, list[Node]]:
    """Put a weight in place of every constant value of an entry that something else reads; the nodes that went.

    Folded is what has at most :data:`LIMIT` bytes, or no more than the weights that go with it. Not folded:
    repetitions (their operand is), what the graph returns, random operators, and arithmetic in half precision,
    which would be rounded where a check in float32 does not round. Linear in the nodes.
    """
    graph = program.entries[entry]
    known = _Constants(program, graph.fx.nodes, bounded=True).known
    results = _results(graph, known)
    return _with_stored(program, graph, known, {node: node.name for node in results}), results


def fold_values(program: Program, entry: str, leaves: Mapping[Node, str]) -> Program:
    """Put weights in place of the given values, whatever their size; each is called by its module and its leaf name.

    A value that depends on an input, or is not folded for one of the other reasons of :func:`fold_constants`,
    stays as it is.
    """
    graph = program.entries[entry]
    above: set[Node] = set()
    pending = list(leaves)
    while pending:
        node = pending.pop()
        if node not in above:
            above.add(node)
            pending.extend(node.all_input_nodes)
    known = _Constants(program, [node for node in graph.fx.nodes if node in above], bounded=False).known
    return _with_stored(program, graph, known, {node: leaf for node, leaf in leaves.items() if node in known})


def _with_stored(program: Program, graph: Graph, known: dict[Node, Known], leaves: Mapping[Node, str]) -> Program:
    """The Program in which weights take the place of the nodes in ``leaves``."""
    names, weights = WeightNames(program), {}
    for node, leaf in leaves.items():
        name, expression = names.fresh(path_of(node), leaf), _stored(known[node])
        with graph.before(node):
            weight = graph.weight(name, expression, like=node)
        weights[name] = expression
        replace(node, weight)
    return program.with_weights(weights)


def _results(graph: Graph, known: dict[Node, Known]) -> list[Node]:
    """The constants that something reads which is not folded itself."""
    kept: set[Node] = set()
    found = []
    for node in reversed(list(graph.fx.nodes)):
        if node not in known or all(user in known and user not in kept for user in node.users):
            continue
        is_output = graph.output_node in node.users
        if (
            node.op == "call_function"
            and isinstance(node.meta["val"], Tensor)
            and node.target not in CHEAP
            and not is_output
        ):
            found.append(node)
        else:
            kept.add(node)
    return found[::-1]


def _stored(known: Known) -> Expression:
    if known.values is not None:
        return Constant(known.values.clone(), computed=True)
    assert known.expression is not None
    return known.expression


class _Constants:
    """What of ``nodes``, which stand in the graph's order, depends on no input; within the bound, or of any size."""

    def __init__(self, program: Program, nodes: Iterable[Node], *, bounded: bool) -> None:
        self.weights, self.bounded = program.weights, bounded
        self.reads = Counter(
            str(node.target) for each in program.entries.values() for node in each.fx.nodes if node.op == "get_attr"
        )
        self.known: dict[Node, Known] = {}
        for node in nodes:
            if known := self._look(node):
                self.known[node] = known

    def _look(self, node: Node) -> Known | None:
        if node.op == "get_attr":
            return self._weight(node)
        operands = node.all_input_nodes
        if node.op != "call_function" or any(operand not in self.known for operand in operands):
            return None
        if is_size(node) or not is_deterministic(node) or not all(_is_fixed(value) for value in _values(node)):
            return None
        below = [self.known[operand] for operand in operands]
        owned = sum(known.owned for operand, known in zip(operands, below, strict=True) if len(operand.users) == 1)
        steps = 1 + sum(known.steps for known in below)
        if self.bounded and sum(value.nbytes for value in _values(node)) > max(LIMIT, owned):
            return None
        if steps > STEPS or _rounds(node):
            return None
        if all(known.values is not None for known in below):
            return Known(self._run(node), None, owned, 1)
        expression = self._expression(node)
        if expression is not None and is_larger(expression):
            return None
        return Known(None, expression, owned, steps)

    def _weight(self, node: Node) -> Known | None:
        expression = self.weights[str(node.target)]
        if has_slot(expression):
            # What can be exchanged after the build is no constant.
            return None
        owned = expression.nbytes if self.reads[str(node.target)] == 1 else 0
        values = expression.value if isinstance(expression, Constant) and expression.computed else None
        return Known(values, expression, owned, 0)

    def _run(self, node: Node) -> Any:
        """The values of a call on values."""
        arguments = map_aggregate(
            (node.args, node.kwargs), lambda v: self.known[v].values if isinstance(v, Node) else v
        )
        args, kwargs = arguments
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _expression(self, node: Node) -> Expression | None:
        """A call over expressions; views and casts as what they are, for a view of a file is no copy of it."""
        if not isinstance(node.meta["val"], Tensor):
            return None
        if node.target is operator.getitem:
            split: Any = node.args[0]
            return self._computed(split, node.meta["val"], int(node.args[1]))  # type: ignore[arg-type]
        operand = self._operand(node.all_input_nodes[0])
        if node.target in RESHAPES:
            return Reshape(operand, tuple(node.meta["val"].shape))
        if (order := permutation_of(node)) is not None:
            return Permute(operand, order)
        if node.target is aten.to.dtype and node.args[1:] == (node.meta["val"].dtype,) and not node.kwargs:
            return Cast(operand, node.meta["val"].dtype)
        return self._computed(node, node.meta["val"])

    def _computed(self, node: Node, result: Tensor, index: int | None = None) -> Computed:
        assert isinstance(node.target, torch._ops.OpOverload)
        named = tuple(sorted((name, self._argument(value)) for name, value in node.kwargs.items()))
        return Computed(node.target, self._argument(node.args), named, tuple(result.shape), result.dtype, index)

    def _argument(self, value: Any) -> Any:
        """An argument with expressions for nodes and tuples for lists, which hash."""
        if isinstance(value, (list, tuple)):
            return tuple(map(self._argument, value))
        return self._operand(value) if isinstance(value, Node) else value

    def _operand(self, node: Node) -> Expression:
        known = self.known[node]
        return known.expression or Constant(known.values, computed=True)


def _values(node: Node) -> Iterator[Tensor]:
    value = node.meta["val"]
    yield from value if isinstance(value, (list, tuple)) else (value,)


def _is_fixed(value: Any) -> bool:
    return isinstance(value, Tensor) and all(isinstance(size, int) for size in sizes_of(value))


def _rounds(node: Node) -> bool:
    """Whether a half-precision result is rounded here."""
    narrow = any(value.dtype in NARROW for value in _values(node))
    return narrow and not is_view(node) and node.target not in MOVING | CHEAP
