"""Multiply-accumulates of one node, from shapes alone: a table by operator that an author can extend.

Convention: one MAC for each product that a matrix product, a convolution or an attention sums up.
Biases, normalisations, activations and other elementwise work count nothing, and neither does
padding count less. FLOPs are 2·MAC. Open dimensions count at the sizes that they were captured with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Node

from optpass.analysis.operators import argument, aten
from optpass.ir.graph import example_shape as shape_of

Rule = Callable[[Node], int]
Function = TypeVar("Function", bound=Rule)
RULES: dict[Any, Rule] = {}
"""Operator → its rule; operators without one cost nothing."""


def mac_rule(*operators: Any) -> Callable[[Function], Function]:
    """Register a function ``node → MACs`` for ``operators``; the last one registered holds.

    A rule reads shapes from ``node.meta["val"]`` and its operands', never values.
    """

    def register(rule: Function) -> Function:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register


def macs_of(node: Node) -> int:
    """Multiply-accumulates of ``node``; 0 where no rule is registered."""
    rule = RULES.get(node.target)
    return rule(node) if rule else 0


def _operand_shape(node: Node, name: str) -> tuple[int, ...]:
    return shape_of(argument(node, name))


@mac_rule(aten.linear.default)
def linear(node: Node) -> int:
    """Results times input features."""
    return math.prod(shape_of(node)) * _operand_shape(node, "weight")[-1]


@mac_rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(node: Node) -> int:
    """Results times the contracted size, whatever is batched or broadcast."""
    left: Any = node.args[0]
    return math.prod(shape_of(node)) * shape_of(left)[-1]


@mac_rule(aten.addmm.default)
def addmm(node: Node) -> int:
    """As the matrix product inside it."""
    return math.prod(shape_of(node)) * _operand_shape(node, "mat1")[-1]


@mac_rule(aten.baddbmm.default)
def baddbmm(node: Node) -> int:
    """As the batched matrix product inside it."""
    return math.prod(shape_of(node)) * _operand_shape(node, "batch1")[-1]


@mac_rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def convolution(node: Node) -> int:
    """Results times (input channels of a group × kernel size): a weight is [out, in / groups, *kernel]."""
    return math.prod(shape_of(node)) * math.prod(_operand_shape(node, "weight")[1:])


@mac_rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def transposed_convolution(node: Node) -> int:
    """Inputs times (output channels of a group × kernel size): a weight is [in, out / groups, *kernel]."""
    return math.prod(_operand_shape(node, "input")) * math.prod(_operand_shape(node, "weight")[1:])


@mac_rule(aten.convolution.default)
def any_convolution(node: Node) -> int:
    """Either of the two above, by its ``transposed`` argument."""
    return transposed_convolution(node) if argument(node, "transposed") else convolution(node)


@mac_rule(aten.scaled_dot_product_attention.default)
def attention(node: Node) -> int:
    """QKᵀ and AV: batch × heads × queries × keys × (key features + value features). Masks save nothing."""
    *batch, queries, value_features = shape_of(node)
    keys, key_features = _operand_shape(node, "key")[-2:]
    return math.prod(batch) * queries * keys * (key_features + value_features)


@mac_rule(aten.einsum.default)
def einsum(node: Node) -> int:
    """Operands contracted from left to right, each product over the sizes of all its indices."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    terms, _, result = equation.partition("->")
    shapes = [shape_of(operand) for operand in operands]  # type: ignore[union-attr, arg-type]
    indices = [_indices(term, len(shape)) for term, shape in zip(terms.split(","), shapes, strict=True)]
    sizes: dict[str, int] = {}
    for names, shape in zip(indices, shapes, strict=True):
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    if "->" in equation:
        kept = set(_indices(result, len(shape_of(node))))
    else:
        flat = [name for names in indices for name in names]
        kept = {name for name in flat if flat.count(name) == 1 or name.startswith(".")}
    total, current = 0, set(indices[0])
    for position, names in enumerate(indices[1:], start=1):
        joined = current | set(names)
        total += math.prod(sizes[name] for name in joined)
        current = joined & (kept | {name for later in indices[position + 1 :] for name in later})
    return total


def _indices(term: str, rank: int) -> list[str]:
    """One name per dimension; those under ``...`` are numbered from the right: ``.2 .1``."""
    before, ellipsis, after = term.partition("...")
    hidden = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]
