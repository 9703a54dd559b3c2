"""The table of axis rules: how each operator relates the dimensions of what it takes to those of what it gives.

An operator without a rule may do anything, so nothing that it touches can be cut. An author adds one::

    @axis_rule(torch.ops.mine.gated_sum.default)
    def gated_sum(node, walk):
        return walk.broadcast(node.args[0], node.args[1])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from optpass.analysis.axes.algebra import Algebra
from optpass.analysis.axes.structure import UNIT, Size, Structure, is_unit
from optpass.analysis.operators import MASKING, POINTWISE_UNARY, argument, aten
from optpass.ir.graph import path_of
from optpass.ir.sizes import is_size, size_of, sizes_of

Dims = tuple[Structure, ...]
"""One structure for each dimension of a tensor."""
Results = Dims | list[Dims]
Rule = Callable[[Node, "Walk"], Results]
Function = TypeVar("Function", bound=Rule)
Role = Literal["out", "in", "scale"]

RULES: dict[Any, Rule] = {}
"""Operator → its rule."""


def axis_rule(*operators: Any) -> Callable[[Function], Function]:
    """Register ``(node, walk) → dimensions of the result`` for ``operators``; the last one registered holds."""

    def register(rule: Function) -> Function:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


@dataclass(frozen=True)
class Normalised:
    """``node`` computes statistics over ``structure``: without some of its elements they are others.

    ``groups`` is the number of equal parts that a group norm needs it to have.
    """

    node: Node
    structure: Structure
    groups: int = 1


@dataclass
class Walk:
    """The dimensions of everything seen so far, and what operators said about them."""

    algebra: Algebra = field(default_factory=Algebra)
    values: dict[Node, Results] = field(default_factory=dict)
    weights: dict[str, Dims] = field(default_factory=dict)
    normalised: list[Normalised] = field(default_factory=list)
    stored: set[Node] = field(default_factory=set)
    """Nodes that depend on weights alone."""
    parts: dict[Structure, list[tuple[int, int]]] = field(default_factory=dict)
    """Of dimensions of stored tables, the parts (start, stop) that slices read."""
    derived: list[tuple[Structure, Structure]] = field(default_factory=list)
    """Dimensions computed from others by striding, pooling, interpolation: they have their names, not their indices."""
    roles: dict[tuple[str, int], Role] = field(default_factory=dict)
    """Of a weight (by its name) and a dimension: whether what it computes has it, or what it sums over, or
    whether it scales what a norm made."""
    heads: list[Structure] = field(default_factory=list)
    head_dims: list[Structure] = field(default_factory=list)
    sums: list[Structure] = field(default_factory=list)
    """Dimensions of what two computed values of one shape add up to: residual streams."""
    scales: list[tuple[Node, Structure]] = field(default_factory=list)
    """Attentions that scale by their head dimension's size, which must be written down before it shrinks."""

    def of(self, value: Any) -> Dims:
        """The dimensions of a single tensor; of a number, none."""
        found = self.values[value] if isinstance(value, Node) and value in self.values else ()
        return tuple(found)  # type: ignore[arg-type]

    def every(self, node: Node) -> list[Structure]:
        """The dimensions of all results of ``node``."""
        found = self.values.get(node, ())
        return [s for dims in found for s in dims] if isinstance(found, list) else list(found)

    def visit(self, node: Node) -> None:
        """Walk one operator."""
        self.algebra.place = path_of(node)
        rule = RULES.get(node.target) or (_pointwise if _is_pointwise(node) else _unknown)
        found = rule(node, self)
        self.values[node] = found if _fits(found, node) else _opaque(node, self, f"{node.target} has a wrong axis rule")
        if node.all_input_nodes and self.stored.issuperset(node.all_input_nodes):
            self.stored.add(node)

    def operand(self, node: Node, name: str) -> Dims:
        """The dimensions of ``node``'s argument called ``name``; none where it is absent."""
        return self.of(argument(node, name))

    def shape(self, node: Node) -> tuple[Size, ...]:
        return sizes_of(node.meta["val"])

    def new(self, size: Size) -> Structure:
        return self.algebra.new(size)

    def fix(self, structure: Structure, reason: str) -> Structure:
        return self.algebra.fix(structure, reason)

    def fix_all(self, dims: Iterable[Structure], reason: str) -> None:
        for structure in dims:
            self.fix(structure, reason)

    def unify(self, one: Structure, other: Structure) -> Structure:
        """Of equal sizes; a dimension of size 1 says nothing about what it broadcasts to."""
        if is_unit(one) or is_unit(other):
            return other if is_unit(one) else one
        return self.algebra.unify(one, other)

    def unified(self, *dims: Dims) -> Dims:
        """Dimension by dimension, for as many as all have."""
        first = dims[0]
        for other in dims[1:]:
            first = tuple(self.unify(a, b) for a, b in zip(first, other, strict=True)) if other else first
        return first

    def broadcast(self, *values: Any) -> Dims:
        """The result of a pointwise operator: operands aligned at the right, dimensions of size 1 stretched."""
        found = [dims for value in values if (dims := self.of(value))]
        rank = max(map(len, found), default=0)
        result: list[Structure] = [UNIT] * rank
        for dims in found:
            start = rank - len(dims)
            for index, structure in enumerate(dims):
                result[start + index] = self.unify(result[start + index], structure)
        return tuple(result)

    def replaced(self, dims: Dims, changes: dict[int, Structure]) -> Dims:
        """``dims`` with others at some places."""
        return tuple(changes.get(index, structure) for index, structure in enumerate(dims))

    def resampled(self, structure: Structure, size: Size, reason: str, *, same: bool = False) -> Structure:
        """What neighbours along ``structure`` are mixed into: itself if ``same`` and as long, else a new dimension."""
        if is_unit(structure) and size == 1:
            return UNIT
        self.fix(structure, reason)
        if same and structure.size == size:
            return structure
        new = self.algebra.fixed_new(size, reason)
        self.derived.append((new, structure))
        return new

    def role(self, weight: Any, dim: int, role: Role) -> None:
        """What ``dim`` of ``weight``, if it is one of the store's, is to the operator that reads it."""
        if isinstance(weight, Node) and weight.op == "get_attr":
            self.roles[str(weight.target), dim] = role


