"""Where a graph attends: softmax(q·kᵀ)·v in one operator or written out, and what it is computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from optpass.analysis.attention_products import CARRIERS
from optpass.analysis.operators import FUSED_ATTENTION, MASKING, MATMULS, SOFTMAX, argument, aten, is_view
from optpass.analysis.permutations import permutation_of
from optpass.ir.graph import Graph, shape_of

ADDING = frozenset({aten.add.Tensor, aten.sub.Tensor}) | MASKING


@dataclass(frozen=True)
class Operand:
    """A value of an attention, and which of its dimensions (not negative) hold tokens and the channels of a head."""

    node: Node
    tokens: int
    channels: int

    @property
    def batch(self) -> list[int]:
        """The other dimensions: batch, heads, and what is folded into them."""
        return [dim for dim in range(len(shape_of(self.node))) if dim not in (self.tokens, self.channels)]


@dataclass(frozen=True, eq=False)
class Core:
    """``result`` = softmax(scale · q·kᵀ + masks) · v. ``softmax`` is ``None`` where one operator does all of it.

    ``masks`` are what is added to the scores or chooses among them: masks, and positional biases. ``nodes`` are the
    operators from the first product to ``result``, in order.
    """

    query: Operand
    key: Operand
    value: Operand
    result: Operand
    masks: tuple[Node, ...]
    is_causal: bool
    softmax: Node | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Cores:
    """The attentions of a graph in its order, and the softmaxes between products that could not be read, with why."""

    found: tuple[Core, ...]
    refused: tuple[tuple[Node, str], ...]


def attention_cores(graph: Graph) -> Cores:
    """The attentions of ``graph``; one walk over its nodes.

    Written out, it is a product of two activations, a softmax over one of the dimensions that the product made, and
    a product that sums over it; scalings, masks, casts and views may stand between, in any order.
    """
    reader = _Reader()
    for node in graph.calls:
        reader.visit(node)
    return Cores(tuple(reader.found), tuple(reader.refused))


@dataclass(frozen=True)
class _Product:
    """Two activations multiplied; ``left`` and ``right`` with the dimension that stays in ``tokens`` and the one
    summed over in ``channels``; ``rows`` and ``columns`` are where they stay in the result."""

    left: Operand
    right: Operand
    rows: int
    columns: int
    added: tuple[Node, ...] = ()


@dataclass(frozen=True)
class _Scores:
    """A value that is q·kᵀ, or its softmax once there is one, and where queries and keys are in it.

    ``before`` is the operand that it was before the last operator; ``None`` of the product itself.
    """

    product: _Product
    rows: int
    columns: int
    softmax: Node | None = None
    before: Node | None = None


class _Reader:
    def __init__(self) -> None:
        self.scores: dict[Node, _Scores] = {}
        self.found: list[Core] = []
        self.refused: list[tuple[Node, str]] = []

    def visit(self, node: Node) -> None:
        if node.target in FUSED_ATTENTION:
            if isinstance(node.meta["val"], Tensor):
                self.found.append(_fused(node))
        elif node.target in MATMULS:
            self._visit_product(node)
        elif node.target in SOFTMAX:
            self._visit_softmax(node)
        elif node.target in CARRIERS or is_view(node):
            self._carry(node)

    def _visit_product(self, node: Node) -> None:
        product = _einsum(node) if node.target is aten.einsum.default else _matmul(node)
        if product is None:
            return
        for weights, value in ((product.left, product.right), (product.right, product.left)):
            scores = self.scores.get(weights.node)
            if scores is not None and scores.softmax is not None:
                self._close(node, product, weights, value, scores)
                return
        self.scores[node] = _Scores(product, product.rows, product.columns)

    def _visit_softmax(self, node: Node) -> None:
        before: Any = node.args[0]
        scores = self.scores.get(before)
        if scores is None or scores.softmax is not None:
            return
        dim = int(argument(node, "dim")) % len(shape_of(node))
        product, rows, columns = scores.product, scores.rows, scores.columns
        if dim == rows:
            product = _Product(product.right, product.left, product.columns, product.rows)
            rows, columns = columns, rows
        if dim != columns:
            self.refused.append((node, "the softmax is over neither of the dimensions of a product"))
            return
        self.scores[node] = _Scores(product, rows, columns, node, before)

    def _carry(self, node: Node) -> None:
        operands = [operand for operand in node.all_input_nodes if operand in self.scores]
        if not operands:
            return
        source, scores = operands[0], self.scores[operands[0]]
        rows, columns = (axis_after(node, source, axis) for axis in (scores.rows, scores.columns))
        if rows is None or columns is None:
            return
        self.scores[node] = _Scores(scores.product, rows, columns, scores.softmax, source)

    def _close(self, node: Node, product: _Product, weights: Operand, value: Operand, scores: _Scores) -> None:
        if weights.channels != scores.columns:
            self.refused.append((node, "the product after the softmax does not sum over what the softmax is over"))
            return
        rows, columns = product.rows, product.columns
        tokens, channels = (rows, columns) if weights is product.left else (columns, rows)
        assert scores.softmax is not None
        nodes = self._way(weights.node)
        adding = [each for each in nodes[: nodes.index(scores.softmax)] if each.target in ADDING]
        masks = [operand for each in adding for operand in each.all_input_nodes if operand not in nodes]
        self.found.append(
            Core(
                query=scores.product.left,
                key=scores.product.right,
                # Of values the tokens are summed over.
                value=Operand(value.node, value.channels, value.tokens),
                result=Operand(node, tokens, channels),
                masks=(*scores.product.added, *masks),
                is_causal=False,
                softmax=scores.softmax,
                nodes=(*nodes, node),
            )
        )

    def _way(self, node: Node | None) -> list[Node]:
        """The operators from the first product to ``node``, in order."""
        found = []
        while node is not None:
            found.append(node)
            node = self.scores[node].before
        return found[::-1]


def _fused(node: Node) -> Core:
    query, key, value, result = (_last_two(operand) for operand in (*node.args[:3], node))
    mask = argument(node, "attn_mask")
    masks = (mask,) if isinstance(mask, Node) else ()
    return Core(query, key, value, result, masks, bool(argument(node, "is_causal")), None, (node,))


def _last_two(node: Any) -> Operand:
    rank = len(shape_of(node))
    return Operand(node, rank - 2, rank - 1)


def _matmul(node: Node) -> _Product | None:
    left, right = (operand for operand in node.args[-2:])
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        left, right = node.args[1:3]
    if not _is_activation(left) or not _is_activation(right):
        return None
    added = (node.args[0],) if len(node.args) > 2 and argument(node, "beta") != 0 else ()
    one, other, rank = _last_two(left), _last_two(right), len(shape_of(node))
    swapped = Operand(other.node, other.channels, other.tokens)
    return _Product(one, swapped, rank - 2, rank - 1, added)  # type: ignore[arg-type]


def _einsum(node: Node) -> _Product | None:
    """Of two operands that share one letter which the result lacks, and have one each that the other lacks."""
    operands: Any = node.args[1]
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != 2 or not all(map(_is_activation, operands)):
        return None
    (one, other), (left, right) = terms, operands
    summed = [letter for letter in one if letter in other and letter not in output]
    rows = [letter for letter in one if letter in output and letter not in other]
    columns = [letter for letter in other if letter in output and letter not in one]
    if len(summed) != 1 or len(rows) != 1 or len(columns) != 1:
        return None
    return _Product(
        Operand(left, one.index(rows[0]), one.index(summed[0])),
        Operand(right, other.index(columns[0]), other.index(summed[0])),
        output.index(rows[0]),
        output.index(columns[0]),
    )


def _is_activation(value: Any) -> bool:
    while isinstance(value, Node) and value.op == "call_function" and is_view(value):
        value = value.all_input_nodes[0]
    if not isinstance(value, Node) or value.op == "get_attr" or not isinstance(value.meta["val"], Tensor):
        return False
    return len(shape_of(value)) > 1


def axis_after(node: Node, source: Node, axis: int) -> int | None:
    """Where dimension ``axis`` of ``source`` is in what a pointwise operator or a view makes of it.

    ``None`` where a view takes it apart or merges it.
    """
    before, after = shape_of(source), shape_of(node)
    if permutation := permutation_of(node):
        return permutation.index(axis)
    rule = _VIEWS.get(node.target)
    if rule is not None:
        return rule(node, before, axis)
    if node.target in CARRIERS or node.target is aten.slice.Tensor or node.target is aten.expand.default:
        # Broadcasting aligns at the end.
        return len(after) - len(before) + axis
    return None


def _reshaped(node: Node, before: tuple[Any, ...], axis: int) -> int | None:
    """The dimension with as many elements behind it, and as long."""
    after = shape_of(node)
    behind = before[axis + 1 :]
    if after[len(after) - len(behind) :] == behind and len(after) > len(behind):
        place = len(after) - len(behind) - 1
        return place if after[place] == before[axis] else None
    return None


def _unsqueezed(node: Node, before: tuple[Any, ...], axis: int) -> int:
    return axis + (int(argument(node, "dim")) % (len(before) + 1) <= axis)


_VIEWS: dict[Any, Callable[[Node, tuple[Any, ...], int], int | None]] = {
    aten.reshape.default: _reshaped,
    aten.unsqueeze.default: _unsqueezed,
}
