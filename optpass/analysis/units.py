"""What a model can do without: residual branches by module, each a unit that is removed or kept as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal

from torch.fx import Node

from optpass.analysis.blends import Blend, are_related, blend_of, scaled
from optpass.analysis.layouts import layouts
from optpass.analysis.mac_rules import macs_of
from optpass.analysis.mixing import Mixing, mixed_axes
from optpass.analysis.module_paths import matches
from optpass.analysis.operators import CONVOLUTIONS, argument, aten
from optpass.analysis.residuals import Kind, Residual, residuals
from optpass.ir.graph import Graph, example_shape, path_of
from optpass.ir.weights import Expression

UnitKind = Literal["temporal", "spatial", "attention"] | Kind
ATTENTION: tuple[Kind, ...] = ("self-attention", "temporal-attention", "cross-attention")
PROJECTIONS = (aten.linear.default, *CONVOLUTIONS)
ROOT = "(root)"


@dataclass(frozen=True)
class Branch:
    """A residual addition to be undone: the ``blend`` that it is, if it is one, what it ``mixes``, the units ``inner``.

    ``refusal`` says why it cannot be undone; empty where it can.
    """

    residual: Residual
    blend: Blend | None
    mixes: frozenset[Mixing]
    inner: tuple[Unit, ...]
    refusal: str

    @property
    def passed(self) -> Node:
        """The stream's value without the branch: x of x + f(x), and of a·x + (1 − a)·y (x, not a·x)."""
        return self.blend.stream if self.blend else self.residual.carrier

    @cached_property
    def path(self) -> str:
        """The innermost module that holds everything costly of the branch, what lies inside of it included.

        Where that is the root, the module of its last product: a root adds many branches, which are not one.
        """
        costly = [path_of(node).split(".") for node in self.residual.all_nodes if macs_of(node)]
        shared = [names[0] for names in zip(*costly, strict=False) if len(set(names)) == 1]
        own = [path_of(node) for node in self.residual.nodes if macs_of(node)]
        return ".".join(shared) or next(reversed(own), ROOT)

    def is_kind(self, kind: UnitKind) -> bool:
        """Whether the branch is of one of the kinds that residuals have, or any attention."""
        return self.residual.kind in ATTENTION if kind == "attention" else self.residual.kind == kind

    def is_named(self, patterns: Sequence[str]) -> bool:
        """Whether a pattern means the module of the branch, or that in which it is added."""
        return any(matches(path, patterns) for path in (self.path, self.residual.path))


@dataclass(frozen=True)
class Unit:
    """Branches that go together: one, or all that a module adds (a block's attention and its feed-forward)."""

    path: str
    branches: tuple[Branch, ...]

    @property
    def mixes(self) -> frozenset[Mixing]:
        """What all branches mix together."""
        return frozenset[Mixing]().union(*(branch.mixes for branch in self.branches))

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of its branches and of everything inside."""
        own = frozenset(branch.residual.kind for branch in self.branches)
        return own.union(*(unit.kinds for unit in self.inner))

    @property
    def inner(self) -> list[Unit]:
        """The units that lie within its branches."""
        return [unit for branch in self.branches for unit in branch.inner]

    @property
    def nodes(self) -> list[Node]:
        """What is computed from the stream on its branches."""
        return [node for branch in self.branches for node in branch.residual.all_nodes]

    @property
    def refusal(self) -> str:
        """Why it cannot be removed; empty where it can."""
        return next((branch.refusal for branch in self.branches if branch.refusal), "")

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates that go with it, at the captured sizes: of all that only it reads."""
        return sum(map(macs_of, dead_without(self)))

    @cached_property
    def positions(self) -> int:
        """Elements of the stream over its channels, at the captured sizes: batch · frames · height · width."""
        return max(_positions(branch.residual) for branch in self.branches)

    def is_kind(self, kind: UnitKind) -> bool:
        """``temporal``: frames are all that it mixes; ``spatial``: it mixes, and no frames; else a lone branch's."""
        if kind in ("temporal", "spatial"):
            return self.mixes == {kind}
        return len(self.branches) == 1 and self.branches[0].is_kind(kind)

    def is_named(self, patterns: Sequence[str], *, whole: bool = True) -> bool:
        """Whether patterns of module paths mean every branch, or with ``whole=False`` some branch."""
        named = [branch.is_named(patterns) for branch in self.branches]
        return all(named) if whole else any(named)

    def parts(self) -> Iterable[Unit]:
        """The next smaller units: each branch by itself, or what lies within the only one."""
        if len(self.branches) == 1:
            return self.inner
        return [Unit(branch.path, (branch,)) for branch in self.branches]


