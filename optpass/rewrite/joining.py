"""Several graphs → one that computes what all of them do, and equal things once."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph as FxGraph
from torch.fx import Node

from optpass.analysis.computations import Numbering
from optpass.ir.dimensions import Dimensions
from optpass.ir.graph import Graph
from optpass.ir.signature import Signature
from optpass.ir.weights import WeightStore


def joined(graphs: Sequence[Graph], weights: WeightStore) -> tuple[Graph, list[dict[Node, Node]]]:
    """One graph with the inputs of all ``graphs`` by name and the outputs of all, and where each one's nodes went.

    The graphs are of one capture, so that a symbol of open sizes means the same in all. Nodes keep their values and
    provenance. The result is called with flat tensors; its outputs are called by the number of their graph and
    their name. Linear in the nodes.
    """
    whole, numbering = FxGraph(), Numbering(weights)
    numbers = [numbering.of(graph) for graph in graphs]
    made: dict[int, Node] = {}
    inputs: dict[str, Node] = {}
    for graph, numbered in zip(graphs, numbers, strict=True):
        for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True):
            if name not in inputs:
                inputs[name] = made[numbered[node]] = whole.node_copy(node)
    places: list[dict[Node, Node]] = []
    outputs: dict[str, Node] = {}
    for index, (graph, numbered) in enumerate(zip(graphs, numbers, strict=True)):
        place: dict[Node, Node] = {}
        for node in graph.fx.nodes:
            if node.op == "output":
                continue
            number = numbered[node]
            if number not in made:
                made[number] = whole.node_copy(node, place.__getitem__)
            place[node] = made[number]
        results: tuple[Node, ...] = graph.output_node.args[0]  # type: ignore[assignment]
        outputs |= {f"{index}.{name}": place[n] for name, n in zip(graph.signature.outputs, results, strict=True)}
        places.append(place)
    output = whole.output(tuple(outputs.values()))
    output.meta = dict(graphs[0].output_node.meta)
    items = {item.name: item for graph in graphs for item in graph.dimensions}
    guards = dict.fromkeys(guard for graph in graphs for guard in graph.dimensions.guards)
    signature = Signature.flat(list(inputs), outputs)
    return Graph(whole, signature, Dimensions(tuple(items.values()), tuple(guards))), places
