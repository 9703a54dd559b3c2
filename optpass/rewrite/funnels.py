"""Channel funnels: the weights of two layers around a narrower axis, or adaptors between the layers as they are.

y = W₂·σ(W₁·x) → W₂·F₂·σ(F₁·W₁·x), F₁ and F₂ from coupled singular initialisation
(:mod:`optpass.ir.decompositions`). W₁ is everything that writes the axis, side by side: an embedding that is added to
a convolution's result is more columns, a bias is one. Heads are apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Node, map_arg

from optpass.analysis.affine_pairs import LAYERS, Pair
from optpass.analysis.operators import argument, aten
from optpass.ir.algebra import Einsum, Eye, Full
from optpass.ir.decompositions import Adaptors, Coupled, Factors, halves
from optpass.ir.graph import Graph
from optpass.ir.program import Program
from optpass.ir.weights import Cast, Concat, Expression, Permute, Reshape, Select, WeightStore
from optpass.rewrite.naming import WeightNames

POINTWISE = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
"""The convolution of a kernel of 1, by the rank of its weight."""
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Funnel:
    """A pair whose axis gets the width ``rank``; ``weights`` are those that the pair's are made from."""

    pair: Pair
    rank: int
    weights: Mapping[str, Expression]

    @property
    def first(self) -> Expression:
        """[g, c, n]: everything that writes the axis."""
        return Concat(tuple(self._written(name) for name in self.pair.writers), 2)

    @property
    def second(self) -> Expression:
        """[g, m, c]: everything that reads it; of a query what writes it, transposed."""
        if self._is_product:
            both = Concat(tuple(self._written(name) for name in self.pair.readers), 2)
            return Permute(both, (0, 2, 1))
        return Concat(tuple(map(self._read, self.pair.readers)), 1)

    def merged(self) -> dict[str, Expression]:
        """The weights of the narrow axis, by the names of the pair's."""
        first, second = self.first, self.second
        coupled = Factors(first, second, self.rank)
        inner, outer = halves(coupled, first.shape[2])
        made = dict(self._rows(inner, self.pair.writers))
        made |= self._rows(Permute(outer, (0, 2, 1)), self.pair.readers) if self._is_product else self._columns(outer)
        return {**made, **{name: self._mean(name) for name in self.pair.norms}}

    def adaptors(self) -> tuple[Expression, Expression]:
        """F₁ [g·rank, g·c], and F₂ᵀ of that shape; each head's part on the diagonal, zeros beside."""
        coupled: Coupled = Adaptors(self.first, self.second, self.rank)
        inner, outer = halves(coupled, self.pair.width)
        return self._diagonal(inner), self._diagonal(Permute(outer, (0, 2, 1)))

    @property
    def _is_product(self) -> bool:
        return self.pair.scope == "attention-qk"

    def _wide(self, name: str) -> Expression:
        weight = self.weights[name]
        return Cast(weight, torch.float32) if weight.dtype in NARROW else weight

    def _like(self, name: str, made: Expression) -> Expression:
        dtype = self.weights[name].dtype
        return made if made.dtype == dtype else Cast(made, dtype)

    def _written(self, name: str) -> Expression:
        """[g·c, …] → [g, c, n]."""
        weight = self._wide(name)
        return Reshape(weight, (self.pair.batches, self.pair.width, prod(weight.shape[1:])))

    def _read(self, name: str) -> Expression:
        """[m, g·c, …] → [g, m·k, c]."""
        weight = self._wide(name)
        rows, kernel = weight.shape[0], prod(weight.shape[2:])
        apart = Reshape(weight, (rows, self.pair.batches, self.pair.width, kernel))
        return Reshape(Permute(apart, (1, 0, 3, 2)), (self.pair.batches, rows * kernel, self.pair.width))

    def _rows(self, half: Expression, names: Iterable[str]) -> dict[str, Expression]:
        """[g, rank, n] → [g·rank, …] for each of the writers, whose columns stand side by side."""
        found, start = {}, 0
        for name in names:
            rest = self.weights[name].shape[1:]
            part = Select(half, 2, tuple(range(start, start := start + prod(rest))))
            found[name] = self._like(name, Reshape(part, (self.pair.batches * self.rank, *rest)))
        return found

    def _columns(self, half: Expression) -> dict[str, Expression]:
        """[g, m·k, rank] → [m, g·rank, …] for each of the readers, whose rows stand one below the other."""
        found, start = {}, 0
        for name in self.pair.readers:
            rows, _, *kernel = self.weights[name].shape
            part = Select(half, 1, tuple(range(start, start := start + rows * prod(kernel))))
            apart = Reshape(part, (self.pair.batches, rows, prod(kernel), self.rank))
            made = Reshape(Permute(apart, (1, 0, 3, 2)), (rows, self.pair.batches * self.rank, *kernel))
            found[name] = self._like(name, made)
        return found

    def _mean(self, name: str) -> Expression:
        """The parameter of a norm: new channels are mixtures of all old ones, and get their mean."""
        wide = self._wide(name)
        share = Full((self.pair.width, self.rank), 1 / self.pair.width, wide.dtype)
        return self._like(name, Einsum("c,cr->r", (wide, share)))

    def _diagonal(self, blocks: Expression) -> Expression:
        """[g, r, c] → [g·r, g·c]."""
        count, rows, columns = blocks.shape
        apart = Einsum("grc,gh->grhc", (blocks, Eye(count, blocks.dtype)))
        return Reshape(apart, (count * rows, count * columns))


