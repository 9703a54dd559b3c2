"""What a cut will save, before anything is cut: MACs and parameters as sums of products of sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Node

from optpass.analysis.axes.axes import Axes
from optpass.analysis.axes.rules import Dims, Walk, dimensions
from optpass.analysis.axes.structure import Atom, Structure, atoms, is_unit, sized
from optpass.analysis.cost import call_shares, parameters_of
from optpass.analysis.mac_rules import contractions, macs_of
from optpass.analysis.operators import CONVOLUTIONS, FUSED_ATTENTION, TRANSPOSED_CONVOLUTIONS, argument, aten
from optpass.ir.graph import example_shape
from optpass.ir.program import Program

Counts = dict[Atom, int]
"""How many elements of an atom stay; all of those that are not named."""
MATMULS = (
    *(aten.matmul.default, aten.mm.default, aten.bmm.default),
    *(aten.mv.default, aten.dot.default, aten.inner.default),
)


@dataclass(frozen=True)
class Term:
    """``amount``, which falls with each of ``sizes`` in proportion."""

    amount: float
    sizes: tuple[Structure, ...]

    def at(self, counts: Counts) -> float:
        return self.amount * prod(share(structure, counts) for structure in self.sizes)


@dataclass(frozen=True)
class Forecast:
    """MACs of a call (of a loop, in the mean of a period) and parameters, as functions of what stays."""

    macs_terms: tuple[Term, ...]
    parameter_terms: tuple[Term, ...]

    def macs(self, counts: Counts) -> float:
        return sum(term.at(counts) for term in self.macs_terms)

    def parameters(self, counts: Counts) -> float:
        return sum(term.at(counts) for term in self.parameter_terms)


def forecast(program: Program, found: Axes) -> Forecast:
    """The costs of ``program``, analysed as ``found``, after any cut. Operators without a term keep theirs."""
    shares = call_shares(program.loop) if program.loop else dict.fromkeys(program.entries, 1)
    macs = [
        Term(float(shares.get(name, 0)) * amount, sizes)
        for name, graph in program.entries.items()
        for node in graph.calls
        if macs_of(node)
        for amount, sizes in _terms(node, found.walk)
    ]
    counts = {
        name: n for graph in program.entries.values() for name, n in parameters_of(graph, program.weights).items()
    }
    parameters = [Term(count, found.weight(name)) for name, count in counts.items()]
    return Forecast(tuple(macs), tuple(parameters))


def share(structure: Structure, counts: Counts) -> float:
    """The part of ``structure`` that stays."""
    if not any(atom in counts for atom in atoms(structure)):
        return 1.0
    return float(sized(structure, lambda atom: counts.get(atom, atom.size)) / structure.size)


def _terms(node: Node, walk: Walk) -> list[tuple[float, Dims]]:
    """MACs of a product: those of its result, times what it sums over."""
    result, total = walk.of(node), macs_of(node)
    rule = _SUMMED.get(node.target)
    if rule is not None:
        return [(total, (*result, *rule(node, walk)))]
    if node.target in TRANSPOSED_CONVOLUTIONS:
        return [(total, (*walk.operand(node, "input"), walk.operand(node, "weight")[1]))]
    if node.target in FUSED_ATTENTION:
        return _attention(node, walk, total)
    if node.target is aten.einsum.default:
        return _einsum(node, walk)
    return _bilinear(node, walk, total) if node.target is aten.bilinear.default else [(total, ())]


def _attention(node: Node, walk: Walk, total: int) -> list[tuple[float, Dims]]:
    query, value = walk.operand(node, "query"), walk.operand(node, "value")
    widths = (query[-1], value[-1])
    whole = sum(1 if is_unit(width) else width.size for width in widths)
    outer = walk.of(node)[:-1]
    return [(total * (1 if is_unit(width) else width.size) / whole, (*outer, width)) for width in widths]


def _einsum(node: Node, walk: Walk) -> list[tuple[float, Dims]]:
    indices, products = contractions(node)
    operands: Any = node.args[1]
    sizes: dict[str, tuple[int, Structure]] = {}
    for names, operand in zip(indices, operands, strict=True):
        for name, size, structure in zip(names, example_shape(operand), walk.of(operand), strict=True):
            sizes[name] = max(sizes.get(name, (0, structure)), (size, structure), key=lambda pair: pair[0])
    pairs = [[sizes[name] for name in product] for product in products]
    return [(prod(size for size, _ in pair), tuple(structure for _, structure in pair)) for pair in pairs]


def _bilinear(node: Node, walk: Walk, total: int) -> list[tuple[float, Dims]]:
    result, (_, first, second) = walk.of(node), walk.operand(node, "weight")
    each = total / (first.size + 1)
    return [(each * first.size, (*result, first, second)), (each, (*result, second))]


def _linear(node: Node, walk: Walk) -> Dims:
    return (walk.operand(node, "weight")[-1],)


def _convolution(node: Node, walk: Walk) -> Dims:
    return (walk.operand(node, "weight")[1],)


def _matmul(node: Node, walk: Walk) -> Dims:
    return (walk.of(node.args[0])[-1],)


def _added_matmul(node: Node, walk: Walk) -> Dims:
    return (walk.of(argument(node, "mat1" if node.target is aten.addmm.default else "batch1"))[-1],)


def _tensordot(node: Node, walk: Walk) -> Dims:
    dims = walk.of(node.args[0])
    return tuple(dims[dim] for dim in dimensions(argument(node, "dims_self"), len(dims)))


_SUMMED: dict[Any, Callable[[Node, Walk], Dims]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _added_matmul,
    aten.baddbmm.default: _added_matmul,
    aten.tensordot.default: _tensordot,
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(MATMULS, _matmul),
}
