"""Floating weights and compute in another dtype: half precision, mixed with what stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import PATH, Graph, value_of
from optpass.ir.program import Program
from optpass.ir.weights import Cast, Constant, WeightStore

aten = torch.ops.aten
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def convert(
    program: Program, dtype: torch.dtype, stays: Callable[[str], bool], *, boundary: bool = False
) -> tuple[Program, list[str]]:
    """``program``, whose graphs are edited, with weights and what depends on them in ``dtype``; the weights' names.

    Modules for whose path ``stays`` holds keep weights and compute. ``boundary``: inputs and outputs change too.
    """
    plan = _plan(program, dtype, stays)
    if not plan.weights:
        return program, []
    for graph in program.entries.values():
        _Conversion(graph, plan, boundary).run()
    changed = {name: Cast(old, dtype) for name, old in program.weights.items() if name in plan.weights}
    return program.with_weights(changed).with_written_states(), list(changed)


def _plan(program: Program, dtype: torch.dtype, stays: Callable[[str], bool]) -> Plan:
    used = program.used_weights()
    cold = _cold_constants(program.entries.values(), used)
    weights = {
        name
        for name, expression in used.items()
        if expression.dtype in FLOATS
        and expression.dtype != dtype
        and name not in cold
        and not stays(name.rpartition(".")[0])
    }
    return Plan(dtype, weights, frozenset(used[name].dtype for name in weights), cold, stays)


@dataclass(frozen=True)
class Plan:
    """What becomes ``dtype``: the ``weights``, and warm values that had one of the ``sources`` dtypes.

    Warm is what depends on a weight. ``cold`` weights are data of the code (tables, frequencies) that
    some cold operator reads.
    """

    dtype: torch.dtype
    weights: set[str]
    sources: frozenset[torch.dtype]
    cold: frozenset[str]
    stays: Callable[[str], bool]

    def converted(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if dtype in self.sources else dtype


def _cold_constants(graphs: Iterable[Graph], weights: WeightStore) -> frozenset[str]:
    """Floating constants of the model's code that some cold operator reads, in any entry."""
    constants = {
        name
        for name, expression in weights.items()
        if isinstance(expression, Constant) and expression.computed and expression.dtype in FLOATS
    }
    cold: set[str] = set()
    for graph in graphs:
        warm = _warm(graph, constants)
        cold |= {
            str(node.target)
            for node in graph.fx.nodes
            if node.op == "get_attr" and str(node.target) in constants and not all(user in warm for user in node.users)
        }
    return frozenset(cold)


def _warm(graph: Graph, cold: Iterable[str]) -> set[Node]:
    """Weights but the ``cold`` ones, and every node that depends on one of them."""
    cold, warm = set(cold), set[Node]()
    for node in graph.fx.nodes:
        is_weight = node.op == "get_attr" and str(node.target) not in cold
        if is_weight or any(operand in warm for operand in node.all_input_nodes):
            warm.add(node)
    return warm


@dataclass
class _Conversion:
    """One graph being converted, node by node in execution order."""

    graph: Graph
    plan: Plan
    cast_boundary: bool
    original: dict[Node, Any] = field(init=False)
    casts: dict[tuple[Node, torch.dtype], Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.original = {node: node.meta.get("val") for node in self.graph.fx.nodes}

    def run(self) -> None:
        warm = _warm(self.graph, self.plan.cold)
        for node in list(self.graph.fx.nodes):
            if node.op == "placeholder" and self.cast_boundary:
                self._retype(node, self.plan.converted(value_of(node).dtype))
            elif node.op == "get_attr" and str(node.target) in self.plan.weights:
                self._retype(node, self.plan.dtype)
            elif node.op == "call_function" and not self.plan.stays(str(node.meta[PATH])):
                self._convert(node, self.plan.converted if node in warm else _same)
            elif node.op == "call_function":
                self._operands(node, _same)
        output = self.graph.output_node
        self._operands(output, self.plan.converted if self.cast_boundary else _same)
        self._remove_idle_casts()

    def _retype(self, node: Node, dtype: torch.dtype) -> None:
        with self.graph.mode:
            node.meta["val"] = value_of(node).to(dtype)

    def _convert(self, node: Node, change: Change) -> None:
        arguments = _map_literals((node.args, node.kwargs), lambda value: _literal(value, change, self.plan.dtype))
        altered = arguments != (node.args, node.kwargs)
        node.args, node.kwargs = arguments
        self._operands(node, change, altered)

    def _operands(self, node: Node, change: Change, altered: bool = False) -> None:
        """Give ``node`` its operands in the dtypes that ``change`` makes of their original ones."""
        if node.target is not aten.to.dtype:
            for operand in node.all_input_nodes:
                found = self._as(operand, change, node)
                if found is not operand:
                    node.replace_input_with(operand, found)
        stale = altered or any(
            operand.meta.get("val") is not self.original.get(operand) for operand in node.all_input_nodes
        )
        if stale and node.op == "call_function":
            node.meta["val"] = self.graph.infer(node)

    def _as(self, operand: Node, change: Change, user: Node) -> Node:
        was, now = self.original.get(operand), operand.meta.get("val")
        if not isinstance(was, Tensor) or not isinstance(now, Tensor) or now.dtype not in FLOATS:
            return operand
        wanted = change(was.dtype)
        if now.dtype == wanted:
            return operand
        if (operand, wanted) not in self.casts:
            with self.graph.before(user):
                self.casts[operand, wanted] = self.graph.call(aten.to.dtype, operand, wanted, like=user)
        return self.casts[operand, wanted]

    def _remove_idle_casts(self) -> None:
        for node in self.graph.calls:
            source: Any = node.args[0] if node.args else None
            if node.target is aten.to.dtype and value_of(source).dtype == value_of(node).dtype:
                node.replace_all_uses_with(source)
        self.graph.remove_dead_code()


Change = Callable[[torch.dtype], torch.dtype]


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def _literal(value: Any, change: Change, narrow: torch.dtype) -> Any:
    """A dtype argument changed; a finite number that ``narrow`` cannot hold, as its largest one."""
    if isinstance(value, torch.dtype):
        return change(value)
    if isinstance(value, float) and math.isfinite(value):
        limit = torch.finfo(narrow).max
        return max(-limit, min(limit, value))
    return value


def _map_literals(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map_literals(item, function) for item in value)
    if isinstance(value, Mapping):
        return {key: _map_literals(item, function) for key, item in value.items()}
    return value if isinstance(value, Node) else function(value)
