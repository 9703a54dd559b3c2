"""Where the tokens of a stream go: which values have a row for each of them, and what hinders that there are fewer.

What is alike for all tokens (a layer, a norm, attention) gives for some of them what it gave for all; what takes them
by their place (a convolution, a table of positions) does not. One walk over the nodes says which is which.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.attention_cores import Core
from optpass.analysis.operators import FUSED_ATTENTION, MASKING, MATMULS, SOFTMAX, argument, aten
from optpass.analysis.permutations import permutation_of
from optpass.analysis.pieces import SPLITS
from optpass.ir.graph import shape_of

Dims = tuple[int, ...]
PLACED = "takes tokens by their place"
POOLED = frozenset({aten.mean.dim})
NORMALISED = {aten.layer_norm.default: "normalized_shape", aten.rms_norm.default: "normalized_shape"}


@dataclass(frozen=True)
class Rows:
    """A value with a row for each token in every dimension of ``dims``, without the first ``start`` tokens.

    ``level`` counts the places of selection behind which it stands.
    """

    dims: Dims
    level: int
    start: int = 0


@dataclass(frozen=True)
class Obstacle:
    """An operator that cannot do with fewer tokens than there were before the selection number ``level``."""

    node: Node
    level: int
    reason: str


@dataclass
class TokenFlow:
    """Where tokens go.

    ``rows`` are the values that have a row for each, as they are read; ``means`` the operators that average over them;
    ``arriving`` says of each of ``starts`` the number of the selection before it, 0 where there is none.
    """

    rows: dict[Node, Rows] = field(default_factory=dict)
    means: dict[Node, Rows] = field(default_factory=dict)
    arriving: dict[Node, int] = field(default_factory=dict)
    obstacles: list[Obstacle] = field(default_factory=list)
    starts: Mapping[Node, int] = field(default_factory=dict)

    def refuse(self, node: Node, level: int, reason: str) -> None:
        """Note that ``node`` needs the tokens that there were before the selection ``level``."""
        self.obstacles.append(Obstacle(node, level, reason))

    @property
    def hindered(self) -> dict[int, Obstacle]:
        """The selections that some operator does not allow, each with one that does not."""
        before = {number: self.arriving[start] for start, number in self.starts.items()}
        found: dict[int, Obstacle] = {}
        for each in self.obstacles:
            level = each.level
            while level and level not in found:
                found[level] = each
                level = before[level]
        return found


def token_flow(nodes: Sequence[Node], starts: Mapping[Node, int], cores: Iterable[Core], protected: int) -> TokenFlow:
    """Follow the tokens of ``starts`` through ``nodes``, which are in order; time linear in these.

    ``starts`` are streams [batch, tokens, channels] with the number of their selection, from 1. The first ``protected``
    tokens keep their place. ``cores`` are the attentions among ``nodes``.
    """
    return _Walk(nodes, starts, cores, protected).walked()


class _Walk:
    def __init__(
        self, nodes: Sequence[Node], starts: Mapping[Node, int], cores: Iterable[Core], protected: int
    ) -> None:
        self.nodes, self.starts, self.protected = nodes, starts, protected
        self.attending = {node for core in cores for node in core.nodes}
        self.flow = TokenFlow(starts=starts)

    def walked(self) -> TokenFlow:
        for start in self.starts.keys() - set(self.nodes):
            self.flow.rows[start] = Rows((1,), self.starts[start])
        for node in self.nodes:
            if operands := [each for each in node.all_input_nodes if each in self.flow.rows]:
                self._visit(node, operands)
            if node in self.starts:
                arriving = self.flow.rows.get(node)
                self.flow.arriving[node] = arriving.level if arriving else 0
                self.flow.rows[node] = Rows((1,), self.starts[node])
        return self.flow

    def _visit(self, node: Node, operands: list[Node]) -> None:
        found = [self.flow.rows[each] for each in operands]
        if len({(rows.level, rows.start) for rows in found}) > 1:
            self._refuse(node, operands, "reads tokens from before and behind a selection")
            return
        result = self._result(node)
        if isinstance(result, str):
            self._refuse(node, operands, result)
        elif result is not None:
            self.flow.rows[node] = result

    def _refuse(self, node: Node, operands: list[Node], reason: str) -> None:
        level = max(self.flow.rows[each].level for each in operands)
        self.flow.refuse(node, level, reason)

    def _result(self, node: Node) -> Rows | str | None:
        """The rows of ``node``; ``None`` where it has none any more, or why it needs all of them."""
        if node.op == "output":
            return "is a result with a row for every token"
        if node.target in _RULES:
            result = _RULES[node.target](self, node)
        elif node.target in SPLITS or permutation_of(node):
            result = _moved(self, node)
        elif torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in MASKING:
            result = _pointwise(self, node)
        else:
            result = "mixes tokens by their place, or counts them"
        if not isinstance(result, tuple):
            return result
        first = self.of(next(each for each in node.all_input_nodes if each in self.flow.rows))
        return Rows(result, first.level, first.start)

    def of(self, node: Node) -> Rows:
        return self.flow.rows[node]

    def dims(self, node: Any) -> Dims:
        """Where tokens stand in ``node``; nowhere in what is no value or has none."""
        rows = self.flow.rows.get(node) if isinstance(node, Node) else None
        return rows.dims if rows else ()


Result = Dims | Rows | str | None
_RULES: dict[Any, Callable[[_Walk, Node], Result]] = {}


def _rule(*operators: Any) -> Callable[[Callable[[_Walk, Node], Result]], Callable[[_Walk, Node], Result]]:
    def register(function: Callable[[_Walk, Node], Result]) -> Callable[[_Walk, Node], Result]:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def _pointwise(walk: _Walk, node: Node) -> Result:
    """Aligned at the end; an operand without rows is the same for all tokens."""
    rank = len(shape_of(node))
    operands = {each: shape_of(each) for each in node.all_input_nodes if isinstance(each.meta["val"], Tensor)}
    dims = {rank - len(shape) + dim for each, shape in operands.items() for dim in walk.dims(each)}
    for each, shape in operands.items():
        own = {rank - len(shape) + dim for dim in walk.dims(each)}
        if any(dim - rank + len(shape) >= 0 and shape[dim - rank + len(shape)] != 1 for dim in dims - own):
            return f"reads a table with a row for every token (%{each.name})"
    return tuple(sorted(dims))


@_rule(aten.linear.default)
def _linear(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    dims = walk.dims(value)
    if len(shape_of(value)) - 1 in dims or any(walk.dims(each) for each in node.all_input_nodes if each is not value):
        return "sums over tokens"
    return dims


@_rule(*NORMALISED)
def _norm(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    dims, last = walk.dims(value), len(argument(node, "normalized_shape"))
    return "normalises over tokens" if any(dim >= len(shape_of(value)) - last for dim in dims) else dims


@_rule(*SOFTMAX)
def _softmax(walk: _Walk, node: Node) -> Result:
    dims = walk.dims(node.args[0])
    over = int(argument(node, "dim")) % len(shape_of(node))
    return dims if over not in dims or node in walk.attending else "is a softmax over tokens, and no attention"


@_rule(*FUSED_ATTENTION)
def _attention(walk: _Walk, node: Node) -> Result:
    operands: Any = node.args[:3]
    tokens = [(len(shape_of(each)) - 2,) for each in operands]
    found = [walk.dims(each) for each in operands]
    if any(dims not in ((), place) for dims, place in zip(found, tokens, strict=True)) or found[1] != found[2]:
        return "is an attention beside the tokens, for each of them"
    if argument(node, "is_causal") or isinstance(argument(node, "attn_mask"), Node):
        return "is an attention with a mask (simplify drops one that hides nothing)"
    return (len(shape_of(node)) - 2,) if found[0] else None


@_rule(*(MATMULS - {aten.einsum.default}))
def _product(walk: _Walk, node: Node) -> Result:
    if node.target in (aten.addmm.default, aten.baddbmm.default) and argument(node, "beta") != 0:
        return "adds a table with a row for every token"
    left, right = (walk.dims(each) for each in node.args[-2:])
    ranks = [len(shape_of(each)) for each in node.args[-2:]]  # type: ignore[arg-type]
    rank = len(shape_of(node))
    names = [{ranks[0] - 2: "row", ranks[0] - 1: "sum"}, {ranks[1] - 2: "sum", ranks[1] - 1: "column"}]
    return _contracted(walk, node, (left, right), names, {"row": rank - 2, "column": rank - 1})


@_rule(aten.einsum.default)
def _einsum(walk: _Walk, node: Node) -> Result:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != 2:
        return "mixes tokens in a way that is not read"
    one, other = terms
    names = [
        {i: "sum" if c not in output else "row" if c not in other else "both" for i, c in enumerate(one)},
        {i: "sum" if c not in output else "column" if c not in one else "both" for i, c in enumerate(other)},
    ]
    dims = tuple(walk.dims(each) for each in operands)  # type: ignore[union-attr]
    rows = [output.index(one[dim]) for dim in dims[0] if names[0][dim] == "row"]
    columns = [output.index(other[dim]) for dim in dims[1] if names[1][dim] == "column"]
    places = {"row": rows[0] if rows else -1, "column": columns[0] if columns else -1}
    return _contracted(walk, node, dims, names, places)  # type: ignore[arg-type]


def _contracted(
    walk: _Walk, node: Node, dims: tuple[Dims, Dims], names: list[dict[int, str]], places: dict[str, int]
) -> Result:
    """Of a product whose dimensions are ``names``: the rows that stay; a sum over tokens only in attention."""
    found = [name.get(dim, "both") for name, own in zip(names, dims, strict=True) for dim in own]
    if "both" in found:
        return "is a product for each token"
    if found.count("sum") not in (0, 2) or ("sum" in found and node not in walk.attending):
        return "sums over tokens"
    if found.count("row") + found.count("column") == 2 and node not in walk.attending:
        return "compares tokens, and is no attention"
    return tuple(sorted(places[name] for name in found if name != "sum")) or None


@_rule(aten.reshape.default)
def _reshaped(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    before, after = shape_of(value), shape_of(node)
    found = []
    for dim in walk.dims(value):
        place = next(
            (
                to
                for to, size in enumerate(after)
                if size == before[dim] and prod(after[to + 1 :]) == prod(before[dim + 1 :])
            ),
            None,
        )
        if place is None:
            return "arranges tokens in another shape, which takes all of them"
        found.append(place)
    return tuple(found)


def _moved(walk: _Walk, node: Node) -> Result:
    """Permutations, and pieces of another dimension than the tokens'."""
    value: Any = node.args[0]
    dims = walk.dims(value)
    if order := permutation_of(node):
        return tuple(sorted(order.index(dim) for dim in dims))
    return PLACED if int(argument(node, "dim")) % len(shape_of(value)) in dims else dims


