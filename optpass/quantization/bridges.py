"""The bridge blocks of hybrid models: where a convolutional stage hands over to attention, by structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from optpass.analysis import operators
from optpass.ir.graph import Graph
from optpass.quantization.placement import LINEARS, PRODUCTS, SOFTMAX_PRODUCTS

CONVOLUTIONS = operators.CONVOLUTIONS | operators.TRANSPOSED_CONVOLUTIONS
ATTENTION = PRODUCTS | SOFTMAX_PRODUCTS
COMPUTING = CONVOLUTIONS | LINEARS | ATTENTION


@dataclass
class Bridges:
    """The ``operators`` of all bridge blocks, in order of execution, and what looks like one and is none."""

    operators: list[Node] = field(default_factory=list)
    declined: list[tuple[Node, str]] = field(default_factory=list)


def bridges(graph: Graph) -> Bridges:
    """The last convolution of each convolutional stage that attention reads, and what of attention reads it.

    Between computing operators (convolutions, linears, products of activations) lie norms, activations, views and
    sums. A value's source is the last computing operator that it is made from, broadcast operands aside. A bridge is a
    convolution whose own source is a convolution, and the linears whose source it is and from which attention's product
    is reached before any convolution, or the convolutions that make its operands themselves (q, k, v as 1×1
    convolutions).

    That is what the paper's list for MobileViT-S names by index ([17, 18, 36, 37, 67, 68]: `conv_1x1` and the first
    `qkv` of each block); of EfficientFormer-L1 it names the way into the last stage, which is no such place.

    Linear time: one walk down the graph, one up.

    Source: derived; Q-HyViT (arXiv 2303.12557), whose lists are written by hand for each model.
    """
    sources, heads, operands = _sources(graph), _leading(graph, LINEARS), _leading(graph, frozenset())
    found: dict[Node, None] = {}
    declined: dict[Node, str] = {}
    for node in graph.calls:
        leads = heads if node.target in LINEARS else operands if node.target in CONVOLUTIONS else ()
        convolution = sources.get(_input(node)) if node in leads else None
        if convolution is None or convolution.target not in CONVOLUTIONS:
            continue
        if why := _no_stage(convolution, sources):
            declined[convolution] = why
        else:
            found |= {convolution: None, node: None}
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    return Bridges(sorted(found, key=order.__getitem__), list(declined.items()))


def _no_stage(convolution: Node, sources: Mapping[Node, Node]) -> str:
    """Why ``convolution``, which attention reads, ends no convolutional stage; empty when it does."""
    before = sources.get(_input(convolution))
    if before is None:
        return "a patch embedding, with no convolution before it, is no bridge block"
    return "" if before.target in CONVOLUTIONS else "a convolution among tokens is no bridge block"


def _sources(graph: Graph) -> dict[Node, Node]:
    """Of each value that has one, its source; of several operands those of the result's shape tell it."""
    order: dict[Node, int] = {}
    sources: dict[Node, Node] = {}
    for index, node in enumerate(graph.calls):
        order[node] = index
        if node.target in COMPUTING:
            sources[node] = node
        elif made := [operand for operand in node.all_input_nodes if operand in sources]:
            # Embeddings and gates are broadcast along the stream that they join.
            whole = [operand for operand in made if _shape(operand) == _shape(node)]
            sources[node] = max((sources[operand] for operand in whole or made), key=order.__getitem__)
    return sources


def _shape(node: Node) -> object:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _leading(graph: Graph, through: frozenset[object]) -> set[Node]:
    """What attention's products are made from, with no computing operators between but those of ``through``."""
    found: set[Node] = set()
    for node in reversed(graph.calls):
        for user in node.users:
            passes = user.target not in COMPUTING or user.target in through
            if user.target in ATTENTION or (passes and user in found):
                found.add(node)
    return found


def _input(node: Node) -> Node:
    value = node.args[0]
    assert isinstance(value, Node)
    return value
