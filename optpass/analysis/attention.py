"""Every attention of a Program as one record: operands, heads, projections, tokens, and the place in its stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor
from torch.fx import Node

from optpass.analysis.attention_cores import Core, Operand, attention_cores
from optpass.analysis.axes import Axes, axes_of
from optpass.analysis.axes.structure import factors
from optpass.analysis.blocks import Stack, stacks
from optpass.analysis.carriers import CATS
from optpass.analysis.operators import (
    CONVOLUTIONS,
    MASKING,
    POINTWISE_BINARY,
    POINTWISE_UNARY,
    aten,
    is_view,
)
from optpass.analysis.residuals import Residual, Residuals, residuals
from optpass.analysis.token_grids import Tokens, tokens_of
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.ir.program import Program

LAYERS = frozenset({aten.linear.default, *CONVOLUTIONS})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default, aten.group_norm.default})
JOINING = frozenset({*CATS, aten.stack.default, aten.slice_scatter.default})
POOLS = frozenset({aten.max_pool2d.default, aten.avg_pool2d.default})
CARRIERS = POINTWISE_UNARY | POINTWISE_BINARY | MASKING | NORMS | JOINING | POOLS
PASSED = POINTWISE_UNARY | NORMS | {*CATS, aten.mul.Tensor}
"""What may stand between a result and its projection."""
MOST_PROJECTIONS = 8
"""Layers behind one operand beyond which nobody calls them its projections."""


@dataclass(frozen=True)
class Projections:
    """The layers (``linear``, convolutions) nearest to the operands and to the result, in the graph's order.

    One layer stands three times where queries, keys and values are one projection; an operand has several where
    streams are joined (text and image), none where it is no projection of anything.
    """

    query: tuple[Node, ...]
    key: tuple[Node, ...]
    value: tuple[Node, ...]
    output: tuple[Node, ...]

    @property
    def is_fused(self) -> bool:
        """Whether queries, keys and values come from one layer."""
        return len(self.query) == 1 and self.query == self.key == self.value


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention of the graph ``entry``.

    ``kind`` is "self" where keys come from what queries come from. ``heads`` counts those of queries, ``key_heads``
    those of keys, fewer where heads share them. ``residuals`` are the additions by which its result enters the stream,
    one for each stream that it joins. ``layer`` is the number of its block in ``stack``, ``slot`` its number among the
    attentions of that block; ``None`` where it enters no stream.
    """

    entry: str
    core: Core
    kind: Literal["self", "cross"]
    heads: int
    key_heads: int
    projections: Projections
    residuals: tuple[Residual, ...]
    queries: Tokens
    keys: Tokens
    stack: Stack | None = None
    layer: int | None = None
    slot: int = 0

    @property
    def path(self) -> str:
        """The module that the attention stands in."""
        return path_of(self.core.result.node)

    @property
    def width(self) -> Any:
        """Channels of a head of queries and keys."""
        return shape_of(self.core.query.node)[self.core.query.channels]

    @property
    def residual(self) -> Residual | None:
        """The addition by which the result enters the stream, where there is one and no other."""
        return self.residuals[0] if len(self.residuals) == 1 else None

    @property
    def is_joint(self) -> bool:
        """Whether it is among the tokens of several streams, each with its own projections."""
        return self.kind == "self" and len(self.projections.query) > 1


@dataclass(frozen=True)
class Attentions:
    """The attentions of a Program, by entry and in the order of its graph.

    ``refused`` are softmaxes between two products that could not be read as attention, with the entry and the reason.
    """

    found: tuple[Attention, ...]
    refused: tuple[tuple[str, Node, str], ...]

    def of(self, entry: str) -> list[Attention]:
        return [each for each in self.found if each.entry == entry]

    @cached_property
    def rows(self) -> list[list[Attention]]:
        """Attentions that take one place in the blocks of a stack, in the order of the blocks."""
        rows: dict[Any, list[Attention]] = {}
        for each in self.found:
            if each.stack is not None:
                rows.setdefault((id(each.stack), each.slot), []).append(each)
        return list(rows.values())


def attentions(program: Program, axes: Axes | None = None) -> Attentions:
    """The attentions of ``program``, of which ``axes`` are the axes if they are known; time linear in its nodes."""
    axes = axes or axes_of(program)
    found: list[Attention] = []
    refused: list[tuple[str, Node, str]] = []
    for entry, graph in program.entries.items():
        cores = attention_cores(graph)
        found += _Describer(entry, graph, axes).describe(cores.found)
        refused += [(entry, node, reason) for node, reason in cores.refused]
    return Attentions(tuple(found), tuple(refused))


