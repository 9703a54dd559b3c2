"""Names of axes: batch, channels, frames, height, width, tokens. Inputs have them; they travel with what is unified.

Which dimension of an input holds channels is seen from the weights that sum over it; of the others the order says
which they are, as all of diffusers, transformers and timm have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.fx import Node

from optpass.analysis.axes.groups import Census
from optpass.analysis.axes.rules import Dims, Walk
from optpass.analysis.axes.structure import Atom, Structure, atoms
from optpass.ir.graph import value_of

Name = str
ORDERS: Mapping[int, tuple[Name, ...]] = {
    1: ("tokens",),
    2: ("height", "width"),
    3: ("frames", "height", "width"),
}
"""By how many dimensions an input has beside its batch and its channels."""


def names_of(walk: Walk, census: Census, inputs: Iterable[Node]) -> dict[Atom, frozenset[Name]]:
    """The names of every atom that has some."""
    found: dict[Atom, set[Name]] = {}
    for node in inputs:
        for structure, name in _named(walk.of(node), census, node):
            _add(found, structure, {name})
    for new, source in walk.derived:
        _add(found, new, {name for atom in atoms(source) for name in found.get(atom, ())})
    return {atom: frozenset(names) for atom, names in found.items()}


def _add(found: dict[Atom, set[Name]], structure: Structure, names: set[Name]) -> None:
    for atom in atoms(structure):
        found.setdefault(atom, set()).update(names)


def _named(dims: Dims, census: Census, node: Node) -> list[tuple[Structure, Name]]:
    if len(dims) < 3 or not value_of(node).is_floating_point():
        return []
    channels = [dim for dim in range(1, len(dims)) if _is_summed(dims[dim], census)]
    rest = [dim for dim in range(1, len(dims)) if dim not in channels]
    order = ORDERS.get(len(rest), ())
    pairs = [(0, "batch"), *((dim, "channels") for dim in channels), *zip(rest, order, strict=False)]
    return [(dims[dim], name) for dim, name in pairs]


def _is_summed(structure: Structure, census: Census) -> bool:
    parts = list(atoms(structure))
    return bool(parts) and all(any(s.role == "in" for s in census.slices.get(atom, ())) for atom in parts)
