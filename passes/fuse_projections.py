"""The pass ``fuse-projections``."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch.fx import Node

from optpass.analysis.module_paths import matches
from optpass.analysis.operators import argument
from optpass.ir.algebra import Full
from optpass.ir.graph import PATH, Graph, shape_of, value_of
from optpass.ir.program import Program
from optpass.ir.weights import Concat, Expression, WeightStore
from optpass.pipeline.contract import exact
from optpass.pipeline.passes import Context, Pass
from optpass.rewrite.naming import WeightNames
from optpass.rewrite.rules import replace

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
SHOWN = 4
"""Names of fused projections that the name of the fused weight lists."""


class FuseProjections(Pass):
    """y₁ = W₁x, y₂ = W₂x … → [W₁; W₂; …]x, split: one product for query, key and value, for gate and up.

    Linears and 1×1 convolutions that read one value, lie in one module and agree in dtype and settings become one
    over concatenated weights (zeros where a sibling has no bias), and a split along the features gives each
    reader its part. Parameters and MACs stay; the input is read once and fewer, larger products are started.
    ``across: true`` also takes siblings of different modules: every cross-attention's key and value of one text,
    every modulation of one time embedding; what a step computes once for all blocks is then one product.

    Leaves alone, with the reason: siblings of another dtype, stride, padding or group count; weights that are
    read elsewhere too, which would be stored twice (of two siblings with one weight, one is a common
    subexpression: ``simplify``); weights that are computed in the graph; groups outside of ``min`` and ``max``.

    Source: common practice; Shoeybi et al., Megatron-LM, arXiv 1909.08053, section 3 (query, key and value as one).
    """

    match: tuple[str, ...] = Field(("*",), description="patterns of the modules whose projections are fused")
    min: int = Field(2, ge=2, description="siblings that a group has at least")
    max: int | None = Field(None, ge=2, description="siblings that a group has at most")
    across: bool = Field(False, description="whether siblings may lie in different modules")

    contract = exact(rtol=1e-5)

    def requires(self, program: Program) -> list[str]:
        owners = {p.owner for graph in program.entries.values() for p in _projections(graph)}
        return [
            f"match: {pattern!r} matches no module that has projections"
            for pattern in self.match
            if pattern != "*" and not any(matches(owner, (pattern,)) for owner in owners)
        ]

    def run(self, program: Program, context: Context) -> Program:
        groups = [
            group
            for entry, graph in program.entries.items()
            for group in self._groups(entry, graph, context)
            if not self._refused(group, context)
        ]
        names = WeightNames(program)
        made: dict[str, Expression] = {}
        fused: dict[tuple[str, ...], tuple[str, str | None]] = {}
        for group in _unshared(program, groups, context):
            if group.weights not in fused:
                fused[group.weights] = _fused_weights(group, program.weights, names, made)
            _rewrite(program.entries[group.entry], group, *fused[group.weights], made)
            context.rewrote(group.label, group.entry)
        return program.with_weights(made).pruned()

    def _groups(self, entry: str, graph: Graph, context: Context) -> Iterator[Group]:
        """Siblings by input and module; those that differ in what one product must share are told and left out."""
        families: dict[Any, list[Projection]] = defaultdict(list)
        for projection in _projections(graph):
            if matches(projection.owner, self.match):
                place = None if self.across else projection.parent
                families[projection.node.args[0], place].append(projection)
        for family in families.values():
            alike: dict[Any, list[Projection]] = defaultdict(list)
            for projection in family:
                alike[projection.settings].append(projection)
            for members in alike.values():
                if len(members) > 1:
                    yield Group(entry, tuple(members))
                elif len(family) > 1 and len(alike) > 1:
                    others = ", ".join(p.owner for p in family if p is not members[0])
                    context.decline(members[0].node, f"it differs in dtype or settings from {others}", entry)

    def _refused(self, group: Group, context: Context) -> bool:
        size, most = len(group.members), self.max
        if self.min <= size and (most is None or size <= most):
            return False
        bound = f"min: {self.min}" if size < self.min else f"max: {most}"
        context.decline(group.first, f"{size} siblings, and the option asks for {bound}", group.entry)
        return True


@dataclass(frozen=True)
class Projection:
    """A linear or 1×1 convolution whose weight, and bias if any, are read from the store.

    ``owner`` is the module that the weight belongs to, ``settings`` what siblings must agree in.
    """

    node: Node
    weight: str
    bias: str | None
    settings: tuple[Any, ...]

    @property
    def owner(self) -> str:
        return self.weight.rpartition(".")[0]

    @property
    def parent(self) -> str:
        return self.owner.rpartition(".")[0]

    @property
    def features(self) -> int:
        return int(value_of(self.node.args[1]).shape[0])  # type: ignore[arg-type]

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Group:
    """Siblings of one entry, in the graph's order."""

    entry: str
    members: tuple[Projection, ...]

    @property
    def first(self) -> Node:
        return self.members[0].node

    @property
    def weights(self) -> tuple[str, ...]:
        """What identifies the group in other entries."""
        return tuple(member.weight for member in self.members)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for member in self.members for name in member.reads)

    @property
    def path(self) -> str:
        """The innermost module that all siblings lie in."""
        owners = [member.owner.split(".") for member in self.members]
        common: list[str] = []
        for parts in zip(*owners, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)

    @property
    def leaves(self) -> list[str]:
        """The siblings' names below :attr:`path`."""
        inside = len(self.path) + 1 if self.path else 0
        return [member.owner[inside:] or member.weight.rpartition(".")[2] for member in self.members]

    @property
    def label(self) -> str:
        """The place in the report: ``blocks.0.attn.to_q+to_k+to_v``."""
        joined = "+".join(self.leaves)
        return f"{self.path}.{joined}" if self.path else joined