@_rule(operator.getitem)
def _item(walk: _Walk, node: Node) -> Result:
    return walk.dims(node.args[0])


@_rule(aten.unbind.int)
def _unbound(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    dims, over = walk.dims(value), int(argument(node, "dim")) % len(shape_of(value))
    return PLACED if over in dims else tuple(dim - (dim > over) for dim in dims)


@_rule(aten.unsqueeze.default)
def _unsqueezed(walk: _Walk, node: Node) -> Result:
    at = int(argument(node, "dim")) % len(shape_of(node))
    return tuple(dim + (dim >= at) for dim in walk.dims(node.args[0]))


@_rule(aten.squeeze.dim)
def _squeezed(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    at = int(argument(node, "dim")) % len(shape_of(value))
    gone = len(shape_of(node)) < len(shape_of(value))
    return tuple(dim - (gone and dim > at) for dim in walk.dims(value))


@_rule(aten.expand.default)
def _expanded(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    return tuple(dim + len(shape_of(node)) - len(shape_of(value)) for dim in walk.dims(value))


@_rule(aten.cat.default, aten.stack.default)
def _joined(walk: _Walk, node: Node) -> Result:
    values: Any = node.args[0]
    dims = {walk.dims(each) for each in values}
    if len(dims) > 1:
        return "joins tokens with other rows"
    [own] = dims
    at = int(argument(node, "dim")) % len(shape_of(node))
    if node.target is aten.stack.default:
        return tuple(dim + (dim >= at) for dim in own)
    return "joins tokens one behind the other" if at in own else own


@_rule(aten.select.int)
def _selected(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    rows, over = walk.of(value), int(argument(node, "dim")) % len(shape_of(value))
    if over not in rows.dims:
        return tuple(dim - (dim > over) for dim in rows.dims)
    index = argument(node, "index")
    fixed = isinstance(index, int) and 0 <= index < walk.protected and rows.start == 0
    return None if fixed and len(rows.dims) == 1 else PLACED


@_rule(aten.slice.Tensor)
def _sliced(walk: _Walk, node: Node) -> Result:
    """The protected tokens, which keep their places, or all the others."""
    value: Any = node.args[0]
    rows, shape = walk.of(value), shape_of(value)
    over = int(argument(node, "dim")) % len(shape)
    if over not in rows.dims:
        return rows.dims
    bounds = [argument(node, name) for name in ("start", "end", "step")]
    if not all(isinstance(bound, int | None) for bound in bounds) or bounds[2] != 1:
        return PLACED
    start, end, _ = slice(*bounds).indices(int(shape[over]))
    if start == 0 and end == shape[over]:
        return rows
    if rows.start or len(rows.dims) > 1 or start > walk.protected:
        return PLACED
    if end <= walk.protected:
        return None
    return Rows(rows.dims, rows.level, start) if end == shape[over] else PLACED


@_rule(*POOLED)
def _mean(walk: _Walk, node: Node) -> Result:
    value: Any = node.args[0]
    rank, rows = len(shape_of(value)), walk.of(value)
    over = {int(dim) % rank for dim in argument(node, "dim") or range(rank)}
    if over.isdisjoint(rows.dims):
        keeps = argument(node, "keepdim")
        return tuple(dim if keeps else dim - sum(each < dim for each in over) for dim in rows.dims)
    if over != {1} or rows.dims != (1,) or rank != 3:
        return "is a mean over tokens and more"
    walk.flow.means[node] = rows
    return None
