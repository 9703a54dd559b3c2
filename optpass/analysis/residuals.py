"""Residual additions x + f(x), found from the graph alone: the stream, the branch, and what kind of branch it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor
from torch.fx import Node

from optpass.analysis.attention_products import attention_products
from optpass.analysis.carriers import carried_from, is_constant
from optpass.analysis.layouts import Layout, layouts, mixes_outer_axis
from optpass.analysis.mac_rules import macs_of
from optpass.analysis.operators import CONVOLUTIONS, FUSED_ATTENTION, MATMULS, aten
from optpass.ir.graph import Graph, path_of, shape_of

Kind = Literal["self-attention", "temporal-attention", "cross-attention", "feed-forward", "convolution", "other"]
LARGEST_BRANCH = 4096
"""Operators in a branch beyond which an addition is taken for none: what a search may cost at most."""
ATTEMPTS = 3
"""Earlier stream values that a branch may begin at: x + f(x) + g(x) is two additions, and g begins at x."""


@dataclass(frozen=True, eq=False)
class Residual:
    """The addition ``add`` = ``carrier`` + ``branch``.

    ``carrier`` is the operand by which the stream arrives, ``stream`` the value that it carries (the addition
    before, or where the stream begins), ``root`` the stream value that ``branch`` is computed from: ``stream``, or
    an earlier one where branches are parallel. ``branch`` is the other operand, after its gate. ``nodes`` are the
    operators between ``root`` and ``branch`` that depend on ``root``, in order, without those of the residuals
    ``inner`` that lie among them; ``entering`` are the other values that they read.
    """

    add: Node
    carrier: Node
    stream: Node
    root: Node
    branch: Node
    nodes: tuple[Node, ...]
    inner: tuple[Residual, ...]
    entering: tuple[Node, ...]
    kind: Kind

    @property
    def path(self) -> str:
        """The module that the addition stands in."""
        return path_of(self.add)

    @cached_property
    def branch_path(self) -> str:
        """The innermost module that holds everything costly of the branch."""
        paths = [path_of(node).split(".") for node in self.nodes if macs_of(node)] or [self.path.split(".")]
        shared = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
        return ".".join(shared) or "(root)"

    @property
    def all_nodes(self) -> list[Node]:
        """``nodes`` and those of everything ``inner``."""
        return [*self.nodes, *(node for residual in self.inner for node in (*residual.all_nodes, residual.add))]


@dataclass(frozen=True)
class Residuals:
    """The residual additions of a graph in its order, and the additions that look like one, with why they are none."""

    found: tuple[Residual, ...]
    refused: tuple[tuple[Node, str], ...]

    def of_kind(self, *kinds: Kind) -> list[Residual]:
        return [residual for residual in self.found if residual.kind in kinds]


def residuals(graph: Graph) -> Residuals:
    """The residual additions of ``graph``; time linear in its nodes.

    An addition of two values of one shape is residual if one operand carries a value (through views, scalings
    by broadcast factors as in α·x, casts) from which the other is computed, with a product of matrices, a
    convolution or an attention on the way. A branch that was found counts as one step for those around it.
    """
    finder = _Finder(graph)
    for node in graph.calls:
        if node.target is aten.add.Tensor:
            finder.visit(node)
    return Residuals(tuple(finder.found.values()), tuple(finder.refused))


def with_inner(found: Iterable[Residual]) -> list[Residual]:
    """``found``, each with those that lie in its branch behind it."""
    return [item for residual in found for item in (residual, *with_inner(residual.inner))]


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.fx.nodes)}
        self.products = attention_products(graph)
        self.layouts = layouts(graph)
        self.found: dict[Node, Residual] = {}
        self.refused: list[tuple[Node, str]] = []

    def visit(self, add: Node) -> None:
        operands = [operand for operand in add.args[:2] if isinstance(operand, Node) and _may_carry(operand, add)]
        if len(operands) != 2:
            return
        pairs = [(operands[0], operands[1]), (operands[1], operands[0])]
        for carrier, branch in sorted(pairs, key=lambda pair: self.order[self._stream(pair[0])]):
            if residual := self._residual(add, carrier, branch):
                self.found[add] = residual
                return
        if reason := self._reason(operands):
            self.refused.append((add, reason))

    def _stream(self, node: Node) -> Node:
        """The addition or the beginning of a stream that ``node`` carries on."""
        while node not in self.found and (before := carried_from(node)) is not None:
            node = before
        return node

    def _residual(self, add: Node, carrier: Node, branch: Node) -> Residual | None:
        stream = self._stream(carrier)
        for root in self._roots(carrier, stream):
            if between := self._between(root, branch):
                break
        else:
            return None
        stream = stream if stream in self.found else root
        nodes = tuple(node for node in between if node not in self.found)
        inner = tuple(self.found[node] for node in between if node in self.found)
        if not any(map(macs_of, nodes)) and not inner:
            return None
        inside = {root, *between}
        entering = dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in inside)
        kind = self._kind(nodes, inside, inner)
        return Residual(add, carrier, stream, root, branch, nodes, inner, tuple(entering), kind)

    def _roots(self, carrier: Node, stream: Node) -> list[Node]:
        """Where the branch may begin: earlier on the stream, and where it is the first, before rearrangements."""
        if stream in self.found:
            roots = [stream]
            while len(roots) < ATTEMPTS and roots[-1] in self.found:
                roots.append(self.found[roots[-1]].stream)
            return roots
        roots = [carrier]
        while roots[-1] is not stream and (before := carried_from(roots[-1])) is not None:
            roots.append(before)
        return roots

    def _between(self, root: Node, branch: Node) -> list[Node] | None:
        """What lies between ``root`` and ``branch`` and depends on ``root``, in order; ``None`` if nothing does."""
        bound, seen, pending = self.order[root], {branch}, [branch]
        while pending and len(seen) <= LARGEST_BRANCH:
            node = pending.pop()
            if node is root or self.order[node] < bound:
                continue
            for operand in self._steps_back(node):
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
        if root not in seen or pending or root is branch:
            return None
        depends = {root}
        for node in sorted((n for n in seen if self.order[n] > bound), key=self.order.__getitem__):
            if any(operand in depends for operand in self._steps_back(node)):
                depends.add(node)
        return sorted(depends - {root}, key=self.order.__getitem__) if branch in depends else None

    def _steps_back(self, node: Node) -> Iterable[Node]:
        residual = self.found.get(node)
        return node.all_input_nodes if residual is None else (residual.stream, residual.root, *residual.entering)

    def _kind(self, nodes: tuple[Node, ...], inside: set[Node], inner: tuple[Residual, ...]) -> Kind:
        mixing = [n for n in nodes if n in self.products or (n.target in MATMULS and not _reads_weight(n))]
        if mixing:
            if not any(_keys_depend(node, inside) for node in mixing):
                return "cross-attention"
            return "temporal-attention" if any(self._is_temporal(node) for node in mixing) else "self-attention"
        if inner:
            return "other"
        if any(node.target in CONVOLUTIONS for node in nodes):
            return "convolution"
        return (
            "feed-forward" if all(n.target in (aten.linear.default, *MATMULS) for n in nodes if macs_of(n)) else "other"
        )

    def _is_temporal(self, node: Node) -> bool:
        query = node.args[0]
        layout = self.layouts.get(query) if isinstance(query, Node) else None
        return isinstance(layout, Layout) and len(layout.axes) > 2 and mixes_outer_axis(layout, len(layout.axes) - 2)

    def _reason(self, operands: list[Node]) -> str:
        """Why an addition of two computed values is no residual one; empty where nobody would take it for one."""
        streams = [self._stream(operand) for operand in operands]
        projected = [node for node in streams if macs_of(node)]
        if len(projected) < 2 or not any(stream.target in CONVOLUTIONS for stream in streams):
            return ""
        return "both operands are projected: neither carries the stream itself"


def _may_carry(operand: Node, add: Node) -> bool:
    if is_constant(operand) or not isinstance(operand.meta["val"], Tensor):
        return False
    return shape_of(operand) == shape_of(add) and len(shape_of(add)) > 1


def _reads_weight(node: Node) -> bool:
    return any(is_constant(operand) for operand in node.all_input_nodes)


def _keys_depend(node: Node, inside: set[Node]) -> bool:
    """Whether what a product has on its right (keys, values) is computed from the stream."""
    operands = node.args[1:3] if node.target in FUSED_ATTENTION else node.args[-1:]
    return any(operand in inside for operand in operands if isinstance(operand, Node))