def units(graph: Graph, weights: Mapping[str, Expression]) -> tuple[Unit, ...]:
    """The outermost units of ``graph``, in its order; time linear in its nodes.

    Branches that are added in one module at the same depth are one unit, that of the root each its own.
    """
    found, places = residuals(graph).found, layouts(graph)
    branches: dict[Residual, Branch] = {}
    for residual in found:
        blend, inner = blend_of(residual, weights), _grouped(residual.inner, branches)
        refused = _refusal(residual, blend, weights)
        branches[residual] = Branch(residual, blend, mixed_axes(residual, places), inner, refused)
    within = {each for residual in found for each in residual.inner}
    return _grouped((residual for residual in found if residual not in within), branches)


def _grouped(found: Iterable[Residual], branches: Mapping[Residual, Branch]) -> tuple[Unit, ...]:
    groups: dict[object, list[Branch]] = {}
    for residual in found:
        groups.setdefault(residual if residual.path == ROOT else residual.path, []).append(branches[residual])
    return tuple(
        Unit(group[0].path if len(group) == 1 else group[0].residual.path, tuple(group)) for group in groups.values()
    )


def outermost(found: Iterable[Unit], wanted: Callable[[Unit], bool]) -> list[Unit]:
    """The largest units that are ``wanted``: of those that are not, the parts."""
    chosen: list[Unit] = []
    for unit in found:
        chosen += [unit] if wanted(unit) else outermost(unit.parts(), wanted)
    return chosen


def with_inner(found: Iterable[Unit]) -> list[Unit]:
    """``found``, each with what lies within behind it."""
    return [item for unit in found for item in (unit, *with_inner(unit.inner))]


def dead_without(unit: Unit) -> set[Node]:
    """The operators that nothing reads once the unit's additions are gone, these included; linear in their number."""
    gone = {branch.residual.add for branch in unit.branches}
    pending = [operand for node in gone for operand in node.all_input_nodes]
    # The stream goes on without the additions.
    passed = {branch.passed for branch in unit.branches} - gone
    while pending:
        node = pending.pop()
        if node in gone or node in passed or node.op != "call_function" or not gone.issuperset(node.users):
            continue
        gone.add(node)
        pending.extend(node.all_input_nodes)
    return gone


def _refusal(residual: Residual, blend: Blend | None, weights: Mapping[str, Expression]) -> str:
    if argument(residual.add, "alpha") != 1:
        return "the addition scales its second operand (alpha)"
    stream, branch = scaled(residual.carrier), scaled(residual.branch)
    if blend is None and stream and branch:
        computed = isinstance(stream[1], Node) and stream[1].op != "get_attr"
        if computed or are_related(stream[1], branch[1], weights):
            return "stream and branch are both scaled, and nothing tells that the factors sum to one"
    return ""


def _positions(residual: Residual) -> int:
    """The channels are those that the last product of the branch gives: no shape tells which axis they are."""
    elements, last = prod(example_shape(residual.add)), _last_projection(residual)
    if last is None:
        return elements
    weight: Any = argument(last, "weight")
    return elements // example_shape(weight)[0]


def _last_projection(residual: Residual) -> Node | None:
    for node in reversed(residual.nodes):
        if node.target in PROJECTIONS:
            return node
    found = map(_last_projection, reversed(residual.inner))
    return next((node for node in found if node is not None), None)
