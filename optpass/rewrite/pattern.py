"""Patterns: a Python function over ATen operators, matched against a graph from its last operator back.

    def pattern(x, scale):
        return aten.mul.Tensor(aten.softmax.int(x, -1), scale)

A parameter is a wildcard that binds whatever stands there: a value, a weight, a literal, a list. A
parameter used twice must bind the same thing twice. Literals must be equal; arguments left out mean
the operator's defaults, as they do in a graph. Matched operators may have other users: the dialect
is functional, so they stay alive for those.

torch.fx's tracer writes the pattern down. Its SubgraphMatcher is not used: it refuses two wildcards
that bind one value (q, k and v from one input) and patterns whose inner operators have other users.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from optpass.ir.graph import Graph


@dataclass(frozen=True)
class Match:
    """``root``: the node whose value is replaced; ``bindings``: what each parameter of the pattern stands for."""

    graph: Graph
    root: Node
    bindings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]


class Pattern:
    """A traced pattern function.

    Raises:
        TypeError: the function returns something else than the result of one operator.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.graph = fx.Graph()
        names = list(inspect.signature(function).parameters)
        tracer = fx.proxy.GraphAppendingTracer(self.graph)
        proxies = [fx.Proxy(self.graph.placeholder(name), tracer) for name in names]
        result = function(*proxies)
        if not isinstance(result, fx.Proxy) or result.node.op != "call_function":
            raise TypeError(f"pattern {getattr(function, '__qualname__', function)!r} must return an operator's result")
        self.root = result.node

    def match(self, graph: Graph, root: Node) -> Match | None:
        """The match that ends in ``root``, if there is one; linear in the pattern."""
        bound: dict[Node, Any] = {}
        if not _same_node(self.root, root, bound):
            return None
        bindings = {pattern.name: value for pattern, value in bound.items() if pattern.op == "placeholder"}
        return Match(graph, root, bindings)


def _same(pattern: Any, value: Any, bound: dict[Node, Any]) -> bool:
    if isinstance(pattern, Node):
        if pattern in bound:
            return _equal(bound[pattern], value)
        if pattern.op == "placeholder":
            bound[pattern] = value
            return True
        return isinstance(value, Node) and _same_node(pattern, value, bound)
    if isinstance(pattern, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(pattern) != len(value):
            return False
        return all(_same(p, v, bound) for p, v in zip(pattern, value, strict=True))
    return _equal(pattern, value)


def _same_node(pattern: Node, node: Node, bound: dict[Node, Any]) -> bool:
    if node.op != "call_function" or node.target != pattern.target:
        return False
    bound[pattern] = node
    pairs = zip(_arguments(pattern), _arguments(node), strict=True)
    return all(_same(expected, found, bound) for expected, found in pairs)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _arguments(node: Node) -> list[Any]:
    """All arguments in the schema's order, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [*node.args, *node.kwargs.values()]
    filled = []
    for index, item in enumerate(node.target._schema.arguments):
        if item.name in node.kwargs:
            filled.append(node.kwargs[item.name])
        elif index < len(node.args) and not item.kwarg_only:
            filled.append(node.args[index])
        else:
            filled.append(item.default_value)
    return filled
