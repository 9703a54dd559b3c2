"""Values that cross a module's boundary: what other modules read of it, and what it reads of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable

from torch import Tensor
from torch.fx import Node

from optpass.ir.graph import PATH, Graph, operators


def module_paths(graph: Graph) -> set[str]:
    """The paths of all modules that nodes of ``graph`` came from, with those that these lie in."""
    found: set[str] = set()
    for path in {str(node.meta.get(PATH, "")) for node in graph.calls}:
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return found


def values_leaving(graph: Graph, module: str) -> list[Node]:
    """The tensors that nodes in ``module``, a path, compute and others read, in execution order."""
    inside = _membership(module)
    return [node for node in _tensors(graph) if inside(node) and not all(map(inside, node.users))]


def values_entering(graph: Graph, module: str) -> list[Node]:
    """The tensors that nodes outside of ``module``, a path, compute and nodes in it read, in execution order."""
    inside = _membership(module)
    return [node for node in _tensors(graph) if not inside(node) and any(map(inside, node.users))]


def depending_on(graph: Graph, inputs: Collection[str], stop: Collection[Node] = ()) -> set[Node]:
    """The nodes whose values depend on those of the graph's ``inputs``, given by name, these themselves among them.

    What they depend on through a node of ``stop`` does not count, and reading no more than a size is no dependence.
    """
    named = zip(graph.signature.inputs, graph.placeholders, strict=True)
    found = {node for name, node in named if name in inputs}
    for node in operators(graph):
        if node not in stop and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def ancestors(values: Iterable[Node], stop: Collection[Node] = ()) -> set[Node]:
    """The nodes that ``values`` are computed from, and they themselves; nothing behind a node of ``stop``."""
    found: set[Node] = set()
    waiting = list(values)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node not in stop:
            waiting += node.all_input_nodes
    return found


def _membership(module: str) -> Callable[[Node], bool]:
    """Whether a node came from ``module`` or one inside of it; a part of several results, from where these came."""

    def inside(node: Node) -> bool:
        while node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        path = str(node.meta.get(PATH, ""))
        return node.op == "call_function" and (path == module or path.startswith(f"{module}."))

    return inside


def _tensors(graph: Graph) -> list[Node]:
    return [node for node in graph.calls if isinstance(node.meta["val"], Tensor)]