class _Describer:
    def __init__(self, entry: str, graph: Graph, axes: Axes) -> None:
        self.entry, self.axes = entry, axes
        additions = residuals(graph)
        self.layers = _layers_behind(graph, additions)
        self.residuals: dict[Node, list[Residual]] = {}
        for residual in additions.found:
            for node in residual.nodes:
                self.residuals.setdefault(node, []).append(residual)
        self.places = _places(stacks(graph, additions))

    def describe(self, cores: Sequence[Core]) -> Iterator[Attention]:
        slots: dict[tuple[int, int], int] = {}
        for core in cores:
            into = tuple(self.residuals.get(core.result.node, ()))
            place = next((self.places[residual] for residual in into if residual in self.places), None)
            slot = 0
            if place is not None:
                key = (id(place[0]), place[1])
                slot = slots[key] = slots.get(key, -1) + 1
            yield self._attention(core, into, place, slot)

    def _attention(
        self, core: Core, into: tuple[Residual, ...], place: tuple[Stack, int] | None, slot: int
    ) -> Attention:
        query, key, value = (self.layers.get(each.node, ()) for each in (core.query, core.key, core.value))
        projections = Projections(query, key, value, _layers_after(core.result.node))
        heads = self._heads(core)
        return Attention(
            entry=self.entry,
            core=core,
            kind="self" if self._is_self(core, projections, into) else "cross",
            heads=heads,
            key_heads=self._key_heads(core, heads),
            projections=projections,
            residuals=into,
            queries=self._tokens(core.query),
            keys=self._tokens(core.key),
            stack=place[0] if place else None,
            layer=place[1] if place else None,
            slot=slot,
        )

    def _tokens(self, operand: Operand) -> Tokens:
        dims = self.axes.of(operand.node)
        return tokens_of(self.axes, dims[operand.tokens], [dims[dim] for dim in operand.batch])

    def _is_self(self, core: Core, projections: Projections, into: Sequence[Residual]) -> bool:
        if core.key.node is core.query.node:
            return True
        if into:
            return any(core.key.node in residual.nodes or core.key.node is residual.root for residual in into)
        sources = [{layer.all_input_nodes[0] for layer in layers} for layers in (projections.query, projections.key)]
        return bool(sources[0]) and sources[0] == sources[1]

    def _heads(self, core: Core) -> int:
        """How often a head's channels stand in what the result is rearranged to."""
        channels = factors(self.axes.of(core.result.node)[core.result.channels])
        node, heads = core.result.node, None
        while (after := _only_view(node)) is not None:
            node = after
            for structure in self.axes.of(node):
                found = factors(structure)
                if len(found) > len(channels) and found[-len(channels) :] == channels:
                    heads = int(structure.size) // int(shape_of(core.result.node)[core.result.channels])
        return heads if heads is not None else _third_from_last(core.query)

    def _key_heads(self, core: Core, heads: int) -> int:
        shared = [int(shape_of(each.node)[-3]) for each in (core.query, core.key) if len(shape_of(each.node)) > 3]
        return heads * shared[1] // shared[0] if len(shared) == 2 and shared[0] else heads


def _third_from_last(query: Operand) -> int:
    shape = shape_of(query.node)
    return int(shape[-3]) if len(shape) > 3 and query.tokens == len(shape) - 2 else 1


def _only_view(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and is_view(users[0]) and isinstance(users[0].meta["val"], Tensor) else None


def _layers_behind(graph: Graph, additions: Residuals) -> Mapping[Node, tuple[Node, ...]]:
    """The layers that every value comes from without others between, past norms, pools, views and arithmetic.

    A residual stream comes from none. One walk over the nodes.
    """
    streams = {residual.add for residual in additions.found}
    found: dict[Node, tuple[Node, ...]] = {}
    for node in graph.calls:
        if node.target in LAYERS:
            found[node] = (node,)
        elif node not in streams and (node.target in CARRIERS or is_view(node)):
            layers = dict.fromkeys(layer for operand in node.all_input_nodes for layer in found.get(operand, ()))
            if 0 < len(layers) <= MOST_PROJECTIONS:
                found[node] = tuple(layers)
    return found


def _layers_after(result: Node) -> tuple[Node, ...]:
    """The layers that read ``result``, past views, casts, activations, gates and concatenations."""
    found: dict[Node, None] = {}
    pending, seen = [result], {result}
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in LAYERS:
                found[user] = None
            elif is_view(user) or user.target in PASSED:
                pending.append(user)
    return tuple(sorted(found))


def _places(found: Iterable[Stack]) -> dict[Residual, tuple[Stack, int]]:
    return {
        residual: (stack, number)
        for stack in found
        for number, block in enumerate(stack.blocks)
        for residual in block.residuals
    }
