"""What a Program costs, from the graphs alone: no execution, no weight read, linear time.

Conventions, which differ between papers: MACs as in :mod:`optpass.analysis.mac_rules`; FLOPs are
2·MAC; the products inside attention are counted and also given apart, because some counters miss
them (DeepSpeed and torch's FlopCounterMode do not see every fused attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from optpass.analysis.attention_products import attention_products
from optpass.analysis.liveness import peak_activation_bytes
from optpass.analysis.mac_rules import attention_inside, is_counted, macs_of
from optpass.ir.graph import PATH, Graph, operators
from optpass.ir.loop import Cycle, Listed, Loop
from optpass.ir.program import Program
from optpass.ir.text import operator_name
from optpass.ir.weights import Constant, Expression, WeightStore

SHOWN = 5
STATISTICS = ("running_mean", "running_var")
"""Arguments of normalisations that hold statistics, which nobody counts as parameters."""


@dataclass(frozen=True)
class Totals:
    """``parameters`` in elements, ``macs`` with attention, ``macs_attention`` QKᵀ and AV alone."""

    parameters: int
    macs: int
    macs_attention: int
    weight_bytes: int
    peak_activation_bytes: int

    def flops(self, *, attention: bool = True) -> int:
        """2·MAC; ``attention=False`` leaves QKᵀ and AV out, as several published counts do."""
        return 2 * (self.macs if attention else self.macs - self.macs_attention)

    def as_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class NodeCost:
    """One operator node: its name, module path, ATen name and MACs, those of QKᵀ and AV also apart.

    ``counted`` is false where the MACs are 0 for want of a rule and not for want of products.
    """

    name: str
    path: str
    operator: str
    macs: int
    macs_attention: int
    counted: bool


@dataclass(frozen=True)
class EntryCost:
    """One graph: its totals, its nodes, and the elements of each parameter it reads."""

    totals: Totals
    nodes: tuple[NodeCost, ...]
    parameters: Mapping[str, int]

    def by_module(self, depth: int = 1) -> dict[str, dict[str, int]]:
        """``parameters``, ``macs`` and ``macs_attention`` by the first ``depth`` parts of the module path.

        Nodes and weights of the outermost module stand under ``(root)``.
        """
        rows: dict[str, dict[str, int]] = {}
        for node in self.nodes:
            row = rows.setdefault(_prefix(node.path, depth), {"parameters": 0, "macs": 0, "macs_attention": 0})
            row["macs"] += node.macs
            row["macs_attention"] += node.macs_attention
        for name, count in self.parameters.items():
            place = _prefix(name.rpartition(".")[0], depth)
            rows.setdefault(place, {"parameters": 0, "macs": 0, "macs_attention": 0})["parameters"] += count
        return rows

    def by_operator(self) -> dict[str, dict[str, int]]:
        """``count``, ``macs`` and ``macs_attention`` by ATen name, the most expensive first."""
        rows: dict[str, dict[str, int]] = {}
        for node in self.nodes:
            row = rows.setdefault(node.operator, {"count": 0, "macs": 0, "macs_attention": 0})
            row["count"] += 1
            row["macs"] += node.macs
            row["macs_attention"] += node.macs_attention
        return dict(sorted(rows.items(), key=lambda item: (-item[1]["macs"], -item[1]["count"], item[0])))

    def uncounted(self) -> dict[str, dict[str, Any]]:
        """Operators that may multiply and were counted as nothing: ``count`` and the first ``paths``, by ATen name."""
        rows: dict[str, dict[str, Any]] = {}
        for node in self.nodes:
            if node.counted:
                continue
            row = rows.setdefault(node.operator, {"count": 0, "paths": []})
            row["count"] += 1
            if len(row["paths"]) < SHOWN:
                row["paths"].append(node.path or "(root)")
        return rows


@dataclass(frozen=True)
class Cost:
    """Every entry, and the Program: shared weights once, the worst entry's peak.

    The Program's MACs are those of its entries together; of a loop, those of a call in the mean of a period, what
    runs once a generation or once a timestep left out (:mod:`optpass.analysis.generation` counts it).
    """

    entries: Mapping[str, EntryCost]
    totals: Totals

    def as_json(self) -> dict[str, Any]:
        """``{"entries": {name: {"totals": …, "uncounted": …}}, "totals": …}``."""
        entries = {
            name: {"totals": entry.totals.as_json(), "uncounted": entry.uncounted()}
            for name, entry in self.entries.items()
        }
        return {"entries": entries, "totals": self.totals.as_json()}


def measure(program: Program) -> Cost:
    """The cost of ``program``; works on a structure-only capture too.

    Parameters are the floating weights that a graph reads, each once, without normalisation
    statistics and without data that the model's code computes (position tables, literals).
    """
    entries = {name: _measure_entry(graph, program.weights) for name, graph in program.entries.items()}
    parameters = {name: count for entry in entries.values() for name, count in entry.parameters.items()}
    each = [entry.totals for entry in entries.values()]
    shares = call_shares(program.loop) if program.loop else dict.fromkeys(entries, Fraction(1))
    totals = Totals(
        parameters=sum(parameters.values()),
        macs=round(sum(share * entries[name].totals.macs for name, share in shares.items())),
        macs_attention=round(sum(share * entries[name].totals.macs_attention for name, share in shares.items())),
        weight_bytes=program.used_weights().nbytes,
        peak_activation_bytes=max((totals.peak_activation_bytes for totals in each), default=0),
    )
    return Cost(entries, totals)


def call_shares(loop: Loop) -> dict[str, Fraction]:
    """How often a call runs each entry in the mean of a period; where a policy decides, as if all were computed."""
    match loop.schedule:
        case Cycle(variants):
            weights = {name: Fraction(variants.count(name), len(variants)) for name in loop.variants}
        case Listed(computed, of):
            share = Fraction(len(computed), of)
            weights = {loop.reused: 1 - share, loop.computed: share}
        case _:
            weights = {loop.computed: Fraction(1)}
    found: dict[str, Fraction] = {}
    for variant, weight in weights.items():
        for entry in loop.variants[variant]:
            found[entry] = found.get(entry, Fraction(0)) + weight
    return found


def _measure_entry(graph: Graph, weights: WeightStore) -> EntryCost:
    products = attention_products(graph)
    nodes = tuple(_node(node, node in products) for node in operators(graph))
    read, parameters = graph.weight_names, parameters_of(graph, weights)
    totals = Totals(
        parameters=sum(parameters.values()),
        macs=sum(node.macs for node in nodes),
        macs_attention=sum(node.macs_attention for node in nodes),
        weight_bytes=sum(weights[name].nbytes for name in read),
        peak_activation_bytes=peak_activation_bytes(graph),
    )
    return EntryCost(totals, nodes, parameters)


def parameters_of(graph: Graph, weights: WeightStore) -> dict[str, int]:
    """The parameters that ``graph`` reads, each with its number of elements."""
    statistics = statistics_of(graph)
    names = [name for name in graph.weight_names if name not in statistics]
    return {name: weights[name].numel for name in names if _is_parameter(weights[name])}


def _node(node: Node, is_attention: bool) -> NodeCost:
    macs = macs_of(node)
    attention = macs if is_attention else attention_inside(node)
    return NodeCost(node.name, str(node.meta.get(PATH, "")), operator_name(node), macs, attention, is_counted(node))


def statistics_of(graph: Graph) -> set[str]:
    """The weights that are running statistics of a normalisation: nobody trains them."""
    found = set()
    for node in graph.calls:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.name in STATISTICS and isinstance(value, Node):
                found.add(str(value.target))
    return found


def _is_parameter(expression: Expression) -> bool:
    if not expression.dtype.is_floating_point:
        return False
    if isinstance(expression, Constant):
        return not expression.computed
    return not expression.operands() or any(map(_is_parameter, expression.operands()))


def _prefix(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth]) or "(root)"
