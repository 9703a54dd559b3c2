"""What may be cut: for every free atom, the slices of weights that go together; for every other one, why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch.fx import Node

from optpass.analysis.axes.rules import Role, Walk
from optpass.analysis.axes.structure import Atom, Structure, atoms

Kind = Literal["conv", "ffn", "heads", "head-dim", "stream", "other"]


@dataclass(frozen=True)
class Slice:
    """A dimension of a weight that an atom is a part of.

    ``role`` says whether a product gives it ("out") or sums over it ("in"), or a norm's scale has it;
    ``None`` of biases and tables.
    """

    weight: str
    dim: int
    role: Role | None = None


class Sliced:
    """What consists of slices of weights."""

    slices: tuple[Slice, ...]

    @property
    def paths(self) -> list[str]:
        """The modules whose weights give it; where none does, those whose weights have it."""
        giving = [item for item in self.slices if item.role == "out"] or self.slices
        return list(dict.fromkeys(item.weight.rpartition(".")[0] or item.weight for item in giving))

    @property
    def path(self) -> str:
        """The first of them, by which it is called."""
        return self.paths[0]


@dataclass(frozen=True, eq=False)
class Group(Sliced):
    """Slices that must be cut at the same indices of ``atom``.

    ``kind``: channels between convolutions, the width of a feed-forward, the number of heads of an attention, the
    width of each of its heads, a residual stream, which several layers write. ``norms`` are the nodes that compute
    statistics over it: without some of its elements they are others, so that removing an element is not the same as
    making it zero.
    """

    atom: Atom
    kind: Kind
    slices: tuple[Slice, ...]
    norms: tuple[Node, ...] = ()

    @property
    def size(self) -> int:
        return int(self.atom.size)

    @property
    def label(self) -> str:
        """How the group is called in tables and messages: ``mid_block.attentions.0.to_q [heads]``."""
        return f"{self.path} [{self.kind}]"


@dataclass(frozen=True, eq=False)
class Fixed(Sliced):
    """An atom of some weights that may not be cut, and the first reason that was found."""

    atom: Atom
    slices: tuple[Slice, ...]
    reason: str


@dataclass
class Census:
    """Every atom that some weight is made of, in the order in which the graphs read their weights."""

    slices: dict[Atom, list[Slice]] = field(default_factory=dict)
    reasons: dict[Atom, str] = field(default_factory=dict)

    @classmethod
    def of(cls, walk: Walk) -> Census:
        census = cls()
        for name, dims in walk.weights.items():
            for dim, structure in enumerate(dims):
                for atom in dict.fromkeys(atoms(structure)):
                    found = census.slices.setdefault(atom, [])
                    found.append(Slice(name, dim, walk.roles.get((name, dim))))
        for statement in walk.algebra.fixed:
            for atom in atoms(statement.structure):
                census.reasons.setdefault(atom, statement.reason)
        return census


def groups_of(walk: Walk, census: Census) -> Iterator[Group]:
    """The atoms that may be cut."""
    heads, head_dims = _atoms(walk.heads), _atoms(walk.head_dims)
    streams = _atoms(walk.sums)
    convolved = {name for name, dims in walk.weights.items() if len(dims) > 2}
    norms = _norms(walk)
    for atom, slices in census.slices.items():
        if atom in census.reasons or not isinstance(atom.size, int) or atom.size < 2:
            continue
        kind: Kind = "other"
        if atom in heads:
            kind = "heads"
        elif atom in head_dims:
            kind = "head-dim"
        elif atom in streams and sum(item.role == "out" for item in slices) > 1:
            kind = "stream"
        elif any(item.weight in convolved and item.role in ("out", "in") for item in slices):
            kind = "conv"
        elif any(item.role in ("out", "in") for item in slices):
            kind = "ffn"
        yield Group(atom, kind, tuple(slices), tuple(dict.fromkeys(norms.get(atom, ()))))


def fixed_of(census: Census) -> Iterator[Fixed]:
    """The atoms of weights that may not be cut."""
    for atom, slices in census.slices.items():
        if atom in census.reasons:
            yield Fixed(atom, tuple(slices), census.reasons[atom])


def _atoms(structures: Iterable[Structure]) -> set[Atom]:
    return {atom for structure in structures for atom in atoms(structure)}


def _norms(walk: Walk) -> Mapping[Atom, list[Node]]:
    found: dict[Atom, list[Node]] = {}
    for item in walk.normalised:
        for atom in atoms(item.structure):
            found.setdefault(atom, []).append(item.node)
    return found
