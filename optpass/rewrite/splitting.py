"""One graph → a part of it, cut at values: how an entry becomes several that share weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.fx import Graph as FxGraph
from torch.fx import Node

from optpass.analysis.boundaries import ancestors
from optpass.ir.graph import PATH, Graph, shape_of
from optpass.ir.signature import Signature


def subgraph(
    graph: Graph, *, inputs: Mapping[str, Node], outputs: Mapping[str, Node], keep: Collection[str] = ()
) -> Graph:
    """The part of ``graph`` that computes ``outputs`` (node by port) from ``inputs`` and whatever else it needs.

    Each of the ``inputs`` (node by port) becomes a placeholder of that name, in the order given, and nothing that
    only it needed is left. Those of the graph's own inputs that are still read come first, under their names, with
    those in ``keep``, read or not (a call's input that nothing reads has to stay in some entry).
    Nodes keep their names, values and provenance, reads keep the names of their weights. The result is called
    with flat tensors (:meth:`Signature.flat`), and has the dimensions that its inputs' shapes speak of.

    Raises:
        ValueError: one of ``inputs`` has the name of one of the graph's own inputs that is still read.
    """
    cut = set(inputs.values())
    needed = ancestors(outputs.values(), stop=cut)
    own = [
        (name, node)
        for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True)
        if (node in needed or name in keep) and node not in cut
    ]
    if clash := {name for name, _ in own} & set(inputs):
        raise ValueError(f"cut values are called as inputs are: {', '.join(sorted(clash))}")
    copies: dict[Node, Node] = {}
    part = FxGraph()
    taken = {node.name for node in needed}
    for _, node in own:
        copies[node] = part.node_copy(node)
    for name, node in inputs.items():
        copies[node] = _placeholder(part, name, node, taken)
    for node in graph.fx.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    output = part.output(tuple(copies[node] for node in outputs.values()))
    output.meta = dict(graph.output_node.meta)
    signature = Signature.flat([*(name for name, _ in own), *inputs], outputs)
    symbols = {
        str(symbol)
        for node in part.nodes
        if node.op == "placeholder"
        for size in shape_of(node)
        for symbol in getattr(size, "free_symbols", ())
    }
    return Graph(part, signature, graph.dimensions.restricted(symbols))


def unread_inputs(graph: Graph) -> list[str]:
    """The inputs that nothing in ``graph`` reads."""
    pairs = zip(graph.signature.inputs, graph.placeholders, strict=True)
    return [name for name, node in pairs if not node.users]


def _placeholder(part: FxGraph, name: str, node: Node, taken: set[str]) -> Node:
    plain = "".join(letter if letter.isalnum() else "_" for letter in name)
    while plain in taken:
        plain += "_"
    taken.add(plain)
    made = part.placeholder(plain)
    made.meta = {"val": node.meta["val"], PATH: ""}
    return made
