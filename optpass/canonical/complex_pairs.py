"""Complex arithmetic → real arithmetic on pairs: a last dimension of 2, real part first.

ONNX has no complex numbers; rotary embeddings are written with them. Every complex value gets a twin
``[…, 2]``; what reads a complex value into a real one reads the twin, and the complex chain is left
dead. Where an operator has no rule here, its operands stay complex and a target says so by dtype.
The products are rounded as real arithmetic rounds them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from optpass.ir.graph import Graph, value_of
from optpass.ir.weights import Constant

aten = torch.ops.aten
SUFFIX = ".real_pairs"


def complex_pairs(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Give every complex value that has a rule its twin, and let real values be computed from the twins."""
    twins = _Twins(graph, constants)
    for node in list(graph.fx.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        if _is_complex(node):
            twins.make(node)
        elif node.target in READS and node.args[0] in twins.of:
            with graph.before(node):
                result = READS[node.target](graph, node, twins.of[node.args[0]])
            node.replace_all_uses_with(result)
            graph.fx.erase_node(node)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(item, Tensor) and item.is_complex() for item in values)


class _Twins:
    """The pairs made so far: complex node → real node."""

    def __init__(self, graph: Graph, constants: dict[str, Tensor]) -> None:
        self.graph, self.constants = graph, constants
        self.of: dict[Any, Node] = {}

    def make(self, node: Node) -> None:
        with self.graph.before(node):
            twin = self._constant(node) if node.op == "get_attr" else self._call(node)
        if twin is not None:
            self.of[node] = twin

    def _constant(self, node: Node) -> Node | None:
        name = str(node.target)
        if name not in self.constants:
            return None
        self.constants[name + SUFFIX] = pairs = torch.view_as_real(self.constants[name].resolve_conj())
        return self.graph.weight(name + SUFFIX, Constant(pairs), like=node)

    def _call(self, node: Node) -> Node | None:
        if node.target in MAKES:
            return MAKES[node.target](self.graph, node, *node.args)
        known = [operand for operand in node.all_input_nodes if _is_complex(operand)]
        if not known or any(operand not in self.of for operand in known):
            return None
        if node.target in ARITHMETIC:
            return ARITHMETIC[node.target](self, node)
        if node.target in MOVES:
            return self._moved(node, MOVES[node.target])
        return None

    def _moved(self, node: Node, adapt: Callable[[Node, list[Any]], list[Any]]) -> Node:
        """The same movement of elements, on pairs."""
        args: Any = map_arg(adapt(node, list(node.args)), lambda operand: self.of.get(operand, operand))
        return self.graph.call(node.target, *args, like=node)

    def parts(self, operand: Any, like: Node) -> tuple[Node, Node]:
        """Real and imaginary part of a complex node."""
        return _part(self.graph, like, self.of[operand], 0), _part(self.graph, like, self.of[operand], 1)


def _part(graph: Graph, like: Node, pair: Node, index: int) -> Node:
    return graph.call(aten.select.int, pair, -1, index, like=like)


def _pair(graph: Graph, like: Node, real: Node, imaginary: Node) -> Node:
    return graph.call(aten.stack.default, [real, imaginary], -1, like=like)


def _polar(graph: Graph, like: Node, radius: Node, angle: Node) -> Node:
    parts = [graph.call(function, angle, like=like) for function in (aten.cos.default, aten.sin.default)]
    return _pair(graph, like, *(graph.call(aten.mul.Tensor, radius, part, like=like) for part in parts))


def _scaled(kind: Any) -> Callable[[_Twins, Node], Node | None]:
    """Product or quotient with something real: both parts alike."""

    def apply(twins: _Twins, node: Node) -> Node | None:
        left, right = node.args[:2]
        if left not in twins.of:
            left, right = right, left
            if kind is not aten.mul.Tensor:
                return None
        if right in twins.of:
            return _product(twins, node) if kind is aten.mul.Tensor else None
        if isinstance(right, complex):
            return None
        if isinstance(right, Node):
            right = twins.graph.call(aten.unsqueeze.default, right, -1, like=node)
        return twins.graph.call(kind, twins.of[left], right, like=node)

    return apply


def _product(twins: _Twins, node: Node) -> Node:
    """(a + bi)(c + di) = ac − bd + (ad + bc)i."""
    (a, b), (c, d) = (twins.parts(operand, node) for operand in node.args[:2])

    def call(function: Any, left: Node, right: Node) -> Node:
        return twins.graph.call(function, left, right, like=node)

    times = aten.mul.Tensor
    real = call(aten.sub.Tensor, call(times, a, c), call(times, b, d))
    return _pair(twins.graph, node, real, call(aten.add.Tensor, call(times, a, d), call(times, b, c)))


