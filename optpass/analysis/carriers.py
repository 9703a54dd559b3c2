"""The ways in which a residual stream passes from one addition to the next without being computed on."""

from __future__ import annotations

from torch.fx import Node

from optpass.analysis.operators import aten, is_view
from optpass.analysis.permutations import PERMUTATIONS
from optpass.analysis.pieces import cat_dim, extent, piece_of
from optpass.ir.graph import shape_of

REARRANGEMENTS = PERMUTATIONS | {
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.to.dtype,
}
"""Operators whose result has the elements of their operand and no others."""

SCALINGS = frozenset(
    {
        *(aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor),
        *(aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar),
    }
)
"""Arithmetic that carries a stream where its other operand is a number, a weight or broadcast: α·x, x + positions."""

CATS = (aten.cat.default, aten.concat.default)


def carried_from(node: Node) -> Node | None:
    """The value that ``node`` carries on, if it is a rearrangement or a scaling or the parts of one put together."""
    if node.op != "call_function":
        return None
    if node.target in REARRANGEMENTS:
        return node.all_input_nodes[0]
    if node.target in SCALINGS:
        return _scaled(node)
    return whole_of(node) if node.target in CATS else None


def whole_of(cat: Node) -> Node | None:
    """The value of which ``cat`` joins all consecutive parts, in order; ``None`` where it joins anything else."""
    dim, position, source = cat_dim(cat), 0, None
    for part in cat.all_input_nodes:
        piece = piece_of(part)
        if piece is None or piece.dim != dim or piece.start != position or source not in (None, piece.source):
            return None
        source, position = piece.source, piece.stop
    return source if source is not None and position == shape_of(source)[dim] else None


def joined(node: Node) -> list[Node]:
    """The streams that a ``cat`` of the same channels joins along its tokens; none for other operators."""
    if node.target not in CATS or whole_of(node) is not None or cat_dim(node) == len(shape_of(node)) - 1:
        return []
    return [part for part in node.all_input_nodes if extent(part, cat_dim(node)) != 0]


def _scaled(node: Node) -> Node | None:
    full = shape_of(node)
    operands = [operand for operand in node.args[:2] if isinstance(operand, Node)]
    streams = [x for x in operands if x.op != "get_attr" and not is_constant(x) and shape_of(x) == full]
    return streams[0] if len(streams) == 1 else None


def is_constant(node: Node) -> bool:
    """Whether ``node`` is a weight behind nothing but views."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node.op == "get_attr"
