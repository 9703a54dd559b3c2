"""Cutting axes: the chosen indices of free atoms stay, everything that they are a part of follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.fx import Node

from optpass.analysis.axes import Axes
from optpass.analysis.axes.structure import Atom, Kept, Structure, atoms, is_cut, kept_indices, kept_size
from optpass.analysis.operators import argument
from optpass.ir.graph import Graph, path_of
from optpass.ir.program import Program
from optpass.ir.weights import Expression, Select, Shape
from optpass.rewrite.baked_sizes import NewSizes, with_new_sizes


class CutError(ValueError):
    """A choice of indices that a graph cannot do without the others; the text says where and why."""


def cut(program: Program, found: Axes, kept: Kept, weights: Mapping[str, Expression] | None = None) -> Program:
    """``program`` with only ``kept`` of the atoms that are named; its graphs are edited.

    ``found`` is the analysis of ``program`` itself. Weights become selections of themselves, or the expressions in
    ``weights``, which have the new shapes. Sizes that stand in the graphs follow, and so do states of the loop.
    Attention keeps the scale that it had.

    Raises:
        CutError: an atom may not be cut or is of another analysis, nothing of one would be left, or a group norm's
            channels would not divide.
    """
    kept = {atom: tuple(indices) for atom, indices in kept.items()}
    _check(found, kept)
    kept = {atom: indices for atom, indices in kept.items() if len(indices) != atom.size}
    _write_scales(found, kept)
    given = weights or {}
    changes = {
        name: given.get(name, selected)
        for name, dims in found.walk.weights.items()
        if (selected := selection(program.weights[name], dims, kept)) is not program.weights[name]
    }
    program = program.with_weights({**given, **changes})
    sizes = NewSizes(found.walk, lambda structure: kept_size(structure, kept))
    for graph in program.entries.values():
        resize_nodes(graph, sizes, lambda structure: is_cut(structure, kept))
    return program.with_written_states()


def selection(expression: Expression, dims: Iterable[Structure], kept: Kept) -> Expression:
    """What stays of a weight whose dimensions are ``dims``; itself where that is everything."""
    for dim, structure in enumerate(dims):
        if is_cut(structure, kept):
            expression = Select(expression, dim, tuple(kept_indices(structure, kept)))
    return expression


def resize_nodes(graph: Graph, sizes: NewSizes, changes: Callable[[Structure], bool]) -> None:
    """Bring sizes and values of every node up to date of which, or of an operand of which, a dimension ``changes``."""
    touched: set[Node] = set()
    for node in list(graph.fx.nodes):
        if node.op == "output":
            continue
        if any(map(changes, sizes.walk.every(node))):
            touched.add(node)
        if node.op == "call_function" and (node in touched or not touched.isdisjoint(node.all_input_nodes)):
            node.meta["val"] = _updated(graph, node, sizes)
        elif node in touched:
            resize_value(graph, node, tuple(sizes.of(node)))


def resize_value(graph: Graph, node: Node, shape: Shape) -> None:
    """Give a weight or an input another shape."""
    before = node.meta["val"]
    with graph.mode:
        node.meta["val"] = torch.empty(shape, dtype=before.dtype)


def _updated(graph: Graph, node: Node, sizes: NewSizes) -> object:
    try:
        with_new_sizes(graph, node, sizes)
        return graph.infer(node)
    except (RuntimeError, ValueError) as error:
        raise CutError(f"%{node.name} ({path_of(node)}) refuses the new sizes: {error}") from error


def _check(found: Axes, kept: Kept) -> None:
    for atom, indices in kept.items():
        if reason := found.reason(atom):
            raise CutError(f"an axis of size {atom.size} cannot be cut: it {reason}")
        if atom not in found.census.slices:
            raise CutError(f"an axis of size {atom.size} is not one of this Program's weights")
        if not indices:
            raise CutError(f"nothing would be left of an axis of size {atom.size}")
        if list(indices) != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < atom.size:
            raise CutError(f"kept indices of an axis of size {atom.size} must ascend within it")
    for item in found.normalised:
        size = kept_size(item.structure, kept)
        if item.groups > 1 and isinstance(size, int) and size % item.groups:
            raise CutError(
                f"{size} channels do not divide into the {item.groups} groups of the norm at {path_of(item.node)}"
            )


def _write_scales(found: Axes, kept: Mapping[Atom, object]) -> None:
    for node, structure in found.walk.scales:
        if any(atom in kept for atom in atoms(structure)) and argument(node, "scale") is None:
            node.update_kwarg("scale", 1 / math.sqrt(structure.size))
