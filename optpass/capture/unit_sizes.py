"""An open dimension that may be 1: is the graph that was captured for more the graph for 1 as well?

Kernels ask whether a size is 1 to choose a memory layout, and torch.export keeps the answer as if a result depended
on it. Whether one does shows in an export at 1: the same operators on the same operands, or others.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_flatten

from optpass.capture.inputs import Example
from optpass.ir.dialect import IDENTITIES, is_assertion
from optpass.ir.sizes import is_size, sizes_of

SQUEEZES = (torch.ops.aten.squeeze.default, torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims)
SLICE = (None, 0, 0, sys.maxsize, 1)
"""What ``slice`` takes for operand, dimension, start, end and step when it is not told."""


def at_one(example: Example, name: str) -> Example:
    """``example`` with the dimension ``name`` fixed at 1."""

    def resized(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: resized(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(resized(item, f"{path}.{index}") for index, item in enumerate(value))
        axes = example.places.get(path, {})
        if not isinstance(value, Tensor) or name not in axes.values():
            return value
        shape = [1 if axes.get(axis) == name else size for axis, size in enumerate(value.shape)]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    places = {path: {axis: dim for axis, dim in axes.items() if dim != name} for path, axes in example.places.items()}
    others = tuple(item for item in example.dimensions if item.name != name)
    return replace(example, arguments=resized(dict(example.arguments), ""), dimensions=others, places=places)


def squeezed(exported: ExportedProgram, symbol: str) -> bool:
    """Whether a dimension is dropped where ``symbol`` is 1: a ``squeeze`` of it leaves no guard, and keeps it."""
    for node in exported.graph.nodes:
        if node.target not in SQUEEZES:
            continue
        source: Any = node.args[0]
        sizes = sizes_of(source.meta["val"])
        given = node.args[1] if len(node.args) > 1 else list(range(len(sizes)))
        for axis in given if isinstance(given, (list, tuple)) else [given]:
            names = {str(item): item for item in getattr(sizes[axis], "free_symbols", ())}
            if symbol in names and sizes[axis].subs(names[symbol], 1) == 1:
                return True
    return False


def same_operators(one: ExportedProgram, other: ExportedProgram) -> bool:
    """Whether two graphs apply the same operators to the same operands, sizes that either computes aside."""
    numbers: tuple[dict[fx.Node, int], dict[fx.Node, int]] = ({}, {})
    for left, right in zip_longest(_operators(one, numbers[0]), _operators(other, numbers[1])):
        if left is None or right is None or (left.target != right.target and left.op != "placeholder"):
            return False
        if not _same_operands(left, right, numbers) or _rank(left) != _rank(right):
            return False
    return True


def _operators(exported: ExportedProgram, numbers: dict[fx.Node, int]) -> Iterator[fx.Node]:
    """The nodes that compute tensors, each numbered before it is given; a mere copy has its operand's number."""
    for node in exported.graph.nodes:
        if is_assertion(node) or is_size(node):
            continue
        if node.target in IDENTITIES:
            numbers[node] = numbers[node.args[0]]
            continue
        numbers[node] = len(numbers)
        yield node


def _same_operands(left: fx.Node, right: fx.Node, numbers: tuple[dict[fx.Node, int], dict[fx.Node, int]]) -> bool:
    lefts, rights = _operands(left), _operands(right)
    return len(lefts) == len(rights) and all(
        _same(a, numbers[0], b, numbers[1]) for a, b in zip(lefts, rights, strict=True)
    )


def _operands(node: fx.Node) -> list[Any]:
    arguments = list(node.args)
    if node.target is torch.ops.aten.slice.Tensor:
        # Where one end is symbolic, the other is left out; else both are spelt.
        given = [*arguments, *[None] * (len(SLICE) - len(arguments))]
        arguments = [default if item is None else item for item, default in zip(given, SLICE, strict=True)]
    return tree_flatten((arguments, dict(node.kwargs)))[0]


def _same(left: Any, lefts: dict[fx.Node, int], right: Any, rights: dict[fx.Node, int]) -> bool:
    sizes = [isinstance(item, fx.Node) and is_size(item) for item in (left, right)]
    if any(sizes):
        return all(size or isinstance(item, int) for size, item in zip(sizes, (left, right), strict=True))
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        return lefts.get(left) == rights.get(right)
    return type(left) is type(right) and bool(left == right)


def _rank(node: fx.Node) -> list[int]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item.dim() for item in values if isinstance(item, Tensor)]
