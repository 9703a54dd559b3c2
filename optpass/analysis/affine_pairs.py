"""Two affine layers around an axis: what writes it, what reads it, and that a change of its basis may go into both.

The axis is a group of the axis analysis. Around the width of an attention's heads nothing stands between the layers
but views and the products with other operands' axes; between convolutions a norm and an activation may stand, whose
non-linearity the caller answers for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from optpass.analysis.axes import Atom, Axes, Group, Structure
from optpass.analysis.axes.structure import atoms, factors
from optpass.analysis.operators import (
    CONVOLUTIONS,
    FUSED_ATTENTION,
    MATMULS,
    POINTWISE_UNARY,
    argument,
    aten,
    is_view,
)
from optpass.analysis.readers import Readers, readers_of
from optpass.ir.graph import path_of
from optpass.ir.program import Program

Scope = Literal["attention-qk", "attention-vo", "conv"]
LAYERS = frozenset({aten.linear.default, *CONVOLUTIONS})
NORMS = frozenset({aten.group_norm.default, aten.layer_norm.default})
SCALINGS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})
RESAMPLING = ("pool", "upsample")


@dataclass(frozen=True, eq=False)
class Pair:
    """The layers around ``group``'s axis, which stands ``batches`` times in each of them (once for every head).

    ``writers`` and ``readers`` are names of weights, biases among the writers. Of ``attention-qk`` the readers write
    it too: the axis is summed over in their product. ``norms`` are the affine parameters of norms that stand between,
    ``multiple`` what their groups ask of the width, ``mixed`` the names of the axes that the two layers mix.
    """

    group: Group
    scope: Scope
    batches: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[str, ...]
    multiple: int
    mixed: frozenset[str]

    @property
    def path(self) -> str:
        return self.group.path

    @property
    def width(self) -> int:
        return self.group.size

    @property
    def is_temporal(self) -> bool:
        """Whether the layers mix frames, and nothing within a frame."""
        return "frames" in self.mixed and self.mixed.isdisjoint({"height", "width", "tokens"})


class UnpairedError(Exception):
    """Why the layers around a group are no pair."""


def scope_of(group: Group) -> Scope | None:
    """What a pair around ``group`` would be called; ``None`` where it is no axis between two such layers."""
    if group.kind == "conv":
        return "conv"
    if group.kind != "head-dim":
        return None
    return "attention-vo" if any(item.role == "in" for item in group.slices) else "attention-qk"


class Pairs:
    """Looks at the groups of ``found``, the axes of ``program``; linear in the nodes, once."""

    def __init__(self, program: Program, found: Axes) -> None:
        self.program, self.found = program, found

    def around(self, group: Group) -> Pair:
        """The pair around ``group``, for which :func:`scope_of` has a name.

        Raises:
            UnpairedError: the text says what stands in the way.
        """
        scope = scope_of(group)
        assert scope is not None
        nodes = self._carriers[group.atom]
        for node in nodes:
            self._check_between(node, group.atom, scope)
        batches = self._batches(group)
        writers, readers, norms = self._sorted(group, scope)
        products = [node for node in nodes if node.target in FUSED_ATTENTION | MATMULS]
        if scope == "attention-qk":
            writers, readers = self._sides(writers, products, group.atom)
        if not writers or not readers:
            raise UnpairedError("no layer " + ("writes" if not writers else "reads") + " it")
        if scope == "conv" and (len(self._convolutions(writers)) != 1 or len(self._convolutions(readers)) != 1):
            raise UnpairedError("more than one convolution writes or reads it")
        mixed = self._mixed(products, group.atom) if scope != "conv" else self._convolved(writers + readers)
        return Pair(group, scope, batches, writers, readers, norms, self._multiple(group), mixed)

    @cached_property
    def _carriers(self) -> Mapping[Atom, list[Node]]:
        """The nodes that compute something along each atom, in order."""
        found: dict[Atom, list[Node]] = defaultdict(list)
        for graph in self.program.entries.values():
            for node in graph.calls:
                own = {atom for value in (node, *node.all_input_nodes) for atom in self._atoms(value)}
                for atom in own:
                    found[atom].append(node)
        return found

    def _atoms(self, node: Node) -> set[Atom]:
        return {atom for structure in self.found.walk.every(node) for atom in atoms(structure)}

    @cached_property
    def _readings(self) -> Readers:
        return readers_of(self.program)

    def _batches(self, group: Group) -> int:
        """How often the axis stands in each layer, which is the same everywhere: once for every head."""
        outer: list[Structure] | None = None
        for item in group.slices:
            *before, last = factors(self.found.weight(item.weight)[item.dim])
            if last is not group.atom or group.atom in before:
                raise UnpairedError(f"{item.weight} has other rows beside its own")
            if any(not isinstance(part, Atom) for part in before) or (outer is not None and before != outer):
                raise UnpairedError(f"{item.weight} has other rows: of shared heads, or of several projections in one")
            outer = before
        return prod(int(part.size) for part in outer or ())

    def _sorted(self, group: Group, scope: Scope) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Writers with their biases, readers, and parameters of norms."""
        writers: list[str] = []
        readers: list[str] = []
        norms: list[str] = []
        for item in group.slices:
            places = {place for _, user in self._readings[item.weight] for place in _places(user, item.weight)}
            if len(places) == 1 and (item.role, item.dim, *places) in _WEIGHTS:
                (writers if item.role == "out" else readers).append(item.weight)
            elif places == {"bias"}:
                writers.append(item.weight)
            elif places <= {"norm"} and scope == "conv":
                norms.append(item.weight)
            else:
                raise UnpairedError(f"{item.weight} is read by something else than a layer")
        if set(writers) & set(readers):
            raise UnpairedError("one weight writes and reads it")
        return tuple(writers), tuple(readers), tuple(norms)

    def _check_between(self, node: Node, atom: Atom, scope: Scope) -> None:
        target: Any = node.target
        if target in LAYERS | FUSED_ATTENTION | MATMULS or is_view(node) or target is aten.to.dtype:
            return
        others = [operand for operand in node.all_input_nodes if atom not in self._atoms(operand)]
        scaled = target in SCALINGS and all(_is_scalar(operand) for operand in others) and len(others) < 2
        ignored = target in POINTWISE_UNARY | NORMS or any(name in str(target) for name in RESAMPLING)
        ignored = ignored or (target is aten.add.Tensor and not others)
        carried = sum(atom in self._atoms(operand) for operand in node.all_input_nodes)
        if (scaled and carried == 1) or (scope == "conv" and ignored):
            return
        raise UnpairedError(f"{target} stands between ({path_of(node)}: %{node.name})")

    def _sides(self, writers: Iterable[str], products: list[Node], atom: Atom) -> tuple[tuple[str, ...], ...]:
        """Whose product sums over the axis: the weights and biases behind one operand, and behind the other."""
        sides: tuple[set[str], set[str]] = (set(), set())
        for node in products:
            operands = node.args[:2] if node.target in FUSED_ATTENTION else node.args[-2:]
            for side, operand in zip(sides, operands, strict=True):
                side |= self._written_behind(operand, atom)
        if sides[0] & sides[1]:
            raise UnpairedError("query and key have one projection")
        # The key's side first: it is Wqᵀ·Wk that is decomposed.
        return tuple(tuple(name for name in writers if name in side) for side in reversed(sides))

    def _written_behind(self, operand: Any, atom: Atom) -> set[str]:
        names: set[str] = set()
        pending, seen = [operand], set()
        while pending:
            node = pending.pop()
            if node in seen or atom not in self._atoms(node):
                continue
            seen.add(node)
            if node.target in LAYERS:
                names |= {str(each.target) for each in node.all_input_nodes if each.op == "get_attr"}
            else:
                pending += node.all_input_nodes
        return names

    def _convolutions(self, weights: Iterable[str]) -> list[str]:
        return [name for name in weights if len(self.found.weight(name)) > 2]

    def _multiple(self, group: Group) -> int:
        found = [n.groups for n in self.found.normalised if group.atom in atoms(n.structure) and n.groups > 1]
        return lcm(*found) if found else 1

    def _mixed(self, products: list[Node], atom: Atom) -> frozenset[str]:
        """The names of the keys' axis: of the last operand's two dimensions the one that is not the heads' width."""
        names: frozenset[str] = frozenset()
        for node in products:
            operand: Any = node.args[2] if node.target in FUSED_ATTENTION else node.args[-1]
            tokens = [s for s in self.found.of(operand)[-2:] if atom not in atoms(s)]
            if node.target in FUSED_ATTENTION:
                tokens = [self.found.of(operand)[-2]]
            if any(s.size == 1 for s in tokens):
                raise UnpairedError("its attention has one key: single-token-attention takes it away")
            names = names.union(*map(self.found.names, tokens))
        return names

    def _convolved(self, weights: Iterable[str]) -> frozenset[str]:
        """The names of the axes that kernels extend over."""
        names: frozenset[str] = frozenset()
        for weight in self._convolutions(weights):
            for _, node in self._readings[weight]:
                kernel = [structure.size for structure in self.found.weight(weight)[2:]]
                spatial = self.found.of(argument(node, "input"))[-len(kernel) :]
                wide = [s for s, size in zip(spatial, kernel, strict=True) if size != 1]
                names = names.union(*map(self.found.names, wide))
        return names


_WEIGHTS = {("out", 0, "weight"), ("in", 1, "weight")}
"""Role, dimension and argument of the layers that are taken: no transposed convolution, no table."""


def _places(user: Node, weight: str) -> Iterator[str]:
    """What ``weight`` is to a node that reads it: the weight or the bias of a layer, a norm's parameter, or unknown."""
    for name in ("weight", "bias") if user.target in LAYERS | NORMS else ():
        value = argument(user, name)
        if isinstance(value, Node) and value.op == "get_attr" and value.target == weight:
            yield "norm" if user.target in NORMS else name
            return
    yield "unknown"


def _is_scalar(node: Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.numel() == 1
