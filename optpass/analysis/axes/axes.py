"""The analysis of a whole Program: its entries share weights, and hand one another states."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch.fx import Node

from optpass.analysis.attention_products import attention_products
from optpass.analysis.axes import arrangements, creation, lookups, products, statistics, windows
from optpass.analysis.axes.groups import Census, Fixed, Group, fixed_of, groups_of
from optpass.analysis.axes.naming import names_of
from optpass.analysis.axes.rules import Dims, Normalised, Walk
from optpass.analysis.axes.structure import Atom, Structure, atoms
from optpass.analysis.operators import FUSED_ATTENTION
from optpass.collection import collection_paused
from optpass.ir.graph import Graph
from optpass.ir.loop import Loop, past, present
from optpass.ir.program import Program

RULE_FILES = (arrangements, creation, lookups, products, statistics, windows)
"""Imported so that their rules are registered."""


@dataclass(frozen=True)
class Axes:
    """What :func:`axes_of` found. Structures are those of nodes as they were; analyse again after a rewrite."""

    walk: Walk
    inputs: tuple[Node, ...] = ()
    census: Census = field(default_factory=Census)

    def of(self, node: Node) -> Dims:
        """The structure of each dimension of ``node``'s result, which is one tensor."""
        return self.walk.of(node)

    def weight(self, name: str) -> Dims:
        """The structure of each dimension of the weight ``name``."""
        return self.walk.weights[name]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """What may be cut, in the order in which the graphs read their weights."""
        return tuple(groups_of(self.walk, self.census))

    @cached_property
    def fixed(self) -> tuple[Fixed, ...]:
        """The other axes of weights, with the reason why they may not."""
        return tuple(fixed_of(self.census))

    @property
    def normalised(self) -> list[Normalised]:
        """Where statistics are computed, and over what."""
        return self.walk.normalised

    def reason(self, structure: Structure) -> str:
        """Why ``structure`` may not be cut; empty when it may."""
        return next((self.census.reasons[atom] for atom in atoms(structure) if atom in self.census.reasons), "")

    @cached_property
    def _names(self) -> dict[Atom, frozenset[str]]:
        return names_of(self.walk, self.census, self.inputs)

    def names(self, structure: Structure) -> frozenset[str]:
        """What ``structure`` is, as far as inputs say: "batch", "channels", "frames", "height", "width", "tokens"."""
        return frozenset(name for atom in atoms(structure) for name in self._names.get(atom, ()))


def axes_of(program: Program) -> Axes:
    """The axes of every entry of ``program``, which share weights and states; linear in the nodes."""
    walk = Walk()
    states: dict[str, Dims] = {}
    inputs: list[Node] = []
    with collection_paused():
        for graph in program.entries.values():
            inputs += _walk_entry(graph, walk, _ports(program.loop), states)
        return Axes(walk, tuple(inputs), Census.of(walk))


def _ports(loop: Loop | None) -> dict[str, str]:
    """The inputs and outputs that hand states from one call to another, with the state."""
    return {port(name): name for name in (loop.states if loop else ()) for port in (past, present)}


def _walk_entry(graph: Graph, walk: Walk, ports: dict[str, str], states: dict[str, Dims]) -> list[Node]:
    inputs = []
    for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True):
        dims = tuple(map(walk.new, walk.shape(node)))
        walk.values[node] = _state(walk, states, ports[name], dims) if name in ports else dims
        inputs.append(node)
        if name not in ports:
            _fix(walk, dims, f"is a dimension of the input {name}")
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            if name not in walk.weights:
                walk.weights[name] = tuple(map(walk.new, walk.shape(node)))
            walk.values[node] = walk.weights[name]
            walk.stored.add(node)
        elif node.op == "call_function":
            walk.visit(node)
    outputs: Any = graph.output_node.args[0]
    for name, node in zip(graph.signature.outputs, outputs, strict=True):
        if name in ports:
            _state(walk, states, ports[name], walk.of(node))
        else:
            _fix(walk, walk.of(node), f"is a dimension of the output {name}")
    _note_attention(graph, walk)
    return inputs


def _state(walk: Walk, states: dict[str, Dims], name: str, dims: Dims) -> Dims:
    states[name] = walk.unified(dims, states[name]) if name in states else dims
    return dims


def _fix(walk: Walk, dims: Dims, reason: str) -> None:
    walk.algebra.place = ""
    walk.fix_all(dims, reason)


def _note_attention(graph: Graph, walk: Walk) -> None:
    """Heads and their widths where an attention is written as two products and a softmax."""
    for node in attention_products(graph):
        if node.target in FUSED_ATTENTION:
            continue
        left, result = walk.of(node.args[-2]), walk.of(node)
        # Of scores the columns, of values the contracted dimension are keys, which softmax fixes.
        walk.head_dims += (*left[-1:], *result[-1:])
        walk.heads += result[-3:-2]