def insert_adaptors(program: Program, funnels: Iterable[Funnel], originals: WeightStore) -> Program:
    """``program``, whose axes are narrow already, with the layers of ``originals`` and an adaptor beside each.

    A layer that writes a narrow axis keeps its weights and is followed by F₁, one that reads it is preceded by F₂:
    parameters of their own, called ``funnel``, which training may change.
    """
    names = WeightNames(program)
    before: dict[str, Expression] = {}
    after: dict[str, Expression] = {}
    made: dict[str, Expression] = {}
    for funnel in funnels:
        inner, outer = funnel.adaptors()
        product = funnel.pair.scope == "attention-qk"
        after |= dict.fromkeys(funnel.pair.writers, inner)
        if product:
            after |= dict.fromkeys(funnel.pair.readers, outer)
        else:
            before |= dict.fromkeys(funnel.pair.readers, Permute(outer, (1, 0)))
    for graph in program.entries.values():
        for node in [node for node in graph.calls if node.target in LAYERS]:
            weight: Any = argument(node, "weight")
            if weight.op == "get_attr" and (weight.target in before or weight.target in after):
                site = _Site(graph, node, str(weight.target), originals, names, made)
                site.restore(before.get(weight.target), after.get(weight.target))
        graph.remove_dead_code()
    added = {name: expression for name, expression in made.items() if name not in originals}
    return program.with_weights(made).with_untrained(added).pruned()


@dataclass
class _Site:
    """A layer that gets its original weights back; what is new is added to ``made``."""

    graph: Graph
    node: Node
    weight: str
    originals: WeightStore
    names: WeightNames
    made: dict[str, Expression]

    def restore(self, before: Expression | None, after: Expression | None) -> None:
        graph, node = self.graph, self.node
        with graph.before(node):
            operand: Any = argument(node, "input")
            own = {each: self._original(each) for each in node.all_input_nodes if each.op == "get_attr"}
            if before is not None:
                own[operand] = self._adapted(operand, before)
            args, kwargs = map_arg((node.args, node.kwargs), lambda each: own.get(each, each))
            result = graph.call(node.target, *args, like=node, **kwargs)
            if after is not None:
                result = self._adapted(result, after)
        node.replace_all_uses_with(result)
        graph.fx.erase_node(node)

    def _original(self, read: Node) -> Node:
        name = str(read.target)
        self.made[name] = self.originals[name]
        return self.graph.weight(name, self.originals[name], like=self.node)

    def _adapted(self, operand: Node, matrix: Expression) -> Node:
        """``matrix`` [out, in] applied to the channels of ``operand``."""
        rank, dtype = len(self.originals[self.weight].shape), self.originals[self.weight].dtype
        value = matrix if rank == 2 else Reshape(matrix, (*matrix.shape, *(1,) * (rank - 2)))
        value = value if value.dtype == dtype else Cast(value, dtype)
        name = self._named(value)
        read = self.graph.weight(name, value, like=self.node)
        operator = aten.linear.default if rank == 2 else POINTWISE[rank]
        return self.graph.call(operator, operand, read, like=self.node)

    def _named(self, value: Expression) -> str:
        """One name for a layer's adaptor, whoever calls it: entries share weights."""
        module = self.weight.rpartition(".")[0]
        for name, known in self.made.items():
            if name.startswith(f"{module}.funnel") and known == value:
                return name
        name = self.names.fresh(module, "funnel")
        self.made[name] = value
        return name