def dimension(node: Node, name: str, rank: int) -> int:
    """An argument that is a dimension, counted from the front."""
    return int(argument(node, name)) % max(rank, 1)


def dimensions(value: Any, rank: int) -> list[int]:
    """An argument that is one or several dimensions, or ``None`` or nothing for all, counted from the front."""
    if value is None or value == []:
        return list(range(rank))
    return [int(dim) % rank for dim in (value if isinstance(value, Sequence) else [value])]


def number(value: Any) -> Size:
    """A size among arguments, as a number or an expression."""
    return size_of(value.meta["val"]) if isinstance(value, Node) else value


_UNTAGGED = frozenset(
    {
        *(aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor),
        *(aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar),
        *(aten.fill.Scalar, aten.fill.Tensor, aten.log_sigmoid.default),
        *(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
    }
)
"""Pointwise operators of which torch does not say so."""


def _is_pointwise(node: Node) -> bool:
    target = node.target
    if target in POINTWISE_UNARY or target in MASKING or target in _UNTAGGED:
        return True
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _pointwise(node: Node, walk: Walk) -> Results:
    dims = walk.broadcast(*node.all_input_nodes)
    operands = [operand for operand in node.all_input_nodes if operand.op == "call_function"]
    if node.target is aten.add.Tensor and len({walk.shape(operand) for operand in operands}) == 1:
        walk.sums += dims if len(operands) == 2 else ()
    return dims


def _unknown(node: Node, walk: Walk) -> Results:
    return _opaque(node, walk, f"{node.target} has no axis rule")


def _opaque(node: Node, walk: Walk, reason: str) -> Results:
    """Nothing that ``node`` takes or gives may be cut."""
    for operand in node.all_input_nodes:
        walk.fix_all(walk.every(operand), reason)
    value = node.meta["val"]
    if is_size(node) or value is None:
        return ()
    if isinstance(value, Tensor):
        return tuple(walk.algebra.fixed_new(size, reason) for size in sizes_of(value))
    return [tuple(walk.algebra.fixed_new(size, reason) for size in sizes_of(item)) for item in value]


def _fits(found: Results, node: Node) -> bool:
    """Whether structures have the sizes of the node's values, as far as those are numbers."""
    value = node.meta["val"]
    if not isinstance(found, list):
        return not isinstance(value, Tensor) or _has_sizes(found, value)
    return len(found) == len(value) and all(
        _has_sizes(dims, item) for dims, item in zip(found, value, strict=True) if isinstance(item, Tensor)
    )


def _has_sizes(dims: Dims, value: Tensor) -> bool:
    sizes = sizes_of(value)
    pairs = [(structure.size, size) for structure, size in zip(dims, sizes, strict=False)]
    return len(dims) == len(sizes) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
