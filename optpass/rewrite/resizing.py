"""Other sizes for axes that come from inputs: resolution, frames, tokens, batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.fx import Node

from optpass.analysis.axes import Atom, Axes, Concatenation, Structure
from optpass.analysis.axes.rules import Walk
from optpass.analysis.axes.structure import Size, atoms, factors, quotient, resolved, sized, terms
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.ir.program import Program
from optpass.ir.sizes import sizes_of
from optpass.rewrite.baked_sizes import NewSizes, with_new_sizes
from optpass.rewrite.cutting import resize_value


class ResizeError(ValueError):
    """A graph that does not work at the sizes that were asked for; the text says where and why."""


class Sizes:
    """The new sizes of atoms, learnt while a graph is walked. Those that a weight is made of keep theirs."""

    def __init__(self, found: Axes) -> None:
        self.walk: Walk = found.walk
        self._known: dict[Atom, Size] = {}
        self._tied = {atom: slices[0] for atom, slices in found.census.slices.items()}

    def of(self, structure: Structure) -> Size:
        """The new size, as far as it is known; the old one of what was not met yet."""
        return sized(structure, lambda atom: self._known.get(atom, atom.size))

    def assign(self, structure: Structure, size: Size, place: str) -> None:
        """``structure`` has ``size`` from now on.

        Of a product whose factors are not known the outermost takes the change: rows of patches, of windows.

        Raises:
            ResizeError: it has another size already, a weight has it, or no size of its parts comes to that.
        """
        structure = resolved(structure)
        if isinstance(structure, Atom):
            self._assign_atom(structure, size, place)
            return
        if self.of(structure) == size:
            for atom in atoms(structure):
                self._known.setdefault(atom, atom.size)
            return
        parts = terms(structure) if isinstance(structure, Concatenation) else factors(structure)
        open_parts = [part for part in parts if not self._is_known(part)]
        if not open_parts:
            raise ResizeError(f"{place}: {size} elements, where {structure!r} come to {self.of(structure)}")
        first = open_parts[0]
        for part in open_parts[1:]:
            self.assign(part, part.size, place)
        rest = self.of(structure), self.of(first)
        if isinstance(structure, Concatenation):
            self.assign(first, size - (rest[0] - rest[1]), place)
            return
        share = quotient(size, quotient(rest[0], rest[1]))
        if share is None:
            raise ResizeError(f"{place}: {size} does not divide by {quotient(*rest)}, as {structure!r} ask for")
        self.assign(first, share, place)

    def _assign_atom(self, atom: Atom, size: Size, place: str) -> None:
        known = self._known.get(atom)
        if atom in self._tied and size != atom.size:
            item = self._tied[atom]
            raise ResizeError(f"{place}: {size} elements, and the weight {item.weight} has {atom.size} along it")
        if known is not None and known != size:
            raise ResizeError(f"{place}: {size} elements, where the same axis has {known} elsewhere")
        self._known[atom] = size

    def _is_known(self, structure: Structure) -> bool:
        return all(atom in self._known or atom in self._tied for atom in atoms(structure))


def resized(program: Program, found: Axes, shapes: Mapping[str, tuple[int, ...]]) -> Program:
    """``program`` with inputs of other ``shapes`` (by name); inputs that share an axis follow. Its graphs are edited.

    ``found`` is the analysis of ``program`` itself. Sizes that stand in the graphs follow from the axes; literals
    that only its author could compute anew (padding to whole windows, tables for one resolution) do not.

    Raises:
        ResizeError: a weight, a literal or an operator does not go with the new sizes, or an input is unknown.
    """
    sizes = Sizes(found)
    for name, graph in program.entries.items():
        for spec, node in zip(graph.inputs, graph.placeholders, strict=True):
            if spec.name in shapes:
                _assign(sizes, node, shapes[spec.name], f"input {spec.name} of {name}")
    for graph in program.entries.values():
        for node in graph.placeholders:
            resize_value(graph, node, tuple(map(sizes.of, sizes.walk.of(node))))
        propagate(graph, graph.calls, sizes)
    return program.with_written_states()


def propagate(graph: Graph, nodes: Iterable[Node], sizes: Sizes) -> None:
    """Bring ``nodes``, in order, up to date with their operands: baked sizes, and the shapes that follow.

    Raises:
        ResizeError: an operator refuses its operands' sizes, or gives others than the axis has elsewhere.
    """
    new = NewSizes(sizes.walk, sizes.of)
    for node in nodes:
        place = f"%{node.name} ({path_of(node)})"
        try:
            with_new_sizes(graph, node, new)
            node.meta["val"] = value = graph.infer(node)
        except (RuntimeError, ValueError) as error:
            raise ResizeError(f"{place} refuses the new sizes: {error}") from error
        results = sizes.walk.values.get(node, ())
        pairs = [(results, value)] if isinstance(results, tuple) else zip(results, value, strict=True)
        for dims, item in pairs:
            if isinstance(item, Tensor):
                for structure, size in zip(dims, sizes_of(item), strict=False):
                    sizes.assign(structure, size, place)


def _assign(sizes: Sizes, node: Node, shape: tuple[int, ...], place: str) -> None:
    if len(shape) != len(shape_of(node)):
        raise ResizeError(f"{place} has {len(shape_of(node))} dimensions, and {len(shape)} sizes were given")
    for structure, old, size in zip(sizes.walk.of(node), shape_of(node), shape, strict=True):
        if not isinstance(old, int) and old != size:
            raise ResizeError(f"{place} is open along {old}: its size is given at each call")
        if old == 1 and size != 1:
            raise ResizeError(f"{place} has a dimension of size 1, which the graph broadcasts: capture it at {size}")
        sizes.assign(structure, size, place)