def _sum(twins: _Twins, node: Node) -> Node | None:
    if node.kwargs or any(operand not in twins.of for operand in node.args):
        return None
    return twins.graph.call(node.target, *(twins.of[operand] for operand in node.args), like=node)


def _negative(twins: _Twins, node: Node) -> Node:
    return twins.graph.call(aten.neg.default, twins.of[node.args[0]], like=node)


def _conjugate(twins: _Twins, node: Node) -> Node:
    real, imaginary = twins.parts(node.args[0], node)
    return _pair(twins.graph, node, real, twins.graph.call(aten.neg.default, imaginary, like=node))


def _unchanged(twins: _Twins, node: Node) -> Node:
    return twins.of[node.args[0]]


def _at(position: int) -> Callable[[Node, list[Any]], list[Any]]:
    """Arguments with the dimension at ``position`` counted from the front, where a pair has the same ones."""

    def adapt(node: Node, args: list[Any]) -> list[Any]:
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        rank = value_of(first).dim() + (node.target in GROWS)
        args += [0] * (position + 1 - len(args))
        dims = args[position]
        args[position] = [d % rank for d in dims] if isinstance(dims, (list, tuple)) else dims % rank
        return args

    return adapt


def _both(node: Node, args: list[Any]) -> list[Any]:
    return _at(2)(node, _at(1)(node, args))


def _sizes(last: int) -> Callable[[Node, list[Any]], list[Any]]:
    """Arguments whose list of sizes (or repeats) gets one more, for the pair."""
    return lambda node, args: [args[0], [*args[1], last], *args[2:]]


def _order(node: Node, args: list[Any]) -> list[Any]:
    rank = len(args[1])
    return [args[0], [*(d % rank for d in args[1]), rank]]


def _as_is(node: Node, args: list[Any]) -> list[Any]:
    return args


def _magnitude(graph: Graph, like: Node, pair: Node) -> Node:
    return graph.call(aten.linalg_vector_norm.default, pair, 2, [-1], like=like)


MAKES: dict[Any, Callable[..., Node]] = {
    aten.view_as_complex.default: lambda graph, like, pair: pair,
    aten.complex.default: _pair,
    aten.polar.default: _polar,
}
"""Operators that make complex values of real ones."""

READS: dict[Any, Callable[[Graph, Node, Node], Node]] = {
    aten.view_as_real.default: lambda graph, like, pair: pair,
    aten.real.default: lambda graph, like, pair: _part(graph, like, pair, 0),
    aten.imag.default: lambda graph, like, pair: _part(graph, like, pair, 1),
    aten.abs.default: _magnitude,
}
"""Operators that make real values of complex ones."""

ARITHMETIC: dict[Any, Callable[[_Twins, Node], Node | None]] = {
    aten.mul.Tensor: _scaled(aten.mul.Tensor),
    aten.div.Tensor: _scaled(aten.div.Tensor),
    aten.add.Tensor: _sum,
    aten.sub.Tensor: _sum,
    aten.neg.default: _negative,
    aten._conj.default: _conjugate,
    aten.conj_physical.default: _conjugate,
    aten.resolve_conj.default: _unchanged,
    aten.resolve_neg.default: _unchanged,
}

GROWS = (aten.unsqueeze.default, aten.stack.default)
"""Movements whose dimension is one of the result's."""

MOVES: dict[Any, Callable[[Node, list[Any]], list[Any]]] = {
    aten.reshape.default: _sizes(2),
    aten.expand.default: _sizes(2),
    aten.repeat.default: _sizes(1),
    aten.permute.default: _order,
    aten.transpose.int: _both,
    aten.unsqueeze.default: _at(1),
    aten.squeeze.dim: _at(1),
    aten.squeeze.dims: _at(1),
    aten.slice.Tensor: _at(1),
    aten.select.int: _at(1),
    aten.index_select.default: _at(1),
    aten.flip.default: _at(1),
    aten.cat.default: _at(1),
    aten.stack.default: _at(1),
    aten.split.Tensor: _at(2),
    aten.split_with_sizes.default: _at(2),
    aten.unbind.int: _at(1),
    aten.index.Tensor: _as_is,
    operator.getitem: _as_is,
}
