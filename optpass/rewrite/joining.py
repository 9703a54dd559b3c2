"""Several graphs → one that computes what all of them do, and equal things once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Graph as FxGraph
from torch.fx import Node

from optpass.analysis.computations import Numbering
from optpass.ir.dimensions import Dimensions
from optpass.ir.graph import Graph
from optpass.ir.signature import Signature
from optpass.ir.weights import WeightStore
from optpass.rewrite.stepping import results

Output = tuple[int, str]
"""The number of a graph, and the name of one of its outputs."""


def joined(
    graphs: Sequence[Graph], weights: WeightStore, handed: Sequence[Mapping[str, Output]]
) -> tuple[Graph, list[dict[Node, Node]]]:
    """One graph with the inputs of all ``graphs`` by name and the outputs of all, and where each one's nodes went.

    ``handed`` says for each graph which of its inputs are outputs of earlier ones; an output that is only handed on
    is none of the whole. The graphs are of one capture, so that a symbol of open sizes means the same in all. Nodes
    keep their values and provenance. The result is called with flat tensors; its outputs are called by the number of
    their graph and their name. Linear in the nodes.
    """
    whole, numbering = FxGraph(), Numbering(weights)
    made: dict[int, Node] = {}
    numbers: list[dict[Node, int]] = []
    inputs: list[str] = []
    outputs: dict[str, Node] = {}
    for graph, given in zip(graphs, handed, strict=True):
        known = {name: numbers[index][results(graphs[index])[output]] for name, (index, output) in given.items()}
        numbers.append(numbering.of(graph, known))
        for name, node in zip(graph.signature.inputs, graph.placeholders, strict=True):
            if name not in given and name not in inputs:
                inputs.append(name)
                made[numbers[-1][node]] = whole.node_copy(node)
    inner = {output for given in handed for name, output in given.items() if name not in inputs}
    places: list[dict[Node, Node]] = []
    for index, (graph, numbered) in enumerate(zip(graphs, numbers, strict=True)):
        place: dict[Node, Node] = {}
        for node in graph.fx.nodes:
            if node.op != "output":
                if numbered[node] not in made:
                    made[numbered[node]] = whole.node_copy(node, place.__getitem__)
                place[node] = made[numbered[node]]
        outputs |= {f"{index}.{k}": place[node] for k, node in results(graph).items() if (index, k) not in inner}
        places.append(place)
    output = whole.output(tuple(outputs.values()))
    output.meta = dict(graphs[0].output_node.meta)
    dimensions = Dimensions.joined(graph.dimensions for graph in graphs)
    return Graph(whole, Signature.flat(inputs, outputs), dimensions), places
