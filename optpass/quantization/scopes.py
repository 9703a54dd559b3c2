"""Which operators a quantisation is about: by module path, and by what the graph says that they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from torch.fx import Node

from optpass.analysis.module_paths import matches
from optpass.analysis.operators import is_view
from optpass.ir.graph import Graph, path_of, shape_of
from optpass.quantization.bridges import bridges
from optpass.quantization.placement import PRODUCTS, SOFTMAX_PRODUCTS, weighted

Fact = Literal["first", "last", "embedding", "attention", "products", "bridge"]
"""``first``: reads an input of the model; ``last``: gives an output; ``embedding``: computed from inputs of at most one
dimension (timesteps, classes); ``attention``: projects to or from attention's products; ``products``: these themselves;
``bridge``: where a convolutional stage hands over to attention.
"""


def facts(graph: Graph) -> dict[Node, set[Fact]]:
    """What is true of each operator that could be quantised; one walk over the graph for each fact."""
    found: dict[Node, set[Fact]] = {node: set() for node in weighted(graph)}
    products = [node for node in graph.calls if node.target in PRODUCTS | SOFTMAX_PRODUCTS]
    found |= {node: {"products"} for node in products}
    for fact, nodes in (
        ("first", _beyond(graph.placeholders, down=True)),
        ("last", _beyond([graph.output_node], down=False)),
        ("embedding", _embedded(graph)),
        ("bridge", bridges(graph).operators),
        ("attention", [*_beyond(products, down=False), *_beyond(products, down=True)]),
    ):
        for node in nodes:
            if node in found and (fact != "attention" or "products" not in found[node]):
                found[node].add(fact)  # type: ignore[arg-type]
    return found


def left_alone(path: str, match: tuple[str, ...], keep: tuple[str, ...]) -> str:
    """Why what lies at ``path`` is left alone; empty when it is not."""
    if match and not matches(path, match):
        return "not in match"
    return "kept, as asked" if matches(path, keep) else ""


def unmatched(graphs: Iterable[Graph], patterns: Iterable[str]) -> dict[str, list[str]]:
    """The patterns that match no operator that could be quantised, each with the paths that there are."""
    paths = list(dict.fromkeys(path_of(node) for graph in graphs for node in facts(graph)))
    return {pattern: paths for pattern in patterns if not any(matches(path, (pattern,)) for path in paths)}


def _beyond(starts: Iterable[Node], *, down: bool) -> Iterator[Node]:
    """The operators next to ``starts`` in one direction, past those that only change the view."""
    seen: set[Node] = set()
    pending = [other for node in starts for other in (node.users if down else node.all_input_nodes)]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and is_view(node):
            pending += node.users if down else node.all_input_nodes
        else:
            yield node


def _embedded(graph: Graph) -> Iterator[Node]:
    """Operators that depend on inputs, and on none of more than one dimension."""
    wide = {node: len(shape_of(node)) > 1 for node in graph.placeholders}
    for node in graph.calls:
        known = [wide[operand] for operand in node.all_input_nodes if operand in wide]
        if known:
            wide[node] = any(known)
            if not wide[node]:
                yield node