def _projections(graph: Graph) -> Iterator[Projection]:
    for node in graph.calls:
        if node.target is not aten.linear.default and not _is_pointwise(node):
            continue
        weight, bias = argument(node, "weight"), argument(node, "bias")
        if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            continue
        dtypes = {value_of(operand).dtype for operand in (weight, bias) if operand is not None}
        if len(dtypes) != 1 or value_of(weight).dim() < 2:
            continue
        settings = (node.target, *dtypes, *_settings(node))
        yield Projection(node, str(weight.target), None if bias is None else str(bias.target), settings)


def _is_pointwise(node: Node) -> bool:
    """Whether a convolution has a kernel of one element, no groups, and a batch in front of its channels."""
    if node.target not in CONVOLUTIONS:
        return False
    shape = shape_of(argument(node, "weight"))
    return argument(node, "groups") == 1 and all(size == 1 for size in shape[2:]) and len(shape_of(node)) == len(shape)


def _settings(node: Node) -> tuple[Any, ...]:
    """Stride, padding and dilation of a convolution, one number standing for all dimensions."""
    if node.target not in CONVOLUTIONS:
        return ()
    rank = len(shape_of(node)) - 2
    found = []
    for name in ("stride", "padding", "dilation"):
        given = list(argument(node, name))
        found.append(tuple(given * rank if len(given) == 1 else given))
    return tuple(found)


def _unshared(program: Program, groups: Sequence[Group], context: Context) -> Iterator[Group]:
    """The groups whose weights nothing reads but this group, in every entry that reads them."""
    reads = Counter(
        (str(node.target), entry)
        for entry, graph in program.entries.items()
        for weight in graph.fx.nodes
        if weight.op == "get_attr"
        for node in [weight] * len(weight.users)
    )
    readers: dict[str, set[str]] = defaultdict(set)
    for name, entry in reads:
        readers[name].add(entry)
    entries: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for group in groups:
        entries[group.weights].add(group.entry)
    for group in groups:
        shared = [
            name
            for name in dict.fromkeys(group.reads)
            if readers[name] != entries[group.weights] or any(reads[name, entry] > 1 for entry in readers[name])
        ]
        if not shared:
            yield group
            continue
        again = len(set(group.weights)) < len(group.weights)
        reason = (
            "two siblings have one weight (simplify merges them)" if again else f"{shared[0]} is read elsewhere too"
        )
        context.decline(group.first, f"{reason}; a fused copy would be stored beside it", group.entry)


def _fused_weights(
    group: Group, weights: WeightStore, names: WeightNames, made: dict[str, Expression]
) -> tuple[str, str | None]:
    """Add the concatenated weight, and bias where a sibling has one, to ``made``; their names."""
    leaves = [leaf.replace(".", "_") for leaf in group.leaves]
    more = f"_and_{len(leaves) - 1}_more"
    module = "_".join(leaves) if len(leaves) <= SHOWN else leaves[0] + more
    place = f"{group.path}.{module}" if group.path else module
    weight = names.fresh(place, "weight")
    made[weight] = Concat(tuple(weights[member.weight] for member in group.members), 0)
    if all(member.bias is None for member in group.members):
        return weight, None
    bias = names.fresh(place, "bias")
    dtype = made[weight].dtype
    zeros = (Full((member.features,), 0.0, dtype) for member in group.members)
    parts = [zero if m.bias is None else weights[m.bias] for m, zero in zip(group.members, zeros, strict=True)]
    made[bias] = Concat(tuple(parts), 0)
    return weight, bias


def _rewrite(graph: Graph, group: Group, weight: str, bias: str | None, made: dict[str, Expression]) -> None:
    """One product in front of the first sibling, and each sibling's part of it in its place."""
    first = group.first
    is_linear = first.target is aten.linear.default
    with graph.before(first):
        operands = [graph.weight(name, made[name], like=first) for name in (weight, bias) if name is not None]
        if is_linear:
            settings: tuple[Any, ...] = ()
        else:
            operands = operands if bias is not None else [*operands, None]  # type: ignore[list-item]
            settings = tuple(argument(first, name) for name in ("stride", "padding", "dilation"))
        product = graph.call(first.target, first.args[0], *operands, *settings, like=first)
        sizes = [member.features for member in group.members]
        split = graph.call(aten.split_with_sizes.default, product, sizes, -1 if is_linear else 1, like=first)
        parts = [graph.call(operator.getitem, split, index, like=first) for index in range(len(sizes))]
    for node in (product, split):
        node.meta[PATH] = group.path
    for member, part in zip(group.members, parts, strict=True):
        part.meta[PATH] = member.node.meta[PATH]
        replace(member.node, part)
